"""Images with their labels and groups -> which are held out: mined and validated on, but never trained on."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

import numpy as np
import pyarrow as pa

from diffmine.randomness import generator


def held_out(labels: pa.ListArray, groups: Sequence[Hashable | None] | None, share: float, seed: int) -> np.ndarray:
    """Choose the images to hold out.

    Groups are held out whole, in an order drawn from `seed`, each if none of its labels loses more than `share` of its
    images (rounded), nor its last one. So every label is trained on, and one of few images may have none held out.

    Args:
        labels: list<string> [N], in the order of image ids.
        groups: [N]; images of equal values belong together; None, and a value of None or blank text, is an image of its
            own.

    Returns:
        bool [N].
    """
    of_image = labels.to_pylist()
    images: dict[tuple[bool, Hashable], list[int]] = defaultdict(list)
    for i, group in enumerate(groups if groups is not None else [None] * len(of_image)):
        alone = group is None or (isinstance(group, str) and not group.strip())  # a CSV has no null among its texts
        images[not alone, i if alone else group].append(i)
    totals = Counter(label for own in of_image for label in own)
    left = {label: min(int(share * total + 0.5), total - 1) for label, total in totals.items()}
    found, members = np.zeros(len(of_image), bool), list(images.values())
    for place in generator(seed, "held out").permutation(len(members)).tolist():
        lost = Counter(label for i in members[place] for label in of_image[i])
        if all(left[label] >= count for label, count in lost.items()):
            found[members[place]] = True
            for label, count in lost.items():
                left[label] -= count
    return found

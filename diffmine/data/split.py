"""Images with their labels and groups -> which are held out: mined and validated on, but never trained on."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diffmine.randomness import generator


def held_out(labels: pa.ListArray, groups: pa.ChunkedArray | None, share: float, seed: int) -> np.ndarray:
    """Choose the images to hold out.

    Groups are held out whole, in an order drawn from `seed`, each if none of its labels loses more than `share` of its
    images (rounded), nor its last one. So every label is trained on, and one of few images may have none held out.

    Args:
        labels: list<string> [N], in the order of image ids.
        groups: text or whole numbers [N]; images of equal values belong together; null or blank text is an image of its
            own.

    Returns:
        bool [N].
    """
    group = np.arange(len(labels)) if groups is None else group_numbers(groups)
    label = pc.list_flatten(labels).dictionary_encode().indices.to_numpy()
    totals = np.bincount(label)
    left = np.minimum((share * totals + 0.5).astype(int), totals - 1).tolist()
    pairs, lost = np.unique(group[pc.list_parent_indices(labels)] * len(left) + label, return_counts=True)
    firsts = np.searchsorted(pairs, np.arange(group.max(initial=-1) + 2) * len(left)).tolist()  # pair of each group
    found, own, counts = np.zeros(len(firsts) - 1, bool), (pairs % max(1, len(left))).tolist(), lost.tolist()
    for place in generator(seed, "held out").permutation(len(found)).tolist():
        each = range(firsts[place], firsts[place + 1])
        if all(left[own[i]] >= counts[i] for i in each):
            found[place] = True
            for i in each:
                left[own[i]] -= counts[i]
    return found[group]


def group_numbers(groups: pa.ChunkedArray) -> np.ndarray:
    """Values of a column [N], as for `held_out` -> the group of each image, int [N], numbered by their first images."""
    none = groups.is_null() if pa.types.is_integer(groups.type) else pc.equal(pc.utf8_trim_whitespace(groups), "")
    alone = np.asarray(pc.fill_null(none, True))  # a CSV has no null among its texts
    codes = groups.combine_chunks().dictionary_encode().indices.fill_null(0).to_numpy().astype(np.int64)
    _, first, group = np.unique(
        np.where(alone, -1 - np.arange(len(codes)), codes), return_index=True, return_inverse=True
    )
    return np.argsort(np.argsort(first))[group]

"""Samples that leave a model pass by pass -> groups of equal size, whatever the passes hold."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def groups(passes: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Tensors [any number, ...] -> their rows in the same order, `size` at a time: [size, ...].

    No more is kept than a group and a pass.
    """
    kept: list[Tensor] = []
    for rows in passes:
        kept.append(rows)
        if (there := sum(map(len, kept))) >= size:
            together = torch.cat(kept)
            whole = there // size * size
            yield from together[:whole].split(size)
            kept = [together[whole:].clone()]  # a view would keep it all

"""Scores so far -> which images are still in the race for a label's best patches (successive elimination).

All images of a label get a few draws; those whose best window can hardly enter the label's best patches leave; the
others get more draws, and so on. The draws of an image are those of all rounds it took part in.
"""

from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

_GROWTH = (1, 2, 3, 4)  # shares of the draws, round after round: many images get few


def rounds(draws: int) -> list[int]:
    """Draws of each round: even, at least 4, summing to `draws` (even); one round where there are too few."""
    total, found = sum(_GROWTH), []
    for share in _GROWTH[:-1]:
        found.append(max(4, 2 * round(draws * share / total / 2)))
    last = draws - sum(found)
    return [*found, last] if last >= 4 else [draws]


def pays(images: int, wanted: int) -> bool:
    """Whether anybody can leave: at least twice as many images as wanted patches stay."""
    return images > 2 * wanted


def survivors(
    best: NDArray[np.floating], stderr: NDArray[np.floating], wanted: int, confidence: float
) -> NDArray[np.bool_]:
    """Images [n] of one label that stay.

    An image leaves when its best window lies so far below the `wanted`-th best that their difference is not noise, at
    this one-sided confidence. The 2 `wanted` best stay whatever their scores: with fewer, their own noise would decide.

    Args:
        best: T of each image's best window.
        stderr: its standard error; few draws tell each badly, so their root mean square near the border counts.
        wanted: patches that are kept of the label.
    """
    keep = 2 * wanted
    if len(best) <= keep:
        return np.ones(len(best), dtype=bool)
    order = np.argsort(-best, kind="stable")
    border = best[order[wanted - 1]]
    near = order[wanted // 2 : keep]
    error = np.sqrt(2 * np.mean(np.square(stderr[near])))  # of a difference
    stay = best + NormalDist().inv_cdf(confidence) * error >= border
    stay[order[:keep]] = True
    return stay

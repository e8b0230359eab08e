"""Scores so far -> which images are still in the race for a label's best patches (successive elimination).

All images of a label get a few draws; those whose best window can hardly enter the label's best patches leave; the
others get more draws, and so on. The draws of an image are those of all rounds it took part in.
"""

from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

_GROWTH = (1, 2, 3, 4)  # shares of the draws, round after round: many images get few
_STAYING = (5, 4, 2)  # times the wanted patches: as many images stay after each round whatever their scores


def rounds(draws: int) -> list[int]:
    """Draws of each round: even, at least 4, summing to `draws` (even); one round where there are too few."""
    total, found = sum(_GROWTH), []
    for share in _GROWTH[:-1]:
        found.append(max(4, 2 * round(draws * share / total / 2)))
    last = draws - sum(found)
    return [*found, last] if last >= 4 else [draws]


def pays(images: int, wanted: int) -> bool:
    """Whether a race saves much: images leave after the first round already."""
    return images > _STAYING[0] * wanted


def survivors(
    best: NDArray[np.floating], stderr: NDArray[np.floating], wanted: int, confidence: float, rounds: int
) -> NDArray[np.bool_]:
    """Images [n] of one label that stay after so many rounds.

    An image leaves when its best window lies so far below the `wanted`-th best that the difference is not its noise,
    at this one-sided confidence. The border is itself the best of many noisy scores, and early ones rank badly: the
    best 5, 4 and 2 times `wanted` images stay after the first, second and third round whatever their scores.

    Args:
        best: T of each image's best window.
        stderr: its standard error, of that very window: the best windows are the noisiest. Few draws tell each badly,
            so their root mean square near the border counts.
        wanted: patches that are kept of the label.
    """
    keep = _STAYING[min(rounds, len(_STAYING)) - 1] * wanted
    if len(best) <= keep:
        return np.ones(len(best), dtype=bool)
    order = np.argsort(-best, kind="stable")
    border = best[order[wanted - 1]]
    error = np.sqrt(np.mean(np.square(stderr[order[wanted // 2 : 2 * wanted]])))
    stay = best + NormalDist().inv_cdf(confidence) * error >= border
    stay[order[:keep]] = True
    return stay

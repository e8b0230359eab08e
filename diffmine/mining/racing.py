"""Scores so far -> which images are still in the race for a label's best patches (successive elimination).

The strata of the draws are dealt out over the rounds. All images of a label are scored in the first round; those whose
best window can hardly enter the label's best patches leave, the others go on. Who stays to the end has had all draws:
its score is the one that it has without a race.
"""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

_DONE = (0.1, 0.2, 0.3, 0.4, 0.6, 1.0)  # share of the strata after each round
_STAYING = (7.5, 5.0, 3.5, 2.5, 2.0)  # times the wanted patches: as many images stay after each, whatever their scores
# Each round's strata lie apart, so that it speaks for all of t. The first comes from the lower third, where labels tell
# much and noise is small: of 4,000 toytown images, who is best was seen from it earlier than from the middle.
_FIRST, _STEP = 0.3, 0.381966  # of the strata; the golden section spreads evenly, however many there are


@dataclass(frozen=True)
class Round:
    """One round of a race."""

    strata: tuple[int, ...]
    staying: float  # times the wanted patches that stay after it, whatever their scores


def rounds(strata: int) -> list[Round]:
    """Rounds that have at least one stratum each, and all `strata` (at least 1) between them."""
    order = _order(strata)
    found, done = [], 0
    for share, staying in zip(_DONE, (*_STAYING, _STAYING[-1]), strict=True):
        end = round(share * strata)
        if end > done:
            found.append(Round(tuple(order[done:end]), staying))
            done = end
    return found


def _order(strata: int) -> list[int]:
    order: dict[int, None] = {}
    place = _FIRST
    while len(order) < strata:
        order[int(strata * place)] = None
        place = (place + _STEP) % 1
    return list(order)


def pays(images: int, wanted: int) -> bool:
    """Whether a race saves much: images leave after the first round already."""
    return images > _STAYING[0] * wanted


def survivors(
    best: NDArray[np.floating], stderr: NDArray[np.floating], wanted: int, confidence: float, staying: float
) -> NDArray[np.bool_]:
    """Images [n] of one label that stay after a round.

    An image leaves when its best window lies so far below the `wanted`-th best that the difference is not its noise,
    at this one-sided confidence. The border is itself the best of many noisy scores, and early ones rank badly: the
    best `staying` times `wanted` images stay whatever their scores.

    Args:
        best: T of each image's best window.
        stderr: its standard error, of that very window: the best windows are the noisiest. Few draws tell each badly,
            so their root mean square near the border counts.
        wanted: patches that are kept of the label.
    """
    keep = int(staying * wanted)
    if len(best) <= keep:
        return np.ones(len(best), dtype=bool)
    order = np.argsort(-best, kind="stable")
    border = best[order[wanted - 1]]
    error = np.sqrt(np.mean(np.square(stderr[order[wanted // 2 : 2 * wanted]])))
    stay = best + NormalDist().inv_cdf(confidence) * error >= border
    stay[order[:keep]] = True
    return stay

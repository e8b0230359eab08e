"""Typicality of a few images -> how far it spreads over the timesteps, and how many draws a wished error takes.

Where pairs spread by s_i within strata of share w_i, and are allocated by a_i, the variance of T is
(sum_i w_i a_i) (sum_i w_i s_i^2 / a_i) / pairs, which is least for a = s (Neyman 1934). A few images do not tell s well
or for all, so part of a is the same everywhere. What counts is the spread at each image's best window.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffmine.diffusion.draws import Draws
from diffmine.diffusion.typicality import Typicality

_EVEN = 0.25  # part of the allocation that is the same everywhere


@dataclass(frozen=True)
class Pilot:
    """What a few images tell about draws in mirrored pairs."""

    first: int  # timestep
    spread: list[float]  # by which pairs are allocated, at every timestep from `first` on
    best: float  # root mean square T of the images' best windows
    error: float  # standard error of their T from one pair, were pairs allocated by `spread`

    def draws_for(self, relative_error: float, most: int) -> int:
        """Draws whose standard error is `relative_error` of `best`: even, from 4 to `most`.

        Pairs of fewer than some 30 draws spread more than the pilot's, as their strata are wider: the error is larger.
        """
        pairs = (self.error / (relative_error * self.best)) ** 2 if self.best else math.inf
        return min(max(4, 2 * math.ceil(pairs)), most) if math.isfinite(pairs) else most


def pilot(groups: Sequence[tuple[Typicality, Tensor, Tensor]], draws: Draws, first: int, timesteps: int) -> Pilot:
    """Fold what `typicality` found, by stratum, with `antithetic` draws.

    Args:
        groups: for images of one shape each, their typicality and the window weights [h, h] and [w, w] it was given.
        draws: of any of the groups; t and strata are the same for all shapes.
        first, timesteps: the range of t is [first, first + timesteps).
    """
    best, variance = [torch.empty(0)], [torch.empty(len(draws.strata), 0)]
    for found, rows, columns in groups:
        assert found.window_variance is not None
        finite = found.failed_t < 0
        windows = (rows @ found.map[finite].double() @ columns.T).flatten(1)  # [P, h w]
        value, place = windows.max(dim=1)
        at_windows = found.window_variance[:, finite].flatten(2)  # [S, P, h w]
        best.append(value)
        variance.append(at_windows.gather(2, place.view(1, -1, 1).expand(len(at_windows), -1, 1))[..., 0])
    shares = np.array([s.share for s in draws.strata])
    if not sum(map(len, best)):
        return Pilot(first, [1.0] * timesteps, 0.0, 0.0)
    by_stratum = torch.cat(variance, dim=1).mean(dim=1).numpy()  # [S]
    spread = np.sqrt(np.convolve(np.pad(by_stratum, 1, mode="edge"), [0.25, 0.5, 0.25], mode="valid"))
    mean = (shares @ spread) or 1.0  # all alike where nothing spreads
    allocated = (1 - _EVEN) * spread + _EVEN * mean
    return Pilot(
        first, np.repeat(allocated, np.rint(shares * timesteps).astype(int)).tolist(),
        float(torch.cat(best).square().mean().sqrt()),
        float(np.sqrt((shares @ allocated) * (shares @ (spread**2 / allocated)))),
    )  # fmt: skip

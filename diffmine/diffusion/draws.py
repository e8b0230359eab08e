"""(seed, how many, range of t) -> draws (t, eps): where the expectation of typicality is evaluated.

    T = E_{t uniform, eps}[f(t, eps)]   is estimated by   sum over strata of  share * mean of f over the stratum's units

A stratum is a range of timesteps, its share the part of all timesteps it covers. A unit is one draw or a mirrored pair,
(t, eps) and (t', -eps) with t' as far from the stratum's end as t from its beginning (Haber, Math. Comp. 1967): what of
f is odd in eps or linear in t nearly cancels in its mean. Inside a stratum t is uniform and units are independent, so
every sampler is unbiased, whatever its strata, and the spread of the units gives the error.

| sampler     | strata                                             | unit |
|-------------|----------------------------------------------------|------|
| independent | one: the paper's draws                             | draw |
| stratified  | equally wide                                       | draw |
| antithetic  | equally wide                                       | pair |
| allocated   | narrow where f spreads, so that all weigh the same | pair |
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffmine.randomness import generator

Shape = tuple[int, int, int]  # C, h, w of a latent


@dataclass(frozen=True)
class Stratum:
    """A range of timesteps."""

    share: float  # of all timesteps; the shares sum to 1
    units: int  # independent evaluations in it


@dataclass(frozen=True)
class Draws:
    """N draws for latents of one shape, ordered by stratum, then by unit."""

    t: Tensor  # int64 [N]
    eps: Tensor  # float32 [N, C, h, w]
    strata: tuple[Stratum, ...]
    per_unit: int  # draws per unit
    share: float = 1.0  # of the timesteps that these are draws of

    def of(self, strata: Sequence[int]) -> "Draws":
        """The draws of some strata, in that order, as if there were no others."""
        ends = self.per_unit * np.cumsum([0, *(s.units for s in self.strata)])
        index = torch.cat([torch.arange(ends[s], ends[s + 1]) for s in strata])
        share = sum(self.strata[s].share for s in strata)
        kept = tuple(replace(self.strata[s], share=self.strata[s].share / share) for s in strata)
        return Draws(self.t[index], self.eps[index], kept, self.per_unit, share)

    def divided(self) -> "Draws":
        """The same draws in strata of two or three units: a larger stratum becomes several over its range of t."""
        cut = []
        for stratum in self.strata:
            pieces = stratum.units // 2
            for units in [stratum.units // pieces + (i < stratum.units % pieces) for i in range(pieces)]:
                cut.append(Stratum(stratum.share * units / stratum.units, units))
        return replace(self, strata=tuple(cut))


@dataclass(frozen=True)
class Timesteps:
    """The timesteps of [1000 t_min, 1000 t_max), and how far f spreads at each: the same everywhere unless piloted."""

    first: int
    spread: NDArray[np.float64]  # [number of timesteps], in any unit

    @staticmethod
    def between(t_min: float, t_max: float) -> "Timesteps":
        first = round(1000 * t_min)
        return Timesteps(first, np.ones(round(1000 * t_max) - first))


def independent(seed: int, n: int, timesteps: Timesteps, shape: Shape, bank: int = 0) -> Draws:
    """Uniform t, independent noise (Siglidis et al., ECCV 2024): n >= 2. More draws extend the bank."""
    return _draw(seed, bank, timesteps.first + np.array([0, len(timesteps.spread)]), [n], 1, shape)


def stratified(seed: int, n: int, timesteps: Timesteps, shape: Shape, bank: int = 0) -> Draws:
    """n >= 2 draws, two or three in each of equally wide strata."""
    flat = Timesteps(timesteps.first, np.ones_like(timesteps.spread))
    return _draw(seed, bank, *_strata(flat, n), 1, shape)


def antithetic(seed: int, n: int, timesteps: Timesteps, shape: Shape, bank: int = 0) -> Draws:
    """n >= 4, even: n / 2 mirrored pairs, two or three in each of equally wide strata."""
    flat = Timesteps(timesteps.first, np.ones_like(timesteps.spread))
    return _draw(seed, bank, *_strata(flat, n // 2), 2, shape)


def allocated(seed: int, n: int, timesteps: Timesteps, shape: Shape, bank: int = 0) -> Draws:
    """n >= 4, even: mirrored pairs in strata of equal share x spread (Neyman's allocation with equal numbers)."""
    return _draw(seed, bank, *_strata(timesteps, n // 2), 2, shape)


Sampler = Callable[[int, int, Timesteps, Shape, int], Draws]
SAMPLERS: dict[str, Sampler] = {
    "independent": independent,
    "stratified": stratified,
    "antithetic": antithetic,
    "allocated": allocated,
}


def _strata(timesteps: Timesteps, units: int) -> tuple[NDArray[np.int64], list[int]]:
    """Edges [S + 1] of strata that hold equal parts of the spread, and their units: two each, and what is left over."""
    count = len(timesteps.spread)
    strata = min(max(1, units // 2), count)
    mass = np.concatenate([[0.0], np.cumsum(timesteps.spread)])
    edges = np.interp(np.arange(strata + 1) / strata * mass[-1], mass, np.arange(count + 1)).round().astype(np.int64)
    for i in range(1, strata):  # at least one timestep each
        edges[i] = min(max(edges[i], edges[i - 1] + 1), count - (strata - i))
    numbers = [units // strata] * strata
    for i in range(units % strata):  # what is left over goes to strata spread over the range
        numbers[(2 * i + 1) * strata // (2 * (units % strata))] += 1
    return timesteps.first + edges, numbers


def _draw(seed: int, bank: int, edges: NDArray[np.int64], numbers: list[int], per_unit: int, shape: Shape) -> Draws:
    """Unit i depends on (seed, bank, i) and its stratum only."""
    t: list[int] = []
    eps, unit = [], 0
    for low, high, number in zip(edges[:-1], edges[1:], numbers, strict=True):
        for _ in range(number):
            stream = generator(seed, "draw", bank, unit)
            one = int(stream.integers(low, high))
            t += [one, int(low + high) - 1 - one][:per_unit]
            eps.append(stream.standard_normal(shape, dtype=np.float32))
            unit += 1
    shares = np.diff(edges) / (edges[-1] - edges[0])
    signs = torch.tensor([1.0, -1.0][:per_unit]).view(1, per_unit, 1, 1, 1)
    noise = torch.from_numpy(np.stack(eps))[:, None] * signs  # [units, per_unit, C, h, w]
    return Draws(
        torch.tensor(t), noise.flatten(0, 1),
        tuple(Stratum(float(share), number) for share, number in zip(shares, numbers, strict=True)), per_unit,
    )  # fmt: skip

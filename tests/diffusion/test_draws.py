"""Draws: where they lie, what they weigh, what they depend on."""

import numpy as np
import pytest
import torch

from diffmine.diffusion.draws import SAMPLERS, Draws, Timesteps, allocated, antithetic, independent, stratified

SHAPE = (2, 3, 3)
RANGE = Timesteps.between(0.1, 0.7)


def edges(draws: Draws, timesteps: Timesteps) -> list[int]:
    widths = np.cumsum([0.0, *(s.share for s in draws.strata)]) * len(timesteps.spread)
    assert np.allclose(widths, widths.round())
    return [timesteps.first + round(w) for w in widths]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("n", "steepness"), [(4, 2), (6, 2), (30, 2), (40, 2), (400, 2), (400, 40), (400, -40)])
def test_strata_tile_the_range_and_hold_their_draws(sampler: str, n: int, steepness: float) -> None:
    """With t uniform inside strata that tile the range and weigh as much as they cover, the estimate is unbiased.

    The steepest spreads want more strata at an end of the range than there are timesteps.
    """
    uneven = Timesteps(100, np.linspace(1, 9, 600) ** steepness)
    draws = SAMPLERS[sampler](3, n, uneven, SHAPE, 0)
    bounds = edges(draws, uneven)
    assert (bounds[0], bounds[-1]) == (100, 700)
    assert draws.t.shape == (n,)
    assert (draws.eps.shape, draws.eps.dtype) == ((n, *SHAPE), torch.float32)
    assert sum(s.units for s in draws.strata) * draws.per_unit == n
    assert all(s.units >= 2 for s in draws.strata), "one unit has no spread"
    first = 0
    for low, high, stratum in zip(bounds[:-1], bounds[1:], draws.strata, strict=True):
        t = draws.t[first : first + stratum.units * draws.per_unit]
        assert low < high
        assert ((t >= low) & (t < high)).all()
        first += len(t)


def test_timesteps_are_uniform_inside_a_stratum() -> None:
    t = torch.cat([stratified(seed, 4, Timesteps.between(0.1, 0.104), (1, 1, 1)).t for seed in range(2000)])
    assert np.allclose(np.bincount(t.numpy() - 100) / len(t), 0.25, atol=0.02)


def test_timesteps_fill_the_half_open_range() -> None:
    t = independent(0, 3000, Timesteps.between(0.1, 0.2), (1, 1, 1)).t
    assert (int(t.min()), int(t.max())) == (100, 199)


@pytest.mark.parametrize("sampler", [antithetic, allocated])
def test_pairs_are_mirrored_in_noise_and_in_their_stratum(sampler: object) -> None:
    draws = sampler(0, 20, Timesteps(100, np.linspace(1, 3, 600)), SHAPE)  # type: ignore[operator]
    assert torch.equal(draws.eps[::2], -draws.eps[1::2])
    bounds = edges(draws, RANGE)
    ends = [
        low + high - 1
        for low, high, s in zip(bounds[:-1], bounds[1:], draws.strata, strict=True)
        for _ in range(s.units)
    ]
    assert (draws.t[::2] + draws.t[1::2]).tolist() == ends
    assert not torch.equal(draws.t[::2], draws.t[1::2])


def test_strata_are_narrow_where_the_spread_is_large() -> None:
    spread = np.where(np.arange(600) < 100, 5.0, 1.0)  # half of the mass in the first sixth
    draws = allocated(0, 80, Timesteps(100, spread), SHAPE)
    assert int((draws.t < 200).sum()) == 40
    equal = antithetic(0, 80, Timesteps(100, spread), SHAPE)
    assert len({s.share for s in equal.strata}) <= 2


def test_more_timesteps_are_not_needed_than_there_are() -> None:
    """What does not go into ten strata evenly goes to some that are spread over them."""
    for n, more in ((100, []), (103, [1, 5, 8])):
        units = np.array([s.units for s in stratified(0, n, Timesteps.between(0.1, 0.11), SHAPE).strata])
        assert (units - 10).tolist() == [int(i in more) for i in range(10)]


def test_banks_and_seeds_have_nothing_in_common() -> None:
    noises = [independent(seed, 4, RANGE, SHAPE, bank).eps for seed, bank in ((0, 0), (0, 1), (1, 0))]
    assert len({float(n.sum()) for n in noises}) == 3
    few, many = independent(5, 4, RANGE, SHAPE), independent(5, 9, RANGE, SHAPE)
    assert torch.equal(few.t, many.t[:4])
    assert torch.equal(few.eps, many.eps[:4])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_draws_in_small_strata_are_the_same_and_can_be_taken_apart(sampler: str) -> None:
    whole = SAMPLERS[sampler](3, 42, Timesteps(100, np.linspace(1, 9, 600) ** 2), SHAPE, 0)
    divided = whole.divided()
    assert torch.equal(divided.eps, whole.eps)
    assert {s.units for s in divided.strata} <= {2, 3}
    assert sum(s.share for s in divided.strata) == pytest.approx(1)
    order = np.random.default_rng(0).permutation(len(divided.strata)).tolist()
    parts = [divided.of(order[:3]), divided.of(order[3:])]
    assert sum(part.share for part in parts) == pytest.approx(1)
    assert all(sum(s.share for s in part.strata) == pytest.approx(1) for part in parts)
    f = whole.eps.sum(dim=(1, 2, 3)) + whole.t  # of each draw

    def estimate(draws: Draws, f: torch.Tensor) -> float:
        each = f.split([draws.per_unit * s.units for s in draws.strata])
        return sum(s.share * float(values.mean()) for s, values in zip(draws.strata, each, strict=True))

    assert estimate(divided, f) == pytest.approx(estimate(whole, f), rel=1e-6)
    of_parts = [estimate(part, part.eps.sum(dim=(1, 2, 3)) + part.t) for part in parts]
    assert sum(p.share * e for p, e in zip(parts, of_parts, strict=True)) == pytest.approx(estimate(whole, f), rel=1e-6)

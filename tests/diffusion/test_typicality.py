"""T against closed forms (Gaussian data, whose optimal denoiser is known), and its invariances."""

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from diffmine.diffusion.draws import SAMPLERS, Draws, Timesteps, allocated, antithetic, independent
from diffmine.diffusion.model import Model, load
from diffmine.diffusion.pilot import Pilot, pilot
from diffmine.diffusion.typicality import Typicality, typicality
from diffmine.mining.patches import centred_matrix, centred_starts
from diffmine.run import TINY

ALPHA_BAR = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
NORMAL = np.polynomial.hermite_e.hermegauss(201)  # nodes and weights: an expectation over a normal variable


@dataclass
class Optimal:
    """Optimal denoiser of cells that are independent mixtures of Gaussians; a text state holds (weight, mean) pairs."""

    spread: float = 0.6
    device: str = "cpu"
    calls: list[int] = field(default_factory=list)

    def add_noise(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        a = ALPHA_BAR[t].view(-1, 1, 1, 1)
        return a.sqrt() * x.double() + (1 - a).sqrt() * eps.double()

    def predict_eps(self, noisy: Tensor, t: Tensor, text: Tensor, text_of: Tensor | None = None) -> Tensor:
        self.calls.append(len(noisy))
        text = text if text_of is None else text[text_of]
        a = ALPHA_BAR[t].view(-1, 1, 1, 1, 1)
        weight, mean = (text[..., i].double().view(len(noisy), -1, 1, 1, 1) for i in (0, 1))  # [B, components, 1, 1, 1]
        x = noisy.double()[:, None]
        variance = a * self.spread**2 + 1 - a
        residual = x - a.sqrt() * mean
        posterior = torch.softmax(weight.clamp_min(1e-300).log() - residual**2 / (2 * variance), dim=1)
        return (posterior * (1 - a).sqrt() * residual / variance).sum(1).float()


def exact(x: float, t: int, components: list[tuple[float, float]], spread: float) -> float:
    """E_eps (eps - eps_hat)^2 for one cell by Gauss-Hermite quadrature, with the denoiser written anew in numpy."""
    nodes, weights = NORMAL
    a = float(ALPHA_BAR[t])
    noisy = np.sqrt(a) * x + np.sqrt(1 - a) * nodes
    variance = a * spread**2 + 1 - a
    likelihood = np.array([w * np.exp(-((noisy - np.sqrt(a) * m) ** 2) / (2 * variance)) for w, m in components])
    mean = sum(p * m for p, (_, m) in zip(likelihood / likelihood.sum(0), components, strict=True))
    eps_hat = np.sqrt(1 - a) * (noisy - np.sqrt(a) * mean) / variance
    return float((weights / weights.sum()) @ (nodes - eps_hat) ** 2)


def identity(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def text(*components: tuple[float, float]) -> Tensor:
    return torch.tensor(components, dtype=torch.float32)


def test_typicality_is_the_closed_form_for_gaussian_mixtures() -> None:
    cells = torch.tensor([[-1.5, -0.4], [0.3, 1.2]])
    model, n = Optimal(), 1500
    mixture, own = [(0.5, -1.0), (0.5, 1.0)], [(1.0, 1.0), (0.0, 0.0)]
    draws = independent(7, n, Timesteps.between(0.1, 0.7), (3, 2, 2))
    latents = cells.expand(1, 3, 2, 2)
    found = typicality(model, latents, [(0, 0)], text(*own)[None], text(*mixture), draws, identity(2), identity(2), 64)  # type: ignore[arg-type]
    times = range(100, 700, 7)  # T is smooth in t
    for (i, j), x in np.ndenumerate(cells.numpy()):
        true = np.mean([exact(x, t, mixture, 0.6) - exact(x, t, own, 0.6) for t in times])
        error = abs(float(found.map[0, i, j]) - true)
        assert error < 4 * float(found.window_stderr[0, i, j]) + 1e-6, (i, j)
    assert found.map[0, 0, 0] < -0.05 < 0.02 < found.map[0, 1, 1]  # the condition hurts at -1.5 and helps at 1.2


def test_single_gaussians_have_an_elementary_closed_form() -> None:
    """L = (1 - k b)^2 + (k a)^2 (x - m)^2, where a^2 = alpha_bar, b^2 = 1 - alpha_bar, k = b / (a^2 s^2 + b^2)."""
    x, s, n = 0.8, 0.6, 2000
    draws = independent(3, n, Timesteps.between(0.2, 0.6), (1, 1, 1))
    null, own = [(1.0, 0.0), (0.0, 0.0)], [(1.0, 0.8), (0.0, 0.0)]
    found = typicality(
        Optimal(s),
        torch.full((1, 1, 1, 1), x),
        [(0, 0)],
        text(*own)[None],
        text(*null),
        draws,
        identity(1),
        identity(1),
        8,
    )  # type: ignore[arg-type]
    a2 = ALPHA_BAR[draws.t].numpy()
    k = np.sqrt(1 - a2) / (a2 * s**2 + 1 - a2)
    assert float(found.mean[0]) == pytest.approx(float(np.mean(k**2 * a2 * x**2)), abs=4 * float(found.stderr[0]))
    assert float(found.degrees_of_freedom[0]) == pytest.approx(n - 1)


def test_errors_are_those_of_units_that_spread_within_their_strata() -> None:
    """In numpy, from the losses of single draws: seven mirrored pairs in strata of two, three and two."""
    own, null = text((1.0, 1.0), (0.0, 0.0)), text((0.5, -1.0), (0.5, 1.0))
    latents = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    draws = allocated(0, 14, Timesteps(100, np.linspace(1, 3, 600)), (3, 4, 4))
    assert [s.units for s in draws.strata] == [2, 3, 2]
    rows, columns = centred_matrix(4, 32, 16).copy(), centred_matrix(4, 32, 24).copy()
    weights = torch.from_numpy(rows), torch.from_numpy(columns)
    found = typicality(Optimal(), latents, [(0, 0)], own[None], null, draws, *weights, 9, by_stratum=True)  # type: ignore[arg-type]

    noisy = Optimal().add_noise(latents, draws.eps, draws.t)
    helpless, helped = (
        (Optimal().predict_eps(noisy, draws.t, states.expand(14, 2, 2)) - draws.eps).square().mean(1).double().numpy()
        for states in (null, own)
    )
    strata = np.split((helpless - helped).reshape(7, 2, 4, 4).mean(axis=1), [2, 5])  # [units, h, w] each
    shares, units = (np.array([getattr(s, name) for s in draws.strata]) for name in ("share", "units"))
    expected = sum(share * one.mean(axis=0) for share, one in zip(shares, strata, strict=True))
    assert found.map[0].numpy() == pytest.approx(expected, abs=1e-6)
    assert float(found.mean[0]) == pytest.approx(expected.mean(), abs=1e-6)
    windows = [rows @ one @ columns.T for one in strata]
    variances = np.stack([one.var(axis=0, ddof=1) for one in windows])
    assert found.window_variance is not None
    assert found.window_variance[:, 0].numpy() == pytest.approx(variances, rel=1e-3)
    of_mean = np.array([one.mean(axis=(1, 2)).var(ddof=1) for one in strata])
    for spread, error, freedom in (
        (of_mean, found.stderr, found.degrees_of_freedom),
        (variances, found.window_stderr, found.window_degrees_of_freedom),
    ):
        parts = (spread.T * shares**2 / units).T
        welch = parts.sum(axis=0) ** 2 / (parts.T**2 / (units + 1)).T.sum(axis=0) - 2
        assert error[0].numpy() == pytest.approx(np.sqrt(parts.sum(axis=0)), rel=1e-3)
        assert freedom[0].numpy() == pytest.approx(np.maximum(welch, 1), rel=1e-3)
    nothing = typicality(Optimal(), latents, [(0, 0)], null[None], null, draws, *weights, 9)  # type: ignore[arg-type]
    assert (float(nothing.stderr[0]), float(nothing.degrees_of_freedom[0])) == (0, 1)


def test_null_pass_is_shared_by_the_labels_of_an_image() -> None:
    """1 + K passes for K labels."""
    model, draws = Optimal(), independent(0, 5, Timesteps.between(0.1, 0.7), (1, 2, 2))
    latents, conditions = torch.randn(3, 1, 2, 2), torch.randn(4, 1, 2).abs()
    pairs = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (2, 2)]
    typicality(model, latents, pairs, conditions, text((1, 0)), draws, identity(2), identity(2), 9)  # type: ignore[arg-type]
    assert model.calls == [3 + len(pairs)] * 5


def test_a_pair_can_be_compared_with_another_condition() -> None:
    """As if that were the null, standard errors included; a text that several pairs need is seen once."""
    torch.manual_seed(0)
    model, draws = Optimal(), antithetic(0, 40, Timesteps.between(0.1, 0.7), (1, 2, 2))
    latents, conditions, null = torch.randn(2, 1, 2, 2), torch.randn(3, 1, 2).abs(), text((1, 0))
    pairs, references = [(0, 0), (0, 0), (1, 0), (1, 1)], [-1, 2, -1, 0]

    def scored(pairs: list[tuple[int, int]], null: Tensor, references: list[int] | None = None) -> Typicality:
        arguments = latents, pairs, conditions, null, draws, identity(2), identity(2), 9
        return typicality(model, *arguments, references=references)  # type: ignore[arg-type]

    found = scored(pairs, null, references)
    assert sum(model.calls) == 40 * (2 + 4)  # of each image the null and two texts
    for i, (pair, reference) in enumerate(zip(pairs, references, strict=True)):
        alone = scored([pair], null if reference < 0 else conditions[reference])
        for name in ("map", "mean", "stderr", "window_stderr", "window_degrees_of_freedom"):
            assert torch.allclose(getattr(found, name)[i], getattr(alone, name)[0], rtol=1e-4, atol=1e-6), name


def test_passes_are_filled_with_draws_where_images_are_few() -> None:
    model, draws = Optimal(), antithetic(0, 12, Timesteps.between(0.1, 0.7), (1, 2, 2))
    arguments = torch.randn(1, 1, 2, 2), [(0, 0)], torch.randn(1, 1, 2).abs(), text((1, 0)), draws
    typicality(model, *arguments, identity(2), identity(2), 8)  # type: ignore[arg-type]
    assert model.calls == [8, 8, 8]


def test_passes_are_equal_rather_than_one_small_at_the_end() -> None:
    """34 samples, of 7 images under 2 draws, do not become 8, 8, 8, 8 and 2."""
    model, draws = Optimal(), independent(0, 2, Timesteps.between(0.1, 0.7), (1, 2, 2))
    pairs = [(i, 0) for i in range(7)] + [(0, 1), (1, 1), (2, 1)]
    arguments = torch.randn(7, 1, 2, 2), pairs, torch.randn(2, 1, 2).abs(), text((1, 0)), draws
    typicality(model, *arguments, identity(2), identity(2), 8)  # type: ignore[arg-type]
    assert model.calls == [7, 7, 7, 7, 6]


@pytest.mark.parametrize(("images", "passes"), [(20, 13), (33, 21), (65, 41)])
def test_padding_is_a_few_percent(images: int, passes: int) -> None:
    """As few passes as hold both conditions of all images under 40 draws, also where 128 is no multiple of a draw's."""
    model, draws = Optimal(), antithetic(0, 40, Timesteps.between(0.1, 0.7), (1, 1, 1))
    pairs, one = [(i, 0) for i in range(images)], identity(1)
    latents, conditions = torch.randn(images, 1, 1, 1), torch.randn(1, 1, 2).abs()
    typicality(model, latents, pairs, conditions, text((1, 0)), draws, one, one, 128, pad=True)  # type: ignore[arg-type]
    assert model.calls == [128] * passes
    assert passes * 128 < 1.05 * 40 * 2 * images


# ------------------------------------------------------------------------------ every sampler, against the closed form

NULL, OWN = [(0.5, -1.0), (0.5, 1.0)], [(1.0, 1.0), (0.0, 0.0)]  # not linear, as no denoiser of images is
CELLS = torch.tensor([[0.3, 1.2, -0.5, 0.9], [0.5, 1.5, -0.2, 0.2], [0.8, 0.1, 0.7, 1.0], [-0.3, 0.6, 0.4, 1.1]])
LATENTS = CELLS.view(1, 1, 4, 4)
ROWS = torch.from_numpy(centred_matrix(4, 32, 16).copy())


def estimate(sampler: str, seed: int, n: int, timesteps: Timesteps) -> Typicality:
    """T of one image."""
    draws = SAMPLERS[sampler](seed, n, timesteps, (1, 4, 4), 0)
    return typicality(Optimal(), LATENTS, [(0, 0)], text(*OWN)[None], text(*NULL), draws, ROWS, ROWS, 640)  # type: ignore[arg-type]


def of_pilot(own: Tensor) -> Pilot:
    found_by = antithetic(1, 64, Timesteps.between(0.1, 0.9), (1, 4, 4), 1)
    arguments = LATENTS, [(0, 0)], own[None], text(*NULL), found_by, ROWS, ROWS, 640
    found = typicality(Optimal(), *arguments, by_stratum=True)  # type: ignore[arg-type]
    return pilot([(found, ROWS, ROWS)], found_by, 100, 800)


@pytest.fixture(scope="module")
def piloted() -> Timesteps:
    return Timesteps(100, np.array(of_pilot(text(*OWN)).spread))


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    """Exact T of each cell."""
    times = range(105, 900, 10)  # T is smooth in t

    def of_cell(x: float) -> float:
        return float(np.mean([exact(x, t, NULL, 0.6) - exact(x, t, OWN, 0.6) for t in times]))

    return np.vectorize(of_cell)(CELLS.numpy())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_are_unbiased_and_know_their_error(sampler: str, piloted: Timesteps, truth: np.ndarray) -> None:
    """600 seeds of 32 draws: the mean is the exact T, and nominal 95 % intervals cover it 93 to 97 times in 100."""
    true, true_window = truth.mean(), (ROWS.numpy() @ truth @ ROWS.numpy().T)[1, 2]
    means, inside = [], []
    for seed in range(600):
        found = estimate(sampler, seed, 32, piloted)
        window = (ROWS @ found.map[0].double() @ ROWS.T)[1, 2]
        means.append(float(found.mean[0]))
        for miss, error, freedom in (
            (found.mean[0] - true, found.stderr[0], found.degrees_of_freedom[0]),
            (window - true_window, found.window_stderr[0, 1, 2], found.window_degrees_of_freedom[0, 1, 2]),
        ):
            inside.append(abs(float(miss)) < float(stats.t.ppf(0.975, float(freedom)) * error))
    assert abs(np.mean(means) - true) < 3.5 * np.std(means) / np.sqrt(len(means))
    assert 0.93 < np.mean(inside) < 0.97


@pytest.mark.parametrize("sampler", ["independent", "allocated"])
def test_a_chosen_window_needs_fresh_draws(sampler: str) -> None:
    """The best of 144 equally typical windows: its own interval misses T, that of fresh draws covers it."""
    cell, n, timesteps = 0.5, 100, Timesteps.between(0.1, 0.7)
    true = np.mean([exact(cell, t, NULL, 0.6) - exact(cell, t, OWN, 0.6) for t in range(105, 700, 10)])
    latents, rows = torch.full((1, 1, 12, 12), cell), torch.from_numpy(centred_matrix(12, 96, 16).copy())

    def score(draws: Draws, by_stratum: bool = False) -> Typicality:
        arguments = latents, [(0, 0)], text(*OWN)[None], text(*NULL), draws, rows, rows, 640
        return typicality(Optimal(), *arguments, by_stratum=by_stratum)  # type: ignore[arg-type]

    few = antithetic(1, 64, timesteps, (1, 12, 12), 1)
    piloted = Timesteps(100, np.array(pilot([(score(few, by_stratum=True), rows, rows)], few, 100, 600).spread))
    inside: dict[str, list[bool]] = {"chosen": [], "fresh": []}
    for seed in range(240):
        chosen, fresh = (score(SAMPLERS[sampler](seed, n, piloted, (1, 12, 12), bank)) for bank in (0, 2))
        best = int((rows @ chosen.map[0].double() @ rows.T).argmax())
        for name, found in (("chosen", chosen), ("fresh", fresh)):
            miss = float((rows @ found.map[0].double() @ rows.T).flatten()[best]) - true
            freedom = float(found.window_degrees_of_freedom[0].flatten()[best])
            error = float(found.window_stderr[0].flatten()[best])
            inside[name].append(abs(miss) < stats.t.ppf(0.975, freedom) * error)
    assert np.mean(inside["chosen"]) < 0.75, np.mean(inside["chosen"])
    assert 0.93 < np.mean(inside["fresh"]) < 0.97, np.mean(inside["fresh"])


def test_better_draws_have_less_variance(piloted: Timesteps) -> None:
    """Both steps help here: from independent ones to mirrored pairs in strata, and their allocation."""
    variance = {
        name: np.var([float(estimate(name, seed, 32, piloted).mean[0]) for seed in range(200)]) for name in SAMPLERS
    }
    assert variance["independent"] > 1.1 * variance["antithetic"], variance
    assert variance["antithetic"] > 1.1 * variance["allocated"], variance


def test_a_pilot_foretells_the_error() -> None:
    """Of allocated draws, from which `draws: auto` takes their number; variances of 1, 2, ... 16 over t here."""
    found_by = antithetic(1, 64, Timesteps.between(0.1, 0.9), (1, 1, 1), 1)
    each, one = torch.arange(1, 17.0).double().view(16, 1, 1, 1), torch.ones(1)
    made = Typicality(one.view(1, 1, 1), one, one, one, one, one, each, torch.tensor([-1]))
    found = pilot([(made, identity(1), identity(1))], found_by, 100, 800)
    draws = allocated(0, 200, Timesteps(100, np.array(found.spread)), (1, 1, 1))
    bounds = np.rint(800 * np.cumsum([0, *(s.share for s in draws.strata)])).astype(int)
    variances = np.repeat(each.flatten().numpy(), 50)  # of each timestep
    inside = [variances[low:high].mean() for low, high in pairwise(bounds)]
    variance = sum(s.share**2 / s.units * v for s, v in zip(draws.strata, inside, strict=True))
    assert found.error / np.sqrt(100) == pytest.approx(np.sqrt(variance), rel=0.01)
    assert found.draws_for(found.error / np.sqrt(100), 1000) == 200


def test_a_pilot_looks_at_the_best_window_of_each_image_that_has_not_failed() -> None:
    """Variances of 1 and 3 there, T of 3 and 4; whatever else is looked at spreads by millions or is no number."""
    found_by, elsewhere = antithetic(1, 64, Timesteps.between(0, 0.8), (1, 2, 2), 1), 1e6

    def made(maps: Tensor, variance: Tensor, failed_t: list[int]) -> Typicality:
        unused = torch.ones(len(maps))
        return Typicality(maps, *[unused] * 5, variance.double().expand(16, *maps.shape), torch.tensor(failed_t))

    squares = torch.tensor([[[1.0, 2.0], [3.0, 0.0]], [[torch.nan, 0.0], [0.0, 0.0]]])
    at_square = torch.tensor([[elsewhere, elsewhere], [1.0, elsewhere]])
    wide, at_wide = torch.tensor([[[6.0, 2.0]]]), torch.tensor([[elsewhere, 3.0]])
    mean_or_half = torch.tensor([[0.5, 0.0], [0.5, 0.5]]).double()  # means over windows of the wide one are 3 and 4
    square, one_failed = (identity(2), identity(2)), made(squares, at_square, [-1, 0])
    found = pilot([(one_failed, *square), (made(wide, at_wide, [-1]), identity(1), mean_or_half)], found_by, 0, 800)
    assert found.best == pytest.approx(np.sqrt((3**2 + 4**2) / 2))
    assert found.error == pytest.approx(np.sqrt((1 + 3) / 2))
    assert found.spread == pytest.approx([np.sqrt(2)] * 800)
    assert pilot([(made(squares, at_square, [5, 0]), *square)], found_by, 7, 800) == Pilot(7, [1.0] * 800, 0.0, 0.0)


def test_a_quarter_of_the_draws_is_spread_evenly() -> None:
    """Also where a pilot has seen no spread: here the variance is that of one stratum of 16, and two beside it."""
    found_by, one = antithetic(1, 64, Timesteps.between(0.1, 0.9), (1, 1, 1), 1), torch.ones(1)
    variance = 4.0 * (torch.arange(16) == 7).double().view(16, 1, 1, 1)
    made = Typicality(one.view(1, 1, 1), one, one, one, one, one, variance, torch.tensor([-1]))
    spread = np.array(pilot([(made, identity(1), identity(1))], found_by, 100, 800).spread).reshape(16, 50)
    even = np.full((16, 50), 0.25 * (1 + np.sqrt(2) + 1) / 16)
    even[6:9] += 0.75 * np.array([[1], [np.sqrt(2)], [1]])
    assert spread == pytest.approx(even)


def test_draws_are_as_many_as_the_wished_error_takes() -> None:
    """A pair errs by 1, and 6.25 of them by a fifth of T = 2, which 7 stay below; of fewer than 2 no error is known."""
    found = Pilot(100, [], best=2.0, error=1.0)
    assert [found.draws_for(0.2, most) for most in (400, 10)] == [14, 10]
    assert found.draws_for(1.0, 400) == 4


def test_where_a_label_tells_nothing_draws_are_spread_evenly() -> None:
    found = of_pilot(text(*NULL))
    assert (found.best, found.error) == (0.0, 0.0)
    assert len(set(found.spread)) == 1
    assert found.spread[0] > 0
    assert found.draws_for(0.1, 100) == 100


def test_a_loss_that_is_not_finite_is_reported_with_its_timestep() -> None:
    model, draws = Optimal(), antithetic(0, 8, Timesteps.between(0.1, 0.7), (1, 2, 2))
    latents = torch.zeros(2, 1, 2, 2)
    latents[1] = torch.nan
    arguments = [(0, 0), (1, 0)], torch.ones(1, 1, 2), text((1, 0)), draws, identity(2), identity(2), 64
    found = typicality(model, latents, *arguments)  # type: ignore[arg-type]
    assert found.failed_t.tolist() == [-1, int(draws.t[0])]
    assert found.map[0].isfinite().all()


def test_the_timestep_of_a_failure_is_that_of_its_draw() -> None:
    """Of a pair, either may fail."""
    draws = antithetic(0, 8, Timesteps.between(0.1, 0.7), (1, 2, 2))

    class Overflowing(Optimal):
        def predict_eps(self, noisy: Tensor, t: Tensor, text: Tensor, text_of: Tensor | None = None) -> Tensor:
            return super().predict_eps(noisy, t, text, text_of).where((t != draws.t[3]).view(-1, 1, 1, 1), torch.inf)

    arguments = [(0, 0)], torch.ones(1, 1, 2), text((1, 0)), draws, identity(2), identity(2), 64
    assert typicality(Overflowing(), torch.zeros(1, 1, 2, 2), *arguments).failed_t.tolist() == [int(draws.t[3])]  # type: ignore[arg-type]


def test_window_stderr_is_not_that_of_independent_cells() -> None:
    """Draws move whole windows together (through t): the naive error of a mean of cells is too small."""
    draws = independent(1, 60, Timesteps.between(0.0, 1.0), (1, 8, 8))
    null, own = [(1.0, 0.0), (0.0, 0.0)], [(1.0, 1.5), (0.0, 0.0)]
    latents = torch.full((1, 1, 8, 8), 1.5)
    rows = torch.from_numpy(centred_matrix(8, 64, 64).copy())
    found = typicality(Optimal(), latents, [(0, 0)], text(*own)[None], text(*null), draws, rows, rows, 64)  # type: ignore[arg-type]
    cell = typicality(Optimal(), latents, [(0, 0)], text(*own)[None], text(*null), draws, identity(8), identity(8), 64)  # type: ignore[arg-type]
    assert float(found.window_stderr[0, 4, 4]) > 2 * float(cell.window_stderr[0].mean()) / 8
    assert centred_starts(8, 64, 64).tolist() == [0] * 8


@pytest.fixture(scope="module")
def tiny() -> Model:
    return load(TINY)


def test_result_does_not_depend_on_batch_size_or_order(tiny: Model) -> None:
    rng = torch.Generator().manual_seed(0)
    latents, draws = torch.randn(5, 8, 8, 8, generator=rng), independent(0, 6, Timesteps.between(0.1, 0.7), (8, 8, 8))
    conditions, null = tiny.embed(["An image of a.", "An image of b."]), tiny.embed(["An image."])[0]
    pairs = [(i, k) for i in range(5) for k in range(2)]

    def maps(order: list[int], batch_size: int) -> Tensor:
        inverse = np.argsort(order)
        mixed = [(int(inverse[i]), k) for i, k in pairs]
        return typicality(
            tiny, latents[order], mixed, conditions, null, draws, identity(8), identity(8), batch_size
        ).map

    reference = maps([0, 1, 2, 3, 4], 16)
    for order, batch_size in (([0, 1, 2, 3, 4], 1), ([4, 2, 0, 1, 3], 16), ([1, 0, 4, 3, 2], 7)):
        # T is a difference of losses of about 1; their last bits vary with the batch: 3e-7 on one CPU, 1e-6 on another
        assert (maps(order, batch_size) - reference).abs().max() < 3e-6


def test_padded_passes_have_one_shape_and_give_the_same_maps(tiny: Model) -> None:
    latents, draws = torch.randn(3, 8, 8, 8), antithetic(0, 4, Timesteps.between(0.1, 0.7), (8, 8, 8))
    texts = tiny.embed(["An image.", "An image of a."])
    shapes: list[int] = []
    handle = tiny.unet.register_forward_pre_hook(lambda _module, inputs: shapes.append(len(inputs[0])))
    plain, padded = (
        typicality(tiny, latents, [(0, 0), (2, 0)], texts[1:], texts[0], draws, identity(8), identity(8), 16, pad).map
        for pad in (False, True)
    )
    handle.remove()
    assert set(shapes) == {10, 16}
    assert (plain - padded).abs().max() < 1e-6

"""Measures of localisation against scikit-learn, PyTorch, and the same written out; what scaling a map does to them."""

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import average_precision_score
from torch.nn.functional import interpolate

from diffmine.mining.localisation import (
    average_precision,
    inside,
    interval,
    otsu,
    over_patches,
    overlap,
    paper_auc_pr,
    pointing_hit,
    upsampled,
)


def drawn(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A map of few different values, so that many are equal, and a truth that it tells something of."""
    rng = np.random.default_rng(seed)
    truth = rng.random((9, 14)) < 0.2
    truth[0, 0] = True
    return np.round(rng.normal(size=truth.shape) + truth, 1).astype(np.float32), truth


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_is_that_of_scikit_learn(seed: int) -> None:
    values, truth = drawn(seed)
    expected = average_precision_score(truth.ravel(), values.ravel())
    assert average_precision(values, truth) == pytest.approx(expected, abs=1e-12)


def test_average_precision_by_hand() -> None:
    truth = np.array([[True, False], [True, False]])
    assert average_precision(np.array([[3.0, 1.0], [2.0, 0.0]]), truth) == 1
    assert average_precision(np.array([[0.0, 2.0], [1.0, 3.0]]), truth) == pytest.approx(0.5 * 1 / 3 + 0.5 * 2 / 4)
    assert average_precision(np.zeros((2, 2)), truth) == 0.5  # chance


def test_pixels_are_those_whose_centre_lies_in_a_box() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        height, width = (int(n) for n in rng.integers(2, 12, size=2))
        boxes = rng.uniform((-4, -4, 0, 0), (width, height, width, height), size=(int(rng.integers(3)), 4))
        y, x = np.mgrid[:height, :width] + 0.5
        expected = np.zeros((height, width), bool)
        for left, top, across, down in boxes:
            expected |= (left <= x) & (x < left + across) & (top <= y) & (y < top + down)
        assert (inside(height, width, boxes) == expected).all()
    assert inside(4, 4, [(0.5, 0.5, 2, 1)]).sum() == 2  # an edge on a centre: the lower one counts, the upper does not
    assert not inside(4, 4, [(-9, 0, 5, 4), (4, 0, 5, 4), (1, 1, 0, 3)]).any()
    assert inside(4, 4, [(-5, 1, 1e30, 1e30)]).sum() == 12


def test_maps_are_upsampled_as_pytorch_does() -> None:
    cells = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    expected = interpolate(torch.from_numpy(cells)[None, None], (40, 56), mode="bilinear")[0, 0].numpy()
    np.testing.assert_allclose(upsampled(cells, 40, 56), expected, atol=1e-6)
    assert len(np.unique(upsampled(np.full((5, 7), 0.1, np.float32), 40, 56))) == 1  # equal values stay equal


@pytest.mark.parametrize("seed", range(5))
def test_otsu_is_the_best_of_all_splits(seed: int) -> None:
    values, truth = drawn(seed)

    def within(threshold: float) -> float:
        upper = values > threshold
        return sum(part.size * part.var(dtype=np.float64) for part in (values[upper], values[~upper]) if part.size)

    assert within(otsu(values)) == pytest.approx(min(within(v) for v in np.unique(values)), rel=1e-9)
    above = values > otsu(values)
    assert overlap(values, truth) == (above & truth).sum() / (above | truth).sum()


def test_over_patches_is_the_mean_of_the_pixels_around_each_cell() -> None:
    """Of the patch along an edge where it would stick out."""
    cells = np.random.default_rng(0).normal(size=(5, 7))
    pixels = interpolate(torch.from_numpy(cells)[None, None], (40, 56), mode="bilinear")[0, 0].numpy()
    expected = [[pixels[y : y + 16, x : x + 16].mean() for x in (0, 4, 12, 20, 28, 36, 40)] for y in (0, 4, 12, 20, 24)]
    np.testing.assert_allclose(over_patches(cells, 40, 56, 16), expected, atol=1e-6)


def test_two_levels_are_found_whole() -> None:
    truth = inside(16, 16, [(4, 4, 6, 5)])
    assert overlap(np.where(truth, 2.0, -1.0), truth) == 1
    assert overlap(np.ones((16, 16)), truth) == 0  # nothing stands out
    assert pointing_hit(np.where(truth, 2.0, -1.0), truth)
    assert not pointing_hit(np.where(truth, -1.0, 2.0), truth)


def test_only_the_measure_of_the_paper_depends_on_scale() -> None:
    values, truth = drawn(1)
    values *= 0.004
    for measure in (average_precision, pointing_hit, overlap):
        assert measure(100 * values, truth) == measure(values, truth)
    thresholds = 2 * 10 ** (-np.linspace(2, 7, 1000))
    found = np.array([[(values > t).sum(), ((values > t) & truth).sum()] for t in thresholds])
    precision = np.where(found[:, 0] > 0, found[:, 1] / np.maximum(found[:, 0], 1), 0)
    expected = np.trapezoid(precision, found[:, 1] / truth.sum())
    assert paper_auc_pr(values, truth) == pytest.approx(expected, abs=1e-12)
    assert paper_auc_pr(100 * values, truth) < 0.5 * paper_auc_pr(values, truth)
    assert paper_auc_pr(-np.ones_like(values), truth) == 0  # no threshold is below zero


def test_interval_is_that_of_the_mean_and_knows_groups() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0.4, 0.1, 200)
    half = 1.96 * values.std(ddof=1) / np.sqrt(200)
    ends = values.mean() - half, values.mean() + half
    assert interval(values, np.arange(200)) == pytest.approx(ends)
    again, people = np.repeat(values, 4), np.repeat(np.arange(200), 4)  # four pictures of each: nothing more is known
    assert interval(again, people) == pytest.approx(ends)
    low, high = interval(again, np.arange(800)) or (0, 0)
    assert high - low == pytest.approx(half, rel=0.01)
    resampled = stats.bootstrap(  # people of one to seven pictures
        (counts := rng.integers(1, 8, 200), sums := counts * values + rng.normal(0, 0.1, 200)),
        lambda n, s, axis=-1: s.sum(axis) / n.sum(axis), paired=True, vectorized=True, rng=rng, method="percentile",
    )  # fmt: skip
    found = interval(np.repeat(sums / counts, counts), np.repeat(np.arange(200), counts))
    width = resampled.confidence_interval.high - resampled.confidence_interval.low
    assert found == pytest.approx(tuple(resampled.confidence_interval), abs=0.1 * width)
    assert interval(np.array([0.3, 0.4]), np.array([7, 7])) is None
    assert interval(np.array([0.0, 0.9]), np.array([7, 8])) == (0, 1)

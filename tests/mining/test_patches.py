"""Patch maps against torch's upsampling and pooling; choices against brute force and uniformity."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chisquare

from diffmine.mining.patches import (
    at_window,
    centred_matrix,
    centred_starts,
    choose,
    choose_random,
    nearest_centred,
    patch_map,
    rank,
    window_means_matrix,
    window_size,
)

# (cells down, cells across, height, width, size); the last cell of an axis may cover less than a whole number of pixels
SHAPES = [
    (8, 8, 64, 64, 16),
    (8, 12, 64, 96, 17),
    (64, 64, 512, 512, 64),
    (5, 3, 43, 20, 7),
    (4, 6, 32, 48, 40),  # the patch is as tall as the image and not as wide
    (4, 4, 32, 32, 100),  # the whole image
    (1, 9, 8, 72, 1),
    (9, 7, 4, 5, 2),  # more cells than pixels
]


def by_torch(cell_map: np.ndarray, height: int, width: int, size: int) -> np.ndarray:
    up = F.interpolate(torch.tensor(cell_map)[None, None], (height, width), mode="bilinear", align_corners=False)
    window = (min(size, height), min(size, width))
    return F.avg_pool2d(up, window, stride=1)[0, 0].numpy()


@pytest.mark.parametrize(("h", "w", "height", "width", "size"), SHAPES)
def test_window_means_are_upsampling_and_pooling(h: int, w: int, height: int, width: int, size: int) -> None:
    cell_map = np.random.default_rng(0).normal(size=(h, w))
    rows = window_means_matrix(h, height, window_size(size, height))
    columns = window_means_matrix(w, width, window_size(size, width))
    expected = by_torch(cell_map, height, width, size)
    np.testing.assert_allclose(rows @ cell_map @ columns.T, expected, rtol=0, atol=1e-12)
    found = patch_map(cell_map, height, width, size)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-7)


def test_patch_map_takes_stacks_of_maps() -> None:
    maps = np.random.default_rng(0).normal(size=(2, 3, 4, 6)).astype(np.float32)
    found = patch_map(maps, 32, 48, 10)
    assert found.shape == (2, 3, 23, 39)
    np.testing.assert_array_equal(found[1, 2], patch_map(maps[1, 2], 32, 48, 10))


@pytest.mark.parametrize("value", [0.1, -3.3e-4, 0.0])
def test_windows_of_a_constant_map_tie(value: float) -> None:
    found = patch_map(np.full((12, 20), value, dtype=np.float32), 96, 160, 50)
    assert np.unique(found).tolist() == [np.float32(value)]
    assert choose(found, 50, 50, 3) == [(0, 0), (0, 50), (0, 100)]


def test_centred_windows() -> None:
    assert centred_starts(8, 64, 16).tolist() == [0, 4, 12, 20, 28, 36, 44, 48]
    assert centred_starts(3, 24, 100).tolist() == [0, 0, 0]
    np.testing.assert_array_equal(centred_matrix(8, 64, 16), window_means_matrix(8, 64, 16)[centred_starts(8, 64, 16)])
    assert centred_matrix(3, 24, 100).shape == (3, 3)
    assert nearest_centred([0, 2, 3, 20, 23, 48], 8, 64, 16).tolist() == [0, 0, 1, 3, 3, 7]
    # of 8 x 12 cells the window of 16 x 24 at (23, 50) lies nearest to those centred on row 3 (20) and column 7 (48)
    assert at_window(np.arange(96).reshape(8, 12), 23, 50, 16, 24, 8) == 3 * 12 + 7


def test_cached_matrices_cannot_be_changed() -> None:
    for matrix in (window_means_matrix(4, 32, 8), centred_matrix(4, 32, 8)):
        with pytest.raises(ValueError, match="read-only"):
            matrix[0, 0] = 1


def greedy(scores: np.ndarray, size_y: int, size_x: int, count: int, best: bool) -> list[tuple[int, int]]:
    """The definition: sort all windows, take each that overlaps none taken before."""
    sign = -1 if best else 1
    chosen: list[tuple[int, int]] = []
    for _, y, x in sorted((sign * scores[y, x], y, x) for y, x in np.ndindex(scores.shape)):
        if len(chosen) < count and all(abs(y - b) >= size_y or abs(x - a) >= size_x for b, a in chosen):
            chosen.append((y, x))
    return chosen


@pytest.mark.parametrize("best", [True, False])
@pytest.mark.parametrize("levels", [2, 5, 10**9])  # few levels: many ties
def test_choose_is_the_greedy_choice(levels: int, best: bool) -> None:
    rng = np.random.default_rng(levels)
    for _ in range(60):
        scores = rng.integers(levels, size=rng.integers(1, 20, size=2)).astype(np.float32)
        size_y, size_x, count = (int(n) for n in rng.integers(1, 8, size=3))
        before = scores.copy()
        assert choose(scores, size_y, size_x, count, best) == greedy(scores, size_y, size_x, count, best)
        np.testing.assert_array_equal(scores, before)


def test_worst_is_best_of_the_negative() -> None:
    scores = np.random.default_rng(0).normal(size=(40, 30)).astype(np.float32)
    assert choose(scores, 6, 7, 5, best=False) == choose(-scores, 6, 7, 5)
    assert choose(scores, 6, 7, 5, best=False) != choose(scores, 6, 7, 5)


def test_touching_is_not_overlapping_and_full_is_full() -> None:
    # An image of 20 x 20 pixels and patches of 10: 11 x 11 windows, of which the corners fit side by side.
    assert choose(np.zeros((11, 11), np.float32), 10, 10, 5) == [(0, 0), (0, 10), (10, 0), (10, 10)]
    middle = np.zeros((11, 11), np.float32)
    middle[5, 5] = 1
    assert choose(middle, 10, 10, 5) == [(5, 5)]
    assert choose(np.zeros((1, 1), np.float32), 10, 10, 5) == [(0, 0)]


def test_random_windows_do_not_overlap_and_fill_the_image() -> None:
    for seed in range(200):
        chosen = choose_random(40, 30, 9, 11, 5, np.random.default_rng(seed))
        assert all(0 <= y < 40 and 0 <= x < 30 for y, x in chosen)
        assert all(abs(a - c) >= 9 or abs(b - d) >= 11 for (a, b), (c, d) in itertools.combinations(chosen, 2))
    assert sorted(choose_random(4, 3, 1, 1, 99, np.random.default_rng(0))) == list(np.ndindex(4, 3))
    assert choose_random(1, 1, 7, 7, 5, np.random.default_rng(0)) == [(0, 0)]


def test_random_windows_are_uniform_among_the_free() -> None:
    """All ordered pairs, each with its exact probability: 1 / positions x 1 / positions still free."""
    rows, columns, size = 4, 5, 2
    places = list(np.ndindex(rows, columns))
    exact: dict[tuple, float] = {}
    for a in places:
        free = [b for b in places if abs(a[0] - b[0]) >= size or abs(a[1] - b[1]) >= size]
        exact |= {(a, b): 1 / len(places) / len(free) for b in free}
    draws, rng = 60_000, np.random.default_rng(1)
    counts = dict.fromkeys(exact, 0)
    for _ in range(draws):
        first, second = choose_random(rows, columns, size, size, 2, rng)
        counts[first, second] += 1
    expected = draws * np.array(list(exact.values()))
    observed = np.array(list(counts.values()))
    assert chisquare(observed, expected * (observed.sum() / expected.sum())).pvalue > 0.01
    # Negative control: the same test rejects pairs that are uniform over all pairs.
    assert chisquare(observed, np.full(len(exact), observed.sum() / len(exact))).pvalue < 1e-6


def test_random_windows_are_a_function_of_the_generator() -> None:
    draws = [choose_random(50, 50, 5, 5, 5, np.random.default_rng(seed)) for seed in (3, 3, 4)]
    assert draws[0] == draws[1] != draws[2]


def candidates(count: int, levels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Candidates at places of their own, in random order, with few distinct scores and image names as strings."""
    rng = np.random.default_rng(count)
    places = rng.permutation(count)
    image, y, x = places // 25, places // 5 % 5, places % 5
    names = np.array([f"street/{i:03}.png" for i in image], dtype=object)
    return rng.integers(levels, size=count).astype(np.float32), names, y, x


@pytest.mark.parametrize("count", [0, 1, 100, 999, 1000, 5000])
@pytest.mark.parametrize("levels", [1, 7, 10**9])
def test_rank_is_the_full_sort(levels: int, count: int) -> None:
    score, names, y, x = candidates(1000, levels)
    expected = sorted(range(1000), key=lambda i: (-score[i], names[i], y[i], x[i]))[:count]
    assert rank(score, names, y, x, count).tolist() == expected


def test_rank_does_not_depend_on_the_order() -> None:
    score, names, y, x = candidates(1000, 7)
    order = np.random.default_rng(9).permutation(1000)
    shuffled = [values[order] for values in (names, y, x)]
    ranked = rank(score, names, y, x, 50)
    np.testing.assert_array_equal(order[rank(score[order], *shuffled, 50)], ranked)


def test_rank_of_nothing_is_nothing() -> None:
    nothing = np.array([], dtype=object), np.array([], dtype=int), np.array([], dtype=int)
    assert rank(np.array([], dtype=np.float32), *nothing, 5).tolist() == []

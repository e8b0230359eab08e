"""A typicality map -> the typicality of every window of pixels -> the windows to keep.

Upsampling a map bilinearly and averaging it over a window are both linear and separable, so one small matrix per axis
does the two at once: `A M B^T`. Windows are named by their first pixel (y, x); touching is not overlapping.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

KINDS = ("top", "bottom", "random")  # of patches
FloatArray = NDArray[np.floating]
IntArray = NDArray[np.int64]


def window_size(size: int, pixels: int) -> int:
    """Patch side along an axis of `pixels`: a patch larger than the image is the whole image."""
    return min(size, pixels)


def upsampling(cells: int, pixels: int) -> NDArray[np.float64]:
    """Weights [pixels, cells] of bilinear upsampling: half-pixel centres, edges clamped (`align_corners=False`)."""
    source = np.clip((np.arange(pixels) + 0.5) * cells / pixels - 0.5, 0, cells - 1)
    left = source.astype(np.int64)
    right = np.minimum(left + 1, cells - 1)
    weights = np.zeros((pixels, cells))
    np.add.at(weights, (np.arange(pixels), left), 1 - (source - left))
    np.add.at(weights, (np.arange(pixels), right), source - left)
    return weights


@lru_cache(maxsize=64)
def window_means_matrix(cells: int, pixels: int, size: int) -> NDArray[np.float64]:
    """Weights [pixels - size + 1, cells] (read-only): row i gives the mean over the pixels [i, i + size).

    The signal of `cells` values is upsampled bilinearly to `pixels` values first. Needs 1 <= size <= pixels
    (`window_size` clips).
    """
    assert cells >= 1, cells
    assert 1 <= size <= pixels, (size, pixels)
    sums = np.vstack([np.zeros(cells), np.cumsum(upsampling(cells, pixels), axis=0)])
    matrix = (sums[size:] - sums[:-size]) / size
    matrix.setflags(write=False)
    return matrix


def patch_map(cell_map: FloatArray, height: int, width: int, size: int) -> NDArray[np.float32]:
    """Map [..., h, w] of an image of height x width pixels -> its mean over each window [..., H', W'], stride 1.

    H' = height - min(size, height) + 1 and so for W'. Computed in float64 and rounded to float32, the precision in
    which patches are stored: windows that are equal in exact arithmetic then tie instead of differing by 1e-16.
    """
    rows = window_means_matrix(cell_map.shape[-2], height, window_size(size, height))
    columns = window_means_matrix(cell_map.shape[-1], width, window_size(size, width))
    means: NDArray[np.float32] = (rows @ cell_map @ columns.T).astype(np.float32)
    return means


def centred_starts(cells: int, pixels: int, size: int) -> IntArray:
    """First pixels [cells] of the windows centred on each cell, moved inwards where they would leave the image."""
    size = window_size(size, pixels)
    starts = ((2 * np.arange(cells, dtype=np.int64) + 1) * pixels - size * cells) // (2 * cells)
    return np.clip(starts, 0, pixels - size)


@lru_cache(maxsize=64)
def centred_matrix(cells: int, pixels: int, size: int) -> NDArray[np.float64]:
    """Rows [cells, cells] of `window_means_matrix` for the windows centred on each cell (read-only: torch copies)."""
    matrix = window_means_matrix(cells, pixels, window_size(size, pixels))[centred_starts(cells, pixels, size)]
    matrix.setflags(write=False)
    return matrix


def nearest_centred(starts: ArrayLike, cells: int, pixels: int, size: int) -> IntArray:
    """First pixels [n] of windows -> the cell [n] whose centred window lies nearest to each (the first on ties)."""
    distance = np.abs(np.asarray(starts)[:, None] - centred_starts(cells, pixels, size))  # [n, cells]
    return distance.argmin(axis=1)


def _overlapping(first: int, size: int) -> slice:
    """The first pixels of all windows that overlap the window at `first` along one axis."""
    return slice(max(0, first - size + 1), first + size)


def choose(scores: FloatArray, size_y: int, size_x: int, count: int, best: bool = True) -> list[tuple[int, int]]:
    """Finite scores [H', W'] of all windows -> up to `count` windows (y, x), best (or worst) first, none overlapping.

    Greedy: each is the best of those that overlap no earlier one; ties go to the smallest y, then the smallest x.
    Fewer than `count` where no more fit.
    """
    left = scores.copy() if best else -scores
    columns = left.argmax(axis=1)  # the first best column of each row, kept up to date
    maxima = left[np.arange(len(left)), columns]
    chosen: list[tuple[int, int]] = []
    for _ in range(count):
        y = int(maxima.argmax())
        if maxima[y] == -np.inf:
            break
        x = int(columns[y])
        chosen.append((y, x))
        rows = _overlapping(y, size_y)
        left[rows, _overlapping(x, size_x)] = -np.inf
        columns[rows] = left[rows].argmax(axis=1)
        maxima[rows] = np.take_along_axis(left[rows], columns[rows, None], axis=1)[:, 0]
    return chosen


def choose_random(
    rows: int, columns: int, size_y: int, size_x: int, count: int, rng: np.random.Generator
) -> list[tuple[int, int]]:
    """Grid of rows x columns window positions -> up to `count` windows (y, x) drawn at random, none overlapping.

    Each is uniform among all positions that are free when it is drawn; fewer than `count` where none is left.
    """
    free = np.ones((rows, columns), dtype=bool)
    chosen: list[tuple[int, int]] = []
    for _ in range(count):
        ends = np.cumsum(free.sum(axis=1))  # free positions in the rows up to and with each row
        if ends[-1] == 0:
            break
        position = int(rng.integers(ends[-1]))
        y = int(np.searchsorted(ends, position, side="right"))
        before = int(ends[y - 1]) if y else 0
        x = int(np.flatnonzero(free[y])[position - before])
        chosen.append((y, x))
        free[_overlapping(y, size_y), _overlapping(x, size_x)] = False
    return chosen


def rank(score: FloatArray, image_id: ArrayLike, y: ArrayLike, x: ArrayLike, count: int) -> IntArray:
    """Candidates [N] of one label -> indices of its best `count`, in order; ties by image_id, y, x.

    Does not depend on the order of the candidates, as long as no two have the same image and place.
    """
    key = -score
    kept = np.arange(len(key))
    if count < len(key):
        # Only what can be in the answer is sorted: all that are as good as the last one kept, ties included.
        kept = np.flatnonzero(key <= np.partition(key, count - 1)[count - 1]) if count else kept[:0]
    images, tops, lefts = (np.asarray(values)[kept] for values in (image_id, y, x))
    places = (lefts, tops, np.unique(images, return_inverse=True)[1])
    return kept[np.lexsort((*places, key[kept]))[:count]]


def at_window(of_windows: np.ndarray, y: int, x: int, size_y: int, size_x: int, cell: int) -> np.floating:
    """What is known of the windows centred on cells [h, w] -> that of the window nearest to the one at (y, x)."""
    h, w = of_windows.shape
    return of_windows[nearest_centred([y], h, h * cell, size_y)[0], nearest_centred([x], w, w * cell, size_x)[0]]

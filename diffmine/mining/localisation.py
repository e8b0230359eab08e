"""A typicality map and the boxes of its label -> how well the map, read as a detector, finds them.

Maps are upsampled bilinearly to the pixels of the prepared image and compared pixel by pixel, as the paper does with
ChestX-ray8. Average precision, the pointing game and the overlap stay the same when all values of a map are scaled, so
they compare between models, precisions and kinds of prediction; the paper's own measure does not.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffmine.mining.patches import FloatArray, centred_matrix, upsampling

Mask = NDArray[np.bool_]
_PAPER_THRESHOLDS = 2 * 10 ** -np.linspace(2, 7, 1000)  # falling from 2e-2 to 2e-7


def upsampled(cell_map: FloatArray, height: int, width: int) -> FloatArray:
    """Map [h, w] -> float32 [height, width], bilinearly; computed in float64, so that equal values stay equal."""
    rows, columns = upsampling(cell_map.shape[0], height), upsampling(cell_map.shape[1], width)
    return (rows @ cell_map @ columns.T).astype(np.float32)


def over_patches(cell_map: FloatArray, height: int, width: int, size: int) -> FloatArray:
    """Map [h, w] of an image of height x width pixels -> mean over the patch around each cell's centre, float64 [h, w].

    Near an edge the patch is the one along it. A single cell is mostly noise; patches are chosen by such means, too.
    """
    rows = centred_matrix(cell_map.shape[0], height, size)
    columns = centred_matrix(cell_map.shape[1], width, size)
    found: FloatArray = rows @ cell_map @ columns.T
    return found


def inside(height: int, width: int, boxes: ArrayLike) -> Mask:
    """Which pixels have their centre in one of the boxes [M, 4] (x, y, width, height): bool [height, width]."""
    found = np.zeros((height, width), bool)
    edges = np.asarray(boxes, np.float64).reshape(-1, 4)
    corners = np.hstack([edges[:, :2], edges[:, :2] + edges[:, 2:]])
    for left, top, right, bottom in np.clip(np.ceil(corners - 0.5), 0, [width, height] * 2).astype(int):
        found[top:bottom, left:right] = True
    return found


def average_precision(values: FloatArray, truth: Mask) -> float:
    """Sum over thresholds of (R_n - R_{n-1}) P_n, 0 to 1; that of chance is the share of true pixels.

    Pixels of equal values are taken together, as `sklearn.metrics.average_precision_score` does.

    Args:
        values: [H, W], larger where the label's object should be.
        truth: [H, W], true somewhere.
    """
    order = np.argsort(values, axis=None)[::-1]
    ranked = values.ravel()[order]
    last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)  # of each run of equal values
    found = np.cumsum(truth.ravel()[order])[last]
    return float(np.sum(np.diff(found, prepend=0) * (found / (last + 1))) / found[-1])


def pointing_hit(values: FloatArray, truth: Mask) -> bool:
    """The pointing game: whether the pixel of the largest value (the first of equal ones) is a true one."""
    return bool(truth.ravel()[np.argmax(values)])


def overlap(values: FloatArray, truth: Mask) -> float:
    """Intersection over union of the truth and the pixels above Otsu's threshold of the values, 0 to 1."""
    found = values > otsu(values)
    return float((found & truth).sum() / (found | truth).sum())


def otsu(values: FloatArray) -> float:
    """The value that splits the others into two classes of least variance within them (Otsu 1979): the largest of the
    lower class. No histogram is made."""
    ranked = np.sort(values, axis=None).astype(np.float64)
    below = np.arange(1, len(ranked))
    sums = np.cumsum(ranked - ranked.mean())[:-1]  # of the lower class; the upper one has the same, negative
    between = sums**2 / (below * (len(ranked) - below))
    return float(ranked[np.argmax(between)]) if len(between) else float(ranked[0])


def paper_auc_pr(values: FloatArray, truth: Mask) -> float:
    """Area under precision and recall at 1,000 fixed thresholds, as the paper's code takes it for ChestX-ray8.

    Thresholds are between 2e-2 and 2e-7 of squared error, so that no recall of values below zero counts, and the number
    changes with the scale of the values. Only for comparison with published figures.
    """
    ranked, hits = np.sort(values, axis=None), np.sort(values[truth])
    above = len(ranked) - np.searchsorted(ranked, _PAPER_THRESHOLDS, "right")
    found = len(hits) - np.searchsorted(hits, _PAPER_THRESHOLDS, "right")
    precision = np.divide(found, above, out=np.zeros(len(above)), where=above > 0)
    return float(np.trapezoid(precision, found / len(hits)))


def interval(values: FloatArray, groups: NDArray[np.integer]) -> tuple[float, float] | None:
    """95 % interval of the mean of shares, 1.96 standard errors to each side; None where there is one group only.

    Images of one group (a person's) tell less than others: what counts is how the groups' sums differ from what the
    mean expects of as many images.

    Args:
        values: [N], 0 to 1.
        groups: [N], numbers.
    """
    _, group = np.unique(groups, return_inverse=True)
    apart, count = np.bincount(group, values - values.mean()), group.max() + 1
    if count == 1:
        return None
    half = 1.96 * np.sqrt(count / (count - 1) * np.sum(apart**2)) / len(values)
    return float(max(values.mean() - half, 0)), float(min(values.mean() + half, 1))

"""Patches and boxes -> which patches lie on a box, and how often chance would.

A patch lies on a box when their intersection is at least half the smaller of the two areas. All in pixels of one image,
both as x, y, width, height.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Lengths = NDArray[np.float64] | float


def _overlap(
    start: NDArray[np.float64], length: Lengths, box_start: Lengths, box_length: Lengths
) -> NDArray[np.float64]:
    """Length of the intersection of two intervals, broadcast."""
    end = np.minimum(start + length, box_start + box_length)
    return np.maximum(end - np.maximum(start, box_start), 0)


def _lies_on(intersection: NDArray[np.float64], patch_area: Lengths, box_area: Lengths) -> NDArray[np.bool_]:
    """The rule; a box without area is hit by nothing."""
    hit: NDArray[np.bool_] = (intersection > 0) & (2 * intersection >= np.minimum(patch_area, box_area))
    return hit


def on_box(patches: ArrayLike, boxes: ArrayLike) -> NDArray[np.bool_]:
    """Patches [N, 4] and boxes [M, 4] of one image (x, y, width, height) -> does patch n lie on box m: [N, M]."""
    patch = np.asarray(patches, dtype=np.float64).reshape(-1, 1, 4)
    box = np.asarray(boxes, dtype=np.float64).reshape(1, -1, 4)
    across = _overlap(patch[..., 0], patch[..., 2], box[..., 0], box[..., 2])
    down = _overlap(patch[..., 1], patch[..., 3], box[..., 1], box[..., 3])
    return _lies_on(across * down, patch[..., 2] * patch[..., 3], box[..., 2] * box[..., 3])  # [N, M]


def chance(height: int, width: int, size_y: int, size_x: int, boxes: ArrayLike) -> float:
    """Exact share (0 to 1) of all windows of an image, stride 1, that lie on at least one of the boxes [M, 4].

    Windows are size_y x size_x pixels, clipped to the image; boxes are x, y, width, height in its pixels.
    """
    size_y, size_x = min(size_y, height), min(size_x, width)
    tops, lefts = np.arange(height - size_y + 1.0), np.arange(width - size_x + 1.0)
    hit = np.zeros((len(tops), len(lefts)), dtype=bool)
    for x, y, box_width, box_height in np.asarray(boxes, dtype=np.float64).reshape(-1, 4):
        intersection = np.outer(_overlap(tops, size_y, y, box_height), _overlap(lefts, size_x, x, box_width))
        hit |= _lies_on(intersection, size_y * size_x, box_width * box_height)
    return float(hit.mean())

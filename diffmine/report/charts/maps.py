"""Places of a label's images and typical patches -> a map.

All images are grey, and typical patches lie over them in colour; the size of a dot is a share of its own group.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import TypeAlias

import numpy as np

from diffmine.report.charts import svg
from diffmine.report.charts.facets import Facets, Ids, countries
from diffmine.report.rendering import asset

_NORTH, _SOUTH = 84.0, -57.0  # degrees that a map of the world shows where nothing lies beyond
_PART, _LEAST = (80.0, 45.0), 24.0  # degrees to the east and north that a map of a part may hold; how many it shows
_PART_HEIGHT = 190
_GRAIN = 0.2  # units to which the land is rounded
_FRAME = 100  # units around a map
_DOTS = 400
_CELLS = (0.5, 3, 4, 6, 8, 12, 16, 24)  # units: the places in a square of this side are one dot
_LARGEST, _SMALLEST = 12.0, 1.3  # radius of a dot that is all of a group; of one that can just be seen

Project: TypeAlias = Callable[[np.ndarray], np.ndarray]  # lon, lat in degrees [N, 2] -> x, y in units [N, 2]


def map_svg(facets: Facets, images: Ids, typical: Ids) -> str | None:
    """Map of the part of the world where a label's images are; None where no place is known.

    Args:
        images: the label's images.
        typical: the image of each of its typical patches; an image comes as often as it has any.
    """
    rows, best = (rows[np.isfinite(facets.lon[rows])] for rows in map(facets.rows, (images, typical)))
    if not len(rows) + len(best):
        return None
    groups = [np.stack([facets.lon[of], facets.lat[of]], axis=1).astype(np.float64) for of in (rows, best)]
    project, height = _view(np.concatenate(groups))
    land = f'<path class="land" fill-rule="evenodd" transform="scale({_GRAIN})" d="{_land(project, height)}"/>'
    dots = _dots([project(group) for group in groups])
    names = svg.legend(svg.groups(len(rows), len(images)), height + 8)
    body = f'<svg width="{svg.WIDTH}" height="{height}">{land}{dots}</svg>{names}'
    return svg.chart("map", svg.WIDTH, height + svg.LEGEND, _where(facets, rows, best, len(images)), body)


def _where(facets: Facets, rows: np.ndarray, best: np.ndarray, images: int) -> str:
    """What a map shows, in words."""
    of_images, of_best = (svg.finite(facets.country[group]).astype(int) for group in (rows, best))
    text = svg.counted(len(rows), images)
    if not len(of_images):
        places = [_extent(facets.lon[group], facets.lat[group]) for group in (rows, best) if len(group)]
        return f"{text} {'; typical patches '.join(places)}"
    kinds = len(np.unique(of_images))
    text += f" in {kinds} {'country' if kinds == 1 else 'countries'}"
    if not len(of_best):
        return text
    shares = np.bincount(of_best) / len(of_best)
    most = [i for i in np.argsort(-shares, kind="stable")[:3] if shares[i] >= min(0.05, shares.max())]
    named = ", ".join(f"{countries().names[i]} ({svg.percent(shares[i])})" for i in most)
    return f"{text}; typical patches {svg.often(shares)}from {named}"


def _extent(lon: np.ndarray, lat: np.ndarray) -> str:
    """Between which parallels and meridians places lie."""
    south, north = (f"{abs(v):.0f}° {'S' if v < 0 else 'N'}" for v in (lat.min(), lat.max()))
    west, east = (f"{abs(v):.0f}° {'W' if v < 0 else 'E'}" for v in (lon.min(), lon.max()))
    return f"from {south} to {north}, {west} to {east}"


def _view(places: np.ndarray) -> tuple[Project, int]:
    """Projection to units, and the height of the map: the world, or a part where all places [N, 2] lie in one."""
    (west, south), (east, north) = places.min(axis=0), places.max(axis=0)
    middle = np.array([(west + east) / 2, (south + north) / 2])
    stretch = np.array([max(math.cos(math.radians(middle[1])), 0.1), 1])
    extent = np.array([east - west, north - south]) * stretch
    if extent[0] <= _PART[0] and extent[1] <= _PART[1]:
        size = np.array([svg.WIDTH, _PART_HEIGHT])
        scale = min(*(size / (1.25 * extent + 1e-9)), _PART_HEIGHT / _LEAST)
        offset = size / 2
        return lambda degrees: (degrees - middle) * stretch * [scale, -scale] + offset, _PART_HEIGHT
    border = _natural_earth(np.array([[180, 0], [0, max(north, _NORTH)], [0, min(south - 3, _SOUTH)]]))
    scale = svg.WIDTH / 2 / border[0, 0]
    top, bottom = border[1:, 1]
    corner = np.array([svg.WIDTH / 2, scale * top])
    return lambda degrees: _natural_earth(degrees) * [scale, -scale] + corner, round(scale * (top - bottom))


def _natural_earth(degrees: np.ndarray) -> np.ndarray:
    """Lon, lat [N, 2] -> x to the east, y to the north [N, 2] of the Natural Earth projection (Šavrič et al., 2011)."""
    lon, lat = np.radians(degrees).T
    p = lat**2
    x = lon * (0.8707 + p * (-0.131979 + p * (-0.013791 + p**3 * (0.003971 - 0.001529 * p))))
    y = lat * (1.007226 + p * (0.015085 + p**2 * (-0.044475 + 0.028874 * p - 0.005916 * p**2)))
    return np.stack([x, y], axis=1)


@cache
def _rings() -> list[np.ndarray]:
    """Outlines of the land, [N, 2] lon, lat."""
    lines = [line for line in asset("land.txt").decode().splitlines() if not line.startswith("#")]
    return [np.cumsum(np.array(line.split(), np.int64).reshape(-1, 2), axis=0) / 10 for line in lines]


def _land(project: Project, height: int) -> str:
    """The land on a map as a path in steps of `_GRAIN`.

    What lies beyond the map is pulled to a frame around it, so far off that no line between two points there is seen.
    """
    low, high = -_FRAME, np.array([svg.WIDTH, height]) + _FRAME
    path = []
    for ring in map(project, _rings()):
        if (ring.max(axis=0) < 0).any() or (ring.min(axis=0) > (svg.WIDTH, height)).any():
            continue
        points = corners(np.rint(np.clip(ring, low, high) / _GRAIN).astype(np.int64))
        if len(points) > 2 and np.ptp(points, axis=0).all():
            start, *steps = np.diff(points, axis=0, prepend=0).tolist()
            path.append(f"M{start[0]} {start[1]}l{' '.join(f'{x} {y}' for x, y in steps)}z".replace(" -", "-"))
    return "".join(path)


def corners(ring: np.ndarray) -> np.ndarray:
    """A ring int [N, 2] without repeated points, and without those between two on one line along an axis."""
    ring = ring[(ring != np.roll(ring, 1, axis=0)).any(axis=1)]
    between = (ring == np.roll(ring, 1, axis=0)) & (ring == np.roll(ring, -1, axis=0))
    return ring[~between.any(axis=1)]


def _dots(groups: Sequence[np.ndarray]) -> str:
    """Dots of images and of typical patches, given as x, y [N, 2]; where there are too many, near ones share a dot."""
    for cell in _CELLS:
        dots = [_binned(points, cell) for points in groups]
        if sum(len(places) for places, _ in dots) <= _DOTS:
            break
    most = max(shares.max(initial=0) for _, shares in dots)
    scale = max(_LARGEST, 0.45 * cell / math.sqrt(most))  # in shared dots, the largest fills its square
    layers = []
    for kind, (places, shares) in zip(("images", "typical"), dots, strict=True):
        radius = np.maximum(scale * np.sqrt(shares), _SMALLEST)
        order = np.lexsort((places[:, 0], places[:, 1], -shares))  # small ones on top
        drawn = np.column_stack([places, radius])[order].tolist()
        circles = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}"/>' for x, y, r in drawn)
        layers.append(f'<g class="{kind}">{circles}</g>')
    return "".join(layers)


def _binned(points: np.ndarray, cell: float) -> tuple[np.ndarray, np.ndarray]:
    """Points [N, 2] -> means [K, 2] of those in one square each, and their shares [K]."""
    column, row = np.floor(points / cell).astype(np.int64).T
    _, square, counts = np.unique(row * 100_000 + column, return_inverse=True, return_counts=True)
    sums = np.stack([np.bincount(square, axis, len(counts)) for axis in points.T], axis=1)
    return sums / counts[:, None], counts / max(len(points), 1)

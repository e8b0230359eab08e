"""world-atlas, i18n-iso-countries -> diffmine/report/assets/land.txt and countries.csv: what the report's maps need.

    npm pack world-atlas@2.0.2 i18n-iso-countries@7.14.0        # unpack each into a folder of its own
    python scripts/make_land.py world-atlas i18n-iso-countries

Land and borders: Natural Earth 4.1 (public domain), as TopoJSON by world-atlas (ISC licence, Michael Bostock).
Codes and English names: ISO 3166-1 as listed by i18n-iso-countries (MIT licence, (c) 2016 widdix GmbH).
"""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

from diffmine.report.charts.maps import corners

ASSETS = Path(__file__).parents[1] / "diffmine" / "report" / "assets"
TOLERANCE = 0.08  # degrees that the outline may move
# Parts of other countries in Natural Earth, or too small for it.
POINTS = {
    "BQ": (-68.3, 12.2), "BV": (3.4, -54.4), "CC": (96.8, -12.2), "CX": (105.6, -10.5), "GF": (-53.0, 4.0),
    "GP": (-61.5, 16.2), "MQ": (-61.0, 14.6), "RE": (55.5, -21.1), "SJ": (16.0, 78.6), "TK": (-171.8, -9.2),
    "YT": (45.2, -12.8),
}  # fmt: skip
NAMES = {  # where the atlas is older than the name, or both sources are clumsy
    "BQ": "Caribbean Netherlands", "CD": "DR Congo", "FK": "Falkland Islands", "MK": "North Macedonia",
    "SZ": "Eswatini", "US": "United States", "VG": "British Virgin Islands", "VI": "US Virgin Islands",
}  # fmt: skip
OTHER_NAMES = {
    "CD": ["DRC"], "CZ": ["Czech Rep."], "MM": ["Burma"], "MO": ["Macau"], "SZ": ["Swaziland"], "TL": ["East Timor"],
    "VA": ["Vatican City", "Holy See"], "VN": ["Viet Nam"], "XK": ["XKX"],
}  # fmt: skip
Json = dict[str, Any]


def polygons(topology: Json, geometry: Json) -> list[list[np.ndarray]]:
    """Of a TopoJSON geometry; each is its outer ring and its holes, float [N, 2] of lon, lat.

    A ring that crosses the 180th meridian goes on beyond it; one around the pole is closed along it.
    """
    scale, translate = (np.array(topology["transform"][key]) for key in ("scale", "translate"))

    def arc(index: int) -> np.ndarray:
        points = np.cumsum(topology["arcs"][index if index >= 0 else ~index], axis=0) * scale + translate
        return points if index >= 0 else points[::-1]

    def ring(indices: list[int]) -> np.ndarray:
        points = np.concatenate([arc(indices[0])[:1], *(arc(index)[1:] for index in indices)])
        points[:, 0] = np.unwrap(points[:, 0], period=360)
        if abs(points[-1, 0] - points[0, 0]) < 180:
            return points[:-1]
        return np.concatenate([points, [[points[-1, 0], -90], [points[0, 0], -90]]])

    found = [geometry["arcs"]] if geometry["type"] == "Polygon" else geometry["arcs"]
    return [[ring(indices) for indices in polygon] for polygon in found]


def simplified(line: np.ndarray, tolerance: float) -> np.ndarray:
    """Douglas and Peucker: the points [N, 2] of a line without those that lie within the tolerance of it."""
    if len(line) < 3:
        return line
    start, along = line[0], line[-1] - line[0]
    length = np.hypot(*along)
    offset = line - start
    away = np.abs(along[0] * offset[:, 1] - along[1] * offset[:, 0]) / length if length else np.hypot(*offset.T)
    far = int(away[1:-1].argmax()) + 1
    if away[far] <= tolerance:
        return line[[0, -1]]
    return np.concatenate([simplified(line[: far + 1], tolerance)[:-1], simplified(line[far:], tolerance)])


def area(ring: np.ndarray) -> float:
    """In square degrees of the equator."""
    x, y = ring[:, 0] * np.cos(np.radians(ring[:, 1].mean())), ring[:, 1]
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def middle(polygon: list[np.ndarray]) -> tuple[float, float]:
    """The point of a polygon that is farthest from its border, as far as a grid of 40 x 40 tells."""
    outer = polygon[0]
    low, high = outer.min(axis=0), outer.max(axis=0)
    steps = (np.arange(40) + 0.5) / 40
    grid = np.stack(np.meshgrid(*(low + steps[:, None] * (high - low)).T), axis=-1).reshape(-1, 2)
    inside = np.zeros(len(grid), bool)
    for ring in polygon:
        for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
            if y0 != y1:
                crosses = (grid[:, 1] < y0) != (grid[:, 1] < y1)
                inside ^= crosses & (grid[:, 0] < x0 + (grid[:, 1] - y0) * (x1 - x0) / (y1 - y0))
    grid = grid[inside] if inside.any() else outer  # a few metres wide
    stretch = np.array([np.cos(np.radians(outer[:, 1].mean())), 1])
    border = np.concatenate(polygon) * stretch
    nearest = np.array([((border - point) ** 2).sum(axis=1).min() for point in grid * stretch])
    lon, lat = grid[nearest.argmax()]
    return round((float(lon) + 180) % 360 - 180, 1), round(float(lat), 1)


def land(atlas: Path) -> str:
    topology = json.loads((atlas / "land-110m.json").read_text())
    lines = [
        "# Natural Earth 1:110m land, public domain; scripts/make_land.py. A ring: lon lat, then steps, in 0.1 degrees"
    ]
    found = polygons(topology, topology["objects"]["land"]["geometries"][0])
    for ring in (ring for polygon in found for ring in polygon):
        half = len(ring) // 2
        parts = [simplified(part, TOLERANCE)[:-1] for part in (ring[: half + 1], np.r_[ring[half:], ring[:1]])]
        for world in (-360, 0, 360):  # what lies beyond the 180th meridian comes back on the other side
            points = np.concatenate(parts) - [world, 0]
            points = corners(np.rint(10 * np.clip(points, [-180, -90], [180, 90])).astype(int))
            if len(points) > 2 and np.ptp(points[:, 0]):
                lines.append(" ".join(map(str, np.diff(points, axis=0, prepend=0).ravel())))
    return "\n".join(lines) + "\n"


def countries(atlas: Path, iso: Path) -> list[list[str]]:
    """Rows alpha2, alpha3, name, lon, lat, other names joined by "|"; sorted by alpha2."""
    topology = json.loads((atlas / "countries-10m.json").read_text())
    largest: dict[str, tuple[float, str, list[np.ndarray]]] = {}  # ISO number, or name where there is none
    for geometry in topology["objects"]["countries"]["geometries"]:
        name = geometry["properties"]["name"]
        polygon = max(polygons(topology, geometry), key=lambda polygon: area(polygon[0]))
        found = (area(polygon[0]), name, polygon)
        key = geometry.get("id", name)
        largest[key] = max(largest.get(key, found), found, key=lambda one: one[0])
    english = json.loads((iso / "langs" / "en.json").read_text())["countries"]
    rows: list[list[str]] = []
    for alpha2, alpha3, number, _ in sorted(json.loads((iso / "codes.json").read_text())):
        names = [english[alpha2]] if isinstance(english[alpha2], str) else english[alpha2]
        _, atlas_name, polygon = largest.get(number) or largest.get(names[0]) or (0, names[0], [])
        name = NAMES.get(alpha2) or (atlas_name if "." not in atlas_name else names[0])
        others = dict.fromkeys([*names, atlas_name, *OTHER_NAMES.get(alpha2, [])])
        point = POINTS.get(alpha2) or middle(polygon)
        rows.append([alpha2, alpha3, name, *map(str, point), "|".join(other for other in others if other != name)])
    taken = {row[2] for row in rows}  # "Congo" is one country's name and another's nickname
    return [[*row[:5], "|".join(other for other in row[5].split("|") if other not in taken)] for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("atlas", type=Path, help="unpacked world-atlas")
    parser.add_argument("iso", type=Path, help="unpacked i18n-iso-countries")
    arguments = parser.parse_args()
    (ASSETS / "land.txt").write_text(land(arguments.atlas))
    with (ASSETS / "countries.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["alpha2", "alpha3", "name", "lon", "lat", "other_names"])
        writer.writerows(countries(arguments.atlas, arguments.iso))


if __name__ == "__main__":
    main()

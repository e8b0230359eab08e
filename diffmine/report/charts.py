"""Manifest and scores -> small SVG charts: where and when a label's images are, and how its typicality is distributed.

Each says in its aria-label what it shows. Colours come from charts.css, by class. On maps and timelines all images are
grey and typical patches lie over them in colour; the size of a dot or bar is a share of its own group.
"""

import csv
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from html import escape
from importlib.resources import files as package_files
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_LON, _LAT = ("lon", "lng", "long", "longitude"), ("lat", "latitude")
_COUNTRY = ("country", "country_code", "iso", "iso2", "iso3", "iso_a2", "iso_a3")
_YEAR = ("year", "date", "decade", "period")
_MOST = 0.8  # share of the labels that must be countries or years to be taken for them
_NUMBER = r"^-?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
# 1936, 1930s, 1914-1918, 1936-05, 1936-05-02 and the time of day
_DATE = r"^(?P<year>\d{3,4})(?:\.0*|'?s|\s*[-–]\s*\d{4}|-\d\d?(?:-\d\d?(?:[ T].*)?)?)?$"
_FIRST_YEAR, _LAST_YEAR = 100, 2100  # smaller numbers are class numbers, or say that a year is missing

_WIDTH = 360  # of all charts but the small one, in their own units: on a phone a unit is about a pixel
_LEGEND, _PLOT = 18, 84  # heights: of the row that says what is what, and of bars below it
_BASE = _LEGEND + _PLOT
_IMAGES = (("images", "all images"), ("typical", "typical patches"))  # class and name
_GROUPS = ("filled", "outlined", "dashed")
_BARS = 40
_SPARK = (120, 24)

_NORTH, _SOUTH = 84.0, -57.0  # degrees that a map of the world shows where nothing lies beyond
_PART, _LEAST = (80.0, 45.0), 24.0  # degrees to the east and north that a map of a part may hold; how many it shows
_PART_HEIGHT = 190
_GRAIN = 0.2  # units to which the land is rounded
_FRAME = 100  # units around a map
_DOTS = 400
_CELLS = (0.5, 3, 4, 6, 8, 12, 16, 24)  # units: the places in a square of this side are one dot
_LARGEST, _SMALLEST = 12.0, 1.3  # radius of a dot that is all of a group; of one that can just be seen

Ids: TypeAlias = pa.Array | pa.ChunkedArray | Sequence[str]
Read = Callable[[pa.StringArray], np.ndarray]  # texts -> float32 [N], NaN where a text says nothing
Project = Callable[[np.ndarray], np.ndarray]  # lon, lat in degrees [N, 2] -> x, y in units [N, 2]


# ------------------------------------------------------------------------------------------------------ where and when


@dataclass(frozen=True)
class Facets:
    """Where and when the images of a manifest are. Arrays are float32 [N], NaN where it is not known.

    Attributes:
        image_id: string [N], sorted: the images of which anything is known.
        lon, lat: degrees; of the middle of the country where only that is known.
        country: row of countries.csv.
        year: the first one of a decade or period.
    """

    image_id: pa.Array
    lon: np.ndarray
    lat: np.ndarray
    country: np.ndarray
    year: np.ndarray

    def map_svg(self, images: Ids, typical: Ids) -> str | None:
        """Map of the part of the world where a label's images are; None where no place is known.

        Args:
            images: the label's images.
            typical: the image of each of its typical patches; an image comes as often as it has any.
        """
        rows, best = (rows[np.isfinite(self.lon[rows])] for rows in map(self._rows, (images, typical)))
        if not len(rows) + len(best):
            return None
        groups = [np.stack([self.lon[of], self.lat[of]], axis=1).astype(np.float64) for of in (rows, best)]
        project, height = _view(np.concatenate(groups))
        land = f'<path class="land" fill-rule="evenodd" transform="scale({_GRAIN})" d="{_land(project, height)}"/>'
        dots = _dots([project(group) for group in groups])
        body = f'<svg width="{_WIDTH}" height="{height}">{land}{dots}</svg>' + _legend(_IMAGES, height + 8)
        return _svg("map", _WIDTH, height + _LEGEND, self._where(rows, best, len(images)), body)

    def timeline_svg(self, images: Ids, typical: Ids) -> str | None:
        """Bars per year, or per some years, on the whole manifest's axis of time; None where no year is known.

        Args:
            images, typical: as in `map_svg`.
        """
        years, best = (_finite(self.year[self._rows(ids)]) for ids in (images, typical))
        own = np.concatenate([years, best])
        if not len(own):
            return None
        usual_first, usual_last, exact = self._calendar
        first, last = min(usual_first, int(own.min())), max(usual_last, int(own.max()))
        width = next(w for w in (1, 5, 10, 20, 50, 100) if w >= exact and (last - first) / w < _BARS)
        edges = np.arange(first // width, last // width + 2) * width
        shares = [_shares(group, edges) for group in (years, best)]
        slot = _WIDTH / (len(edges) - 1)
        bars = "".join(
            f'<path class="{kind}" d="{_bars(share / np.max(shares), slot, thick)}"/>'
            for kind, share, thick in zip(("images", "typical"), shares, (0.8, 0.36), strict=True)
        )
        shift = width / 2 if width == exact else 0  # a bar of one value has its name below its middle
        step = max(_step(last - first), exact)
        named = [first, *np.arange(first // step + 1, math.ceil(last / step)) * step, last]
        ticks = [((year - edges[0] + shift) / width * slot, _period(int(year), exact)) for year in dict.fromkeys(named)]
        text = f"{_count(len(years), len(images))} {_from_to(own, exact)}"
        if len(best):
            top = int(shares[1].argmax())
            text += f"; typical patches {_often(shares[1])}from {_period(int(edges[top]), width, 'the ')}"
            text += f" ({_percent(shares[1][top])})"
        return _svg("timeline", _WIDTH, _BASE + 18, text, _legend(_IMAGES, 6) + bars + _axis(ticks))

    @cached_property
    def _calendar(self) -> tuple[int, int, int]:
        """First and last year but for strays, and how exact years are: to 1, or to 10 where all are decades."""
        years = _finite(self.year)
        first, last = np.quantile(years, [0.001, 0.999], method="nearest")
        return int(first), int(last), 1 if first == last or (years % 10).any() else 10

    def _rows(self, ids: Ids) -> np.ndarray:
        """Where ids are, unknown ones left out. Searched by halves: to hash a million ids per label takes longer."""
        wanted = (ids if isinstance(ids, pa.Array | pa.ChunkedArray) else pa.array(ids, pa.string())).cast(pa.string())
        last = len(self.image_id) - 1
        if last < 0:
            return np.zeros(0, np.int64)
        before = np.full(len(wanted), -1)  # the last row that is known to come before the wanted one
        for step in 2 ** np.arange(len(self.image_id).bit_length())[::-1]:
            probe = np.minimum(before + step, last)
            smaller = pc.less(self.image_id.take(pa.array(probe)), wanted)
            before = np.where(_flags(smaller), probe, before)
        row = np.minimum(before + 1, last)
        return row[_flags(pc.equal(self.image_id.take(pa.array(row)), wanted))]

    def _where(self, rows: np.ndarray, best: np.ndarray, images: int) -> str:
        """What a map shows, in words."""
        countries, of_best = (_finite(self.country[group]).astype(int) for group in (rows, best))
        text = _count(len(rows), images)
        if not len(countries):
            places = [_extent(self.lon[group], self.lat[group]) for group in (rows, best) if len(group)]
            return f"{text} {'; typical patches '.join(places)}"
        kinds = len(np.unique(countries))
        text += f" in {kinds} {'country' if kinds == 1 else 'countries'}"
        if not len(of_best):
            return text
        shares = np.bincount(of_best) / len(of_best)
        most = [i for i in np.argsort(-shares, kind="stable")[:3] if shares[i] >= min(0.05, shares.max())]
        named = ", ".join(f"{_countries().names[i]} ({_percent(shares[i])})" for i in most)
        return f"{text}; typical patches {_often(shares)}from {named}"


def where_and_when(manifest: pa.Table) -> Facets:
    """Finds places and years in the pass-through columns; countries and years also in the labels.

    Names of columns are read in any case. Places are latitude and longitude in degrees, and countries as ISO 3166 codes
    or English names. Years are numbers from 100 to 2100, decades as "1930s", periods as "1914-1918" or ISO dates. What
    does not read as one is left out. Labels are looked at where no column says it; at least 80 % of them must.

    Args:
        manifest: image_id, labels and the pass-through columns.

    Returns:
        what was found, without rows where that is nothing.
    """
    columns = {name.casefold(): manifest[name] for name in reversed(manifest.column_names)}
    labels = _whole(manifest["labels"])
    lon = _column(columns, _LON, lambda texts: _degrees(texts, 180))
    lat = _column(columns, _LAT, lambda texts: _degrees(texts, 90))
    country = _column(columns, _COUNTRY, _country)
    year = _column(columns, _YEAR, lambda texts: _years(texts, _FIRST_YEAR))
    if country is None:
        country = _of_labels(labels, _country)
    if year is None:
        year = _of_labels(labels, lambda texts: _years(texts, 1000))
    if lon is None or lat is None:
        lon = lat = np.full(len(manifest), np.nan, np.float32)
    placed = np.isfinite(lon) & np.isfinite(lat)
    middle = _countries().points[np.where(np.isfinite(country), country, -1).astype(np.int16)]  # the last one is NaN
    lon, lat = np.where(placed, lon, middle[:, 0]), np.where(placed, lat, middle[:, 1])
    known = np.isfinite(lon) | np.isfinite(year)
    ids = _whole(manifest["image_id"])
    if not known.all():
        ids, lon, lat, country, year = ids.filter(pa.array(known)), lon[known], lat[known], country[known], year[known]
    if not pc.all(pc.less(ids[:-1], ids[1:])).as_py():
        order = pc.sort_indices(ids).to_numpy()
        ids, lon, lat, country, year = ids.take(order), lon[order], lat[order], country[order], year[order]
    return Facets(ids, lon, lat, country, year)


# -------------------------------------------------------------------------------------------------- text -> numbers


def _column(columns: Mapping[str, pa.ChunkedArray], names: Sequence[str], read: Read) -> np.ndarray | None:
    """The first of the named columns that says anything, float32 [N]."""
    for name in names:
        if name in columns:
            values = read(_texts(columns[name]))
            if np.isfinite(values).any():
                return values
    return None


def _texts(column: pa.ChunkedArray) -> pa.StringArray:
    """A column as text without spaces around it, nulls where its type has none."""
    try:
        plain = column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
        return pc.utf8_trim_whitespace(_whole(plain.cast(pa.string())))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return pa.nulls(len(column), pa.string())


def _whole(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array, which pyarrow would copy even where it is one."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _degrees(texts: pa.StringArray, most: float) -> np.ndarray:
    numbers = pc.if_else(pc.match_substring_regex(texts, _NUMBER), texts, None).cast(pa.float32())
    values = numbers.to_numpy(zero_copy_only=False)
    return np.where(np.abs(values) <= most, values, np.float32(np.nan))


def _years(texts: pa.StringArray, first: int) -> np.ndarray:
    found = pc.struct_field(pc.extract_regex(texts, _DATE), "year")
    values = found.cast(pa.float32()).to_numpy(zero_copy_only=False)
    return np.where((values >= first) & (values <= _LAST_YEAR), values, np.float32(np.nan))


def _country(texts: pa.StringArray) -> np.ndarray:
    rows = _countries().rows
    coded = texts.dictionary_encode()
    values = [rows.get(_plain(text), np.nan) for text in coded.dictionary.to_pylist()]
    return np.array([*values, np.nan], np.float32)[pc.fill_null(coded.indices, len(values))]


def _of_labels(labels: pa.ListArray, read: Read) -> np.ndarray:
    """What the labels say of their images: the first one that says anything; nothing unless most of several do."""
    coded = pc.list_flatten(labels).dictionary_encode()
    values = read(pc.utf8_trim_whitespace(coded.dictionary))
    found = np.full(len(labels), np.nan, np.float32)
    if len(values) > 1 and np.isfinite(values).mean() >= _MOST:
        each = values[coded.indices]
        saying = np.flatnonzero(np.isfinite(each))[::-1]  # of several values for one place numpy keeps the last
        found[pc.list_parent_indices(labels).to_numpy()[saying]] = each[saying]
    return found


@dataclass(frozen=True)
class _Countries:
    """names [K]; points float32 [K + 1, 2] lon, lat, the last one NaN; rows: a code or name, plain -> its row."""

    names: list[str]
    points: np.ndarray
    rows: dict[str, int]


@cache
def _countries() -> _Countries:
    table = list(csv.DictReader(_asset("countries.csv").splitlines()))
    rows = {
        _plain(name): number
        for number, row in enumerate(table)
        for name in (row["alpha2"], row["alpha3"], row["name"], *row["other_names"].split("|"))
        if name
    }
    points = [(float(row["lon"]), float(row["lat"])) for row in table]
    return _Countries([row["name"] for row in table], np.array([*points, (np.nan, np.nan)], np.float32), rows)


def _plain(text: str) -> str:
    """A name without case, accents, punctuation, "and" and "the"."""
    letters = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    words = re.sub(r"[\W_]+", " ", letters.casefold()).split()
    return " ".join(word for word in words if len(words) == 1 or word not in ("and", "the"))


def _asset(name: str) -> str:
    return (package_files("diffmine.report") / "assets" / name).read_text(encoding="utf-8")


# ----------------------------------------------------------------------------------------------------- typicality


def histogram_svg(groups: Mapping[str, np.ndarray]) -> str:
    """Distribution of T of up to three groups of a label's patches, each with area 1; "" where there are none.

    Args:
        groups: name -> T; drawn filled, outlined and dashed, in this order.
    """
    scores = {name: _finite(np.asarray(values, np.float64)) for name, values in groups.items()}
    kinds = dict(zip(groups, _GROUPS[: len(groups)], strict=True))
    scores = {name: values for name, values in scores.items() if len(values)}
    if not scores:
        return ""
    every = np.concatenate([[0.0], *scores.values()])
    low, high = float(every.min()), float(every.max())
    pad = 0.02 * (high - low) or 0.01
    low, high = low - pad, high + pad
    edges = np.linspace(low, high, 61)
    shares = {name: _shares(values, edges) for name, values in scores.items()}
    tallest = max(share.max() for share in shares.values())
    paths = {name: _outline(share / tallest, _WIDTH, _BASE, _PLOT) for name, share in shares.items()}
    drawn = "".join(f'<path class="{kinds[name]}" d="{path}"/>' for name, path in paths.items())
    step = _step(high - low)
    numbers = np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step
    decimals = max(0, -math.floor(math.log10(step)))
    ticks = [((n - low) / (high - low) * _WIDTH, _score(n, decimals) if abs(n) > step / 2 else "0") for n in numbers]
    zero = f'<path class="zero" d="M{-low / (high - low) * _WIDTH:.1f} {_LEGEND}V{_BASE}"/>'
    text = "; ".join(f"{name} {_summary(values)}" for name, values in scores.items())
    legend = _legend([(kinds[name], name) for name in scores], 6)
    return _svg("histogram", _WIDTH, _BASE + 18, f"T of patches: {text}", legend + drawn + zero + _axis(ticks))


def spark_svg(values: np.ndarray, low: float, high: float) -> str:
    """Distribution of a cluster's T from `low` to `high`, the label's range, with a line at zero; no text.

    Args:
        values: T of its patches; what lies outside of the range is drawn at its end.
    """
    values = _finite(np.asarray(values, np.float64))
    width, height = _SPARK
    span = high - low if high > low else 1.0
    shares = _shares(np.clip(values, low, high), np.linspace(low, low + span, 41))
    body = f'<path class="base" d="M0 {height - 0.5}H{width}"/>'
    if len(values):
        body += f'<path class="bars" d="{_outline(shares / shares.max(), width, height - 1, height - 3)}"/>'
    if low <= 0 <= high:
        body += f'<path class="zero" d="M{-low / span * width:.1f} 0V{height}"/>'
    return _svg("spark", width, height, f"T {_summary(values)}" if len(values) else "no patches", body)


# ---------------------------------------------------------------------------------------------------------- maps


def _view(places: np.ndarray) -> tuple[Project, int]:
    """Projection to units, and the height of the map: the world, or a part where all places [N, 2] lie in one."""
    (west, south), (east, north) = places.min(axis=0), places.max(axis=0)
    middle = np.array([(west + east) / 2, (south + north) / 2])
    stretch = np.array([max(math.cos(math.radians(middle[1])), 0.1), 1])
    extent = np.array([east - west, north - south]) * stretch
    if extent[0] <= _PART[0] and extent[1] <= _PART[1]:
        scale = min(_WIDTH / (1.25 * extent[0] + 1e-9), _PART_HEIGHT / (1.25 * extent[1] + 1e-9), _PART_HEIGHT / _LEAST)
        offset = np.array([_WIDTH, _PART_HEIGHT]) / 2
        return lambda degrees: (degrees - middle) * stretch * [scale, -scale] + offset, _PART_HEIGHT
    border = _natural_earth(np.array([[180, 0], [0, max(north, _NORTH)], [0, min(south - 3, _SOUTH)]]))
    scale = _WIDTH / 2 / border[0, 0]
    top, bottom = border[1:, 1]
    corner = np.array([_WIDTH / 2, scale * top])
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
    lines = [line for line in _asset("land.txt").splitlines() if not line.startswith("#")]
    return [np.cumsum(np.array(line.split(), np.int64).reshape(-1, 2), axis=0) / 10 for line in lines]


def _land(project: Project, height: int) -> str:
    """The land on a map as a path in steps of `_GRAIN`.

    What lies beyond the map is pulled to a frame around it, so far off that no line between two points there is seen.
    """
    low, high = -_FRAME, np.array([_WIDTH, height]) + _FRAME
    path = []
    for ring in map(project, _rings()):
        if (ring.max(axis=0) < 0).any() or (ring.min(axis=0) > (_WIDTH, height)).any():
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


# --------------------------------------------------------------------------------------------------------- drawing


def _svg(kind: str, width: int, height: int, label: str, body: str) -> str:
    return (
        f'<svg class="chart {kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{_text(label)}">{body}</svg>'
    )


def _bars(heights: np.ndarray, slot: float, thick: float) -> str:
    """Path of bars in slots of a width, of which they take the part `thick`; heights 0 to 1, none without any."""
    path = []
    for i in np.flatnonzero(heights):
        left, top = slot * (i + (1 - thick) / 2), _BASE - max(_PLOT * heights[i], 0.8)
        path.append(f"M{left:.1f} {_BASE}V{top:.1f}h{slot * thick:.1f}V{_BASE}z")
    return "".join(path)


def _outline(heights: np.ndarray, width: float, base: float, tall: float) -> str:
    """Path around bars that touch, `width` wide together; heights 0 to 1."""
    right = width / len(heights) * np.arange(1, len(heights) + 1)
    steps = "".join(f"V{base - tall * h:.3g}H{x:.4g}" for h, x in zip(heights, right, strict=True))
    return f"M0 {base}{steps}V{base}z"


def _axis(ticks: Sequence[tuple[float, str]]) -> str:
    """The base line with (x, text) below it, those left out that would touch the first or the last one."""
    first, last = ticks[0][0], ticks[-1][0]
    ticks = [(x, text) for x, text in ticks if x in (first, last) or min(x - first, last - x) > 40]
    parts = [f'<path class="axis" d="M0 {_BASE}H{_WIDTH}{"".join(f"M{x:.1f} {_BASE}v3" for x, _ in ticks)}"/>']
    for x, text in ticks:
        anchor, at = ("start", 0) if x < 20 else ("end", _WIDTH) if x > _WIDTH - 20 else ("middle", x)
        parts.append(f'<text x="{at:.1f}" y="{_BASE + 14}" text-anchor="{anchor}">{_text(text)}</text>')
    return "".join(parts)


def _legend(items: Sequence[tuple[str, str]], y: int) -> str:
    """Class and name of up to three kinds, in a row."""
    return "".join(
        f'<rect class="{kind}" x="{120 * i + 1}" y="{y - 4}" width="10" height="8"/>'
        f'<text x="{120 * i + 16}" y="{y + 4}">{_text(name if len(name) <= 18 else name[:17] + "…")}</text>'
        for i, (kind, name) in enumerate(items)
    )


def _text(text: str) -> str:
    """Safe in XML: escaped, and without characters that cannot be printed."""
    return escape("".join(c for c in text if c.isprintable()))


def _step(span: float) -> float:
    """1, 2 or 5 times a power of ten that goes into `span` at most seven times."""
    power = 10.0 ** math.floor(math.log10(max(span, 1e-9) / 7))
    return next(power * m for m in (1, 2, 5, 10) if span <= 7.000001 * power * m)


def _shares(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Share of the values between edges [K + 1] -> [K]; zeros where there are none."""
    return np.histogram(values, edges)[0] / max(len(values), 1)


def _finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


def _flags(values: pa.Array) -> np.ndarray:
    return np.asarray(pc.fill_null(values, False))


# ----------------------------------------------------------------------------------------------------------- words


def _count(known: int, images: int) -> str:
    total = f"{images:,} image{'s' if images != 1 else ''}"
    return total if known == images else f"{known:,} of {total}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _often(shares: np.ndarray) -> str:
    return "most often " if np.count_nonzero(shares) > 1 else ""


def _extent(lon: np.ndarray, lat: np.ndarray) -> str:
    """Between which parallels and meridians places lie."""
    south, north = (f"{abs(v):.0f}° {'S' if v < 0 else 'N'}" for v in (lat.min(), lat.max()))
    west, east = (f"{abs(v):.0f}° {'W' if v < 0 else 'E'}" for v in (lon.min(), lon.max()))
    return f"from {south} to {north}, {west} to {east}"


def _period(year: int, width: int, article: str = "") -> str:
    """A year, decade or longer period by its first year."""
    if width == 10:
        return f"{article}{year}s"
    return f"{year}" if width == 1 else f"{year} to {year + width - 1}"


def _from_to(years: np.ndarray, exact: int) -> str:
    first, last = (_period(int(year), exact, "the ") for year in (years.min(), years.max()))
    return f"from {first}" + (f" to {last}" if last != first else "")


def _score(value: float, decimals: int) -> str:
    return f"{value:+.{decimals}f}".replace("-", "−")


def _summary(values: np.ndarray) -> str:
    """Range and median of T, to three digits of the largest."""
    decimals = max(2, 2 - math.floor(math.log10(max(float(np.abs(values).max()), 1e-9))))
    low, middle, high = (_score(float(value), decimals) for value in np.quantile(values, [0, 0.5, 1]))
    return f"from {low} to {high}, median {middle}"

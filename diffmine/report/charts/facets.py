"""Manifest -> where and when its images are: places, countries and years, from its columns or its labels."""

import csv
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diffmine.report.rendering import asset

_LON, _LAT = ("lon", "lng", "long", "longitude"), ("lat", "latitude")
_COUNTRY = ("country", "country_code", "iso", "iso2", "iso3", "iso_a2", "iso_a3")
_YEAR = ("year", "date", "decade", "period")
_MOST = 0.8  # share of the labels that must be countries or years to be taken for them
_NUMBER = r"^-?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
# 1936, 1930s, c. 1936, 1914-1918, 1914–18, 1914/15, 1936-05, 1936-05-02 and the time of day
_DATE = (
    r"^(?i:(?:c|ca|circa|about)\b\.?\s*)?(?P<year>\d{3,4})"
    r"(?:\.0*|'?s|\s*[-–/]\s*(?:(?i:c|ca|circa|about)\b\.?\s*)?\d{1,4}|-\d\d?-\d\d?(?:[ T].*)?)?$"
)
_FIRST_YEAR, _LAST_YEAR = 100, 2100  # smaller numbers are class numbers, or say that a year is missing

Ids: TypeAlias = pa.Array | pa.ChunkedArray | Sequence[str]
Read = Callable[[pa.StringArray], np.ndarray]  # texts -> float32 [N], NaN where a text says nothing


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

    @cached_property
    def calendar(self) -> tuple[int, int, int]:
        """First and last year but for strays, and how exact years are: to 1, or to 10 where all are decades."""
        years = self.year[np.isfinite(self.year)]
        first, last = np.quantile(years, [0.001, 0.999], method="nearest")
        return int(first), int(last), 1 if first == last or (years % 10).any() else 10

    def rows(self, ids: Ids) -> np.ndarray:
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


def where_and_when(manifest: pa.Table) -> Facets:
    """Finds places and years in the pass-through columns; countries and years also in the labels.

    Names of columns are read in any case. Places are latitude and longitude in degrees, and countries as ISO 3166 codes
    or English names. Years are numbers from 100 to 2100, decades as "1930s", periods as "1914-1918" or ISO dates, also
    after "c.". What does not read as one is left out. Labels are looked at where no column says it; at least 80 % of
    them must.

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
    middle = countries().points[np.where(np.isfinite(country), country, -1).astype(np.int16)]  # the last one is NaN
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


def _flags(values: pa.Array) -> np.ndarray:
    return np.asarray(pc.fill_null(values, False))


def _degrees(texts: pa.StringArray, most: float) -> np.ndarray:
    numbers = pc.if_else(pc.match_substring_regex(texts, _NUMBER), texts, None).cast(pa.float32())
    values = numbers.to_numpy(zero_copy_only=False)
    return np.where(np.abs(values) <= most, values, np.float32(np.nan))


def _years(texts: pa.StringArray, first: int) -> np.ndarray:
    found = pc.struct_field(pc.extract_regex(texts, _DATE), "year")
    values = found.cast(pa.float32()).to_numpy(zero_copy_only=False)
    return np.where((values >= first) & (values <= _LAST_YEAR), values, np.float32(np.nan))


def _country(texts: pa.StringArray) -> np.ndarray:
    rows = countries().rows
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
class Countries:
    """names [K]; points float32 [K + 1, 2] lon, lat, the last one NaN; rows: a code or name, plain -> its row."""

    names: list[str]
    points: np.ndarray
    rows: dict[str, int]


@cache
def countries() -> Countries:
    table = list(csv.DictReader(asset("countries.csv").decode().splitlines()))
    rows = {
        _plain(name): number
        for number, row in enumerate(table)
        for name in (row["alpha2"], row["alpha3"], row["name"], *row["other_names"].split("|"))
        if name
    }
    points = [(float(row["lon"]), float(row["lat"])) for row in table]
    return Countries([row["name"] for row in table], np.array([*points, (np.nan, np.nan)], np.float32), rows)


def _plain(text: str) -> str:
    """A name without case, accents, punctuation, "and" and "the"."""
    letters = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    words = re.sub(r"[\W_]+", " ", letters.casefold()).split()
    return " ".join(word for word in words if len(words) == 1 or word not in ("and", "the"))

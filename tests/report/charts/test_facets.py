"""What is read from a manifest: places, countries and years."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from drawn import manifest

from diffmine.report.charts.facets import where_and_when
from diffmine.report.charts.maps import map_svg
from diffmine.report.charts.timeline import timeline_svg


def known(values: np.ndarray) -> list[float]:
    return values[np.isfinite(values)].tolist()


@pytest.mark.parametrize("lat", ["lat", "latitude", "Lat", "LATITUDE"])
@pytest.mark.parametrize("lon", ["lon", "lng", "long", "longitude", "Lng", "Longitude"])
def test_every_spelling_of_a_place(lat: str, lon: str) -> None:
    facets = where_and_when(manifest(**{lat: [48.5, -33.0], lon: [2.25, 151.0]}))
    assert facets.lat.tolist() == [48.5, -33.0]
    assert facets.lon.tolist() == [2.25, 151.0]


def test_junk_among_places_is_left_out() -> None:
    lat = ["48.5", " -33 ", "1e1", "n/a", "", None, "91", "12,5", "nan", "7.", "<b>", "5"]
    lon = ["2.25", "151", "-.5", "1", "1", "1", "1", "1", "1", "8", "1", "181"]
    facets = where_and_when(manifest(lat=lat, lon=lon))
    assert facets.image_id.to_pylist() == ["a000", "a001", "a002", "a009"]
    assert facets.lat.tolist() == [48.5, -33.0, 10.0, 7.0]
    assert facets.lon.tolist() == [2.25, 151.0, -0.5, 8.0]


def test_a_latitude_alone_is_no_place() -> None:
    assert map_svg(where_and_when(manifest(lat=[1.0, 2.0])), ["a000"], []) is None


COUNTRY_COLUMNS = ["country", "country_code", "iso", "iso2", "iso3", "iso_a2", "iso_a3", "Country"]


@pytest.mark.parametrize("column", COUNTRY_COLUMNS)
def test_every_spelling_of_a_country(column: str) -> None:
    names = ["FR", "fra", "France", "  FRANCE", "NA", "DE", "Narnia", None]
    facets = where_and_when(manifest(**{column: names}))
    france = facets.country[0]
    assert len(facets.image_id) == 6
    assert facets.country[:4].tolist() == [france] * 4
    assert facets.lon[:4].tolist() == [facets.lon[0]] * 4
    assert facets.lat[4] < 0 < facets.lat[5]  # "NA" is Namibia


@pytest.mark.parametrize(
    "names",
    [
        ("US", "USA", "united_states", "United States of America", "U.S.A."),
        ("GB", "UK", "united kingdom", "Great Britain"),
        ("CI", "Côte d'Ivoire", "cote d’ivoire", "Ivory Coast"),
        ("BA", "Bosnia & Herzegovina", "bosnia-and-herzegovina"),
        ("GM", "The Gambia", "gambia"),
        ("AND", "AD", "andorra"),
        ("CD", "DR Congo", "Democratic Republic of the Congo"),
        ("TR", "Türkiye", "Turkey"),
    ],
)
def test_names_of_one_country(names: Sequence[str]) -> None:
    found = where_and_when(manifest(country=list(names))).country
    assert len(found) == len(names)
    assert len(set(found.tolist())) == 1


def test_congo_is_not_dr_congo() -> None:
    assert len(set(where_and_when(manifest(country=["Congo", "DR Congo"])).country.tolist())) == 2


def test_labels_are_countries_where_most_of_them_are() -> None:
    names = ["France", "japan", "BR", "ZAF", "elsewhere"]
    assert len(known(where_and_when(manifest(names)).country)) == 4
    assert not len(where_and_when(manifest([*names, "nowhere"])).image_id)
    assert not len(where_and_when(manifest(["turkey", "turkey"])).image_id)  # one label says nothing of where


def test_a_column_comes_before_the_labels() -> None:
    facets = where_and_when(manifest(["France", "Japan"], country=["Japan", "Japan"]))
    assert len(set(facets.country.tolist())) == 1


def test_film_speeds_are_no_countries() -> None:
    facets = where_and_when(manifest(["France", "Japan"], iso=[100, 400]))
    assert len(set(facets.country.tolist())) == 2


def test_an_image_with_several_labels_has_its_first_country() -> None:
    facets = where_and_when(manifest([["France", "Japan"], ["Japan"], ["France"]]))
    assert facets.country[0] == facets.country[2] != facets.country[1]


def test_a_country_stands_in_for_a_missing_place() -> None:
    facets = where_and_when(manifest(lat=[48.5, None], lon=[2.25, None], country=["FR", "Japan"]))
    assert facets.lat[0] == 48.5
    assert 34 < facets.lat[1] < 38


@pytest.mark.parametrize("column", ["year", "date", "decade", "period", "Year"])
@pytest.mark.parametrize(
    ("values", "years"),
    [
        ([1936, 0, 7, 2101, 850, None], [1936, 850]),
        ([1936.0, float("nan")], [1936]),
        (["1936", " 1936 ", "36", "", "after 1936", "16th century", "c 12", "cat 1936"], [1936, 1936]),
        (["1930s", "1930's", "1914-1918", "1914 – 1918"], [1930, 1930, 1914, 1914]),
        (["c. 1565", "c.1565", "Ca 1565", "circa 1560s", "c. 1597–c. 1600"], [1565, 1565, 1565, 1560, 1597]),
        (["1519–20", "1519-20", "1475/1500", "1434/35", "1605/6"], [1519, 1519, 1475, 1434, 1605]),
        (["1936-05-02", "1936-05", "1936-05-02T10:00:00Z", "02.05.1936"], [1936, 1936, 1936]),
        (pa.array([-12_000, None], pa.date32()), [1937]),
        (pa.array([0, None], pa.timestamp("s")), [1970]),
        (pa.array(["1936", "1930s"]).dictionary_encode(), [1936, 1930]),
    ],
)
def test_every_spelling_of_a_year(column: str, values: Any, years: list[int]) -> None:
    assert where_and_when(manifest(**{column: values})).year.tolist() == years


@pytest.mark.parametrize("labels", [["1930s", "1940s"], ["1936", "1940", "1941", "1942", "undated"]])
def test_labels_are_years_where_most_of_them_are(labels: list[str]) -> None:
    assert known(where_and_when(manifest(labels)).year) == [int(label[:4]) for label in labels if label[0] == "1"]


@pytest.mark.parametrize("labels", [["1", "2", "3"], ["101", "102"], ["3001", "3002"], ["1930s", "old", "new"]])
def test_class_numbers_are_no_years(labels: list[str]) -> None:
    assert not len(where_and_when(manifest(labels)).image_id)


@pytest.mark.parametrize("values", [[[1, 2], [3]], [b"\xff", b"\xfe"], [True, False], [None, None], [{"a": 1}, None]])
def test_columns_of_any_type_are_read(values: list[Any]) -> None:
    table = manifest(**dict.fromkeys(["lat", "lon", "country", "year"], values))
    assert not len(where_and_when(table).image_id)


@pytest.mark.parametrize("table", [manifest(), manifest(["arch", "door"]), manifest(year=["?"], country=["?"])])
def test_nothing_known_gives_nothing(table: pa.Table) -> None:
    facets = where_and_when(table)
    assert map_svg(facets, table["image_id"], ["a000"]) is None
    assert timeline_svg(facets, table["image_id"], ["a000"]) is None


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 100])
def test_images_are_found_in_any_order(count: int) -> None:
    years = np.arange(1800, 1800 + count)
    table = manifest(year=years)
    facets = where_and_when(table.take(np.random.default_rng(0).permutation(count)))
    assert facets.year[facets.rows(table["image_id"])].tolist() == years.tolist()
    assert facets.rows(["a000", "a000", "", "zzz", "a", "a0000", "é"]).tolist() == [0, 0]

"""Charts of the report: what is read from a manifest, where it is drawn, and that it is safe to put into a page."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from diffmine.report.charts import Facets, histogram_svg, spark_svg, where_and_when

HOSTILE = [
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "&amp;",
    "\u202eمئذنة\x00\x1b",
    "x" * 10_000,
]
ASSETS = files("diffmine.report") / "assets"


def manifest(labels: Sequence[str] | Sequence[list[str]] = (), **columns: Any) -> pa.Table:
    """Images a000, a001 ... with these columns; the label is "x" where none is given."""
    count = len(labels) or len(next(iter(columns.values()), ()))
    lists = [[label] if isinstance(label, str) else label for label in labels or ["x"] * count]
    ids = pa.array([f"a{i:03d}" for i in range(count)], pa.string())
    return pa.table({"image_id": ids, "labels": pa.array(lists, pa.list_(pa.string())), **columns})


def known(values: np.ndarray) -> list[float]:
    return values[np.isfinite(values)].tolist()


def parsed(svg: str | None) -> ET.Element:
    """A chart as an element, checked for what every chart must be."""
    assert svg is not None
    root = ET.fromstring(svg)
    assert root.get("role") == "img"
    assert root.get("aria-label")
    assert "style" not in svg
    assert "script" not in {element.tag for element in root.iter()}
    assert len(svg) < 40_000
    numbers = " ".join(v for element in root.iter() for key, v in element.items() if key not in ("class", "aria-label"))
    assert not re.search(r"nan|inf|e-|\.\d\d", numbers)
    return root


def label_of(svg: str | None) -> str:
    return parsed(svg).get("aria-label", "")


def circles(svg: str | None, kind: str) -> np.ndarray:
    """x, y, radius of the dots of a kind, [K, 3]."""
    found = parsed(svg).findall(f".//g[@class='{kind}']/circle")
    return np.array([[float(c.get(key, "")) for key in ("cx", "cy", "r")] for c in found]).reshape(-1, 3)


def bars(svg: str | None, kind: str) -> np.ndarray:
    """Left side and height of the bars of a kind, [K, 2]."""
    path = parsed(svg).find(f"path[@class='{kind}']")
    assert path is not None
    found = re.findall(r"M([\d.]+) (\d+)V([\d.]+)", path.get("d", ""))
    return np.array([[float(left), float(base) - float(top)] for left, base, top in found]).reshape(-1, 2)


def texts(svg: str | None) -> list[str]:
    return [element.text or "" for element in parsed(svg).iter("text")]


# ----------------------------------------------------------------------------------------------------------- reading


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
    assert where_and_when(manifest(lat=[1.0, 2.0])).map_svg(["a000"], []) is None


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
        (["1936", " 1936 ", "c. 1936", "36", ""], [1936, 1936]),
        (["1930s", "1930's", "1914-1918", "1914 – 1918"], [1930, 1930, 1914, 1914]),
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
    assert facets.map_svg(table["image_id"], ["a000"]) is None
    assert facets.timeline_svg(table["image_id"], ["a000"]) is None


# ------------------------------------------------------------------------------------------------------------ finding


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 100])
def test_images_are_found_in_any_order(count: int) -> None:
    years = np.arange(1800, 1800 + count)
    table = manifest(year=years)
    facets = where_and_when(table.take(np.random.default_rng(0).permutation(count)))
    assert facets.year[facets._rows(table["image_id"])].tolist() == years.tolist()
    assert facets._rows(["a000", "a000", "", "zzz", "a", "a0000", "é"]).tolist() == [0, 0]


def test_bytes_are_the_same_for_any_order_and_kind_of_list() -> None:
    rng = np.random.default_rng(0)
    table = manifest(lat=rng.uniform(-60, 70, 900), lon=rng.uniform(-170, 170, 900), year=rng.integers(1900, 2000, 900))
    mixed = table.take(rng.permutation(900))
    ids = table["image_id"].to_pylist()
    one, other = where_and_when(table), where_and_when(mixed)
    assert one.map_svg(table["image_id"], ids[:30]) == other.map_svg(
        mixed["image_id"].to_pylist(), pa.array(ids[29::-1])
    )
    assert one.timeline_svg(ids, ids[:30]) == other.timeline_svg(mixed["image_id"], ids[29::-1])


# --------------------------------------------------------------------------------------------------------------- maps


def test_dots_lie_where_the_images_are() -> None:
    """A part of the world: 190 units for 24 degrees, so 20 of them are 158.3 wide about the middle, 180, 95."""
    facets = where_and_when(manifest(lat=[0.0, 0.0, 6.0, -6.0], lon=[-10.0, 10.0, 0.0, 0.0]))
    svg = facets.map_svg(["a000", "a001", "a002", "a003"], ["a001"])
    half, up = 10 * 190 / 24, 6 * 190 / 24
    expected = [[180, 95 - up], [180 - half, 95], [180 + half, 95], [180, 95 + up]]
    np.testing.assert_allclose(circles(svg, "images")[:, :2], expected, atol=0.06)
    np.testing.assert_allclose(circles(svg, "typical")[:, :2], [[180 + half, 95]], atol=0.06)


def test_the_world_is_drawn_whole_where_images_are_far_apart() -> None:
    facets = where_and_when(manifest(lat=[0.0, 0.0, 0.0, -80.0], lon=[-180.0, 0.0, 90.0, 0.0]))
    found = circles(facets.map_svg(["a000", "a001", "a002"], []), "images")
    assert found[:, 0].tolist() == [0, 180, 270]
    assert len(set(found[:, 1])) == 1
    height = [int((parsed(facets.map_svg(ids, [])).get("viewBox") or "").split()[3]) for ids in (["a000", "a001"],
              ["a000", "a001", "a003"])]  # fmt: skip
    assert height[1] > height[0]  # the Antarctic is shown where images are there


def test_area_is_the_share_of_the_own_group() -> None:
    facets = where_and_when(manifest(lat=[0.0, 0.0, 0.0, 9.0], lon=[0.0, 0.0, 0.0, 9.0]))
    svg = facets.map_svg(["a000", "a001", "a002", "a003"], ["a003"] * 5)
    assert circles(svg, "images")[:, 2].tolist() == [10.4, 6.0]  # 12 times the root of 3/4 and 1/4
    assert circles(svg, "typical")[:, 2].tolist() == [12.0]


def test_many_places_share_dots_that_add_up() -> None:
    rng = np.random.default_rng(0)
    table = manifest(lat=rng.uniform(-15, 15, 5000), lon=rng.uniform(-30, 30, 5000))
    svg = where_and_when(table).map_svg(table["image_id"], table["image_id"][:500])
    groups = [circles(svg, kind) for kind in ("images", "typical")]
    assert 50 < sum(map(len, groups)) <= 400
    areas = [float((dots[:, 2] ** 2).sum()) for dots in groups]
    assert areas[0] == pytest.approx(areas[1], rel=0.05)  # each group's shares add up to 1


def test_all_countries_fit() -> None:
    names = [line.split(",")[0] for line in (ASSETS / "countries.csv").read_text().splitlines()[1:]]
    table = manifest(names)
    svg = where_and_when(table).map_svg(table["image_id"], table["image_id"][:20])
    assert label_of(svg).startswith("250 images in 250 countries; typical patches most often from Andorra (5 %), ")
    assert len(circles(svg, "images")) >= 245


def test_a_map_says_what_it_shows() -> None:
    countries = ["France"] * 6 + ["Belgium"] * 3 + ["Peru", "?"]
    table = manifest(country=countries)
    facets, ids = where_and_when(table), table["image_id"].to_pylist()
    said = label_of(facets.map_svg(ids, [ids[0]] * 3 + [ids[7]]))
    assert said == "10 of 11 images in 3 countries; typical patches most often from France (75 %), Belgium (25 %)"
    assert label_of(facets.map_svg(ids[:1], [])) == "1 image in 1 country"
    assert label_of(facets.map_svg(ids[:2], ids[:2])).endswith("in 1 country; typical patches from France (100 %)")
    places = where_and_when(manifest(lat=[10.0, -20.0], lon=[-5.0, 30.0]))
    said = label_of(places.map_svg(["a000", "a001"], ["a001"]))
    assert said == "2 images from 20° S to 10° N, 5° W to 30° E; typical patches from 20° S to 20° S, 30° E to 30° E"


def rings() -> list[np.ndarray]:
    lines = (ASSETS / "land.txt").read_text().splitlines()[1:]
    return [np.cumsum(np.array(line.split(), int).reshape(-1, 2), axis=0) / 10 for line in lines]


@pytest.mark.parametrize(
    ("lon", "lat", "land"),
    [(2.3, 48.8, True), (-60.0, -10.0, True), (134.0, -25.0, True), (179.0, 67.5, True), (-175.0, 66.5, True),
     (0.0, -85.0, True), (-40.0, 35.0, False), (51.0, 42.0, False), (-179.9, 0.0, False), (80.0, -30.0, False)],
)  # fmt: skip
def test_land_is_land(lon: float, lat: float, land: bool) -> None:
    """Crossings of a ray to the east; 51, 42 is in the Caspian Sea."""
    crossings = 0
    for ring in rings():
        (x0, y0), (x1, y1) = ring.T, np.roll(ring, -1, axis=0).T
        across = (y0 > lat) != (y1 > lat)
        crossings += int((lon < x0 + (lat - y0) * (x1 - x0) / np.where(across, y1 - y0, 1))[across].sum())
    assert crossings % 2 == land


def test_the_assets_are_small_and_sound() -> None:
    assert (ASSETS / "land.txt").read_bytes().__len__() < 30_000
    for ring in rings():
        assert (np.abs(ring) <= (180, 90)).all()
    facets = where_and_when(manifest(iso3=["RUS", "FJI", "NZL", "USA", "CHL"]))
    inside = [(27, 180, 41, 77), (177, 180, -19, -16), (166, 179, -48, -34), (-125, -67, 25, 49), (-76, -67, -56, -17)]
    for lon, lat, (west, east, south, north) in zip(facets.lon, facets.lat, inside, strict=True):
        assert west < lon < east
        assert south < lat < north


# ---------------------------------------------------------------------------------------------------------- timelines


def timeline(years: Sequence[int | str], typical: Sequence[int] = ()) -> str | None:
    table = manifest(year=years)
    ids = table["image_id"].to_pylist()
    return where_and_when(table).timeline_svg(ids, [ids[i] for i in typical])


def test_bars_are_shares_of_their_group() -> None:
    svg = timeline([1990, 1990, 1990, 1993], [3])
    np.testing.assert_allclose(bars(svg, "images"), [[9, 63], [279, 21]], atol=0.06)  # 4 slots of 90, 84 high
    np.testing.assert_allclose(bars(svg, "typical"), [[298.8, 84]], atol=0.06)
    assert texts(svg)[2:] == ["1990", "1991", "1992", "1993"]
    assert label_of(svg) == "4 images from 1990 to 1993; typical patches from 1993 (100 %)"


@pytest.mark.parametrize(
    ("first", "last", "bins"), [(1990, 1990, 1), (1980, 2010, 31), (1902, 1998, 20), (1700, 2000, 31), (100, 2100, 21)]
)
def test_there_are_few_bars_however_long_it_takes(first: int, last: int, bins: int) -> None:
    svg = timeline(list(range(first, last + 1)))
    heights = bars(svg, "images")[:, 1]
    assert len(heights) == bins
    assert heights.max() == pytest.approx(84)
    assert {str(first), str(last)} <= set(texts(svg))


def test_decades_are_named_as_decades() -> None:
    svg = timeline(["1930s", "1950s", "1950s", "1960s"], [1, 2, 3])
    assert texts(svg)[2:] == ["1930s", "1940s", "1950s", "1960s"]
    assert label_of(svg) == "4 images from the 1930s to the 1960s; typical patches most often from the 1950s (67 %)"


def test_all_labels_have_the_same_axis_and_strays_do_not_stretch_it() -> None:
    table = manifest(year=[101, *range(1900, 2000), *[1950] * 4000])
    facets, ids = where_and_when(table), table["image_id"].to_pylist()
    one, other = (texts(facets.timeline_svg([ids[i]], [])) for i in (30, 60))
    assert one == other
    assert "101" not in one
    assert "101" in texts(facets.timeline_svg(ids[:2], []))


# --------------------------------------------------------------------------------------------------------- typicality


def outline(svg: str, kind: str) -> np.ndarray:
    """Heights of the steps of an outline."""
    path = parsed(svg).find(f"path[@class='{kind}']")
    assert path is not None
    base, *tops = map(float, re.findall(r"(?:M0 |V)([\d.]+)", path.get("d", "")))
    return base - np.array(tops[:-1])


def test_a_histogram_tells_three_groups_apart_without_colour() -> None:
    groups = {"Most typical": np.full(30, 0.03), "Random": np.array([0.0, 0.01]), "Least typical": np.array([-0.01])}
    svg = histogram_svg(groups)
    assert [element.get("class") for element in parsed(svg).iter("rect")] == ["filled", "outlined", "dashed"]
    heights = {kind: outline(svg, kind) for kind in ("filled", "outlined", "dashed")}
    assert [sorted(h[h > 0]) for h in heights.values()] == [[84], [42, 42], [84]]  # one area each
    assert texts(svg) == ["Most typical", "Random", "Least typical", "−0.01", "0", "+0.01", "+0.02", "+0.03"]
    zero = parsed(svg).find("path[@class='zero']")
    assert zero is not None
    assert float((zero.get("d") or "").split()[0][1:]) == pytest.approx(360 * (0.01 + 0.0008) / 0.0416, abs=0.06)
    assert "Random from +0.0000 to +0.0100, median +0.0050" in label_of(svg)


def test_a_missing_group_leaves_the_others_as_they_are() -> None:
    svg = histogram_svg({"a": np.array([np.nan]), "b": np.array([0.5, 1.0])})
    assert [element.get("class") for element in parsed(svg).iter("rect")] == ["outlined"]


@pytest.mark.parametrize("groups", [{}, {"a": np.array([])}, {"a": np.array([np.nan, np.inf])}])
def test_no_scores_give_no_histogram(groups: dict[str, np.ndarray]) -> None:
    assert histogram_svg(groups) == ""


@pytest.mark.parametrize("scale", [0.0, 1e-7, 1.0, 1e4])
def test_scores_of_any_size_are_drawn(scale: float) -> None:
    values = scale * np.linspace(-1, 2, 50)
    assert outline(histogram_svg({"a": values}), "filled").max() == 84
    assert outline(spark_svg(values, values.min(), values.max()), "bars").max() == 21


def test_more_than_three_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        histogram_svg(dict.fromkeys("abcd", np.ones(3)))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_text(name: str) -> None:
    svg = histogram_svg({name: np.ones(3), "b": np.zeros(3)})
    assert len(parsed(svg).findall("text")) == len(texts(svg))
    assert {element.tag for element in parsed(svg).iter()} <= {"svg", "path", "rect", "text"}
    printable = "".join(c for c in name if c.isprintable())
    assert printable in label_of(svg)


def test_a_spark_lies_on_the_common_scale() -> None:
    svg = spark_svg(np.array([0.026, 0.076, 0.076, 9.0]), -0.1, 0.1)
    heights = outline(svg, "bars")
    assert np.flatnonzero(heights).tolist() == [25, 35, 39]  # what lies beyond is at the end
    assert heights[35] == 21
    zero = parsed(svg).find("path[@class='zero']")
    assert zero is not None
    assert (zero.get("d") or "").startswith("M60.0 ")
    assert not texts(svg)
    assert label_of(svg) == "T from +0.03 to +9.00, median +0.08"
    assert parsed(spark_svg(np.array([0.2]), 0.1, 0.3)).find("path[@class='zero']") is None
    assert label_of(spark_svg(np.array([]), 0, 1)) == "no patches"


def test_every_class_has_its_rule() -> None:
    """A class without a rule would be drawn black."""
    facets = Facets(pa.array(["a"]), *(np.array([v], np.float32) for v in (2.0, 48.0, np.nan, 1930)))
    drawn = [facets.map_svg(["a"], ["a"]), facets.timeline_svg(["a"], ["a"]), spark_svg(np.ones(3), -1, 1)]
    drawn.append(histogram_svg({"a": np.ones(3), "b": np.zeros(3), "c": -np.ones(3)}))
    shapes = {e.get("class") for svg in drawn for e in parsed(svg).iter() if e.tag in ("path", "g", "rect")}
    css = (ASSETS / "charts.css").read_text()
    assert {name for name in shapes if not re.search(rf"\.{name}\b[^}}]*\bfill:", css)} == set()

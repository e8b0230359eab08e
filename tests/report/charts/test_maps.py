"""Maps: where dots are drawn, what land is, and what a map says of itself."""

import numpy as np
import pyarrow as pa
import pytest
from drawn import ASSETS, label_of, manifest, parsed

from diffmine.report.charts.facets import where_and_when
from diffmine.report.charts.maps import map_svg
from diffmine.report.charts.timeline import timeline_svg


def circles(svg: str | None, kind: str) -> np.ndarray:
    """x, y, radius of the dots of a kind, [K, 3]."""
    found = parsed(svg).findall(f".//g[@class='{kind}']/circle")
    return np.array([[float(c.get(key, "")) for key in ("cx", "cy", "r")] for c in found]).reshape(-1, 3)


def test_bytes_are_the_same_for_any_order_and_kind_of_list() -> None:
    rng = np.random.default_rng(0)
    table = manifest(lat=rng.uniform(-60, 70, 900), lon=rng.uniform(-170, 170, 900), year=rng.integers(1900, 2000, 900))
    mixed = table.take(rng.permutation(900))
    ids = table["image_id"].to_pylist()
    one, other = where_and_when(table), where_and_when(mixed)
    again = map_svg(other, mixed["image_id"].to_pylist(), pa.array(ids[29::-1]))
    assert map_svg(one, table["image_id"], ids[:30]) == again
    assert timeline_svg(one, ids, ids[:30]) == timeline_svg(other, mixed["image_id"], ids[29::-1])


def test_dots_lie_where_the_images_are() -> None:
    """A part of the world: 190 units for 24 degrees, so 20 of them are 158.3 wide about the middle, 180, 95."""
    facets = where_and_when(manifest(lat=[0.0, 0.0, 6.0, -6.0], lon=[-10.0, 10.0, 0.0, 0.0]))
    svg = map_svg(facets, ["a000", "a001", "a002", "a003"], ["a001"])
    half, up = 10 * 190 / 24, 6 * 190 / 24
    expected = [[180, 95 - up], [180 - half, 95], [180 + half, 95], [180, 95 + up]]
    np.testing.assert_allclose(circles(svg, "images")[:, :2], expected, atol=0.06)
    np.testing.assert_allclose(circles(svg, "typical")[:, :2], [[180 + half, 95]], atol=0.06)


def test_the_world_is_drawn_whole_where_images_are_far_apart() -> None:
    facets = where_and_when(manifest(lat=[0.0, 0.0, 0.0, -80.0], lon=[-180.0, 0.0, 90.0, 0.0]))
    found = circles(map_svg(facets, ["a000", "a001", "a002"], []), "images")
    assert found[:, 0].tolist() == [0, 180, 270]
    assert len(set(found[:, 1])) == 1
    height = [int((parsed(map_svg(facets, ids, [])).get("viewBox") or "").split()[3]) for ids in (["a000", "a001"],
              ["a000", "a001", "a003"])]  # fmt: skip
    assert height[1] > height[0]  # the Antarctic is shown where images are there


def test_area_is_the_share_of_the_own_group() -> None:
    facets = where_and_when(manifest(lat=[0.0, 0.0, 0.0, 9.0], lon=[0.0, 0.0, 0.0, 9.0]))
    svg = map_svg(facets, ["a000", "a001", "a002", "a003"], ["a003"] * 5)
    assert circles(svg, "images")[:, 2].tolist() == [10.4, 6.0]  # 12 times the root of 3/4 and 1/4
    assert circles(svg, "typical")[:, 2].tolist() == [12.0]


def test_many_places_share_dots_that_add_up() -> None:
    rng = np.random.default_rng(0)
    table = manifest(lat=rng.uniform(-15, 15, 5000), lon=rng.uniform(-30, 30, 5000))
    svg = map_svg(where_and_when(table), table["image_id"], table["image_id"][:500])
    groups = [circles(svg, kind) for kind in ("images", "typical")]
    assert 50 < sum(map(len, groups)) <= 400
    areas = [float((dots[:, 2] ** 2).sum()) for dots in groups]
    assert areas[0] == pytest.approx(areas[1], rel=0.05)  # each group's shares add up to 1


def test_all_countries_fit() -> None:
    names = [line.split(",")[0] for line in (ASSETS / "countries.csv").read_text().splitlines()[1:]]
    table = manifest(names)
    svg = map_svg(where_and_when(table), table["image_id"], table["image_id"][:20])
    assert label_of(svg).startswith("250 images in 250 countries; typical patches most often from Andorra (5 %), ")
    assert len(circles(svg, "images")) >= 245


def test_a_map_says_what_it_shows() -> None:
    countries = ["France"] * 6 + ["Belgium"] * 3 + ["Peru", "?"]
    table = manifest(country=countries)
    facets, ids = where_and_when(table), table["image_id"].to_pylist()
    said = label_of(map_svg(facets, ids, [ids[0]] * 3 + [ids[7]]))
    assert said == "10 of 11 images in 3 countries; typical patches most often from France (75 %), Belgium (25 %)"
    assert label_of(map_svg(facets, ids[:1], [])) == "1 image in 1 country"
    assert label_of(map_svg(facets, ids[:2], ids[:2])).endswith("in 1 country; typical patches from France (100 %)")
    places = where_and_when(manifest(lat=[10.0, -20.0], lon=[-5.0, 30.0]))
    said = label_of(map_svg(places, ["a000", "a001"], ["a001"]))
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

"""Timelines: where bars are drawn, how many, and what they are called."""

import re
from collections.abc import Sequence

import numpy as np
import pytest
from drawn import label_of, manifest, parsed, texts

from diffmine.report.charts.facets import where_and_when
from diffmine.report.charts.timeline import timeline_svg


def bars(svg: str | None, kind: str) -> np.ndarray:
    """Left side and height of the bars of a kind, [K, 2]."""
    path = parsed(svg).find(f"path[@class='{kind}']")
    assert path is not None
    found = re.findall(r"M([\d.]+) (\d+)V([\d.]+)", path.get("d", ""))
    return np.array([[float(left), float(base) - float(top)] for left, base, top in found]).reshape(-1, 2)


def timeline(years: Sequence[int | str], typical: Sequence[int] = ()) -> str | None:
    table = manifest(year=years)
    ids = table["image_id"].to_pylist()
    return timeline_svg(where_and_when(table), ids, [ids[i] for i in typical])


def test_bars_are_shares_of_their_group() -> None:
    svg = timeline([1990, 1990, 1990, 1993], [3])
    np.testing.assert_allclose(bars(svg, "images"), [[9, 63], [279, 21]], atol=0.06)  # 4 slots of 90, 84 high
    np.testing.assert_allclose(bars(svg, "typical"), [[298.8, 84]], atol=0.06)
    assert texts(svg)[2:] == ["1990", "1991", "1992", "1993"]
    assert label_of(svg) == "4 images from 1990 to 1993; typical patches from 1993 (100 %)"


@pytest.mark.parametrize(
    ("dated", "undated", "name"),
    [(4, 0, "all images"), (1, 25, "1 of 26 images"), (1990, 10, "99 % of images"), (1, 9999, "1 of 10,000 images")],
)
def test_images_without_a_year_are_not_passed_over_in_silence(dated: int, undated: int, name: str) -> None:
    assert texts(timeline(["1990"] * dated + ["?"] * undated))[:2] == [name, "typical patches"]


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
    one, other = (texts(timeline_svg(facets, [ids[i]], [])) for i in (30, 60))
    assert one == other
    assert "101" not in one
    assert "101" in texts(timeline_svg(facets, ids[:2], []))

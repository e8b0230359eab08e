"""Distributions of T: how they are drawn, and that names stay text."""

import re

import numpy as np
import pytest
from drawn import label_of, parsed, texts

from diffmine.report.charts.histogram import histogram_svg, spark_svg

HOSTILE = [
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "&amp;",
    "\u202eمئذنة\x00\x1b",
    "x" * 10_000,
]


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


def test_the_largest_score_is_drawn() -> None:
    low, high = -0.01, 0.02
    assert low + (high - low) < high, "rounded"
    assert outline(spark_svg(np.full(3, high), low, high), "bars")[-1] == 21


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

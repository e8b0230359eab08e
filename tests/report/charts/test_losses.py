"""Courses of the loss: smoothed as they should be, and the weights that are used marked where they are."""

import re

import numpy as np
import pytest
from drawn import label_of, parsed, texts

from diffmine.report.charts.losses import smoothed, training_svg, validation_svg


def line(svg: str | None, kind: str) -> np.ndarray:
    """x, y of the points of a line, [N, 2]."""
    path = parsed(svg).find(f"path[@class='{kind}']")
    assert path is not None
    return np.array(re.findall(r"[\d.]+", path.get("d", "")), float).reshape(-1, 2)


def test_smoothing_is_a_running_mean() -> None:
    loss = np.random.default_rng(0).random(100)
    steps, mean = smoothed(loss.tolist())
    assert steps.tolist() == list(range(3, 99))  # the middles of 1 to 5, 2 to 6 ...
    assert mean == pytest.approx([loss[i : i + 5].mean() for i in range(96)])
    assert len(smoothed([1.0] * 4000)[0]) == 150
    assert [value.tolist() for value in smoothed([0.5])] == [[1], [0.5]]


def test_a_training_loss_falls_from_corner_to_corner() -> None:
    assert training_svg([1.0] * 19) is None
    svg = training_svg(np.linspace(2, 1, 400).tolist())
    points = line(svg, "outlined")
    assert len(points) == 150
    assert (np.diff(points, axis=0) >= 0).all()
    assert [points[0, 1], points[-1, 1]] == [24, 99]
    assert texts(svg)[:2] == ["1.98", "1.02"]
    assert texts(svg)[-1] == "400"
    assert label_of(svg) == "Training loss over 400 steps, smoothed: from 1.9762 to 1.0238"


def test_the_weights_that_are_used_are_marked() -> None:
    found = [{"step": step, "loss": loss, "null_loss": loss + 1} for step, loss in ((0, 4), (50, 2), (100, 3))]
    assert validation_svg(found[:1], found[0]) is None
    svg = validation_svg(found, found[1])
    assert line(svg, "curve").tolist() == [[36, 49], [198, 99], [360, 74]]  # 75 units for 3
    mark = parsed(svg).find("circle")
    assert mark is not None
    assert [float(mark.get(key, "")) for key in ("cx", "cy")] == line(svg, "curve")[1].tolist() == [198, 99]
    assert line(svg, "dashed")[0].tolist() == [36, 24]
    assert texts(svg)[:3] == ["with the label", "without", "used: step 50"]
    assert label_of(svg).endswith("lowest with it, 2.0000, at step 50")


def test_a_loss_that_never_changes_is_drawn() -> None:
    found = [{"step": step, "loss": 0.5, "null_loss": 0.5} for step in (0, 10)]
    assert np.isfinite(line(validation_svg(found, found[0]), "curve")).all()

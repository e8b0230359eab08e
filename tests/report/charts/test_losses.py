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
    assert training_svg([1.0] * 19, 19) is None
    svg = training_svg(np.linspace(2, 1, 400).tolist(), 400)
    points = line(svg, "outlined")
    assert len(points) == 150
    assert (np.diff(points, axis=0) >= 0).all()
    assert [points[0, 1], points[-1, 1]] == [24, 99]
    assert texts(svg)[:2] == ["1.976", "1.024"]
    assert texts(svg)[-1] == "400"
    assert label_of(svg) == "Training loss over 400 steps, smoothed: from 1.9762 to 1.0238"
    thinned = training_svg(np.linspace(2, 1, 400).tolist(), 800)  # every other step's
    assert np.array_equal(line(thinned, "outlined"), points)
    assert texts(thinned)[-1] == "800"


def test_the_weights_that_are_used_are_marked() -> None:
    assert validation_svg([0], [4.0], 0, "Loss") is None
    svg = validation_svg([0, 50, 100], [4.0, 2.0, 3.0], 1, "Loss")
    assert line(svg, "curve").tolist() == [[48, 24], [204, 99], [360, 61.5]]
    mark = parsed(svg).find("circle")
    assert mark is not None
    assert [float(mark.get(key, "")) for key in ("cx", "cy")] == [204, 99]
    assert texts(svg)[0] == "used: step 50"
    assert label_of(svg) == "Loss over 100 steps: from 4 to 3; the weights of step 50 are used, with 2"


def test_a_loss_that_never_changes_is_drawn() -> None:
    assert np.isfinite(line(validation_svg([0, 10], [0.5, 0.5], 0, "Loss"), "curve")).all()

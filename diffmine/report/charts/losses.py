"""Losses of finetuning -> their course over the steps: in training, and on held-out images."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from diffmine.report.charts import svg

_LEFT = 48  # units for the numbers of the axis
_POINTS = 150  # of a line, at most
_FEWEST = 20  # steps that are worth a line


def training_svg(loss: Sequence[float], steps: int) -> str | None:
    """Running mean of the training loss, of steps that lie evenly; None where there are too few."""
    if len(loss) < _FEWEST:
        return None
    at, mean = smoothed(loss)
    said = f"Training loss over {steps:,} steps, smoothed: from {mean[0]:.4f} to {mean[-1]:.4f}"
    return _drawn(said, ("outlined", at * (steps / len(loss)), mean), steps)


def validation_svg(steps: Sequence[int], values: Sequence[float], used: int, what: str) -> str | None:
    """What was measured on held-out images over the steps; None where it was measured once.

    Args:
        steps: done before each measurement.
        used: place of the one whose weights are used; it is marked.
        what: the values are.
    """
    if len(steps) < 2:
        return None
    found = np.array(values, float)
    said = (
        f"{what} over {steps[-1]:,} steps: from {found[0]:.4g} to {found[-1]:.4g}; "
        f"the weights of step {steps[used]:,} are used, with {found[used]:.4g}"
    )
    return _drawn(said, ("curve", np.array(steps), found), steps[-1], (steps[used], found[used]))


def smoothed(loss: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Places between the losses, and the running mean over 1/20 of the losses around them; both [N]."""
    width = max(1, len(loss) // 20)
    mean = np.convolve(loss, np.ones(width) / width, mode="valid")
    shown = np.linspace(0, len(mean) - 1, min(len(mean), _POINTS)).astype(int)
    return shown + (width + 1) / 2, mean[shown]


Line = tuple[str, np.ndarray, np.ndarray]  # class, steps [N], values [N]


def _drawn(said: str, line: Line, steps: int, mark: tuple[int, float] | None = None) -> str:
    """A line over the steps, with the least and the largest value beside it."""
    kind, at, values = line
    low, high = float(values.min()), float(values.max())

    def place(step: Any, value: Any) -> Any:
        up = (value - low) / (high - low or 1)
        return _LEFT + (svg.WIDTH - _LEFT) * step / steps, svg.BASE - 3 - (svg.PLOT - 9) * up

    points = "L".join(f"{x:.1f} {y:.1f}" for x, y in zip(*place(at, values), strict=True))
    body, names = f'<path class="{kind}" d="M{points}"/>', []
    if mark:
        x, y = place(*mark)
        body += f'<circle class="kept" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'
        names.append(("kept", f"used: step {mark[0]}"))
    for value in dict.fromkeys((high, low)):
        body += f'<text x="{_LEFT - 6}" y="{place(0, value)[1] + 3:.1f}" text-anchor="end">{_plain(value)}</text>'
    step = svg.round_step(steps)
    ticks = [(place(n, low)[0], f"{n:,.0f}") for n in dict.fromkeys([*np.arange(0, steps, step), steps])]
    return svg.chart("losses", svg.WIDTH, svg.BASE + 18, said, svg.legend(names, 6) + body + svg.axis(ticks, _LEFT))


def _plain(value: float) -> str:
    return f"{value:.4g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"

"""Losses of finetuning -> their course over the steps: in training, and on held-out images."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffmine.report.charts import svg

_LEFT = 36  # units for the numbers of the axis
_POINTS = 150  # of a line, at most
_FEWEST = 20  # steps that are worth a line


def training_svg(loss: Sequence[float]) -> str | None:
    """Running mean of the training loss of every step; None where there are too few."""
    if len(loss) < _FEWEST:
        return None
    steps, mean = smoothed(loss)
    said = f"Training loss over {len(loss):,} steps, smoothed: from {mean[0]:.4f} to {mean[-1]:.4f}"
    return _drawn(said, [("outlined", "", steps, mean)], len(loss))


def validation_svg(validation: Sequence[Mapping[str, Any]], kept: Mapping[str, Any]) -> str | None:
    """Loss on held-out images, told the label and not, over the steps; None where it was measured once.

    Args:
        validation: step, loss (with the label) and null_loss, by step.
        kept: the one whose weights are used; it is marked.
    """
    if len(validation) < 2:
        return None
    steps, loss, null = (np.array([one[key] for one in validation], float) for key in ("step", "loss", "null_loss"))
    said = (
        f"Loss on held-out images over {int(steps[-1]):,} steps: from {loss[0]:.4f} to {loss[-1]:.4f} with the label, "
        f"from {null[0]:.4f} to {null[-1]:.4f} without; lowest with it, {kept['loss']:.4f}, at step {kept['step']:,}"
    )
    lines = [("curve", "with the label", steps, loss), ("dashed", "without", steps, null)]
    return _drawn(said, lines, int(steps[-1]), (kept["step"], kept["loss"]))


def smoothed(loss: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Steps done, and the running mean of the loss over 1/20 of the steps around them; both [N]."""
    width = max(1, len(loss) // 20)
    mean = np.convolve(loss, np.ones(width) / width, mode="valid")
    shown = np.linspace(0, len(mean) - 1, min(len(mean), _POINTS)).astype(int)
    return shown + (width + 1) / 2, mean[shown]


Line = tuple[str, str, np.ndarray, np.ndarray]  # class, name, steps [N], loss [N]


def _drawn(said: str, lines: Sequence[Line], steps: int, mark: tuple[int, float] | None = None) -> str:
    """Lines over the steps, with the least and the largest loss beside them."""
    every = np.concatenate([loss for *_, loss in lines])
    low, high = float(every.min()), float(every.max())

    def place(step: Any, loss: Any) -> Any:
        up = (loss - low) / (high - low or 1)
        return _LEFT + (svg.WIDTH - _LEFT) * step / steps, svg.BASE - 3 - (svg.PLOT - 9) * up

    body = "".join(
        f'<path class="{kind}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in zip(*place(at, loss), strict=True))}"/>'
        for kind, _, at, loss in lines
    )
    names = [(kind, name) for kind, name, *_ in lines if name]
    if mark:
        x, y = place(*mark)
        body += f'<circle class="kept" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'
        names.append(("kept", f"used: step {mark[0]}"))
    for loss in dict.fromkeys((high, low)):
        body += f'<text x="{_LEFT - 6}" y="{place(0, loss)[1] + 3:.1f}" text-anchor="end">{loss:.3g}</text>'
    step = svg.round_step(steps)
    ticks = [(place(n, low)[0], f"{n:,.0f}") for n in dict.fromkeys([*np.arange(0, steps, step), steps])]
    return svg.chart("losses", svg.WIDTH, svg.BASE + 18, said, svg.legend(names, 6) + body + svg.axis(ticks, _LEFT))

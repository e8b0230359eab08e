"""Typicality of patches -> how it is distributed."""

import math
from collections.abc import Mapping

import numpy as np

from diffmine.report.charts import svg

_GROUPS = ("filled", "outlined", "dashed")
_SPARK = (120, 24)


def histogram_svg(groups: Mapping[str, np.ndarray]) -> str:
    """Distribution of T of up to three groups of a label's patches, each with area 1; "" where there are none.

    Args:
        groups: name -> T; drawn filled, outlined and dashed, in this order.
    """
    scores = {name: svg.finite(np.asarray(values, np.float64)) for name, values in groups.items()}
    kinds = dict(zip(groups, _GROUPS[: len(groups)], strict=True))
    scores = {name: values for name, values in scores.items() if len(values)}
    if not scores:
        return ""
    every = np.concatenate([[0.0], *scores.values()])
    low, high = float(every.min()), float(every.max())
    pad = 0.02 * (high - low) or 0.01
    low, high = low - pad, high + pad

    def x(score: float) -> float:
        return (score - low) / (high - low) * svg.WIDTH

    edges = np.linspace(low, high, 61)
    shares = {name: svg.shares_between(values, edges) for name, values in scores.items()}
    tallest = max(share.max() for share in shares.values())
    paths = {name: svg.outline(share / tallest, svg.WIDTH, svg.BASE, svg.PLOT) for name, share in shares.items()}
    drawn = "".join(f'<path class="{kinds[name]}" d="{path}"/>' for name, path in paths.items())
    step = svg.round_step(high - low)
    numbers = np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step
    decimals = max(0, -math.floor(math.log10(step)))
    ticks = [(x(n), svg.signed(n, decimals) if abs(n) > step / 2 else "0") for n in numbers]
    zero = f'<path class="zero" d="M{x(0):.1f} {svg.LEGEND}V{svg.BASE}"/>'
    text = "; ".join(f"{name} {_summary(values)}" for name, values in scores.items())
    body = svg.legend([(kinds[name], name) for name in scores], 6) + drawn + zero + svg.axis(ticks)
    return svg.chart("histogram", svg.WIDTH, svg.BASE + 18, f"T of patches: {text}", body)


def spark_svg(values: np.ndarray, low: float, high: float) -> str:
    """Distribution of a cluster's T from `low` to `high`, the label's range, with a line at zero; no text.

    Args:
        values: T of its patches; what lies outside of the range is drawn at its end.
    """
    values = svg.finite(np.asarray(values, np.float64))
    width, height = _SPARK
    edges = np.linspace(low, high if high > low else low + 1, 41)
    span = edges[-1] - edges[0]
    shares = svg.shares_between(np.clip(values, low, high), edges)
    body = f'<path class="base" d="M0 {height - 0.5}H{width}"/>'
    if len(values):
        body += f'<path class="bars" d="{svg.outline(shares / shares.max(), width, height - 1, height - 3)}"/>'
    if low <= 0 <= high:
        body += f'<path class="zero" d="M{-low / span * width:.1f} 0V{height}"/>'
    return svg.chart("spark", width, height, f"T {_summary(values)}" if len(values) else "no patches", body)


def _summary(values: np.ndarray) -> str:
    """Range and median of T, to three digits of the largest."""
    digits = svg.decimals(float(np.abs(values).max()))
    low, middle, high = (svg.signed(float(value), digits) for value in np.quantile(values, [0, 0.5, 1]))
    return f"from {low} to {high}, median {middle}"

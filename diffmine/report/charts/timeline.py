"""Years of a label's images and typical patches -> a timeline.

All images are grey, and typical patches lie over them in colour; the height of a bar is a share of its own group.
"""

import math

import numpy as np

from diffmine.report.charts import svg
from diffmine.report.charts.facets import Facets, Ids

_BARS = 40


def timeline_svg(facets: Facets, images: Ids, typical: Ids) -> str | None:
    """Bars per year, or per some years, on the whole manifest's axis of time; None where no year is known.

    Args:
        images, typical: as in `map_svg`.
    """
    years, best = (svg.finite(facets.year[facets.rows(ids)]) for ids in (images, typical))
    own = np.concatenate([years, best])
    if not len(own):
        return None
    usual_first, usual_last, exact = facets.calendar
    first, last = min(usual_first, int(own.min())), max(usual_last, int(own.max()))
    width = next(w for w in (1, 5, 10, 20, 50, 100) if w >= exact and (last - first) / w < _BARS)
    edges = np.arange(first // width, last // width + 2) * width
    shares = [svg.shares_between(group, edges) for group in (years, best)]
    slot = svg.WIDTH / (len(edges) - 1)
    bars = "".join(
        f'<path class="{kind}" d="{_bars(share / np.max(shares), slot, thick)}"/>'
        for kind, share, thick in zip(("images", "typical"), shares, (0.8, 0.36), strict=True)
    )
    shift = width / 2 if width == exact else 0  # a bar of one value has its name below its middle
    step = max(svg.round_step(last - first), exact)
    named = [first, *np.arange(first // step + 1, math.ceil(last / step)) * step, last]
    ticks = [((year - edges[0] + shift) / width * slot, _period(int(year), exact)) for year in dict.fromkeys(named)]
    text = f"{svg.counted(len(years), len(images))} {_from_to(own, exact)}"
    if len(best):
        top = int(shares[1].argmax())
        text += f"; typical patches {svg.often(shares[1])}from {_period(int(edges[top]), width, 'the ')}"
        text += f" ({svg.percent(shares[1][top])})"
    body = svg.legend(svg.groups(len(years), len(images)), 6) + bars + svg.axis(ticks)
    return svg.chart("timeline", svg.WIDTH, svg.BASE + 18, text, body)


def _bars(heights: np.ndarray, slot: float, thick: float) -> str:
    """Path of bars in slots of a width, of which they take the part `thick`; heights 0 to 1, none without any."""
    path = []
    for i in np.flatnonzero(heights):
        left, top = slot * (i + (1 - thick) / 2), svg.BASE - max(svg.PLOT * heights[i], 0.8)
        path.append(f"M{left:.1f} {svg.BASE}V{top:.1f}h{slot * thick:.1f}V{svg.BASE}z")
    return "".join(path)


def _period(year: int, width: int, article: str = "") -> str:
    """A year, decade or longer period by its first year."""
    if width == 10:
        return f"{article}{year}s"
    return f"{year}" if width == 1 else f"{year} to {year + width - 1}"


def _from_to(years: np.ndarray, exact: int) -> str:
    first, last = (_period(int(year), exact, "the ") for year in (years.min(), years.max()))
    return f"from {first}" + (f" to {last}" if last != first else "")

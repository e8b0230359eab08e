"""What the charts are drawn with: frame, axis, legend and outline as SVG text, numbers as words."""

import math
from collections.abc import Sequence
from html import escape

import numpy as np

WIDTH = 360  # of all charts but the small one, in their own units: on a phone a unit is about a pixel
LEGEND, PLOT = 18, 84  # heights: of the row that says what is what, and of what is drawn below it
BASE = LEGEND + PLOT
_LONGEST = 18  # characters of a name in a legend


def chart(kind: str, width: int, height: int, label: str, body: str) -> str:
    return (
        f'<svg class="chart {kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{safe(label)}">{body}</svg>'
    )


def outline(heights: np.ndarray, width: float, base: float, tall: float) -> str:
    """Path around bars that touch, `width` wide together; heights 0 to 1."""
    right = width / len(heights) * np.arange(1, len(heights) + 1)
    steps = "".join(f"V{base - tall * h:.3g}H{x:.4g}" for h, x in zip(heights, right, strict=True))
    return f"M0 {base}{steps}V{base}z"


def axis(ticks: Sequence[tuple[float, str]], left: float = 0) -> str:
    """The base line from `left` on with (x, text) below it, those left out that would touch the first or last one."""
    first, last = ticks[0][0], ticks[-1][0]
    ticks = [(x, text) for x, text in ticks if x in (first, last) or min(x - first, last - x) > 40]
    parts = [f'<path class="axis" d="M{left} {BASE}H{WIDTH}{"".join(f"M{x:.1f} {BASE}v3" for x, _ in ticks)}"/>']
    for x, text in ticks:
        anchor, at = ("start", 0) if x < 20 else ("end", WIDTH) if x > WIDTH - 20 else ("middle", x)
        parts.append(f'<text x="{at:.1f}" y="{BASE + 14}" text-anchor="{anchor}">{safe(text)}</text>')
    return "".join(parts)


def legend(items: Sequence[tuple[str, str]], y: int) -> str:
    """Class and name of up to three kinds, in a row."""
    return "".join(
        f'<rect class="{kind}" x="{120 * i + 1}" y="{y - 4}" width="10" height="8"/>'
        f'<text x="{120 * i + 16}" y="{y + 4}">{safe(_short(name))}</text>'
        for i, (kind, name) in enumerate(items)
    )


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"


def groups(known: int, images: int) -> list[tuple[str, str]]:
    """Class and name of the two groups of a chart of places or years, which knows so many of the label's images."""
    counts, share = f"{known:,} of {images:,} images", f"{100 * known // max(images, 1)} % of images"
    of_some = counts if len(counts) <= _LONGEST else share
    return [("images", "all images" if known == images else of_some), ("typical", "typical patches")]


def safe(text: str) -> str:
    """Safe in XML: escaped, and without characters that cannot be printed."""
    return escape("".join(c for c in text if c.isprintable()))


def round_step(span: float) -> float:
    """1, 2 or 5 times a power of ten that goes into `span` at most seven times."""
    power = 10.0 ** math.floor(math.log10(max(span, 1e-9) / 7))
    return next(power * m for m in (1, 2, 5, 10) if span <= 7.000001 * power * m)


def shares_between(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Share of the values between edges [K + 1] -> [K]; zeros where there are none."""
    return np.histogram(values, edges)[0] / max(len(values), 1)


def finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


def counted(known: int, images: int) -> str:
    total = f"{images:,} image{'s' if images != 1 else ''}"
    return total if known == images else f"{known:,} of {total}"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def often(shares: np.ndarray) -> str:
    return "most often " if np.count_nonzero(shares) > 1 else ""


def decimals(largest: float) -> int:
    """That show three digits of a score; two at least."""
    return max(2, 2 - math.floor(math.log10(max(largest, 1e-9))))


def signed(value: float, decimals: int) -> str:
    return f"{value:+.{decimals}f}".replace("-", "−")

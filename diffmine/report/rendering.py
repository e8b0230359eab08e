"""Templates and what they may call: names of files, links, numbers and times as people read them."""

from functools import partial
from importlib.resources import files as package_files
from urllib.parse import quote

import jinja2

from diffmine.report import images
from diffmine.report.charts.svg import signed
from diffmine.report.pages import KINDS, ROW_PATCHES, Page, Patch

KIND_NAMES = dict(zip(KINDS, ("Most typical", "Random", "Least typical"), strict=True))
_LONGEST = 120  # characters of a name from the data, where it is not shown whole
_ALL = "All labels"


def environment(decimals: int) -> jinja2.Environment:
    """Templates with autoescape.

    Args:
        decimals: of scores.
    """
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("diffmine.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(
        short=short,
        number=lambda count: f"{count:,}",
        percent=lambda share: f"{100 * share:.{0 if share == 0 or share >= 0.0995 else 1}f}\N{NO-BREAK SPACE}%",
        score=partial(signed, decimals=decimals),
        dataset=dataset_name,
        plain=lambda value: f"{value:.{decimals}f}",
        loss=lambda value: f"{value:.4f}",
        duration=duration,
        name=lambda page: _ALL if page.label is None else short(page.label),
        label_name=lambda label: _ALL if label is None else short(label),
        about=about,
    )
    found.globals.update(
        page_name=page_name, download_name=download_name, kind_names=KIND_NAMES, kinds=KINDS, sample=images.SAMPLE
    )
    return found


def link(uri: str, run: str) -> str | None:
    """From a label's page to an image: relative inside the run's folder, so that the folder can move.

    Args:
        uri: of the image: an absolute path, or the URI of an object, which a browser cannot open: None.
        run: URI of the run's folder.
    """
    if uri.startswith(f"{run}/"):
        return f"../../{quote(uri.removeprefix(f'{run}/'))}"
    return f"file://{quote(uri)}" if uri.startswith("/") else None


def page_name(page: Page | int) -> str:
    return _named(page, ".html")


def download_name(page: Page | int, kind: str) -> str:
    return _named(page, f".{kind}")


def data_name(page: Page | int) -> str:
    return _named(page, ".js")


def figures_name(page: Page | int) -> str:
    return _named(page, "-figures.js")


def _named(page: Page | int, end: str) -> str:
    return f"labels/{page if isinstance(page, int) else page.number:04d}{end}"


def short(text: str, longest: int = _LONGEST) -> str:
    """A name on one line, its middle left out where it is long."""
    text = " ".join(text.split())
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]} … {text[-half:]}"


def dataset_name(source: str) -> str:
    """The last part of a dataset's path or URI."""
    last = source.rstrip("/").rpartition("/")[2]
    return short(source if last in ("", ".", "..") else last)


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 10:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def about(patch: Patch, joint: bool) -> str:
    """Rank of a patch; its kind where that is not the most typical, and its label where a row mixes labels."""
    rank = f"rank {patch.rank + 1}" + (f" ({KIND_NAMES[patch.kind].lower()})" if patch.kind != "top" else "")
    return f"{short(patch.label)}, {rank}" if joint else rank


def style(most: int) -> bytes:
    """The style sheet; its end says which cell of a strip the n-th patch of a row shows."""
    rules = [f".strip>:nth-child({n + 1}){{--n:{n}}}" for n in range(1, max(most, ROW_PATCHES))]
    rules += [f".from-{kind}{{--first:{i * ROW_PATCHES}}}" for i, kind in enumerate(KINDS)]
    return asset("style.css") + asset("charts.css") + "\n".join(["", *rules, ""]).encode()


def asset(name: str) -> bytes:
    return (package_files("diffmine.report") / "assets" / name).read_bytes()

"""One page -> its files: pictures, the data that the script reads, the HTML, and tables of the patches to take away.

All that they are made from travels in a `Job`, so that pages can be made side by side, on any machine.
"""

import base64
import json
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from diffmine.errors import ImageError
from diffmine.mining.localisation import over_patches
from diffmine.report import images
from diffmine.report.charts.histogram import spark_svg
from diffmine.report.localisation import Localisation
from diffmine.report.pages import KINDS, ROW_PATCHES, Cluster, Page, Patch
from diffmine.report.rendering import (
    data_name,
    dataset_name,
    download_name,
    environment,
    figures_name,
    link,
    page_name,
    short,
)

Files = Iterator[tuple[str, bytes]]
Maps = Mapping[tuple[str, str], np.ndarray]  # image_id and label -> typicality map, float [h, w]
Neighbour = tuple[int, str | None]  # number and label of a page
_STEPS = 127  # a value of a map is kept as a whole number from -127 to 127
_FIGURE_PATCHES = 8
_LONGEST_FACT = 300  # characters of a value of the manifest


@dataclass(frozen=True)
class Job:
    """All that one page is made from."""

    page: Page
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    decimals: int  # of scores
    cell: int  # side of a latent cell in pixels of the prepared image
    run: str  # URI of the run's folder
    uris: Mapping[str, str]  # of the images that are shown
    facts: Mapping[str, Mapping[str, str]]  # image -> what else the manifest says of it
    validation: Mapping[str, Mapping[str, Any]] | None = None  # the label's losses on held-out images
    hit: Mapping[str, Any] | None = None
    localisation: Localisation | None = None
    beside: tuple[Neighbour | None, Neighbour | None] = (None, None)
    compare: int | None = None  # number of another page whose clusters can stand beside
    other: str | None = None  # name of another run whose clusters can stand beside
    samples: Sequence[bytes] = ()
    downloads: Mapping[str, bytes] = field(default_factory=dict)  # kind of file -> the label's patches
    shards: Mapping[str, int] = field(default_factory=dict)  # image -> its part of the run's tables
    charts: Mapping[str, str] = field(default_factory=dict)  # title -> SVG


@dataclass
class Sheet:
    """Whole images in one picture."""

    href: str | None = None
    size: tuple[int, int] = (0, 0)  # its width and height
    places: dict[str, tuple[int, int, int, int]] = field(default_factory=dict)  # image -> x, y, width, height in it


@dataclass
class Pictures:
    """The files of a page's pictures, relative to the site, and what the page says of them."""

    clusters: list[str]
    kinds: str
    wholes: "Sheet" = field(default_factory=lambda: Sheet())
    located: "Sheet" = field(default_factory=lambda: Sheet())  # under their maps
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)  # image -> width and height, prepared
    samples: str | None = None
    figures: list[bytes] = field(default_factory=list)  # a strip of the first patches of each cluster
    unreadable: dict[str, str] = field(default_factory=dict)  # image -> why


def page_files(job: Job, opened: Iterable[np.ndarray | ImageError], maps: Maps, unreadable: dict[str, str]) -> Files:
    """A page's files, as (path, bytes).

    Args:
        opened: the prepared images of the page's `image_ids()`, uint8 [H, W, 3], in that order; for an ImageError a
            placeholder is drawn.
        maps: those of the patches that are shown, as far as there are any.
        unreadable: the images that could not be read come into it, with the reason.
    """
    pictures = yield from _draw(job, opened, maps)
    unreadable |= pictures.unreadable
    yield data_name(job.page), _data(job, pictures, maps)
    if job.page.clusters:
        yield figures_name(job.page), _figures(job, pictures)
    html = environment(job.decimals).get_template("label.html").render(
        page=job.page, pictures=pictures, config=job.config, run={"versions": job.versions}, hit=job.hit,
        localisation=job.localisation,
        validation=job.validation, beside=job.beside, compare=job.compare, other=job.other,
        sample_count=len(job.samples), downloads=list(job.downloads),
        root="../", shown={p.patch_id for p in job.page.shown()},
        raced=job.config["typicality"]["racing"],
        charts={title: Markup(svg) for title, svg in job.charts.items()}, sparks=_sparks(job.page),
    )  # fmt: skip
    yield page_name(job.page), html.encode()
    for kind, data in job.downloads.items():
        yield download_name(job.page, kind), data


def _sparks(page: Page) -> list[Markup]:
    """Distribution of T of each cluster, all on one scale."""
    every = np.concatenate([c.typicality for c in page.clusters] or [np.zeros(1)])
    low, high = min(0.0, float(every.min())), float(every.max())
    return [Markup(spark_svg(c.typicality, low, high)) for c in page.clusters]


# --------------------------------------------------------------------------------------------------------- pictures


def _draw(
    job: Job, opened: Iterable[np.ndarray | ImageError], maps: Maps
) -> Generator[tuple[str, bytes], None, Pictures]:
    """Yields the pictures; what is said of them. One image is held at a time."""
    page, folder = job.page, f"images/{job.page.number:04d}"
    shown, wholes = page.shown(), page.wholes(job.config["report"]["whole_images"])
    side = images.cell_side([p.box for p in shown])
    pictures = Pictures([f"{folder}/cluster-{c.rank:03d}.webp" for c in page.clusters], f"{folder}/kinds.webp")
    cells: dict[str, Image.Image] = {}
    whole: dict[str, Image.Image] = {}
    located: dict[str, Image.Image] = {}
    of_located = _over_patches(job, maps)
    unit = _unit([values for values in of_located.values() if values is not None])
    for image_id, found in zip(page.image_ids(), opened, strict=True):
        image = None if isinstance(found, ImageError) else found
        if isinstance(found, ImageError):
            pictures.unreadable[image_id] = found.reason
        else:
            pictures.sizes[image_id] = found.shape[1], found.shape[0]
        cells |= {p.patch_id: images.cell(image, p.box, side) for p in shown if p.image_id == image_id}
        if image_id in wholes:
            whole[image_id] = images.whole(image)
        if image_id in of_located:
            located[image_id] = images.under_map(image, of_located[image_id], unit)
    for name, cluster in zip(pictures.clusters, page.clusters, strict=True):
        own = [cells[p.patch_id] for p in cluster.patches]
        pictures.figures.append(images.strip(own[:_FIGURE_PATCHES]))
        yield name, images.strip(own)
    if page.kinds:
        rows = [[cells[p.patch_id] for p in page.kinds.get(kind, ())] for kind in KINDS]
        padded = [[*row, *[images.blank(side)] * (ROW_PATCHES - len(row))] for row in rows]
        yield pictures.kinds, images.strip([cell for row in padded for cell in row])
    if whole:
        pictures.wholes, data = _sheet(f"{folder}/wholes.webp", {image_id: whole[image_id] for image_id in wholes})
        yield f"{folder}/wholes.webp", data
    if located:
        pictures.located, data = _sheet(
            f"{folder}/located.webp", {one.image_id: located[one.image_id] for one in page.located}
        )
        yield f"{folder}/located.webp", data
    if job.samples:
        pictures.samples = f"{folder}/samples.webp"
        yield pictures.samples, images.sampled(job.samples)
    return pictures


def _over_patches(job: Job, maps: Maps) -> dict[str, np.ndarray | None]:
    """image -> its map over patches, of those that are shown with boxes; None where there is no map."""
    found: dict[str, np.ndarray | None] = {}
    for image in job.page.located:
        whole = maps.get((image.image_id, job.page.label or ""))
        size = job.config["patches"]["size"]
        if whole is not None:
            height, width = (job.cell * cells for cells in whole.shape)
            whole = over_patches(whole, height, width, size)
        found[image.image_id] = whole
    return found


def _sheet(name: str, whole: Mapping[str, Image.Image]) -> tuple[Sheet, bytes]:
    """Whole images in one picture, and where each is."""
    columns, side = min(images.SHEET_COLUMNS, len(whole)), max(max(one.size) for one in whole.values())
    places = {
        image_id: (i % columns * side, i // columns * side, *one.size)
        for i, (image_id, one) in enumerate(whole.items())
    }
    size = columns * side, -(-len(whole) // columns) * side
    return Sheet(name, size, places), images.grid(list(whole.values()), columns)


def _unit(values: Sequence[np.ndarray]) -> float:
    """The size of T that has the full colour: nearly the largest."""
    sizes = np.concatenate([np.abs(v).ravel() for v in values] or [np.ones(1)])
    return max(float(np.quantile(sizes, 0.99)), 1e-9)


# ------------------------------------------------------------------------------------------------------------- data


def _data(job: Job, pictures: Pictures, maps: Maps) -> bytes:
    """What the script shows of each patch, as a classic script: a page opened from a disk may read nothing else."""
    page, shown = job.page, job.page.shown()
    ids = page.image_ids()
    order = {image_id: i for i, image_id in enumerate(ids)}
    wholes = {i: place for i, place in pictures.wholes.places.items() if i not in pictures.unreadable}
    pairs = sorted({(p.image_id, p.label) for p in shown if p.image_id in wholes})
    whole = {pair: i for i, pair in enumerate(pairs)}
    seen = {p.patch_id: _under(maps.get((p.image_id, p.label)), p, job.cell) for p in shown}
    unit = _unit([values for values in seen.values() if values is not None])
    base = _base(job.uris)
    ends = np.cumsum([0, *(len(c.patches) for c in page.clusters)]).tolist()
    found = {
        "label": page.label, "usable": page.usable, "decimals": job.decimals, "unit": _round(unit),
        "stored": job.config["report"]["whole_images"], "prepared": job.config["dataset"]["image"],
        "sheet": dict(zip(("href", "width", "height"), (pictures.wholes.href, *pictures.wholes.size), strict=True)),
        "maps": [_packed(maps.get(pair), unit) for pair in pairs],
        "images": {
            "id": ids, "base": base, "uri": [job.uris[i] if job.uris[i] != base + i else None for i in ids],
            "href": [link(job.uris[i], job.run) for i in ids],
            "size": [pictures.sizes.get(i) for i in ids], "lost": [pictures.unreadable.get(i) for i in ids],
            "facts": [job.facts.get(i, {}) for i in ids], "whole": [wholes.get(i) for i in ids],
        },
        "patches": {
            "id": [p.patch_id for p in shown], "image": [order[p.image_id] for p in shown],
            "label": None if page.label is not None else [p.label for p in shown],
            "kind": [KINDS.index(p.kind) for p in shown], "rank": [p.rank for p in shown],
            "box": [p.box for p in shown], "typicality": [_round(p.typicality) for p in shown],
            "stderr": [_round(p.stderr) for p in shown],
            "fresh": _rounded(p.fresh_typicality for p in shown),
            "fresh_stderr": _rounded(p.fresh_stderr for p in shown),
            "contrast": _rounded(p.contrast for p in shown),
            "fresh_contrast": _rounded(p.fresh_contrast for p in shown),
            "fresh_contrast_stderr": _rounded(p.fresh_contrast_stderr for p in shown),
            "rival": [p.rival for p in shown] if any(p.rival for p in shown) else None,
            "map": [_packed(seen[p.patch_id], unit) for p in shown],
            "whole": [whole.get((p.image_id, p.label)) for p in shown],
        },
        "clusters": [
            {
                "cluster": c.cluster, "rank": c.rank, "size": c.size, "images": c.images,
                "median": _round(c.median_typicality), "stderr": _round(c.stderr), "small": c.small,
                "doubt": _doubt(job, c), "strip": name, "first": first, "end": end,
            }
            for c, name, first, end in zip(page.clusters, pictures.clusters, ends[:-1], ends[1:], strict=True)
        ],
    }  # fmt: skip
    return script(f"{page.number:04d}", found)


def _doubt(job: Job, cluster: Cluster) -> str | None:
    """What the page would not be told apart from if this cluster led."""
    led = replace(job.page, median_typicality=cluster.median_typicality, stderr=cluster.stderr)
    return led.doubt(beside_random=not job.config["typicality"]["racing"])


def _figures(job: Job, pictures: Pictures) -> bytes:
    """The first patches of each cluster as a data URI, with a caption, for figures that are saved from the page."""
    page, version = job.page, job.versions.get("diffmine")
    of = f"of “{short(page.label)}”" if page.label is not None else "of all labels"
    found = [
        {
            "strip": f"data:image/webp;base64,{base64.b64encode(strip).decode()}",
            "count": min(_FIGURE_PATCHES, len(cluster.patches)),
            "caption": f"Cluster {cluster.rank + 1} {of}: {cluster.size} patches of {cluster.images} images, median "
            f"typicality {cluster.median_typicality:+.{job.decimals}f}. "
            f"{dataset_name(job.config['dataset']['source'])}, mined with diffmine{f' {version}' if version else ''}.",
        }
        for cluster, strip in zip(page.clusters, pictures.figures, strict=True)
    ]
    return script(f"{page.number:04d}-figures", found)


def script(name: str, found: Any) -> bytes:
    """A classic script that leaves data under a name."""
    text = json.dumps(found, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return f'(globalThis.diffmine??={{}})["{name}"]={text};\n'.encode()


def _under(whole: np.ndarray | None, patch: Patch, cell: int) -> np.ndarray | None:
    """The values of a map [h, w] under a patch, at as many places as it has cells, [rows, columns]."""
    if whole is None:
        return None
    rows, columns = (max(1, round(side / cell)) for side in (patch.height, patch.width))
    y = (patch.y + (np.arange(rows) + 0.5) * patch.height / rows) / cell
    x = (patch.x + (np.arange(columns) + 0.5) * patch.width / columns) / cell
    return whole[np.ix_(y.astype(int).clip(0, whole.shape[0] - 1), x.astype(int).clip(0, whole.shape[1] - 1))]


def _base(uris: Mapping[str, str]) -> str:
    """What comes before the image_id in the first URI, and mostly in all: it need not be said again of each."""
    return next((uri.removesuffix(image_id) for image_id, uri in sorted(uris.items())), "")


def _packed(values: np.ndarray | None, unit: float) -> list[Any] | None:
    """Rows, columns, and the values in steps of unit / 127, signed bytes in base64."""
    if values is None:
        return None
    steps = np.rint(values * (_STEPS / unit)).clip(-_STEPS, _STEPS).astype(np.int8)
    return [*values.shape, base64.b64encode(steps.tobytes()).decode()]


def _round(value: float | None) -> float | None:
    """Six digits: of fewer the script would round some to other numbers than those on the page."""
    return None if value is None or not np.isfinite(value) else float(f"{value:.6g}")


def _rounded(values: Iterable[float | None]) -> list[float | None] | None:
    """None where none is known."""
    found = [_round(value) for value in values]
    return found if any(value is not None for value in found) else None


def facts(row: Mapping[str, Any], held_out: bool) -> dict[str, str]:
    """What a row of the manifest says of an image beside its place and boxes: its own columns, and its labels.

    Args:
        held_out: the image was not trained on; this is said, too.
    """
    own = {k: v for k, v in row.items() if k not in ("image_id", "uri", "labels", "boxes") and v is not None}
    labels = {"labels": ", ".join(row["labels"])} if len(row["labels"]) > 1 else {}
    held = {"held out": "not trained on"} if held_out else {}
    return {short(str(k), 60): short(str(v), _LONGEST_FACT) for k, v in {**labels, **own, **held}.items()}

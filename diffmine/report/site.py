"""Tables -> the files of a static site: an overview, and a page per label with its clusters as rows of patches.

The pages need no server, and no script but to search and sort. File names are numbers, never labels; every string from
data is escaped.
"""

import io
import math
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files as package_files
from typing import Any
from urllib.parse import quote, unquote

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml
from pyarrow import csv

from diffmine.errors import ImageError
from diffmine.report import images
from diffmine.report.pages import ROW_PATCHES, Page, Patch, choose, grouped, label_sizes

KIND_NAMES = {"top": "Most typical", "random": "Random", "bottom": "Least typical"}
OVERVIEW_PATCHES = 8  # shown of a label's best cluster on the overview
_LONGEST = 120  # characters of a name from the data, where it is not shown whole
_ALL = "All labels"

LoadImage = Callable[[str], np.ndarray]
Files = Iterator[tuple[str, bytes]]


@dataclass
class _Pictures:
    """The files of a page's pictures, relative to the site."""

    clusters: list[str] = field(default_factory=list)
    kinds: dict[str, str] = field(default_factory=dict)
    context: list[tuple[str, tuple[int, int]]] = field(default_factory=list)  # with width and height
    samples: str | None = None
    unreadable: dict[str, str] = field(default_factory=dict)  # image -> why


def build(tables: Mapping[str, pa.Table], settings: Mapping[str, Any], load_image: LoadImage) -> Files:
    """Files of the site, as (path, bytes); the same input gives the same bytes.

    Args:
        tables: `manifest`, `patches`, `clusters`, `members`, and where there are any `latents`, `samples` and
            `failures`; columns as the run writes them, the latent left out.
        settings: `config` (nested dict), `run` (`versions`, `seconds` per stage, `git_revision`), `notes` (sentences),
            `hits` (rows of `hit_table`, or None), `skipped` (file extension -> files), `loss` (per step), `uri` of the
            run's folder (default `config.output`). All but `config` may be missing.
        load_image: image_id -> prepared image, uint8 [H, W, 3]. Where it raises ImageError a placeholder is drawn.
    """
    config = settings["config"]
    most_patches = min(config["report"]["patches_per_cluster"], images.LONGEST_STRIP)
    joint = config["clusters"]["scope"] == "dataset"
    pages = choose(tables, joint, config["report"]["clusters_per_label"], most_patches)
    samples = _samples(tables.get("samples"))
    overview = _overview(tables, settings, pages)
    environment = _environment(_Links(_uris(tables["manifest"], pages), settings.get("uri") or config["output"]), pages)

    rows = grouped(_csv_rows(tables, joint), "label")
    yield "style.css", _style(max(most_patches, ROW_PATCHES))
    unreadable: dict[str, str] = {}
    strips = {}
    for i, page in enumerate(pages):
        pictures = yield from _draw(page, samples.get(page.label, []), load_image)
        unreadable |= pictures.unreadable
        strips[page.number] = pictures.clusters[0] if pictures.clusters else pictures.kinds.get("top")
        beside = (pages[i - 1] if i else None, pages[i + 1] if i + 1 < len(pages) else None)
        html = environment.get_template("label.html").render(
            page=page,
            pictures=pictures,
            sample_count=len(samples.get(page.label, [])),
            hit=overview["hits"].get(page.label),
            beside=beside,
            root="../",
            **overview,
        )
        yield _page_name(page), html.encode()
        if page.label is not None:
            yield _csv_name(page), _csv(rows[page.label])
    html = environment.get_template("index.html").render(root="", strips=strips, unreadable=unreadable, **overview)
    if len(overview["labels"]) > 1:
        yield "find.js", _asset("find.js")
    yield "index.html", html.encode()


def _page_name(page: Page) -> str:
    return f"labels/{page.number:04d}.html"


def _csv_name(page: Page) -> str:
    return f"labels/{page.number:04d}.csv"


# ------------------------------------------------------------------------------------------------------- to take away


def _csv_rows(tables: Mapping[str, pa.Table], joint: bool) -> pa.Table:
    """The table of patches, with the image's URI and the rank of the patch's cluster."""
    patches, manifest, members = tables["patches"], tables["manifest"], tables["members"]
    ranks = {(c["label"], c["cluster"]): c["rank"] for c in tables["clusters"].to_pylist()}
    keys = zip(
        members["patch_id"].to_pylist(), members["label"].to_pylist(), members["cluster"].to_pylist(), strict=True
    )
    rank_of = {patch_id: ranks.get((None if joint else label, cluster)) for patch_id, label, cluster in keys}
    uris = manifest["uri"].take(pc.index_in(patches["image_id"], manifest["image_id"]))
    cluster = pa.array([rank_of.get(patch_id) for patch_id in patches["patch_id"].to_pylist()], pa.int32())
    return patches.append_column("uri", uris).append_column("cluster_rank", cluster)


def _csv(rows: pa.Table) -> bytes:
    """All patches of a label: most typical, least typical and random, by rank."""
    out = io.BytesIO()
    order = pa.array([-list(KIND_NAMES).index(kind) for kind in rows["kind"].to_pylist()])
    rows = rows.append_column("order", order).sort_by([("order", "descending"), ("rank", "ascending")])
    csv.write_csv(rows.drop_columns(["order"]), out)
    return out.getvalue()


# --------------------------------------------------------------------------------------------------------- pictures


def _draw(page: Page, samples: Sequence[bytes], load_image: LoadImage) -> Generator[tuple[str, bytes], None, _Pictures]:
    """Yields a page's pictures; returns their names. Every image is opened once, one at a time."""
    pictures, cells, context = _Pictures(), {}, {}
    shown, outlines = page.shown(), dict(page.context)
    folder = f"images/{page.number:04d}"
    for image_id in page.image_ids():
        image = _load(image_id, load_image, pictures.unreadable)
        for patch in shown:
            if patch.image_id == image_id:
                cells[patch.patch_id] = images.cell(image, patch.box)
        if image_id in outlines:
            context[image_id] = images.outlined(image, [patch.box for patch in outlines[image_id]])
    for cluster in page.clusters:
        pictures.clusters.append(f"{folder}/cluster-{cluster.rank:03d}.webp")
        yield pictures.clusters[-1], images.strip([cells[p.patch_id] for p in cluster.patches])
    for kind, patches in page.kinds.items():
        pictures.kinds[kind] = f"{folder}/{kind}.webp"
        yield pictures.kinds[kind], images.strip([cells[p.patch_id] for p in patches])
    for i, (image_id, _) in enumerate(page.context):
        data, size = context[image_id]
        pictures.context.append((f"{folder}/context-{i}.webp", size))
        yield pictures.context[-1][0], data
    if samples:
        pictures.samples = f"{folder}/samples.webp"
        yield pictures.samples, images.sampled(samples)
    return pictures


def _load(image_id: str, load_image: LoadImage, unreadable: dict[str, str]) -> np.ndarray | None:
    """A prepared image, or None, and its reason noted, where it can no longer be read."""
    try:
        return load_image(image_id)
    except ImageError as error:
        unreadable[image_id] = error.reason
        return None


def _samples(table: pa.Table | None) -> dict[str | None, list[bytes]]:
    """label -> PNG files sampled from the finetuned model, in order."""
    groups: dict[str | None, list[bytes]] = {}
    for row in table.sort_by([("label", "ascending"), ("index", "ascending")]).to_pylist() if table is not None else ():
        groups.setdefault(row["label"], []).append(row["image"]["bytes"])
    return {label: pngs[: images.LONGEST_STRIP] for label, pngs in groups.items()}


# --------------------------------------------------------------------------------------------------------- overview


def _overview(tables: Mapping[str, pa.Table], settings: Mapping[str, Any], pages: Sequence[Page]) -> dict[str, Any]:
    """What the templates show of the whole run."""
    mined = {page.label for page in pages}
    run = {"versions": {}, "seconds": {}, "git_revision": None, **(settings.get("run") or {})}
    seconds, failures = run["seconds"], tables.get("failures")
    loss = settings.get("loss") or ()
    return {
        "config": settings["config"], "run": run, "notes": settings.get("notes") or (),
        "skipped": settings.get("skipped") or {}, "hits": {row["label"]: row for row in settings.get("hits") or ()},
        "images": len(tables["manifest"]), "labels": [page for page in pages if page.label is not None],
        "ranked": sorted(pages, key=lambda page: (page.label is not None, -_number(page.median_typicality))),
        "unmined": [label for label in label_sizes(tables["manifest"]) if label not in mined],
        "failures": _failures(failures), "failed": len(failures) if failures is not None else 0,
        "seconds": seconds, "total_seconds": sum(seconds.values()), "steps": len(loss), "loss": curve(loss),
        "largest": max((_number(page.median_typicality) for page in pages), default=0.0),
        "draws": settings.get("draws"), "draws_spent": settings.get("draws_spent"),
        "settings_text": yaml.safe_dump(settings["config"], sort_keys=False, allow_unicode=True, width=100),
    }  # fmt: skip


def _number(value: float) -> float:
    """For sorting: no patches is less than any."""
    return value if math.isfinite(value) else -math.inf


def _failures(table: pa.Table | None) -> list[tuple[str, int, list[str]]]:
    """Reason, number of images, and the first of them; most frequent first."""
    if table is None or not len(table):
        return []
    counts = Counter(table["reason"].to_pylist())
    found = []
    for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        own = table.filter(pc.equal(table["reason"], reason))
        found.append((reason, count, sorted(own["image_id"].to_pylist())[:3]))
    return found


def curve(loss: Sequence[float]) -> str | None:
    """Training loss per step -> points of its running mean over 1/20 of the steps, in a box of 300 x 80."""
    if len(loss) < 20:
        return None
    width = len(loss) // 20
    mean = np.convolve(loss, np.ones(width) / width, mode="valid")
    mean = mean[np.linspace(0, len(mean) - 1, min(len(mean), 150)).astype(int)]
    x = np.linspace(0, 300, len(mean))
    y = 78 - 76 * (mean - mean.min()) / max(float(np.ptp(mean)), 1e-9)
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))


# -------------------------------------------------------------------------------------------------------- templates


class _Links:
    """image_id -> what its link is, and how its place reads."""

    def __init__(self, uris: Mapping[str, str], run: str) -> None:
        self.uris = uris
        self.run = run.removeprefix("file://").rstrip("/") + "/"

    def __call__(self, image_id: str, root: str) -> str | None:
        """Relative inside the run's folder, so that the folder can move; None where a browser cannot open it."""
        uri = self.uris[image_id]
        path = unquote(uri.removeprefix("file://")) if uri.startswith("file://") else uri
        if path.startswith(self.run):
            return f"{root}../{quote(path.removeprefix(self.run))}"
        if path.startswith("/"):
            return f"file://{quote(path)}"
        return uri if uri.startswith(("https://", "http://")) else None


def _uris(manifest: pa.Table, pages: Sequence[Page]) -> dict[str, str]:
    """image_id -> URI, of the images that are shown."""
    shown = pa.array(sorted({image_id for page in pages for image_id in page.image_ids()}), pa.string())
    rows = manifest.filter(pc.is_in(manifest["image_id"], shown))
    return dict(zip(rows["image_id"].to_pylist(), rows["uri"].to_pylist(), strict=True))


def _environment(links: _Links, pages: Sequence[Page]) -> jinja2.Environment:
    """Templates with autoescape, and what they may call."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("diffmine.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scores = [abs(page.median_typicality) for page in pages if math.isfinite(page.median_typicality)]
    decimals = min(8, max(2, 2 - math.floor(math.log10(max([*scores, 1e-9])))))  # three digits of the largest
    environment.filters.update(
        short=short,
        number=lambda count: f"{count:,}",
        percent=lambda share: f"{100 * share:.0f} %" if share == 0 or share >= 0.0995 else f"{100 * share:.1f} %",
        score=lambda value: f"{value:+.{decimals}f}".replace("-", "−"),
        plain=lambda value: f"{value:.{decimals}f}",
        duration=duration,
        name=lambda page: _ALL if page.label is None else short(page.label),
        about=about,
    )
    environment.globals.update(
        link=links, uris=links.uris, page_name=_page_name, csv_name=_csv_name, kind_names=KIND_NAMES, cell=images.CELL,
        sample=images.SAMPLE, overview_patches=OVERVIEW_PATCHES,
    )  # fmt: skip
    return environment


def short(text: str, longest: int = _LONGEST) -> str:
    """A name on one line, its middle left out where it is long."""
    text = " ".join(text.split())
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]} … {text[-half:]}"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 10:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def about(patch: Patch, joint: bool) -> str:
    """Where a patch stands: its rank among its kind, and its label where a row mixes labels."""
    kind = KIND_NAMES[patch.kind].lower()
    return f"{short(patch.label)}, rank {patch.rank + 1} ({kind})" if joint else f"rank {patch.rank + 1} ({kind})"


def _style(most: int) -> bytes:
    """The style sheet; its end says which cell of a strip the n-th patch of a row shows."""
    css = _asset("style.css")
    rules = [f".strip>:nth-child({n + 1}) img{{object-position:calc(var(--cell)*-{n}) 0}}" for n in range(1, most)]
    return css + "\n".join(["", *rules, ""]).encode()


def _asset(name: str) -> bytes:
    return (package_files("diffmine.report") / "assets" / name).read_bytes()

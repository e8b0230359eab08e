"""Tables -> the files of a static site: an overview, and a page per label with its clusters as rows of patches.

The pages need no server and no script. File names are numbers, never labels; every string from data is escaped.
"""

import io
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files as package_files
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import yaml
from PIL import Image, ImageDraw

from diffmine.errors import ImageError

CELL, GAP = 96, 4  # pixels of a patch in a strip, and between two
_ROW = 12  # patches of a kind's row
_CONTEXT = 4  # whole images shown with their patches outlined
_CONTEXT_SIDE = 320
_OUTLINE = (255, 196, 0)
_KINDS = {"top": "Most typical", "bottom": "Least typical", "random": "Random"}

LoadImage = Callable[[str], np.ndarray]
Row = dict[str, Any]


@dataclass(frozen=True)
class _Strip:
    """A row of patches: one image file and what each of its cells shows."""

    file: str
    cells: list[Row]

    @property
    def width(self) -> int:
        return len(self.cells) * (CELL + GAP) - GAP


def build(tables: Mapping[str, pa.Table], settings: Mapping[str, Any], load_image: LoadImage) -> Iterator[tuple[str, bytes]]:
    """Files of the site, as (path, bytes).

    Args:
        tables: `manifest`, `latents` (without the latent), `patches`, `clusters`, `members`, and where there are any
            `samples` and `failures`; columns as the run writes them.
        settings: `config`, `run` (versions, seconds), `notes`, `hits` (rows of `hit_table`, or None), `loss` (per step).
        load_image: image_id -> prepared image, uint8 [H, W, 3]; may raise ImageError.
    """
    environment = _environment()
    data = _Data(tables, settings)
    yield "style.css", (package_files("diffmine.report") / "assets" / "style.css").read_bytes()
    overview = []
    for number, label in enumerate(data.labels):
        page = yield from _label_files(data, label, number, load_image)
        html = environment.get_template("label.html").render(page=page, data=data, root="../")
        yield f"labels/{number:04d}.html", html.encode()
        overview.append(page)
    overview.sort(key=lambda page: -(page["clusters"][0]["median_typicality"] if page["clusters"] else -np.inf))
    html = environment.get_template("index.html").render(pages=overview, data=data, root="", loss=_curve(data.loss))
    yield "index.html", html.encode()


class _Data:
    """The tables, grouped for the pages."""

    def __init__(self, tables: Mapping[str, pa.Table], settings: Mapping[str, Any]) -> None:
        self.settings = settings
        self.config = settings["config"]
        self.images = len(tables["manifest"])
        self.usable = len(tables["latents"])
        self.uris = dict(zip(*(tables["manifest"][c].to_pylist() for c in ("image_id", "uri")), strict=True))
        self.patches = {p["patch_id"]: p for p in tables["patches"].to_pylist()}
        self.by_kind: dict[tuple[str, str], list[Row]] = defaultdict(list)
        for patch in self.patches.values():
            self.by_kind[patch["label"], patch["kind"]].append(patch)
        for group in self.by_kind.values():
            group.sort(key=lambda p: p["rank"])
        self.members: dict[tuple[str | None, int], list[Row]] = defaultdict(list)
        joint = self.config["clusters"]["scope"] == "dataset"
        for member in tables["members"].to_pylist():
            self.members[None if joint else member["label"], member["cluster"]].append(member)
        for group in self.members.values():
            group.sort(key=lambda m: (m["distance"], m["patch_id"]))
        self.clusters: dict[str | None, list[Row]] = defaultdict(list)
        for cluster in sorted(tables["clusters"].to_pylist(), key=lambda c: c["rank"]):
            self.clusters[cluster["label"]].append(cluster)
        self.labels: list[str | None] = [*([None] if joint else []), *sorted({p["label"] for p in self.patches.values()})]
        self.samples = _grouped(tables.get("samples"), "label")
        self.failures = _counts(tables.get("failures"), "reason")
        self.hits = {row["label"]: row for row in settings.get("hits") or ()}
        self.loss: Sequence[float] = settings.get("loss") or ()
        self.notes: Sequence[str] = settings.get("notes") or ()
        self.yaml = yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True)
        self.draws = self.config["typicality"]["draws"]


def _grouped(table: pa.Table | None, key: str) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in table.to_pylist() if table is not None else ():
        groups[row[key]].append(row)
    return groups


def _counts(table: pa.Table | None, key: str) -> dict[str, int]:
    return {reason: len(rows) for reason, rows in sorted(_grouped(table, key).items())}


def _label_files(
    data: _Data, label: str | None, number: int, load_image: LoadImage
) -> Iterator[tuple[str, bytes]]:
    """Yields a label's pictures; returns what its page shows. Every image is opened once."""
    shown = data.config["report"]
    clusters = data.clusters.get(label, [])[: shown["clusters_per_label"]]
    wanted: dict[str, list[Row]] = {}  # strip name -> patches
    for cluster in clusters:
        members = data.members[label, cluster["cluster"]][: shown["patches_per_cluster"]]
        wanted[f"cluster-{cluster['rank']:03d}"] = [data.patches[m["patch_id"]] for m in members]
    for kind in _KINDS:
        wanted[kind] = data.by_kind.get((label or "", kind), [])[:_ROW]
    best = data.by_kind.get((label or "", "top"), [])
    context = list(dict.fromkeys(p["image_id"] for p in best))[:_CONTEXT]

    crops: dict[str, Image.Image] = {}
    scenes: dict[str, Image.Image] = {}
    needed: dict[str, list[Row]] = defaultdict(list)
    for patch in (p for group in wanted.values() for p in group):
        needed[patch["image_id"]].append(patch)
    for image_id in sorted({*needed, *context}):
        try:
            image = Image.fromarray(load_image(image_id))
        except ImageError:
            image = None
        for patch in needed[image_id]:
            crops[patch["patch_id"]] = _crop(image, patch)
        if image_id in context and image is not None:
            scenes[image_id] = _outlined(image, [p for p in best if p["image_id"] == image_id])

    strips = {}
    for name, patches in wanted.items():
        if patches:
            file = f"images/{number:04d}-{name}.webp"
            yield file, _strip([crops[p["patch_id"]] for p in patches])
            strips[name] = _Strip(file, [_cell(p, data.uris) for p in patches])
    scene_files = []
    for i, image_id in enumerate(image_id for image_id in context if image_id in scenes):
        scene_files.append({"file": f"images/{number:04d}-scene-{i}.webp", **_source(image_id, data.uris)})
        yield scene_files[-1]["file"], _webp(scenes[image_id])
    sample_files = []
    for sample in data.samples.get(label or "", []):
        sample_files.append(f"images/{number:04d}-sample-{sample['index']}.webp")
        yield sample_files[-1], _webp(Image.open(io.BytesIO(sample["image"]["bytes"])).convert("RGB"))
    return {
        "label": label or "all labels", "href": f"labels/{number:04d}.html", "hit": data.hits.get(label),
        "clusters": [{**c, "strip": strips[f"cluster-{c['rank']:03d}"]} for c in clusters],
        "kinds": [(title, kind, strips[kind]) for kind, title in _KINDS.items() if kind in strips],
        "scenes": scene_files, "samples": sample_files, "images": len({p["image_id"] for p in best}),
    }  # fmt: skip


def _cell(patch: Row, uris: Mapping[str, str]) -> Row:
    """What a cell of a strip says of its patch."""
    text = (
        f"T {patch['typicality']:+.4f} ± {patch['stderr']:.4f}, rank {patch['rank'] + 1} of {patch['kind']}; "
        f"{patch['image_id']} at {patch['x']}, {patch['y']}"
    )
    return {"title": text, **_source(patch["image_id"], uris)}


def _source(image_id: str, uris: Mapping[str, str]) -> Row:
    """Name of an image, and its address where a browser can open it."""
    uri = uris[image_id]
    href = "file://" + uri if uri.startswith("/") else uri if uri.startswith("file://") else None
    return {"image_id": image_id, "uri": uri, "href": href}


def _crop(image: Image.Image | None, patch: Row) -> Image.Image:
    """The patch within a cell; a grey cell with a cross when its image can no longer be read."""
    cell = Image.new("RGBA", (CELL, CELL), (0, 0, 0, 0))
    if image is None:
        draw = ImageDraw.Draw(cell)
        draw.rectangle([0, 0, CELL - 1, CELL - 1], fill=(150, 150, 150, 255))
        draw.line([20, 20, CELL - 20, CELL - 20], fill=(90, 90, 90, 255), width=4)
        draw.line([20, CELL - 20, CELL - 20, 20], fill=(90, 90, 90, 255), width=4)
        return cell
    x, y, width, height = (patch[k] for k in ("x", "y", "width", "height"))
    scale = CELL / max(width, height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    crop = image.crop((x, y, x + width, y + height)).resize(size, Image.Resampling.BICUBIC)
    cell.paste(crop, ((CELL - size[0]) // 2, (CELL - size[1]) // 2))
    return cell


def _strip(crops: Sequence[Image.Image]) -> bytes:
    strip = Image.new("RGBA", (len(crops) * (CELL + GAP) - GAP, CELL), (0, 0, 0, 0))
    for i, crop in enumerate(crops):
        strip.paste(crop, (i * (CELL + GAP), 0))
    return _webp(strip)


def _outlined(image: Image.Image, patches: Sequence[Row]) -> Image.Image:
    """A whole image with its best patches outlined."""
    scale = _CONTEXT_SIDE / max(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for patch in patches:
        x, y = patch["x"] * scale, patch["y"] * scale
        draw.rectangle([x, y, x + patch["width"] * scale, y + patch["height"] * scale], outline=_OUTLINE, width=3)
    return image


def _webp(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "WEBP", quality=82, method=4)
    return out.getvalue()


def _curve(loss: Sequence[float]) -> str | None:
    """Points of the training loss, a running mean over 1/20 of the steps, in a box of 300 x 80."""
    if len(loss) < 20:
        return None
    width = max(1, len(loss) // 20)
    mean = np.convolve(loss, np.ones(width) / width, mode="valid")
    mean = mean[np.linspace(0, len(mean) - 1, min(len(mean), 150)).astype(int)]
    x = np.linspace(0, 300, len(mean))
    y = 78 - 76 * (mean - mean.min()) / max(float(np.ptp(mean)), 1e-9)
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("diffmine.report"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.globals.update(cell=CELL, step=CELL + GAP)
    return environment

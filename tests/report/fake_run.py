"""Hand-made tables of a run, and the images they speak of: what the report is built from in tests."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from diffmine.config import Config
from diffmine.errors import ImageError
from diffmine.report.finetuning import Finetuning
from diffmine.report.page import Files, page_files
from diffmine.report.site import Site
from diffmine.run import SCHEMAS, rows_to_table

SIDE, PATCH = 96, 32
ELEMENTS = ("ellipse", "rectangle", "polygon")
Row = dict[str, Any]


def image(image_id: str) -> np.ndarray:
    """A picture [96, 128, 3] that depends on its name only."""
    rng = np.random.default_rng(list(image_id.encode()))
    picture = Image.new("RGB", (SIDE + PATCH, SIDE), tuple(rng.integers(140, 250, 3).tolist()))
    draw = ImageDraw.Draw(picture)
    for _ in range(14):
        x, y, side = rng.integers(0, SIDE), rng.integers(0, SIDE - 16), rng.integers(8, 30)
        colour = tuple(rng.integers(20, 240, 3).tolist())
        shape = ELEMENTS[rng.integers(3)]
        if shape == "polygon":
            draw.polygon([(x, y + side), (x + side, y + side), (x + side / 2, y)], fill=colour)
        else:
            getattr(draw, shape)([x, y, x + side, y + side], fill=colour)
    return np.asarray(picture)


def tables(
    labels: Sequence[str],
    images: int = 12,
    k: int = 4,
    joint: bool = False,
    base: str = "/data/set",
    shared: bool = False,
) -> dict[str, pa.Table]:
    """A run that mined `images` images of each label; the last cluster of each label comes from one image.

    Args:
        joint: clusters hold patches of all labels.
        shared: every image has all labels.
    """
    rows: dict[str, list[Row]] = {name: [] for name in ("manifest", "patches", "clusters", "members", "samples")}
    for number, label in enumerate(labels):
        ids = [f"{0 if shared else number}/{i:03d}.png" for i in range(images)]
        of = list(labels) if shared else [label]
        if not (shared and number):
            rows["manifest"] += [{"image_id": i, "uri": f"{base}/{i}", "labels": of, "boxes": None} for i in ids]
        own = [patch for kind in ("top", "bottom", "random") for patch in _patches(number, label, kind, ids)]
        rows["patches"] += own
        for rank, patch in enumerate(own[: 3 * images]):
            cluster = k - 1 if patch["image_id"] == ids[-1] else rank % (k - 1)
            patch_id, distance = patch["patch_id"], 1 - rank / 100
            rows["members"].append({"patch_id": patch_id, "label": label, "cluster": cluster, "distance": distance})
        rows["samples"] += [{"label": label, "index": i, "image": _sample(f"{number}-{i}")} for i in range(4)]
    rows["clusters"] = _clusters(rows["members"], {p["patch_id"]: p for p in rows["patches"]}, joint)
    found = {name: rows_to_table(name, own) for name, own in rows.items()}
    return {**found, "failures": SCHEMAS["failures"].empty_table()}


def _patches(number: int, label: str, kind: str, ids: Sequence[str]) -> list[Row]:
    """Three patches of each image."""
    sign = {"top": 1.0, "bottom": -1.0, "random": 0.05}[kind]
    return [
        {
            "patch_id": f"{number}-{kind}-{rank:04d}", "image_id": ids[rank % len(ids)], "label": label, "kind": kind,
            "rank": rank, "x": 32 * (rank // len(ids)), "y": rank % (SIDE - PATCH), "width": PATCH, "height": PATCH,
            "image_x": 0.0, "image_y": 0.0, "image_width": 32.0, "image_height": 32.0,
            "typicality": sign * (0.02 - number / 300) * (1 - rank / (4 * len(ids))), "stderr": 0.0004,
        }
        for rank in range(3 * len(ids))
    ]  # fmt: skip


def _clusters(members: Sequence[Row], patches: dict[str, Row], joint: bool) -> list[Row]:
    groups: dict[tuple[str | None, int], list[Row]] = {}
    for member in members:
        key = (None if joint else member["label"], member["cluster"])
        groups.setdefault(key, []).append(patches[member["patch_id"]])
    rows: list[Row] = [
        {
            "label": label, "cluster": cluster, "rank": 0, "size": len(group),
            "images": len({p["image_id"] for p in group}), "inertia": 1.0,
            "median_typicality": float(np.median([p["typicality"] for p in group])),
        }
        for (label, cluster), group in groups.items()
    ]  # fmt: skip
    for label in {row["label"] for row in rows}:
        own = sorted((row for row in rows if row["label"] == label), key=lambda row: -row["median_typicality"])
        for rank, row in enumerate(own):
            row["rank"] = rank
    return rows


def _sample(name: str) -> Row:
    out = io.BytesIO()
    Image.fromarray(image(name)[:SIDE, :SIDE]).save(out, "PNG")
    return {"bytes": out.getvalue(), "path": None}


def finetuning(labels: Sequence[str], images: int = 12, steps: int = 400) -> Finetuning:
    """The second image of each label was held out, and the weights after three quarters of the steps are used."""

    def validated(step: int, loss: float, gain: float) -> Row:
        both = {"loss": loss, "null_loss": loss + 2 * gain, "typicality": gain}  # as of a model that predicts v
        own = {label: {**both, "images": 1} for label in labels}
        return {"step": step, **both, "labels": own, "exported": step == 3 * steps // 4}

    return Finetuning(
        loss=[0.3 - 0.1 * step / steps for step in range(steps)],
        steps=steps,
        validation=[validated(0, 0.31, 0.0), validated(3 * steps // 4, 0.22, 0.01), validated(steps, 0.23, 0.02)],
        held_out=frozenset(f"{number}/001.png" for number in range(len(labels))),
        trained=len(labels) * (images - 1),
    )


def settings(joint: bool = False, **more: Any) -> dict[str, Any]:
    """What the run says of itself."""
    config = Config.model_validate({
        "output": "/runs/one", "dataset": {"source": "/data/set", "layout": "folder"}, "model": {"base": "tiny"},
        "finetune": {"steps": 400}, "typicality": {"draws": 24},
        "clusters": {"scope": "dataset" if joint else "label"},
    }).model_dump(mode="json")  # fmt: skip
    run = {"versions": {"diffmine": "0.1.0"}, "seconds": {"latents": 12.0, "typicality": 75.5}}
    return {"config": config, "run": run, "notes": [], "hits": None, **more}


def build(
    found: Mapping[str, pa.Table],
    about: Mapping[str, Any],
    open_image: Callable[[str], np.ndarray | ImageError] = image,
    map_of: Callable[[str, str], np.ndarray] | None = None,
) -> Files:
    """All files of the site, one page after the other, as (path, bytes).

    Args:
        map_of: image_id and label -> map, float [h, w]; without it there are none.
    """
    site, unreadable = Site(found, about), dict[str, str]()
    for job in site.jobs():
        label, pairs = job.page.label, {(p.image_id, p.label) for p in job.page.shown()}
        pairs |= {(one.image_id, label) for one in job.page.located if label is not None}
        maps = {pair: map_of(*pair) for pair in pairs} if map_of else {}
        yield from page_files(job, map(open_image, job.page.image_ids()), maps, unreadable)
    yield from site.overview(unreadable)

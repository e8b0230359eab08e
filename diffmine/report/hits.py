"""Patches and boxes -> how often a label's most typical patches lie on its boxes, with chance beside it."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diffmine.mining.hits import chance, on_box
from diffmine.mining.patches import KINDS

Row = dict[str, Any]
_COLUMNS = ["image_id", "label", "kind", "x", "y", "width", "height"]
Boxes = dict[tuple[str, str], np.ndarray]  # (image, label) -> boxes [M, 4] in prepared pixels


def hit_table(patches: pa.Table, manifest: pa.Table, latents: pa.Table, cell: int, top: int = 30) -> list[Row]:
    """One row per label that has boxes and patches, sorted by label.

    An image that the boxes do not name has none: a patch there is a miss, and its windows count for chance.

    Args:
        patches, manifest, latents: the run's tables; of `latents` all but the latent is needed.
        cell: side of a latent cell in pixels of the prepared image.
        top: how many of the most and of the least typical patches are looked at, by rank; of random ones all are.

    Returns:
        label; `top`, `random`, `bottom`: (patches that lie on a box of the label, patches looked at) of the most
        typical, random and least typical ones; chance: share (0 to 1) of all windows of the label's images that lie on
        a box of it.
    """
    places = {row["image_id"]: row for row in latents.to_pylist()}
    images: dict[str, list[str]] = defaultdict(list)  # label -> its images
    boxes: Boxes = {}
    for row in manifest.select(["image_id", "labels", "boxes"]).to_pylist():
        place = places.get(row["image_id"])
        if place is not None:
            for label in row["labels"]:
                images[label].append(row["image_id"])
                own = [box for box in row["boxes"] or () if box["label"] == label]
                if own:
                    boxes[row["image_id"], label] = _prepared(own, place)
    looked_at: dict[str, list[Row]] = defaultdict(list)
    wanted = pc.or_(pc.less(patches["rank"], top), pc.equal(patches["kind"], "random"))
    for patch in patches.select(_COLUMNS).filter(wanted).to_pylist():
        looked_at[patch["label"]].append(patch)
    mined = {label for label, group in looked_at.items() if any(patch["kind"] == "top" for patch in group)}
    boxed = sorted(mined & {label for _, label in boxes})
    return [_row(label, looked_at[label], [places[i] for i in images[label]], boxes, cell) for label in boxed]


def _prepared(boxes: list[Row], place: Mapping[str, Any]) -> np.ndarray:
    """Boxes from original to prepared pixels, [M, 4]."""
    scaled = np.array([[b["x"], b["y"], b["width"], b["height"]] for b in boxes], dtype=np.float64) * place["scale"]
    return scaled - np.array([place["crop_x"], place["crop_y"], 0, 0])


def _row(label: str, patches: list[Row], places: list[Row], boxes: Boxes, cell: int) -> Row:
    """Counts of one label; its windows have the size of its largest patch, since small images clip theirs."""
    hits = {kind: [_hit(p, boxes) for p in patches if p["kind"] == kind] for kind in KINDS}
    size = max(p["height"] for p in patches), max(p["width"] for p in patches)
    return {
        "label": label, **{kind: (sum(hit), len(hit)) for kind, hit in hits.items()},
        "chance": _chance([(place, boxes.get((place["image_id"], label))) for place in places], size, cell),
    }  # fmt: skip


def _hit(patch: Row, boxes: Boxes) -> bool:
    """Whether a patch lies on a box of its label."""
    own = boxes.get((patch["image_id"], patch["label"]))
    return own is not None and bool(on_box([[patch[k] for k in ("x", "y", "width", "height")]], own).any())


def _chance(images: list[tuple[Row, np.ndarray | None]], size: tuple[int, int], cell: int) -> float:
    """Share of all windows of the images that lie on a box; larger images have more windows."""
    on = windows = 0.0
    for place, boxes in images:
        height, width = place["h"] * cell, place["w"] * cell
        size_y, size_x = min(size[0], height), min(size[1], width)
        count = (height - size_y + 1) * (width - size_x + 1)
        windows += count
        on += 0.0 if boxes is None else count * chance(height, width, size_y, size_x, boxes)
    return on / windows

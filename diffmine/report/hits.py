"""Patches and boxes -> how often the best patches of a label lie on its boxes, with chance beside it."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from diffmine.mining.hits import chance, on_box


def hit_table(patches: pa.Table, manifest: pa.Table, latents: pa.Table, cell: int, top: int) -> list[dict[str, Any]]:
    """One row per label that has boxes, sorted by label.

    Args:
        patches, manifest, latents: the run's tables (of `latents` all but the latent is needed).
        cell: pixels of a latent cell's side.
        top: how many of a label's best patches are looked at.

    Returns:
        label, best (patches looked at), hits, rate, bottom_rate and random_rate (the same share of the least typical
        and of the random patches), chance (the share of all windows of the label's images that lie on a box of it).
    """
    places = {row["image_id"]: row for row in latents.to_pylist()}
    boxes: dict[tuple[str, str], np.ndarray] = {}  # (image, label) -> boxes [N, 4] in prepared pixels
    images = defaultdict(list)  # label -> its images
    for row in manifest.select(["image_id", "labels", "boxes"]).to_pylist():
        if row["image_id"] in places:
            for label in row["labels"]:
                images[label].append(row["image_id"])
                boxes[row["image_id"], label] = _prepared(row["boxes"] or [], label, places[row["image_id"]])
    shown = patches.filter(pa.compute.less(patches["rank"], top)).to_pylist()
    rows = []
    for label in sorted(images):
        if not any(len(boxes[image, label]) for image in images[label]):
            continue
        hits = {kind: _hits([p for p in shown if p["label"] == label and p["kind"] == kind], boxes) for kind in _KINDS}
        size = next((p["height"], p["width"]) for p in shown if p["label"] == label)
        rows.append({
            "label": label, "best": len(hits["top"]), "hits": sum(hits["top"]), "rate": float(np.mean(hits["top"])),
            "bottom_rate": float(np.mean(hits["bottom"])), "random_rate": float(np.mean(hits["random"])),
            "chance": _chance([(places[image], boxes[image, label]) for image in images[label]], size, cell),
        })  # fmt: skip
    return rows


_KINDS = ("top", "bottom", "random")


def _prepared(boxes: list[Mapping[str, Any]], label: str, place: Mapping[str, Any]) -> np.ndarray:
    """Boxes of a label, from original to prepared pixels, [N, 4]."""
    own = [[b["x"], b["y"], b["width"], b["height"]] for b in boxes if b["label"] == label]
    scaled = np.array(own, dtype=np.float64).reshape(-1, 4) * place["scale"]
    return scaled - np.array([place["crop_x"], place["crop_y"], 0, 0])


def _hits(patches: list[dict[str, Any]], boxes: Mapping[tuple[str, str], np.ndarray]) -> list[bool]:
    """Whether each patch lies on a box of its label."""
    return [
        bool(on_box([[p["x"], p["y"], p["width"], p["height"]]], boxes[p["image_id"], p["label"]]).any()) for p in patches
    ]


def _chance(images: list[tuple[Mapping[str, Any], np.ndarray]], size: tuple[int, int], cell: int) -> float:
    """Share of all windows of the images that lie on a box; larger images have more windows."""
    on = windows = 0.0
    for place, boxes in images:
        height, width = place["h"] * cell, place["w"] * cell
        size_y, size_x = min(size[0], height), min(size[1], width)
        count = (height - size_y + 1) * (width - size_x + 1)
        windows += count
        on += count * chance(height, width, size_y, size_x, boxes) if len(boxes) else 0.0
    return on / windows

"""Patches and boxes -> how often a label's most typical patches lie on its boxes, with chance beside it."""

from collections import defaultdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diffmine.data.images import to_prepared
from diffmine.mining.hits import chance, on_box
from diffmine.mining.patches import KINDS
from diffmine.tables import grouped

Row = dict[str, Any]
_COLUMNS = ["image_id", "label", "kind", "rank", "x", "y", "width", "height"]
_BOX = ("x", "y", "width", "height")
Boxes = dict[str, tuple[np.ndarray, np.ndarray]]  # image -> height and width, and boxes [M, 4], in prepared pixels


def hit_table(patches: pa.Table, manifest: pa.Table, latents: pa.Table, cell: int, top: int = 30) -> list[Row]:
    """One row per label that has boxes and patches, sorted by label.

    Only annotated images count, those whose boxes are known, for patches and for chance. A patch on one that has no
    box is a miss.

    Args:
        patches, manifest, latents: the run's tables; of `latents` all but the latent is needed.
        cell: side of a latent cell in pixels of the prepared image.
        top: how many of the most and of the least typical patches in annotated images are looked at, by rank; of random
            ones all are.

    Returns:
        label; `top`, `random`, `bottom`: (patches that lie on a box of the label, patches looked at) of the most
        typical, random and least typical ones; chance: share (0 to 1) of all windows of the label's annotated images
        that lie on a box of it; `annotated`, `images`: how many images of the label are annotated, and are usable.
    """
    place = pc.index_in(manifest["image_id"], latents["image_id"].combine_chunks())  # null: no latent
    known = manifest.select(["image_id", "labels", "boxes"]).append_column("place", place)
    known = known.filter(pc.is_valid(place)).combine_chunks()
    sizes = cell * np.stack([latents[side].to_numpy() for side in "hw"], 1)  # [N, 2] pixels
    boxes = _boxes(known.filter(pc.greater(pc.list_value_length(known["boxes"]), 0)), latents, sizes)
    annotated = pc.is_valid(known["boxes"])
    looked_at = _looked_at(patches, known.filter(annotated)["image_id"], top)
    mined = {label for label, group in looked_at.items() if any(patch["kind"] == "top" for patch in group)}
    sizes, annotated = sizes[known["place"].to_numpy()], annotated.to_numpy(zero_copy_only=False)
    labels, images = pc.list_flatten(known["labels"]), pc.list_parent_indices(known["labels"]).to_numpy()
    found = []
    for label in sorted(mined & boxes.keys()):
        own = images[pc.equal(labels, label).to_numpy()]
        of = own[annotated[own]]
        row = _row(label, looked_at[label], sizes[of], boxes[label])
        found.append({**row, "annotated": len(of), "images": len(own)})
    return found


def _looked_at(patches: pa.Table, annotated: pa.ChunkedArray, top: int) -> dict[str, list[Row]]:
    """Label -> its patches in annotated images: the first `top` of most and least typical ones, all random ones."""
    patches = patches.select(_COLUMNS).filter(pc.is_in(patches["image_id"], annotated.combine_chunks()))
    return {
        label: [
            patch
            for kind, ranked in grouped(own, "kind").items()
            for patch in ranked[: None if kind == "random" else top].to_pylist()
        ]
        for label, own in grouped(patches.sort_by("rank"), "label").items()
    }


def _boxes(boxed: pa.Table, latents: pa.Table, sizes: np.ndarray) -> dict[str, Boxes]:
    """Label -> its boxes in its images."""
    places = latents.select(["scale", "crop_x", "crop_y"]).take(boxed["place"])
    found: dict[str, Boxes] = defaultdict(dict)
    for row, place in zip(boxed.to_pylist(), places.to_pylist(), strict=True):
        for label in row["labels"]:
            own = [[box[name] for name in _BOX] for box in row["boxes"] if box["label"] == label]
            if own:
                found[label][row["image_id"]] = (sizes[row["place"]], to_prepared(own, **place))
    return found


def _row(label: str, patches: list[Row], sizes: np.ndarray, boxes: Boxes) -> Row:
    """Counts of one label; its windows have the size of its largest patch, since small images clip theirs.

    Args:
        sizes: of its annotated images, [N, 2] pixels.
    """
    hits = {kind: [_hit(p, boxes) for p in patches if p["kind"] == kind] for kind in KINDS}
    window = np.array([max(p["height"] for p in patches), max(p["width"] for p in patches)])
    on = sum(
        _windows(size, window) * chance(size[0], size[1], window[0], window[1], own) for size, own in boxes.values()
    )
    return {
        "label": label, **{kind: (sum(hit), len(hit)) for kind, hit in hits.items()},
        "chance": float(on / _windows(sizes, window).sum()),
    }  # fmt: skip


def _hit(patch: Row, boxes: Boxes) -> bool:
    """Whether a patch lies on a box of its label."""
    if patch["image_id"] not in boxes:
        return False
    return bool(on_box([[patch[name] for name in _BOX]], boxes[patch["image_id"]][1]).any())


def _windows(sizes: np.ndarray, window: np.ndarray) -> np.ndarray:
    """How many windows images have, larger ones more; `sizes` [..., 2] pixels -> [...]."""
    return (sizes - np.minimum(window, sizes) + 1).prod(axis=-1)

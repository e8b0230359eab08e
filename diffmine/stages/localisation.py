"""Typicality maps and boxes -> localisation: how well each map, read as a detector, finds the boxes of its label.

the driver lists the images with boxes of their labels -> CPU tasks measure their maps -> one part
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from diffmine.data.images import to_prepared
from diffmine.mining import localisation as measures
from diffmine.run import SCHEMAS, Run, part_name, rows_to_table, run_here
from diffmine.stages.maps import map_rows
from diffmine.stages.session import Context, Result
from diffmine.stages.shards import each_shard, pack, unpack

Boxes = dict[str, dict[str, list[list[float]]]]  # image -> label -> boxes (x, y, width, height), prepared pixels
_PLACE = ["image_id", "h", "w", "scale", "crop_x", "crop_y"]
_MAP = ["image_id", "label", "own", "h", "w", "map"]


def localisation(context: Context) -> Result:
    """Measure the maps of images under labels of their own that they have boxes of: as they are, over patches, and of
    the contrast with other labels over patches, where there are any."""
    run, progress = context.run, context.progress
    cell = (run.committed("latents") or {})["cell"]
    told = {shard: json.dumps(boxes).encode() for shard, boxes in _boxes(run) if boxes}
    progress.start("localisation", len(told), "shards")
    found = [SCHEMAS["localisation"].empty_table()]
    for row in each_shard(context, "localisation", told, _Measure(run.uri, cell, context.config.patches.size)):
        found.append(unpack(row["found"]))
        progress.advance(1)
    table = pa.concat_tables(found).sort_by([("image_id", "ascending"), ("label", "ascending")])
    progress.finish(f"{len(table):,} maps compared with boxes")
    files = {part_name("localisation", 0): run.write_part("localisation", 0, table, over=True)} if len(table) else {}
    return Result(files, {"rows": len(table)})


def _boxes(run: Run) -> Iterator[tuple[int, Boxes]]:
    """Of each shard, the boxes of images' own labels."""
    manifest = run.table("manifest", ["image_id", "labels", "boxes"])
    boxed = manifest.filter(pc.greater(pc.list_value_length(manifest["boxes"]), 0)).combine_chunks()
    parts = run.read_parts("latents", _PLACE)
    if not len(boxed) or not parts:
        return
    places = pa.concat_tables(
        [rows.append_column("shard", pa.array(np.full(len(rows), n, np.int32))) for n, rows in parts.items()]
    )
    row = pc.index_in(places["image_id"], boxed["image_id"].combine_chunks())  # once: it looks at all of them each time
    known = pc.is_valid(row)
    pairs = zip(places.filter(known).to_pylist(), boxed.take(row.filter(known)).to_pylist(), strict=True)
    for shard, own in groupby(pairs, lambda pair: pair[0]["shard"]):
        yield shard, {place["image_id"]: found for place, image in own if (found := _own(image, place))}


def _own(image: dict[str, Any], place: dict[str, Any]) -> dict[str, list[list[float]]]:
    found: dict[str, list[list[float]]] = {}
    for box in image["boxes"]:
        if box["label"] in image["labels"]:
            corner_and_size = [box[name] for name in ("x", "y", "width", "height")]
            [prepared] = to_prepared([corner_and_size], place["scale"], place["crop_x"], place["crop_y"]).tolist()
            found.setdefault(box["label"], []).append(prepared)
    return found


@dataclass(frozen=True)
class _Measure:
    """Ray task: the rows of a shard."""

    run_uri: str
    cell: int
    size: int  # of a patch

    def __call__(self, batch: pa.Table) -> pa.Table:
        [row], run = batch.to_pylist(), run_here(self.run_uri)
        boxes: Boxes = json.loads(row["told"])
        rows = run.pieces("typicality", row["shard"], lambda file: [*self._of_file(file, boxes)])
        return pa.table({"found": pa.array([pack(rows_to_table("localisation", rows))], pa.large_binary())})

    def _of_file(self, file: pq.ParquetFile, boxes: Boxes) -> Iterator[dict[str, Any]]:
        for image_id, maps in groupby(map_rows(file, _MAP, images=boxes), itemgetter("image_id")):
            of_labels = [*maps]
            others = [self._over_patches(row) for row in of_labels if not row["own"]]
            strongest = np.max(others, axis=0) if others else None  # of the labels that the image does not have
            for row in of_labels:
                if row["own"] and row["label"] in boxes[image_id]:
                    yield from self._of_map(row, strongest, boxes[image_id][row["label"]])

    def _over_patches(self, row: dict[str, Any]) -> np.ndarray:
        return measures.over_patches(row["map"], row["h"] * self.cell, row["w"] * self.cell, self.size)

    def _of_map(
        self, row: dict[str, Any], strongest: np.ndarray | None, boxes: list[list[float]]
    ) -> Iterator[dict[str, Any]]:
        """One row; none where the boxes were cropped away."""
        height, width = row["h"] * self.cell, row["w"] * self.cell
        truth = measures.inside(height, width, boxes)
        if not truth.any():
            return
        maps = {"": row["map"], "patch_": self._over_patches(row)}
        if strongest is not None:
            maps["contrast_"] = maps["patch_"] - strongest
        pixels = {kind: measures.upsampled(values, height, width) for kind, values in maps.items()}
        yield {
            "image_id": row["image_id"], "label": row["label"],
            "boxes": [dict(zip(("x", "y", "width", "height"), box, strict=True)) for box in boxes],
            "prevalence": float(truth.mean()), "paper_auc_pr": measures.paper_auc_pr(pixels[""], truth),
            **{kind + name: v for kind, values in pixels.items() for name, v in _measured(values, truth).items()},
        }  # fmt: skip


def _measured(values: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    return {
        "average_precision": measures.average_precision(values, truth),
        "pointing_hit": measures.pointing_hit(values, truth),
        "iou": measures.overlap(values, truth),
    }

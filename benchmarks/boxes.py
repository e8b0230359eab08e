"""A finished run of a dataset with boxes -> how often its best patches lie on them, and how well its maps find them.

    python benchmarks/boxes.py --run runs/facades --out benchmarks/results/facades.json

- *hits*: of the 30 best patches of a label, those that lie on one of its boxes, as the report counts them; *chance*:
  the share of all windows that do. *By T*: the same of the 30 that T alone would choose, where images were scored
  under more labels.
- *T*: average precision of the map as a detector of the label's boxes, cell by cell, mean over the images that have
  one; *chance*: the share of cells in boxes.
- *contrast*: the same of T less the strongest other label's of each cell, where images were scored under more.
"""

import argparse
from collections import defaultdict
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from gpu import record
from sklearn.metrics import average_precision_score

from diffmine.mining.patches import choose, patch_map, rank, window_size
from diffmine.report.hits import hit_table, prepared_boxes
from diffmine.run import Run
from diffmine.stages.maps import map_rows
from diffmine.stages.report import hits

_PLACE = ["image_id", "h", "w", "scale", "crop_x", "crop_y"]
_MAP = ["image_id", "label", "own", "h", "w", "map"]
Row = dict[str, Any]


def cells_in_boxes(place: Row, boxes: list[Row], cell: int) -> np.ndarray:
    """Which cells of an image's map lie in a box, bool [h, w]; boxes are in pixels of the original image."""
    inside = np.zeros((place["h"], place["w"]), bool)
    for x, y, width, height in prepared_boxes(boxes, place) / cell if boxes else ():
        inside[max(0, round(y)) : max(0, round(y + height)), max(0, round(x)) : max(0, round(x + width))] = True
    return inside


def precision(run: Run) -> dict[str, dict[str, float]]:
    """label -> average precision of its maps, and chance."""
    cell = (run.committed("latents") or {})["cell"]
    boxes = {r["image_id"]: r["boxes"] or [] for r in run.table("manifest", ["image_id", "boxes"]).to_pylist()}
    places = {r["image_id"]: r for r in run.table("latents", _PLACE).to_pylist()}
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for part in run.parts("typicality"):
        rows = run.pieces("typicality", part, lambda file: [*map_rows(file, _MAP)])
        for image_id, of_image in groupby(rows, itemgetter("image_id")):
            maps = {row["label"]: row for row in of_image}
            for label in (label for label, row in maps.items() if row["own"]):
                wanted = [box for box in boxes[image_id] if box["label"] == label]
                truth = cells_in_boxes(places[image_id], wanted, cell).ravel()
                if not truth.any() or truth.all():
                    continue
                own, sides = maps[label]["map"], found[label]
                sides["chance"].append(float(truth.mean()))
                sides["T"].append(average_precision_score(truth, own.ravel()))
                if others := [row["map"] for other, row in maps.items() if other != label]:
                    contrast = own - np.max(others, axis=0)
                    sides["contrast"].append(average_precision_score(truth, contrast.ravel()))
    return {label: {name: float(np.mean(values)) for name, values in sides.items()} for label, sides in found.items()}


def candidates(run: Run) -> dict[str, list[Row]]:
    """label -> what T alone would put forward of its images, `patches.per_image` windows of each."""
    wanted, cell = yaml.safe_load(run.read("run.yaml"))["patches"], (run.committed("latents") or {})["cell"]
    found: dict[str, list[Row]] = defaultdict(list)
    for part in run.parts("typicality"):
        for row in run.pieces("typicality", part, lambda file: [*map_rows(file, _MAP, own=True)]):
            height, width = row["h"] * cell, row["w"] * cell
            size_y, size_x = window_size(wanted["size"], height), window_size(wanted["size"], width)
            means = patch_map(row["map"], height, width, wanted["size"])
            found[row["label"]] += [
                {"image_id": row["image_id"], "y": y, "x": x, "height": size_y, "width": size_x, "T": means[y, x]}
                for y, x in choose(means, size_y, size_x, wanted["per_image"])
            ]
    return found


def hits_by_t(run: Run, top: int = 30) -> dict[str, tuple[int, int]]:
    """label -> (patches on a box, patches) of the best by T alone."""
    cell, best = (run.committed("latents") or {})["cell"], list[Row]()
    for label, rows in candidates(run).items():
        score, image_id, y, x = (np.array([row[name] for row in rows]) for name in ("T", "image_id", "y", "x"))
        order = rank(score, image_id, y, x, top)
        best += [{**rows[i], "label": label, "kind": "top", "rank": place} for place, i in enumerate(order)]
    manifest = run.table("manifest", ["image_id", "labels", "boxes"])
    counted = hit_table(pa.Table.from_pylist(best), manifest, run.table("latents", _PLACE), cell, top)
    return {row["label"]: row["top"] for row in counted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="folder or URI of a finished run")
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args()
    run = Run(args.run)
    found, counted = precision(run), hits(run)
    if counted is None:
        parser.error(f"{args.run}: its dataset has no boxes")
    for row in counted:
        on, of = row["top"]
        print(f"{row['label']}: {on} of the {of} best patches on a box, chance {row['chance']:.2f}")
    by_t = hits_by_t(run) if any("contrast" in sides for sides in found.values()) else {}
    for label, (on, of) in by_t.items():
        print(f"{label}: {on} of the {of} best by T alone")
    for label, sides in found.items():
        print(f"{label}: average precision of cells", *(f"{name} {value:.2f}" for name, value in sides.items()))
    if args.out:
        record(args.out, hits=counted, hits_by_t=by_t, precision=found)


if __name__ == "__main__":
    main()

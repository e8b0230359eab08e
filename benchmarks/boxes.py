"""A finished run of a dataset with boxes -> how often its best patches lie on them, and how well its maps find them.

    python benchmarks/boxes.py --run runs/facades --out benchmarks/results/facades.json

- *hits*: of the 30 best patches of a label, those that lie on one of its boxes, as the report counts them; *chance*:
  the share of all windows that do.
- *T*: average precision of the map as a detector of the label's boxes, cell by cell, mean over the images that have
  one; *chance*: the share of cells in boxes.
- *contrast*: the same of T less the strongest other label's, where images were scored under several labels.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from gpu import record
from sklearn.metrics import average_precision_score

from diffmine.run import Run
from diffmine.stages.report import hits

Row = dict[str, Any]


def cells_in_boxes(row: Row, boxes: list[Row], cell: int) -> np.ndarray:
    """Which cells of a map lie in a box, bool [h, w]; boxes are in pixels of the original image."""
    inside = np.zeros((row["h"], row["w"]), bool)
    for b in boxes:
        x, y = b["x"] * row["scale"] - row["crop_x"], b["y"] * row["scale"] - row["crop_y"]
        right, below = x + b["width"] * row["scale"], y + b["height"] * row["scale"]
        inside[max(0, round(y / cell)) : round(below / cell), max(0, round(x / cell)) : round(right / cell)] = True
    return inside


def precision(run: Run) -> dict[str, dict[str, float]]:
    """label -> average precision of its maps, and chance."""
    cell = (run.committed("latents") or {})["cell"]
    boxes = {r["image_id"]: r["boxes"] or [] for r in run.table("manifest", ["image_id", "boxes"]).to_pylist()}
    latents = run.table("latents", ["image_id", "h", "w", "scale", "crop_x", "crop_y"]).to_pylist()
    maps: dict[str, dict[str, np.ndarray]] = defaultdict(dict)  # of an image, label -> map
    owned = set()
    for row in run.table("typicality", ["image_id", "label", "own", "h", "w", "map"]).to_pylist():
        maps[row["image_id"]][row["label"]] = np.reshape(row["map"], (row["h"], row["w"]))
        if row["own"]:
            owned.add((row["image_id"], row["label"]))
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for place in latents:
        for label, own in maps[place["image_id"]].items():
            wanted = [b for b in boxes[place["image_id"]] if b["label"] == label]
            truth = cells_in_boxes(place, wanted, cell)
            if (place["image_id"], label) not in owned or not truth.any() or truth.all():
                continue
            found[label]["chance"].append(float(truth.mean()))
            found[label]["T"].append(average_precision_score(truth.ravel(), own.ravel()))
            if others := [m for other, m in maps[place["image_id"]].items() if other != label]:
                contrast = own - np.max(others, axis=0)
                found[label]["contrast"].append(average_precision_score(truth.ravel(), contrast.ravel()))
    return {label: {name: float(np.mean(values)) for name, values in sides.items()} for label, sides in found.items()}


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
    for label, sides in found.items():
        print(f"{label}: average precision of cells", *(f"{name} {value:.2f}" for name, value in sides.items()))
    if args.out:
        record(args.out, hits=counted, precision=found)


if __name__ == "__main__":
    main()

"""A finished run of a dataset with boxes -> how often its best patches lie on them, and how well its maps find them.

    python benchmarks/boxes.py --run runs/facades --out benchmarks/results/facades.json

- *hits*: of the 30 best patches of a label, those that lie on one of its boxes, as the report counts them; *chance*:
  the share of all windows that do. *By T*: the same of the 30 that T alone would choose, where images were scored
  under more labels.
- *localisation*: as the report has it, from the run's table of that name.
"""

import argparse
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from gpu import record

from diffmine.mining.patches import choose, patch_map, rank, window_size
from diffmine.report.hits import hit_table
from diffmine.report.localisation import localisations
from diffmine.run import Run
from diffmine.stages.maps import map_rows
from diffmine.stages.report import hits

_PLACE = ["image_id", "h", "w", "scale", "crop_x", "crop_y"]
_MAP = ["image_id", "label", "own", "h", "w", "map"]
Row = dict[str, Any]


def candidates(run: Run, wanted: Row) -> dict[str, list[Row]]:
    """label -> what T alone would put forward of its images, `patches.per_image` windows of each."""
    cell, found = (run.committed("latents") or {})["cell"], defaultdict[str, list[Row]](list)
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


def hits_by_t(run: Run, wanted: Row, top: int = 30) -> dict[str, tuple[int, int]]:
    """label -> (patches on a box, patches) of the best by T alone."""
    cell, best = (run.committed("latents") or {})["cell"], list[Row]()
    for label, rows in candidates(run, wanted).items():
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
    config, counted = yaml.safe_load(run.read("run.yaml")), hits(run)
    if counted is None:
        parser.error(f"{args.run}: its dataset has no boxes")
    for row in counted:
        on, of = row["top"]
        print(f"{row['label']}: {on} of the {of} best patches on a box, chance {row['chance']:.2f}")
    found = localisations(run.table("localisation"), run.table("manifest"), config["dataset"]["group_column"])
    by_t = hits_by_t(run, config["patches"]) if any(len(one.maps) > 2 for one in found) else {}
    for label, (on, of) in by_t.items():
        print(f"{label}: {on} of the {of} best by T alone")
    for one in found:
        print(f"{one.label}: {one.images} images, the paper's AUC-PR {one.paper_auc_pr:.3f}")
        for maps in one.maps:
            low, high = maps.interval or (np.nan, np.nan)
            print(
                f"  {maps.by}: average precision {maps.average_precision:.3f} ({low:.3f} to {high:.3f}; "
                f"chance {maps.prevalence:.3f}), pointing {maps.pointing_hit:.3f}, overlap {maps.iou:.3f}"
            )
    if args.out:
        record(args.out, hits=counted, hits_by_t=by_t, localisation=[asdict(one) for one in found])


if __name__ == "__main__":
    main()

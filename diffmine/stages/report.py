"""Tables -> report/index.html and the pages and pictures beside it."""

import json
from typing import Any

import numpy as np

from diffmine.data.images import decode, prepare
from diffmine.report.hits import hit_table
from diffmine.report.site import build
from diffmine.run import Run
from diffmine.stages.latents import read_file
from diffmine.stages.session import Context, Result, describe

_TABLES = {
    "manifest": None,
    "latents": ["image_id", "width", "height", "h", "w", "scale", "crop_x", "crop_y"],
    "patches": None,
    "clusters": None,
    "members": None,
    "samples": None,
}
_HITS_TOP = 30  # best patches of a label that are compared with its boxes


def report(context: Context) -> Result:
    """Write the static site."""
    run, progress = context.run, context.progress
    progress.start("report")
    tables = {name: run.table(name, columns) for name, columns in _TABLES.items()}
    tables["failures"] = run.failures()
    marker, scored = run.committed("manifest") or {}, run.committed("typicality") or {}
    settings = {
        "uri": run.uri,
        "config": context.config.model_dump(mode="json"),
        "run": _facts(run, context),
        "notes": marker.get("notes", []),
        "skipped": marker.get("skipped_files", {}),
        "hits": hits(run),
        "loss": _losses(run),
        "draws": scored.get("draws"),
        "draws_spent": scored.get("draws_spent"),
    }
    files = {}
    run.remove("report")
    for name, data in build(tables, settings, _Images(tables["manifest"], context)):
        files[f"report/{name}"] = run.put(f"report/{name}", data)
    progress.finish(f"{run.uri}/report/index.html")
    return Result(files, {"rows": len(files)})


def hits(run: Run) -> list[dict[str, Any]] | None:
    """How often the best patches of each label lie on its boxes; None for a dataset without boxes."""
    manifest = run.table("manifest", ["image_id", "labels", "boxes"])
    if manifest["boxes"].null_count == len(manifest):
        return None
    cell = (run.committed("latents") or {})["cell"]
    return hit_table(run.table("patches"), manifest, run.table("latents", _TABLES["latents"]), cell, _HITS_TOP)


def _facts(run: Run, context: Context) -> dict[str, Any]:
    """Versions and times, of this session and of what earlier ones committed."""
    stages = ("manifest", "latents", "model", "typicality", "patches", "features", "clusters")
    seconds = {m["stage"]: m["wall_s"] for s in stages if (m := run.committed(s))}
    return {**describe(context), "seconds": seconds}


def _losses(run: Run) -> list[float]:
    """Training loss of every step."""
    if not run.exists("model/metrics.jsonl"):
        return []
    return [json.loads(line)["loss"] for line in run.read("model/metrics.jsonl").splitlines()]


class _Images:
    """image_id -> the prepared image, uint8 [H, W, 3]; the only place after `latents` that opens image files."""

    def __init__(self, manifest: Any, context: Context) -> None:
        self.uris = dict(zip(manifest["image_id"].to_pylist(), manifest["uri"].to_pylist(), strict=True))
        self.size, self.limits = context.config.dataset.image, context.config.compute

    def __call__(self, image_id: str) -> np.ndarray:
        data = read_file(self.uris[image_id])
        limits = {"max_pixels": self.limits.max_image_pixels, "max_bytes": self.limits.max_image_bytes}
        return prepare(decode(data, **limits).pixels, self.size.short_side, self.size.multiple_of)[0]

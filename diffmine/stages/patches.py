"""Typicality maps -> patches: the most and the least typical windows of each label, and random ones."""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from diffmine.data.images import Geometry, geometry, to_original
from diffmine.mining.patches import choose, choose_random, nearest_centred, patch_map, rank, window_size
from diffmine.randomness import generator
from diffmine.run import SCHEMAS, Run, part_name
from diffmine.stages.session import Context, Result

KINDS = ("top", "bottom", "random")
_PRUNE_AT = 4  # a label's candidates are cut back when there are so many times what is kept


def patches(context: Context) -> Result:
    """Windows of every map -> the best `per_label` of each label and kind."""
    run, wanted, progress = context.run, context.config.patches, context.progress
    shards = run.parts("typicality")
    progress.start("patches", len(shards), "shards")
    image, cell = context.config.dataset.image, (run.committed("latents") or {})["cell"]
    task = _Candidates(
        run.uri, context.config.seed, wanted.size, wanted.per_image, cell, image.short_side, image.multiple_of
    )
    dataset: ray.data.Dataset = ray.data.from_items([{"shard": s} for s in shards], override_num_blocks=len(shards))
    dataset = dataset.map_batches(task, batch_size=1, batch_format="pyarrow", num_cpus=1)
    best: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    whole = 0
    for row in dataset.iter_rows():
        found = json.loads(row["candidates"])
        whole += row["whole_images"]
        for candidate in found:
            kept = best[candidate["label"], candidate["kind"]]
            kept.append(candidate)
            if len(kept) > _PRUNE_AT * wanted.per_label + 1000:
                best[candidate["label"], candidate["kind"]] = _best(kept, wanted.per_label)
        progress.advance(1)
    rows = _ranked(best, wanted.per_label)
    if whole:
        progress.say(
            f"patches: {whole} images are smaller than patches.size {wanted.size}; there the whole side is the patch"
        )
    progress.finish(f"{len(rows)} patches of {len({label for label, _ in best})} labels")
    table = pa.Table.from_pylist(rows, schema=SCHEMAS["patches"])
    return Result(
        {part_name("patches", 0): run.write_part("patches", 0, table)}, {"rows": len(rows), "whole_images": whole}
    )


def _ranked(best: Mapping[tuple[str, str], list[dict[str, Any]]], per_label: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for label, kind in sorted(best, key=lambda key: (key[0], KINDS.index(key[1]))):
        for i, candidate in enumerate(_best(best[label, kind], per_label)):
            rows.append({**candidate, "rank": i, "patch_id": f"{len(rows):08d}"})
    return rows


def _best(candidates: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    columns = {name: np.array([c[name] for c in candidates]) for name in ("order", "image_id", "y", "x")}
    order = rank(columns["order"], columns["image_id"], columns["y"], columns["x"], count)
    return [candidates[i] for i in order]


@dataclass(frozen=True)
class _Candidates:
    """Ray task: the windows that each image of a shard puts forward."""

    run_uri: str
    seed: int
    size: int
    per_image: int
    cell: int
    short_side: int
    multiple_of: int

    def __call__(self, batch: pa.Table) -> pa.Table:
        [shard], run = batch["shard"].to_pylist(), Run(self.run_uri)
        sizes = {
            row["image_id"]: (row["width"], row["height"])
            for row in run.read_part("latents", shard, ["image_id", "width", "height"]).to_pylist()
        }
        found: list[dict[str, Any]] = []
        whole = set()
        for row in run.read_part("typicality", shard).to_pylist():
            if self.size > min(row["h"], row["w"]) * self.cell:
                whole.add(row["image_id"])
            found += self._windows(row, geometry(*sizes[row["image_id"]], self.short_side, self.multiple_of))
        return pa.table({"candidates": [json.dumps(found)], "whole_images": [len(whole)]})

    def _windows(self, row: dict[str, Any], prepared: Geometry) -> list[dict[str, Any]]:
        """Candidates of one image and label, of every kind."""
        h, w, height, width = row["h"], row["w"], row["h"] * self.cell, row["w"] * self.cell
        size_y, size_x = window_size(self.size, height), window_size(self.size, width)
        means = patch_map(np.asarray(row["map"], np.float32).reshape(h, w), height, width, self.size)  # [H', W']
        stderr = np.asarray(row["window_stderr"], np.float32).reshape(h, w)
        rng = generator(self.seed, "random patches", row["image_id"], row["label"])
        chosen = {
            "top": choose(means, size_y, size_x, self.per_image),
            "bottom": choose(means, size_y, size_x, self.per_image, best=False),
            "random": choose_random(means.shape[0], means.shape[1], size_y, size_x, self.per_image, rng),
        }
        candidates = []
        for kind, places in chosen.items():
            for y, x in places:
                value = float(means[y, x])
                cy, cx = nearest_centred([y], h, height, size_y)[0], nearest_centred([x], w, width, size_x)[0]
                image_x, image_y, image_width, image_height = to_original(prepared, x, y, size_x, size_y)
                candidates.append({
                    "image_id": row["image_id"], "label": row["label"], "kind": kind, "x": x, "y": y,
                    "width": size_x, "height": size_y, "image_x": image_x, "image_y": image_y,
                    "image_width": image_width, "image_height": image_height, "typicality": value,
                    "stderr": float(stderr[cy, cx]),
                    "order": {"top": value, "bottom": -value, "random": float(rng.random())}[kind],
                })  # fmt: skip
        return candidates

"""Typicality maps -> patches: the most and the least typical windows of each label, and random ones.

    maps -> each image's candidates (CPU tasks) -> the best of each label (driver) -> their fresh scores (actor pool)

The score of a chosen patch is the best of many noisy ones, so it flatters. What will be looked at is scored again with
draws that had no part in the choice.
"""

import io
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffmine.config import Config
from diffmine.data.images import Geometry, geometry, to_original
from diffmine.mining.patches import KINDS, at_window, choose, choose_random, patch_map, rank, window_size
from diffmine.randomness import generator
from diffmine.run import Run, part_name, rows_to_table, to_parquet
from diffmine.stages.latents import by_shape, latent_rows
from diffmine.stages.session import Context, Result
from diffmine.stages.shards import Part, Payload, each_shard, stream
from diffmine.stages.typicality import FRESH, Estimator, Settings, scoring_settings

Row = dict[str, Any]
_PRUNE_AT = 4  # a label's candidates are cut back when there are so many times what is kept


def patches(context: Context) -> Result:
    """Windows of every map -> the best `per_label` of each label and kind, one part per shard of images."""
    run, wanted, progress = context.run, context.config.patches, context.progress
    chosen, whole = _choose(context)
    if whole:
        progress.say(
            f"patches: {whole} images are smaller than patches.size {wanted.size}; there the whole side is the patch"
        )
    by_shard: dict[int, list[Row]] = defaultdict(list)
    for row in chosen:
        by_shard[row.pop("shard")].append(row)
    marker = {"rows": len(chosen), "whole_images": whole}
    if not wanted.fresh_per_label:
        tables = {shard: rows_to_table("patches", rows) for shard, rows in sorted(by_shard.items())}
        return Result({part_name("patches", s): run.write_part("patches", s, t) for s, t in tables.items()}, marker)
    told = {shard: to_parquet(rows_to_table("patches", rows)) for shard, rows in by_shard.items()}
    make = partial(_Rescorer, scoring_settings(context), wanted.fresh_per_label, wanted.fresh_draws)
    result = stream(context, "patches", told, _read, make, len({row["image_id"] for row in chosen}))
    return Result(result.files, marker)


def _choose(context: Context) -> tuple[list[Row], int]:
    """The patches, ranked, with the shard they come from; and how many images are smaller than a patch."""
    run, wanted, image = context.run, context.config.patches, context.config.dataset.image
    shards = run.parts("typicality")
    context.progress.start("patches", len(shards), "shards")
    task = _Candidates(
        run.uri, context.config.seed, wanted.size, wanted.per_image, (run.committed("latents") or {})["cell"],
        image.short_side, image.multiple_of, context.config.typicality.against == "others",
        _race_length(context.config),
    )  # fmt: skip
    best: dict[tuple[str, str], list[Row]] = defaultdict(list)
    whole = 0
    for row in each_shard(context, "patches", dict.fromkeys(shards, b""), task):
        whole += row["whole_images"]
        for candidate in json.loads(row["candidates"]):
            kept = best[candidate["label"], candidate["kind"]]
            kept.append(candidate)
            if len(kept) > _PRUNE_AT * wanted.per_label + 1000:
                best[candidate["label"], candidate["kind"]] = _best(kept, wanted.per_label)
        context.progress.advance(1)
    rows = _ranked(best, wanted.per_label)
    context.progress.finish(f"{len(rows)} patches of {len({label for label, _ in best})} labels")
    return rows, whole


def _race_length(config: Config) -> int:
    """Draws of the images that stayed to the end of a race; 0 without one."""
    wanted = config.typicality
    return wanted.draws if wanted.racing and wanted.draws != "auto" else 0


def _ranked(best: Mapping[tuple[str, str], list[Row]], per_label: int) -> list[Row]:
    rows: list[Row] = []
    for label, kind in sorted(best, key=lambda key: (key[0], KINDS.index(key[1]))):
        for i, candidate in enumerate(_best(best[label, kind], per_label)):
            rows.append({**candidate, "rank": i, "patch_id": f"{len(rows):08d}"})
    return rows


def _best(candidates: list[Row], count: int) -> list[Row]:
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
    against_others: bool
    draws_of_the_best: int  # images with fewer have left a race, and put nothing forward for the top

    def __call__(self, batch: pa.Table) -> pa.Table:
        [shard], run = batch["shard"].to_pylist(), Run(self.run_uri)
        sizes = {
            row["image_id"]: (row["width"], row["height"])
            for row in run.read_part("latents", shard, ["image_id", "width", "height"]).to_pylist()
        }
        maps: dict[str, list[Row]] = defaultdict(list)  # image -> its maps, under its own labels and others
        for row in run.read_part("typicality", shard).to_pylist():
            maps[row["image_id"]].append(row)
        found: list[Row] = []
        whole = 0
        for image_id, rows in maps.items():
            prepared = geometry(*sizes[image_id], self.short_side, self.multiple_of)
            found += [{**c, "shard": shard} for c in self._of_image(rows, prepared)]
            whole += self.size > min(rows[0]["h"], rows[0]["w"]) * self.cell
        return pa.table({"candidates": [json.dumps(found)], "whole_images": [whole]})

    def _of_image(self, rows: list[Row], prepared: Geometry) -> list[Row]:
        """Candidates of one image, of every own label and kind."""
        h, w = rows[0]["h"], rows[0]["w"]
        means = {
            r["label"]: patch_map(
                np.asarray(r["map"], np.float32).reshape(h, w), h * self.cell, w * self.cell, self.size
            )
            for r in rows
            if r["own"] or self.against_others
        }  # [H', W'] each
        others = [means[r["label"]] for r in rows if not r["own"]] if self.against_others else []
        if self.against_others and not others:  # its own labels are all that were scored: it puts nothing forward
            return []
        return [c for r in rows if r["own"] for c in self._windows(r, means[r["label"]], others, prepared)]

    def _windows(self, row: Row, means: np.ndarray, others: list[np.ndarray], prepared: Geometry) -> list[Row]:
        """Candidates of one image and label, of every kind."""
        h, w, height, width = row["h"], row["w"], row["h"] * self.cell, row["w"] * self.cell
        size_y, size_x = window_size(self.size, height), window_size(self.size, width)
        contrast = means - np.max(others, axis=0) if others else None
        score = means if contrast is None else contrast
        stderr = np.asarray(row["window_stderr"], np.float32).reshape(h, w)
        rng = generator(self.seed, "random patches", row["image_id"], row["label"])
        chosen = {
            "top": choose(score, size_y, size_x, self.per_image if row["draws"] >= self.draws_of_the_best else 0),
            "bottom": choose(score, size_y, size_x, self.per_image, best=False),
            "random": choose_random(means.shape[0], means.shape[1], size_y, size_x, self.per_image, rng),
        }
        candidates = []
        for kind, places in chosen.items():
            for y, x in places:
                value = float(score[y, x])
                image_x, image_y, image_width, image_height = to_original(prepared, x, y, size_x, size_y)
                candidates.append({
                    "image_id": row["image_id"], "label": row["label"], "kind": kind, "x": x, "y": y,
                    "width": size_x, "height": size_y, "image_x": image_x, "image_y": image_y,
                    "image_width": image_width, "image_height": image_height, "typicality": float(means[y, x]),
                    "stderr": float(at_window(stderr, y, x, size_y, size_x, self.cell)),
                    "contrast": None if contrast is None else float(contrast[y, x]),
                    "order": {"top": value, "bottom": -value, "random": float(rng.random())}[kind],
                })  # fmt: skip
        return candidates


# ------------------------------------------------------------------------------------------------------- fresh scores


def _read(run: Run, shard: int, told: bytes) -> Payload:
    """CPU task: the patches of a shard and the latents they lie on."""
    chosen, latents = pq.read_table(io.BytesIO(told)), run.read_part("latents", shard)
    return {"patches": chosen, "latents": latents.filter(pa.compute.is_in(latents["image_id"], chosen["image_id"]))}


class _Rescorer:
    """GPU actor: the chosen patches of a shard -> the same with fresh scores of the best and the worst."""

    def __init__(self, settings: Settings, per_label: int, draws: int) -> None:
        self.estimator, self.per_label, self.draws = Estimator(settings), per_label, draws

    def __call__(self, payload: Payload) -> Part:
        rows = payload["patches"].to_pylist()
        wanted: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))  # image -> label -> patches
        for row in rows:
            if row["kind"] != "random" and row["rank"] < self.per_label:
                wanted[row["image_id"]][row["label"]].append(row)
        latents = [r for r in latent_rows(payload["latents"]) if r["image_id"] in wanted]
        for batch in by_shape(latents, ("h", "w"), max(1, len(latents))):
            labels = [sorted(wanted[r["image_id"]]) for r in batch]
            sampler, cell = self.estimator.config.typicality.sampler, self.estimator.model.cell
            pairs, found, _ = self.estimator.score(batch, labels, sampler, self.draws, FRESH)
            for p, (i, label) in enumerate(pairs):
                if found.failed_t[p] >= 0:
                    continue
                h, w = found.map[p].shape
                for row in wanted[batch[i]["image_id"]][label]:
                    y, x, size = row["y"], row["x"], (row["height"], row["width"])
                    means = patch_map(found.map[p].numpy(), h * cell, w * cell, self.estimator.config.patches.size)
                    row["fresh_typicality"] = float(means[y, x])
                    row["fresh_stderr"] = float(at_window(found.window_stderr[p].numpy(), y, x, *size, cell))
                    row["fresh_degrees_of_freedom"] = float(
                        at_window(found.window_degrees_of_freedom[p].numpy(), y, x, *size, cell)
                    )
        return Part(rows_to_table("patches", rows), [], self.estimator.batches.notes())

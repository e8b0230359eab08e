"""Latents -> typicality in rounds: images that cannot enter their labels' best patches leave after a few draws.

    round r: rounds/<r>/part-*  (a table like typicality, of the images still there, from the strata of that round)
      -> where each image stands (CPU tasks) -> who stays (driver) -> round r + 1
    at the end: typicality/part-*, each row the mean over the timesteps of its image's rounds

The rounds share out the draws of a run without a race, so images that stay have the very scores of such a run. The
others have fewer draws, of a part of the timesteps: these tell that they are not among the best, and little else.
Rounds are committed shard by shard like any stage, so a cut-off race continues where it was.
"""

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from diffmine.diffusion.draws import Draws
from diffmine.mining.patches import at_window, patch_map, window_size
from diffmine.mining.racing import Round, rounds, survivors
from diffmine.run import SCHEMAS, Run, from_parquet, part_name, rows_to_table, to_parquet
from diffmine.stages.manifest import read_shard
from diffmine.stages.session import Context, Result
from diffmine.stages.shards import Part, Payload, Worker, commit_part, each_shard, stream

Row = dict[str, Any]


def race(
    context: Context, shards: list[int], images: int, draws: Draws, make: Callable[[Round], Callable[..., Worker]]
) -> Result:
    """Score in rounds.

    Args:
        draws: `divided` ones, of any shape.
        make: gives what makes the actors of a round.
    """
    told, left, spent, each = dict.fromkeys(shards, b""), images, 0, rounds(len(draws.strata))
    for r, one in enumerate(each):
        if r:
            staying = _who_stays(context, shards, r, each[r - 1].staying)
            left = sum(len(ids) for ids in staying.values())
            context.progress.say(f"typicality: {left:,} of {images:,} images stay for round {r + 1} of {len(each)}")
            told = {s: to_parquet(pa.table({"image_id": ids})) for s, ids in staying.items() if ids}
        stream(context, _round(r), told, read_round, make(one), left)
        spent += draws.per_unit * sum(draws.strata[s].units for s in one.strata) * left
    return _merge(context, shards, len(each), spent / (images * len(draws.t)))


def _round(r: int) -> str:
    return f"rounds/{r}"


def read_round(run: Run, shard: int, told: bytes) -> Payload:
    """CPU task: the latents and labels of a shard's images that are still in the race (`told` is empty: all are)."""
    latents = run.read_part("latents", shard)
    if told:
        ids = from_parquet(told)["image_id"]
        latents = latents.filter(pa.compute.is_in(latents["image_id"], ids.combine_chunks()))
    return {"latents": latents, "manifest": read_shard(run, shard).select(["image_id", "uri", "labels"])}


def _who_stays(context: Context, shards: list[int], r: int, factor: float) -> dict[int, list[str]]:
    """Shard -> images that take part in round r: those that stay under one of their labels."""
    wanted, cell = context.config, (context.run.committed("latents") or {})["cell"]
    task = _Standing(context.run.uri, r, wanted.patches.size, cell)
    by_label: dict[str, list[Row]] = defaultdict(list)
    for batch in each_shard(context, "typicality", dict.fromkeys(shards, b""), task):
        for row in json.loads(batch["standing"]):
            by_label[row["label"]].append({**row, "shard": batch["shard"]})
    staying: dict[int, set[str]] = defaultdict(set)
    for rows in by_label.values():
        rows.sort(key=lambda row: row["image_id"])
        best, stderr = (np.array([row[k] for row in rows]) for k in ("best", "stderr"))
        stay = survivors(best, stderr, wanted.patches.per_label, wanted.typicality.racing_confidence, factor)
        for row, stays in zip(rows, stay, strict=True):
            if stays:
                staying[row["shard"]].add(row["image_id"])
    return {shard: sorted(ids) for shard, ids in sorted(staying.items())}


@dataclass(frozen=True)
class _Standing:
    """Ray task: the best window so far of every image and own label that took part in the last round."""

    run_uri: str
    rounds: int
    size: int
    cell: int

    def __call__(self, batch: pa.Table) -> pa.Table:
        [shard] = batch["shard"].to_pylist()
        found = []
        for row in _combined(Run(self.run_uri), shard, self.rounds):
            if row["own"] and row["rounds"] == self.rounds:
                h, w = row["h"], row["w"]
                cells = np.asarray(row["map"], np.float32).reshape(h, w)
                means = patch_map(cells, h * self.cell, w * self.cell, self.size)
                y, x = np.unravel_index(int(means.argmax()), means.shape)
                sizes = window_size(self.size, h * self.cell), window_size(self.size, w * self.cell)
                errors = np.asarray(row["window_stderr"], np.float32).reshape(h, w)
                stderr = float(at_window(errors, int(y), int(x), *sizes, self.cell))
                best = float(means[y, x])
                found.append({"image_id": row["image_id"], "label": row["label"], "best": best, "stderr": stderr})
        return pa.table({"shard": [shard], "standing": [json.dumps(found)]})


def _combined(run: Run, shard: int, last: int) -> list[Row]:
    """Rows of a shard over its first rounds."""
    seen: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for r in range(last):
        if run.exists(part_name(_round(r), shard)):
            for row in run.read_part(_round(r), shard).to_pylist():
                seen[row["image_id"], row["label"]].append(row)
    return [_average(seen[key]) for key in sorted(seen)]


def _average(rows: list[Row]) -> Row:
    """One row from those of several rounds, as `diffusion.typicality` has it from all their strata at once."""
    share = np.array([row["share"] for row in rows])
    weight = share / share.sum()

    def each(column: str) -> np.ndarray:
        return np.array([row[column] for row in rows], np.float64).reshape(len(rows), -1)  # [rounds, cells]

    part = np.square(weight * each("stderr")[:, 0])
    freedom = part.sum() ** 2 / np.maximum((part**2 / (each("degrees_of_freedom")[:, 0] + 2)).sum(), 1e-300) - 2
    return rows[0] | {
        "map": (weight @ each("map")).astype(np.float32), "mean": float(weight @ each("mean")[:, 0]),
        "stderr": float(np.sqrt(part.sum())), "degrees_of_freedom": max(1.0, float(freedom)),
        "window_stderr": np.sqrt(weight**2 @ np.square(each("window_stderr"))).astype(np.float32),
        "draws": sum(row["draws"] for row in rows), "rounds": len(rows),
    }  # fmt: skip


def _merge(context: Context, shards: list[int], number: int, spent: float) -> Result:
    """The table of typicality, from all rounds."""
    run = context.run
    merged = each_shard(context, "typicality", dict.fromkeys(shards, b""), _Merging(run.uri, number))
    receipts = [json.loads(row["receipt"]) for row in merged]
    context.progress.say(f"typicality: the race spent {spent:.0%} of the draws that all images would have taken")
    files = {name: digest for receipt in receipts for name, digest in receipt["files"].items()}
    totals = {key: sum(receipt[key] for receipt in receipts) for key in ("rows", "failures")}
    return Result(files, {**totals, "draws_spent": round(spent, 4)})


@dataclass(frozen=True)
class _Merging:
    """Ray task: one part of the table."""

    run_uri: str
    rounds: int

    def __call__(self, batch: pa.Table) -> pa.Table:
        [shard], run = batch["shard"].to_pylist(), Run(self.run_uri)
        failures = [
            row
            for r in range(self.rounds)
            if run.exists(part_name(f"failures/{_round(r)}", shard))
            for row in run.read_part(f"failures/{_round(r)}", shard).to_pylist()
        ]
        failed = {row["image_id"] for row in failures}
        rows = [row for row in _combined(run, shard, self.rounds) if row["image_id"] not in failed]
        table = rows_to_table("typicality", [{k: row[k] for k in SCHEMAS["typicality"].names} for row in rows])
        return pa.table({"receipt": [json.dumps(commit_part(run, "typicality", shard, Part(table, failures)))]})

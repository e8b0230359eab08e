"""Latents -> typicality in rounds: images that cannot enter their labels' best patches leave after a few draws.

    round r: rounds/<r>/part-*  (a table like typicality, of the images still there, from the draws of that round)
      -> where each image stands (CPU tasks) -> who stays (driver) -> round r + 1
    at the end: typicality/part-*, each row the mean over its image's rounds

Rounds are committed shard by shard like any stage, so a cut-off race continues where it was.
"""

import io
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffmine.mining.patches import at_window, patch_map, window_size
from diffmine.mining.racing import rounds, survivors
from diffmine.run import SCHEMAS, Run, rows_to_table, to_parquet
from diffmine.stages.manifest import read_shard
from diffmine.stages.session import Context, Result
from diffmine.stages.shards import Part, Payload, Worker, commit_part, each_shard, stream

Row = dict[str, Any]
Draws = tuple[int, int]  # number and bank


def race(context: Context, shards: list[int], images: int, make: Callable[[Draws], Callable[[], Worker]]) -> Result:
    """Score in rounds; `make` gives what makes the actors of a round."""
    wanted = context.config.typicality
    assert wanted.draws != "auto"
    told, left, spent = dict.fromkeys(shards, b""), images, 0
    for r, n in enumerate(rounds(wanted.draws)):
        if r:
            staying = _who_stays(context, shards, r)
            left = sum(len(ids) for ids in staying.values())
            context.progress.say(f"typicality: {left:,} of {images:,} images stay for round {r + 1}")
            told = {s: to_parquet(pa.table({"image_id": ids})) for s, ids in staying.items() if ids}
        stream(context, _round(r), told, read_round, make((n, _BANKS + r)), left)
        spent += n * left
    return _merge(context, shards, spent / (images * wanted.draws))


_BANKS = 10  # of draws; the first round's


def _round(r: int) -> str:
    return f"rounds/{r}"


def read_round(run: Run, shard: int, told: bytes) -> Payload:
    """CPU task: the latents and labels of a shard's images that are still in the race (`told` is empty: all are)."""
    latents = run.read_part("latents", shard)
    if told:
        ids = pq.read_table(io.BytesIO(told))["image_id"]
        latents = latents.filter(pa.compute.is_in(latents["image_id"], ids.combine_chunks()))
    return {"latents": latents, "manifest": read_shard(run, shard).select(["image_id", "uri", "labels"])}


def _who_stays(context: Context, shards: list[int], r: int) -> dict[int, list[str]]:
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
        stay = survivors(best, stderr, wanted.patches.per_label, wanted.typicality.racing_confidence, r)
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
    """Rows of a shard over its first rounds: maps averaged by draws, errors of independent estimates combined."""
    seen: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for r in range(last):
        if shard in run.parts(_round(r)):
            for row in run.read_part(_round(r), shard).to_pylist():
                seen[row["image_id"], row["label"]].append(row)
    return [_average(seen[key]) for key in sorted(seen)]


def _average(rows: list[Row]) -> Row:
    """One row from those of several rounds."""
    draws = np.array([row["draws"] for row in rows])
    weight = (draws / draws.sum())[:, None]

    def mean(column: str) -> np.ndarray:
        return (weight * np.array([row[column] for row in rows]).reshape(len(rows), -1)).sum(axis=0)

    def combined(column: str) -> np.ndarray:
        return np.sqrt(np.square(weight * np.array([row[column] for row in rows]).reshape(len(rows), -1)).sum(axis=0))

    part = np.square(weight[:, 0] * np.array([row["stderr"] for row in rows]))
    freedom = np.array([row["degrees_of_freedom"] for row in rows])
    return rows[0] | {
        "map": mean("map").astype(np.float32), "mean": float(mean("mean")[0]), "stderr": float(combined("stderr")[0]),
        "window_stderr": combined("window_stderr").astype(np.float32), "draws": int(draws.sum()), "rounds": len(rows),
        "degrees_of_freedom": float(part.sum() ** 2 / np.maximum((part**2 / freedom).sum(), 1e-300)),
    }  # fmt: skip


def _merge(context: Context, shards: list[int], spent: float) -> Result:
    """The table of typicality, from all rounds."""
    run, number = context.run, len(rounds(context.config.typicality.draws))  # type: ignore[arg-type]
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
            if shard in run.parts(f"failures/{_round(r)}")
            for row in run.read_part(f"failures/{_round(r)}", shard).to_pylist()
        ]
        failed = {row["image_id"] for row in failures}
        rows = [row for row in _combined(run, shard, self.rounds) if row["image_id"] not in failed]
        table = rows_to_table("typicality", [{k: row[k] for k in SCHEMAS["typicality"].names} for row in rows])
        return pa.table({"receipt": [json.dumps(commit_part(run, "typicality", shard, Part(table, failures)))]})

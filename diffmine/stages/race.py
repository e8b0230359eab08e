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
import pyarrow.compute as pc

from diffmine.diffusion.draws import Draws
from diffmine.mining.patches import at_window, patch_map, window_size
from diffmine.mining.racing import Round, rounds, survivors
from diffmine.run import SCHEMAS, Run, from_parquet, part_name, rows_to_table, run_here, to_parquet
from diffmine.stages.manifest import read_shard
from diffmine.stages.maps import map_rows
from diffmine.stages.session import Context, Result
from diffmine.stages.shards import Part, Payload, Worker, commit_part, each_shard, pack, stream, unpack
from diffmine.tables import grouped

Row = dict[str, Any]
_PIECES = 1000  # tables of shards, which take several times their content, before they become one
_STANDING = pa.schema(
    [("image_id", pa.string()), ("label", pa.string()), ("best", pa.float32()), ("stderr", pa.float32())]
)


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
            left = sum(map(len, staying.values()))
            context.progress.say(f"typicality: {left:,} of {images:,} images stay for round {r + 1} of {len(each)}")
            told = {shard: to_parquet(ids) for shard, ids in staying.items()}
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
        latents = latents.filter(pc.is_in(latents["image_id"], ids.combine_chunks()))
    return {"latents": latents, "manifest": read_shard(run, shard).select(["image_id", "uri", "labels"])}


def _who_stays(context: Context, shards: list[int], r: int, factor: float) -> dict[int, pa.Table]:
    """Shard -> images that take part in round r, sorted: those that stay under one of their labels."""
    wanted, cell = context.config, (context.run.committed("latents") or {})["cell"]
    task = _Standing(context.run.uri, r, wanted.patches.size, cell)
    tables = [_STANDING.append(pa.field("shard", pa.int32())).empty_table()]
    for batch in each_shard(context, "typicality", dict.fromkeys(shards, b""), task):
        found = unpack(batch["standing"])
        tables.append(found.append_column("shard", pa.array([batch["shard"]] * len(found), pa.int32())))
        if len(tables) == _PIECES:
            tables = [pa.concat_tables(tables).combine_chunks()]
    standing = pa.concat_tables(tables).combine_chunks()
    del tables
    label = standing["label"].combine_chunks().dictionary_encode().indices.to_numpy()
    by_image = pc.sort_indices(standing["image_id"]).to_numpy()
    order = by_image[np.argsort(label[by_image], kind="stable")]  # by label, then image
    best, stderr = (standing[name].to_numpy()[order].astype(np.float64) for name in ("best", "stderr"))
    ends = np.flatnonzero(np.diff(label[order])) + 1
    stay = [
        survivors(*own, wanted.patches.per_label, wanted.typicality.racing_confidence, factor)
        for own in zip(np.split(best, ends), np.split(stderr, ends), strict=True)
    ]
    images = standing.select(["shard", "image_id"]).take(pa.array(order[np.concatenate(stay)]))
    images = (
        images.group_by(["shard", "image_id"])
        .aggregate([])
        .sort_by([("shard", "ascending"), ("image_id", "ascending")])
    )
    return {shard: own.select(["image_id"]) for shard, own in grouped(images, "shard").items()}


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
        for scored in _over_rounds(run_here(self.run_uri), shard, self.rounds, own=True):
            if len(scored) == self.rounds:
                row = _average(scored)
                height, width = (n * self.cell for n in row["map"].shape)
                means = patch_map(row["map"], height, width, self.size)
                y, x = np.unravel_index(int(means.argmax()), means.shape)
                sizes = window_size(self.size, height), window_size(self.size, width)
                stderr = at_window(row["window_stderr"], int(y), int(x), *sizes, self.cell)
                standing = {"best": means[y, x], "stderr": stderr}
                found.append({"image_id": row["image_id"], "label": row["label"], **standing})
        packed = pa.array([pack(pa.Table.from_pylist(found, schema=_STANDING))], pa.large_binary())
        return pa.table({"shard": [shard], "standing": packed})


def _over_rounds(run: Run, shard: int, last: int, own: bool = False) -> list[list[Row]]:
    """Of each image and label (`own`: of the image's own) of a shard its rows of the first rounds that it was in."""
    seen: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for r in range(last):
        if run.exists(part_name(_round(r), shard)):
            for row in run.pieces(_round(r), shard, lambda file: [*map_rows(file, own=own)], most=True):
                seen[row["image_id"], row["label"]].append(row)
    return [seen[key] for key in sorted(seen)]


def _average(rows: list[Row]) -> Row:
    """One row from those of several rounds, as `diffusion.typicality` has it from all their strata at once."""
    share = np.array([row["share"] for row in rows])
    weight = share / share.sum()

    def each(column: str) -> np.ndarray:
        return np.array([row[column] for row in rows], np.float64).reshape(len(rows), -1)  # [rounds, cells]

    part, shape = np.square(weight * each("stderr")[:, 0]), rows[0]["map"].shape
    freedom = part.sum() ** 2 / np.maximum((part**2 / (each("degrees_of_freedom")[:, 0] + 2)).sum(), 1e-300) - 2
    window_stderr = np.sqrt(weight**2 @ np.square(each("window_stderr")))
    return rows[0] | {
        "map": (weight @ each("map")).astype(np.float32).reshape(shape), "mean": float(weight @ each("mean")[:, 0]),
        "stderr": float(np.sqrt(part.sum())), "degrees_of_freedom": max(1.0, float(freedom)),
        "window_stderr": window_stderr.astype(np.float32).reshape(shape), "draws": sum(row["draws"] for row in rows),
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
        [shard], run = batch["shard"].to_pylist(), run_here(self.run_uri)
        failures = [
            row
            for r in range(self.rounds)
            if run.exists(part_name(f"failures/{_round(r)}", shard))
            for row in run.read_part(f"failures/{_round(r)}", shard).to_pylist()
        ]
        failed = {row["image_id"] for row in failures}
        scored = [rows for rows in _over_rounds(run, shard, self.rounds) if rows[0]["image_id"] not in failed]
        rows = [
            {**row, "map": row["map"].ravel(), "window_stderr": row["window_stderr"].ravel()}
            for row in map(_average, scored)
        ]
        table = rows_to_table("typicality", [{k: row[k] for k in SCHEMAS["typicality"].names} for row in rows])
        return pa.table({"receipt": [json.dumps(commit_part(run, "typicality", shard, Part(table, failures)))]})

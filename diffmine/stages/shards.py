"""Shards -> committed parts of a table, streamed through a pool of actors that hold a model.

    the driver lists the shards that are not there yet, one Ray Data row each
      -> a CPU task reads the shard
      -> an actor works on it, puts its part in place and returns a receipt
      -> the driver folds the receipts into progress and the stage's result

A shard is a fixed group of images and becomes one part of the same number. Ray only schedules: a part that is there is
whole and final, whoever wrote it, so a retried or repeated shard does no harm. A part says in its file which of its
images failed; the table of failures is made from that, so one file that is there or not is all that is committed.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from socket import gethostname
from typing import Any, Literal, Protocol

import pyarrow as pa
import ray
import torch

from diffmine.errors import DiffmineError, ImageError, StageError
from diffmine.run import (
    GROUP_ROWS,
    INDEXED,
    Run,
    index_name,
    part_name,
    rows_to_table,
    run_here,
    small_columns,
    to_parquet,
)
from diffmine.stages import metrics
from diffmine.stages.room import Room, actors, model_room, require
from diffmine.stages.session import Context, Result
from diffmine.stages.watch import unless_stalled
from diffmine.store import at_once

_READING_CPUS = 0.5
_FEW, _TOGETHER = 256, 64  # parts that the driver looks at itself; of more, what a task looks at
_FAILED = b"diffmine.failures"  # in a part's file
Payload = Mapping[str, pa.Table]  # named tables, as they travel from the reading task to the actor


@dataclass
class Part:
    """What becomes of a shard: rows of the stage's table, sorted by image, and the images that failed."""

    rows: pa.Table
    failures: list[dict[str, str]]
    notes: list[str] = field(default_factory=list)  # what the user should know; said once


class Worker(Protocol):
    def __call__(self, payload: Payload) -> Part: ...


def stream(
    context: Context,
    stage: str,  # names the table and the folder of failures
    shards: Mapping[int, bytes],  # shard -> what the reading task is told beside its number
    read: Callable[[Run, int, bytes], Payload],  # runs in a CPU task
    make_worker: Callable[..., Worker],  # (device="cuda" or "cpu") runs once in each actor: loads the model
    total: int,  # of what is counted, in all shards, for progress
    unit: Literal["images", "patches"] = "images",  # what is counted; patches: rows of the table
) -> Result:
    """Work on every shard that has no part yet; the files of all of them."""
    run, progress = context.run, context.progress
    there = sorted(set(run.parts(stage)) & set(shards))
    receipts: dict[int, dict[str, Any]] = {}
    index: dict[int, pa.Table] = {}

    def keep(receipt: dict[str, Any]) -> None:
        if stage in INDEXED:
            index[receipt["shard"]] = pa.Table.from_pydict(receipt.pop("index"), small_columns(stage))
        receipts[receipt["shard"]] = receipt

    for receipt in _recalled(context, stage, there):
        keep(receipt)
    before = sum(r["done"] for r in receipts.values())
    failed = sum(r["failures"] for r in receipts.values())
    progress.start(stage, total, unit, before)
    missing = [shard for shard in sorted(shards) if shard not in receipts]
    said: set[str] = set()
    actor = model_room(context.config)
    if missing:
        require(stage, actor, beside=_READING_CPUS)

    def awaited(_: int) -> str:
        left = [shard for shard in missing if shard not in receipts]
        return f"shards {', '.join(map(str, left[:3]))}{f' and {len(left) - 3} more' if len(left) > 3 else ''}"

    work = _receipts(context, stage, missing, shards, read, make_worker, actor) if missing else ()
    for receipt in unless_stalled(context, stage, work, awaited, actor):
        keep(receipt)
        for note in set(receipt["notes"]) - said:
            said.add(note)
            progress.say(f"{stage}: {note}")
        metrics.count(f"diffmine_{unit}", stage, receipt["done"])
        metrics.count("diffmine_failures", stage, receipt["failures"])
        metrics.count("diffmine_actor_seconds", stage, receipt["seconds"])
        failed += receipt["failures"]
        progress.advance(receipt["done"], f"{failed} failed" if failed else "")
    progress.finish(f"{failed} images failed, see failures/{stage}/" if failed else "")
    files = {name: digest for r in receipts.values() for name, digest in r["files"].items()}
    if stage in INDEXED:
        files[index_name(stage)] = run.write_index(stage, dict(sorted(index.items())))
    reasons = sum((Counter(r["reasons"]) for r in receipts.values()), Counter())
    marker = {"rows": sum(r["rows"] for r in receipts.values()), "failures": failed}
    newly = sum(r["done"] for r in receipts.values()) - before
    return Result(files, {**marker, "reasons": dict(sorted(reasons.items()))}, newly)


def _receipts(
    context: Context,
    stage: str,
    missing: list[int],
    shards: Mapping[int, bytes],
    read: Any,
    make_worker: Any,
    actor: Room,
) -> Iterable[dict[str, Any]]:
    rows = [{"shard": shard, "told": shards[shard]} for shard in missing]
    dataset: ray.data.Dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    dataset = dataset.map_batches(
        _ReadingTask(context.run.uri, read), batch_size=1, batch_format="pyarrow", num_cpus=_READING_CPUS
    )
    first, most = actors(context.config, actor, len(missing), _READING_CPUS)
    pool = ray.data.ActorPoolStrategy(min_size=1, max_size=most, initial_size=first)
    dataset = dataset.map_batches(
        _Actor, batch_size=1, batch_format="pyarrow", compute=pool,
        num_cpus=actor.cpus, num_gpus=actor.gpus or None, memory=actor.memory or None,
        fn_constructor_args=(context.run.uri, stage, make_worker, actor.gpus > 0),
    )  # fmt: skip
    for row in dataset.iter_rows():
        yield json.loads(row["receipt"])


def each_shard(
    context: Context, stage: str, shards: Mapping[int, bytes], task: Callable[[pa.Table], pa.Table]
) -> Iterator[dict[str, Any]]:
    """What a CPU task makes of each shard (of a table with its number and what it is told), in any order.

    It may run more than once for a shard.
    """
    if not shards:
        return
    require(stage, Room(1))
    rows = [{"shard": shard, "told": told} for shard, told in shards.items()]
    dataset: ray.data.Dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    dataset = dataset.map_batches(task, batch_size=1, batch_format="pyarrow", num_cpus=1)
    made = dataset.iter_rows()
    yield from unless_stalled(context, stage, made, lambda done: f"{len(shards) - done} shards", Room(1))


@dataclass
class _ReadingTask:
    run_uri: str
    read: Callable[[Run, int, bytes], Payload]

    def __call__(self, batch: pa.Table) -> pa.Table:
        [row] = batch.to_pylist()
        payload = self.read(run_here(self.run_uri), row["shard"], row["told"])
        packed = [{"name": name, "data": pack(table)} for name, table in payload.items()]
        column = pa.array([packed], pa.list_(pa.struct([("name", pa.string()), ("data", pa.large_binary())])))
        return pa.table({"shard": [row["shard"]], "payload": column})


class _Actor:
    """Holds a worker; one shard in, one committed part and its receipt out."""

    def __init__(self, run_uri: str, stage: str, make_worker: Callable[..., Worker], on_gpu: bool) -> None:
        # Ray shows GPUs to processes that were given none, too. One that was given one never falls back to a core.
        device = "cuda" if on_gpu else "cpu"
        if device == "cpu":
            torch.set_num_threads(1)
        try:
            self.run, self.stage, self.work = run_here(run_uri), stage, make_worker(device=device)
        except DiffmineError:
            raise
        except Exception as error:
            raise StageError(f"{stage}: cannot start on {gethostname()} ({type(error).__name__}: {error})") from error

    def __call__(self, batch: pa.Table) -> pa.Table:
        start = time.monotonic()
        [row], notes = batch.to_pylist(), []
        if self.run.exists(part_name(self.stage, row["shard"])):  # of an actor that died before its receipt came
            receipt = _recall(self.run, self.stage, row["shard"])
        else:
            part = self._worked(row)
            receipt, notes = commit_part(self.run, self.stage, row["shard"], part), part.notes
        receipt |= {"seconds": round(time.monotonic() - start, 3), "notes": notes}
        return pa.table({"receipt": [json.dumps(receipt)]})

    def _worked(self, row: dict[str, Any]) -> Part:
        """
        Raises:
            StageError: what is wrong, and where: of a hundred GPUs one may be broken.
        """
        try:
            return self.work({item["name"]: unpack(item["data"]) for item in row["payload"]})
        except DiffmineError:
            raise
        except Exception as error:
            raise StageError(
                f"{self.stage}: shard {row['shard']} failed on {gethostname()} ({type(error).__name__}: {error}); the "
                "same command continues the run; if it fails there again, leave this machine out"
            ) from error


def commit_part(run: Run, stage: str, shard: int, part: Part) -> dict[str, Any]:
    """Create the part, whose presence says that the shard is done; the receipt of what is there.

    The first to finish a shard counts: another device, or another time, might have found something else.
    """
    data = part_file(part)
    if not run.put_if_absent(part_name(stage, shard), data):
        return _recall(run, stage, shard)
    return _receipt(run, stage, shard, part.rows, _by_image(part.failures), hashlib.sha256(data).hexdigest())


def part_file(part: Part) -> bytes:
    """The rows, a few in a row group so that some can be read, and beside them which images failed."""
    failures = json.dumps(_by_image(part.failures))
    return to_parquet(part.rows.replace_schema_metadata({_FAILED: failures}), row_group_size=GROUP_ROWS)


def _by_image(failures: list[dict[str, str]]) -> list[dict[str, str]]:
    return sorted(failures, key=lambda failed: failed["image_id"])


def _recall(run: Run, stage: str, shard: int) -> dict[str, Any]:
    """Receipt of a shard that is committed."""
    rows, digest = run.looked_through(stage, shard)
    return _receipt(run, stage, shard, rows, json.loads(rows.schema.metadata[_FAILED]), digest)


def _receipt(
    run: Run, stage: str, shard: int, rows: pa.Table, failures: list[dict[str, str]], digest: str
) -> dict[str, Any]:
    """What the driver is told of a part, after the table of failures has those that the part names."""
    files = {part_name(stage, shard): digest}
    if failures:
        folder = f"failures/{stage}"
        files[part_name(folder, shard)] = run.write_part(folder, shard, rows_to_table("failures", failures), over=True)
    done = len(set(rows["image_id"].to_pylist())) if "image_id" in rows.column_names else len(rows)
    index = {"index": rows.select(small_columns(stage).names).to_pydict()} if stage in INDEXED else {}
    return {
        "shard": shard, "rows": len(rows), "done": done + len(failures), "failures": len(failures),
        "reasons": Counter(failure["reason"] for failure in failures), "files": files, **index,
    }  # fmt: skip


def _recalled(context: Context, stage: str, there: list[int]) -> Iterator[dict[str, Any]]:
    """Receipts of the shards that are there. Each is read whole: of many, tasks of the cluster do that."""
    run = context.run
    if len(there) <= _FEW:
        yield from at_once(lambda shard: _recall(run, stage, shard), there)
        return
    context.progress.say(f"{stage}: {len(there):,} shards are there; they are read again")
    told = {first: json.dumps(there[first : first + _TOGETHER]).encode() for first in range(0, len(there), _TOGETHER)}
    for row in each_shard(context, stage, told, _RecallingTask(run.uri, stage)):
        yield from json.loads(row["receipts"])


@dataclass
class _RecallingTask:
    run_uri: str
    stage: str

    def __call__(self, batch: pa.Table) -> pa.Table:
        [told] = batch["told"].to_pylist()
        run = run_here(self.run_uri)
        receipts = at_once(lambda shard: _recall(run, self.stage, shard), json.loads(told))
        return pa.table({"receipts": [json.dumps(receipts)]})


def failure(image_id: str, uri: str, error: ImageError) -> dict[str, str]:
    """Row of the table of failures."""
    return {"image_id": image_id, "uri": uri, "reason": error.reason, "detail": error.detail}


def pack(table: pa.Table) -> bytes:
    """As a table travels between processes, inside of a cell of another."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def unpack(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()

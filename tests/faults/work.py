"""A light stage that goes through the product's own stream: what the kill tests run, and kill.

    python work.py RUN_FOLDER LEDGER_FOLDER SHARDS [--named-by-chance | --with-pid]

Each worker notes in a file of its own in LEDGER_FOLDER when it starts a shard and when it has its rows. The last two
options are faults made on purpose: two runs then never agree.
"""

import os
import sys
import time
import uuid
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa

from diffmine.config import Config, Dataset
from diffmine.progress import Progress
from diffmine.run import SCHEMAS, Run
from diffmine.stages import session
from diffmine.stages.shards import Part, Payload, stream

IMAGES = 4  # of a shard
WORK_S = 0.15  # of a shard


def read(run: Run, shard: int, told: bytes) -> Payload:
    return {"shard": pa.table({"shard": [shard]})}


@dataclass
class Worker:
    """Rows that depend on the shard only, unless a fault is wanted."""

    ledger: str
    fault: str

    def __call__(self, payload: Payload) -> Part:
        [shard] = payload["shard"]["shard"].to_pylist()
        note(self.ledger, "start", shard)
        time.sleep(WORK_S)
        ids = [f"{shard:04d}/{i}" for i in range(IMAGES)]
        failures = [{"image_id": ids.pop(), "uri": "u", "reason": "empty", "detail": ""}] if shard % 7 == 0 else []
        marks = [str(os.getpid()) if self.fault == "--with-pid" else i for i in ids]
        if self.fault == "--named-by-chance":
            Path(self.ledger).parent.joinpath("run", "features", f"part-{uuid.uuid4().hex}.x").write_bytes(b"x")
        rows = [
            {"image_id": i, "width": shard, "height": 1, "h": 1, "w": 1, "latent": [0.5, float(len(mark))],
             "scale": float(int(mark[-1], 36)), "crop_x": 0, "crop_y": 0}
            for i, mark in zip(ids, marks, strict=True)
        ]  # fmt: skip
        note(self.ledger, "end", shard)
        return Part(pa.Table.from_pylist(rows, schema=SCHEMAS["latents"]), failures)


def note(ledger: str, what: str, shard: int) -> None:
    with open(f"{ledger}/{os.getpid()}", "a") as file:
        file.write(f"{what} {shard}\n")


def main(folder: str, ledger: str, shards: int, fault: str = "") -> None:
    run = Run(folder)
    Path(folder, "features").mkdir(parents=True, exist_ok=True)
    config = Config(output=folder, dataset=Dataset(source="toytown", layout="toytown"), compute={"workers": 2})
    context = session.Context(run, config, Progress())
    with session.connected(context):
        work = partial(Worker, ledger, fault)
        result = stream(context, "latents", dict.fromkeys(range(shards), b""), read, work, shards * IMAGES)
    run.commit("latents", result.marker, result.files)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])

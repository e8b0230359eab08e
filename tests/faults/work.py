"""A light stage that goes through the product's own stream: what the kill tests run, and kill.

    python work.py RUN_FOLDER LEDGER_FOLDER SHARDS [--named-by-chance | --with-pid | --together]

Each worker notes in a file of its own in LEDGER_FOLDER, named by its pid, when it starts a shard and when it has its
rows. The first two options are faults made on purpose: two runs then never agree. With the third a worker keeps its
shard until more workers have one than a driver has: two drivers then are at work at the same time.
"""

import os
import sys
import time
import uuid
from dataclasses import dataclass
from functools import partial

import pyarrow as pa

from diffmine import run as run_module
from diffmine.config import Config, Dataset
from diffmine.progress import Progress
from diffmine.run import SCHEMAS, Run
from diffmine.stages import session, shards
from diffmine.stages.shards import Part, Payload, stream

IMAGES = 4  # of a shard
WORKERS = 2  # of a driver
WORK_S = float(os.environ.get("WORK_S", "0.15"))  # of a shard


def read(run: Run, shard: int, told: bytes) -> Payload:
    return {"shard": pa.table({"shard": [shard]})}


@dataclass
class Worker:
    """Rows that depend on the shard only, unless a fault is wanted."""

    ledger: str
    fault: str
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.fault == "--named-by-chance":
            chance = uuid.uuid4().hex
            for module in (run_module, shards):  # of the actor's process, where parts get their names
                module.part_name = lambda table, part: f"{table}/part-{part:05d}-{chance}.parquet"

    def __call__(self, payload: Payload) -> Part:
        [shard] = payload["shard"]["shard"].to_pylist()
        note(self.ledger, "start", shard)
        while self.fault == "--together" and len(os.listdir(self.ledger)) <= WORKERS:
            time.sleep(0.01)
        time.sleep(WORK_S)
        ids = [f"{shard:04d}/{i}" for i in range(IMAGES)]
        failures = [{"image_id": ids.pop(), "uri": "u", "reason": "empty", "detail": ""}] if shard % 7 == 0 else []
        mark = os.getpid() if self.fault == "--with-pid" else 0
        rows = [
            {"image_id": i, "width": shard, "height": 1, "h": 1, "w": 1, "latent": [0.5, 0.25], "scale": 1.0,
             "crop_x": mark, "crop_y": 0}
            for i in ids
        ]  # fmt: skip
        note(self.ledger, "end", shard)
        return Part(pa.Table.from_pylist(rows, schema=SCHEMAS["latents"]), failures)


def note(ledger: str, what: str, shard: int) -> None:
    with open(f"{ledger}/{os.getpid()}", "a") as file:
        file.write(f"{what} {shard}\n")


def main(folder: str, ledger: str, count: int, fault: str = "") -> None:
    run = Run(folder)
    device = os.environ.get("DEVICE", "auto")
    config = Config(
        output=folder, dataset=Dataset(source="toytown", layout="toytown"), model={"base": "tiny"},
        compute={"workers": WORKERS, "device": device, "open_cluster": True},
    )  # fmt: skip
    context = session.Context(run, config, Progress())
    if run.committed("manifest") is None:  # by which every process knows the run's folder
        run.commit("manifest", {}, {})
    with session.connected(context):
        work = partial(Worker, ledger, fault)
        result = stream(context, "latents", dict.fromkeys(range(count), b""), read, work, count * IMAGES)
    run.commit("latents", result.marker, result.files)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])

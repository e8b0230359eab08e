"""The stream of shards over many actors, with a model that only sleeps as long as a GPU would compute.

    python benchmarks/scaling.py --out benchmarks/results/scaling.json

- *efficiency*: the share of their time that actors spend on images, from when all have begun to when the first has
  nothing left. What they wait for is the driver, Ray and the reading tasks. Start and tail are told apart: they do not
  grow with the dataset.
- *memory*: the driver's peak resident memory for manifests of growing size, with a model that does nothing.

Every shard is read from and written to a local folder: 64 latents of Stable Diffusion at 512 px in, 64 maps out. One
machine carries all actors, so the figures are lower bounds for a cluster: here two cores do what its nodes' CPUs do.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import pyarrow as pa
import ray
from gpu import record

from diffmine.config import Config
from diffmine.progress import Progress
from diffmine.run import Run, rows_to_table
from diffmine.stages.room import Room
from diffmine.stages.session import Context, start_embedded
from diffmine.stages.shards import Part, Payload, stream

CELLS = 64  # of a side
MODEL = {"base": "tiny"}


@dataclass
class Sleeper:
    """Stands in for the scorer; notes when each shard began and ended in a file of its process."""

    notes: str
    seconds: float  # an image
    images: int  # of a shard
    device: str = "cpu"

    def __call__(self, payload: Payload) -> Part:
        start = time.time()
        [shard] = payload["shard"]["shard"].to_pylist()
        time.sleep(self.seconds * self.images)
        maps = np.zeros((self.images, CELLS * CELLS), np.float32)
        rows = [
            {"image_id": f"{shard:07d}/{i:03d}", "label": "a", "own": True, "h": CELLS, "w": CELLS, "map": one,
             "mean": 0.0, "stderr": 0.0, "window_stderr": one, "draws": 1, "degrees_of_freedom": 1.0}
            for i, one in enumerate(maps)
        ]  # fmt: skip
        if self.notes:
            with open(f"{self.notes}/{os.getpid()}", "a") as file:
                file.write(f"{start} {time.time()}\n")
        return Part(rows_to_table("typicality", rows), [])


@dataclass
class Light:
    """Stands in for a scorer that takes no time."""

    device: str = "cpu"

    def __call__(self, payload: Payload) -> Part:
        return Part(rows_to_table("typicality", []), [])


def read_latents(run: Run, shard: int, told: bytes) -> Payload:
    return {"latents": run.read_part("latents", 0), "shard": pa.table({"shard": [shard]})}


def read_nothing(run: Run, shard: int, told: bytes) -> Payload:
    return {"shard": pa.table({"shard": [shard]})}


def context(folder: Path, actors: int) -> Context:
    tree = {"output": str(folder), "dataset": {"source": "toytown", "layout": "toytown"}, "model": MODEL}
    config = Config.model_validate(tree | {"compute": {"workers": actors, "device": "cpu"}})
    return Context(Run(str(folder)), config, Progress())


def write_latents(run: Run, images: int) -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"image_id": f"{i:03d}", "width": 512, "height": 512, "h": CELLS, "w": CELLS, "scale": 1.0, "crop_x": 0,
         "crop_y": 0, "latent": rng.standard_normal(4 * CELLS * CELLS).astype(np.float16)}
        for i in range(images)
    ]  # fmt: skip
    run.write_part("latents", 0, rows_to_table("latents", rows))


def efficiency(actors: int, args: argparse.Namespace) -> dict[str, Any]:
    """Figures of a stage with so many actors."""
    shards = args.shards * actors
    with tempfile.TemporaryDirectory() as folder:
        place, notes = context(Path(folder) / "run", actors), Path(folder) / "notes"
        notes.mkdir()
        write_latents(place.run, args.images)
        made = partial(Sleeper, str(notes), args.seconds, args.images)
        start = time.time()
        with patch("diffmine.stages.shards.model_room", lambda config: Room(1)):  # it holds no model
            stream(place, "typicality", dict.fromkeys(range(shards), b""), read_latents, made, shards * args.images)
        end = time.time()
        spans = [
            [tuple(map(float, line.split())) for line in file.read_text().splitlines()] for file in notes.iterdir()
        ]
    first, last = max(own[0][0] for own in spans), min(own[-1][1] for own in spans)
    busy = sum(max(0.0, min(b, last) - max(a, first)) for own in spans for a, b in own)
    return {
        "actors": len(spans), "shards": shards, "efficiency": busy / (len(spans) * (last - first)),
        "images_per_s": busy / args.seconds / (last - first), "window_s": last - first, "start_s": first - start,
        "tail_s": end - last,
    }  # fmt: skip


def memory(images: int, args: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of a driver of its own."""
    command = [sys.executable, __file__, "--drive", str(-(-images // args.images))]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {"images": images, **json.loads(said.splitlines()[-1])}


def drive(shards: int) -> None:
    """The driver of a stage that does nothing; prints figures of itself as JSON."""
    start_embedded(cpus=3)
    process, peak, ended = psutil.Process(), [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            peak[0] = max(peak[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        place = context(Path(folder) / "run", 2)
        stream(place, "typicality", dict.fromkeys(range(shards), b""), read_nothing, Light, 0)
    seconds = time.time() - start
    ended.set()
    watcher.join()
    found = {
        "shards": shards,
        "driver_mib": peak[0] / 2**20,
        "seconds": seconds,
        "ms_per_shard": 1e3 * seconds / shards,
    }
    print(json.dumps(found), flush=True)
    ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actors", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--manifests", type=int, nargs="*", default=[10_000, 100_000, 1_000_000], help="images")
    parser.add_argument("--seconds", type=float, default=0.14, help="that the stand-in takes for an image")
    parser.add_argument("--images", type=int, default=64, help="of a shard")
    parser.add_argument("--shards", type=int, default=6, help="for each actor")
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--drive", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.drive:
        drive(args.drive)
        return
    scaled = []
    if args.actors:
        start_embedded(cpus=max(args.actors) + 2)
        scaled = [efficiency(actors, args) for actors in args.actors]
        ray.shutdown()
        print(f"{'actors':>7}{'efficiency':>12}{'images/s':>10}{'start':>8}{'tail':>7}")
        for row in scaled:
            print(
                f"{row['actors']:>7}{row['efficiency']:>12.3f}{row['images_per_s']:>10.1f}"
                f"{row['start_s']:>6.0f} s{row['tail_s']:>5.0f} s"
            )
    held = [memory(images, args) for images in args.manifests]
    for row in held:
        print(f"{row['images']:>9,} images: driver {row['driver_mib']:.0f} MiB, {row['ms_per_shard']:.1f} ms a shard")
    if args.out:
        record(args.out, seconds_per_image=args.seconds, shard_images=args.images, scaling=scaled, memory=held)


if __name__ == "__main__":
    main()

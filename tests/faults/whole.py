"""A small whole run by `python jobs/mine.py`, and the files that it leaves."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import yaml
from s3 import BUCKET, CANARY, S3, Faults

from diffmine.data import toytown

ROOT = Path(__file__).parents[2]
LABELS, IMAGES = 2, 4
LONGEST_S = 600  # a command that takes longer is killed
SOURCE = f"s3://{BUCKET}/photos"
CONFIG = {
    "dataset": {"source": SOURCE, "layout": "folder", "image": {"short_side": 64}},
    "prompt": {"null_prompt": "An image."},
    "model": {"base": "tiny", "dtype": "float32"},
    "finetune": {"steps": 4, "batch_size": 4, "checkpoint_every": 2, "samples_per_label": 1, "workers": 1},
    "typicality": {"draws": 8, "pilot_images": 6, "pilot_draws": 16, "batch_size": 16},
    "patches": {"size": 16, "per_image": 2, "per_label": 4, "fresh_per_label": 2, "fresh_draws": 8},
    "features": {"ensemble": 2, "batch_size": 16},
    "clusters": {"k": 2},
    "compute": {"shard_images": 4, "workers": 1},
}


def images() -> list[tuple[str, bytes]]:
    """The images of two labels."""
    return list(toytown.files(1, IMAGES))[: LABELS * IMAGES]


def put_images(s3: S3) -> None:
    client = s3.client()
    for name, data in images():
        client.put_object(Bucket=BUCKET, Key=f"photos/{name}", Body=data)
    client.close()


@dataclass
class Ended:
    """What a command said, and how long it took."""

    code: int
    out: str
    err: str
    seconds: float


class Command:
    """`python jobs/mine.py` in a process group of its own, which starts its own Ray."""

    def __init__(self, folder: Path, output: str, source: str = SOURCE) -> None:
        (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
        self.folder, self.start = folder, time.monotonic()
        command = [sys.executable, "jobs/mine.py", str(folder / "config.yaml"), "--output", output]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
        with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
            self.process = subprocess.Popen(
                [*command, "--dataset.source", source],
                cwd=ROOT, stdout=out, stderr=err, env=environment, start_new_session=True,
            )  # fmt: skip

    def end(self) -> Ended:
        try:
            code = self.process.wait(LONGEST_S)
        finally:
            self.kill()
        out, err = (self.folder / "out").read_text(), (self.folder / "err").read_text()
        assert CANARY not in out + err
        return Ended(code, out, err, time.monotonic() - self.start)

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def mine(folder: Path, output: str, source: str = SOURCE) -> Ended:
    return Command(folder, output, source).end()


def names(s3: S3, prefix: str) -> list[str]:
    """The keys below a prefix, listed by another client."""
    client = s3.client()
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}/")
    found = [entry["Key"].removeprefix(f"{prefix}/") for page in pages for entry in page.get("Contents", [])]
    client.close()
    return found


def stored(s3: S3, prefix: str) -> dict[str, bytes]:
    """Every object below a prefix of a run that is not at work, read by another client; the faults are off."""
    assert s3.faults == Faults()
    client, found = s3.client(), {}
    for name in names(s3, prefix):
        body = client.get_object(Bucket=BUCKET, Key=f"{prefix}/{name}")["Body"]
        found[name] = body.read()
        body.close()
    client.close()
    return found


def tables(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files that hold results. Markers hold times, and the report is made from the tables."""
    return {n: data for n, data in files.items() if n.endswith((".parquet", ".safetensors", "config.json"))}


def differing(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))

"""Whole runs whose images and output folder are on S3, while the store is busy, cuts answers off, or is gone."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from s3 import BUCKET, CANARY, S3, Faults, serving

from diffmine.data import toytown

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]
LABELS, IMAGES = 2, 4
LONGEST_S = 400  # a command that takes longer is killed
CONFIG = {
    "dataset": {"source": f"s3://{BUCKET}/photos", "layout": "folder", "image": {"short_side": 64}},
    "prompt": {"null_prompt": "An image."},
    "model": {"base": "tiny", "dtype": "float32"},
    "finetune": {"steps": 4, "batch_size": 4, "checkpoint_every": 2, "samples_per_label": 1, "workers": 1},
    "typicality": {"draws": 8, "pilot_images": 6, "pilot_draws": 16, "batch_size": 16},
    "patches": {"size": 16, "per_image": 2, "per_label": 4, "fresh_per_label": 2, "fresh_draws": 8},
    "features": {"ensemble": 2, "batch_size": 16},
    "clusters": {"k": 2},
    "compute": {"shard_images": 4, "workers": 2},
}


@dataclass
class Ended:
    """What a command said, and how long it took."""

    code: int
    out: str
    err: str
    seconds: float


class Command:
    """`python jobs/mine.py` in a process group of its own, which starts its own Ray."""

    def __init__(self, folder: Path, output: str) -> None:
        (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
        self.folder, self.start = folder, time.monotonic()
        command = [sys.executable, "jobs/mine.py", str(folder / "config.yaml"), "--output", output]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
        with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
            self.process = subprocess.Popen(
                [*command, "--report.enabled", "true"],
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


def mine(folder: Path, output: str) -> Ended:
    return Command(folder, output).end()


def stored(s3: S3, prefix: str) -> dict[str, bytes]:
    """Every object below a prefix, read by another client; the faults are off."""
    assert s3.faults == Faults()
    client, found = s3.client(), {}
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}/"):
        for entry in page.get("Contents", []):
            if entry["Key"].endswith("/"):  # an empty object that stands for the folder; Ray Train leaves one
                assert entry["Size"] == 0
                continue
            body = client.get_object(Bucket=BUCKET, Key=entry["Key"])["Body"]
            found[entry["Key"].removeprefix(f"{prefix}/")] = body.read()
            body.close()
    client.close()
    return found


def tables(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files that hold results. Markers hold times, and the report is made from the tables."""
    return {name: data for name, data in files.items() if name.endswith((".parquet", ".safetensors"))}


def differing(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def telling(files: dict[str, bytes]) -> list[str]:
    """Files with the secret key; tables are compressed, so they are read."""
    found = [name for name, data in files.items() if CANARY.encode() in data]
    for name, data in files.items():
        if name.endswith(".parquet"):
            table = pq.read_table(io.BytesIO(data))
            found += [name] if CANARY in str(table.to_pydict()) or CANARY in str(table.schema.metadata) else []
    return found


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    """The server, with the images of two labels in its bucket."""
    with serving(seed=3) as server:
        client = server.client()
        for name, data in list(toytown.files(1, IMAGES))[: LABELS * IMAGES]:
            client.put_object(Bucket=BUCKET, Key=f"photos/{name}", Body=data)
        client.close()
        yield server


@pytest.fixture(scope="module")
def golden(s3: S3, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of the run without faults."""
    s3.reset()
    ended = mine(tmp_path_factory.mktemp("golden"), f"s3://{BUCKET}/golden")
    print(f"no faults: {ended.seconds:.0f} s, {s3.counts}")
    assert ended.code == 0, ended.err
    assert ended.out.splitlines()[-1] == f"s3://{BUCKET}/golden"
    files = stored(s3, "golden")
    assert "report/index.html" in files
    for folder in ("manifest", "latents", "samples", "typicality", "patches", "features", "clusters", "members"):
        assert f"{folder}/part-00000.parquet" in files
    assert [name for name in files if name.startswith("model/") and name.endswith(".safetensors")]
    assert pq.read_metadata(io.BytesIO(files["manifest/part-00000.parquet"])).num_rows == LABELS * IMAGES
    return files


def test_a_local_folder_holds_the_same(s3: S3, golden: dict[str, bytes], tmp_path: Path) -> None:
    s3.reset()
    run = tmp_path / "run"
    ended = mine(tmp_path, str(run))
    assert ended.code == 0, ended.err
    files = {path.relative_to(run).as_posix(): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert differing(tables(files), tables(golden)) == []
    assert files.keys() == golden.keys()
    assert telling(files) + telling(golden) == []


@pytest.mark.parametrize(
    "faults",
    [Faults(busy=0.2, truncated=0.2, late=0.02, late_s=2), Faults(busy=0.4)],
    ids=["20-percent-truncated-late", "40-percent"],
)
def test_a_busy_store(
    s3: S3, golden: dict[str, bytes], tmp_path: Path, faults: Faults, request: pytest.FixtureRequest
) -> None:
    name = f"busy-{request.node.callspec.id}"
    s3.reset(faults)
    ended = mine(tmp_path, f"s3://{BUCKET}/{name}")
    counts = s3.counts
    print(f"{name}: {ended.seconds:.0f} s, {counts}")
    s3.reset()
    assert ended.code == 0, ended.err
    files = stored(s3, name)
    assert differing(tables(files), tables(golden)) == []
    assert files.keys() == golden.keys()
    assert telling(files) == []
    assert counts.faults["busy"] > 0.8 * faults.busy * counts.requests.total()
    assert counts.faults["truncated"] >= 10 * faults.truncated
    assert counts.faults["late"] >= 100 * faults.late


def test_a_store_that_goes_away_and_comes_back(s3: S3, golden: dict[str, bytes], tmp_path: Path) -> None:
    marker = ("PUT", f"/{BUCKET}/gone/manifest/_commit.json")
    s3.reset()
    command = Command(tmp_path, f"s3://{BUCKET}/gone")
    try:
        while not s3.counts.requests[marker] and command.process.poll() is None:
            time.sleep(0.02)
        s3.reset(Faults(busy=1))
        gone = time.monotonic()
        ended = command.end()
    finally:
        command.kill()
    waited, counts = time.monotonic() - gone, s3.counts
    s3.reset()
    print(f"gone: {waited:.0f} s after the store, {counts}; {ended.err[-1000:]}")
    assert ended.code == 1
    assert counts.faults["busy"] == counts.requests.total() > 5
    assert waited < 150
    told = [line for line in ended.err.splitlines() if line.startswith("diffmine: ")]
    assert len(told) == 1
    assert ended.err.splitlines()[-1] == told[0]
    assert f"s3://{BUCKET}/" in told[0]
    assert "Traceback" not in ended.err
    left = stored(s3, "gone")
    assert {name.split("/")[0] for name in left} <= {"manifest", "run.yaml"}
    assert "manifest/_commit.json" in left
    again = mine(tmp_path, f"s3://{BUCKET}/gone")
    assert again.code == 0, again.err
    files = stored(s3, "gone")
    assert differing(tables(files), tables(golden)) == []
    assert telling(files) == []

"""Whole runs whose images and output folder are on S3, while the store is busy, cuts answers off, or is gone."""

import io
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from s3 import BUCKET, CANARY, S3, Faults, serving
from whole import IMAGES, LABELS, Command, differing, mine, put_images, stored, tables

pytestmark = pytest.mark.long


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
        put_images(server)
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


def test_a_busy_store_that_cuts_bodies_off(s3: S3, golden: dict[str, bytes], tmp_path: Path) -> None:
    faults = Faults(busy=0.4, truncated=0.2, late=0.02, late_s=2)
    s3.reset(faults)
    ended = mine(tmp_path, f"s3://{BUCKET}/busy")
    counts = s3.counts
    print(f"{ended.seconds:.0f} s, {counts}")
    s3.reset()
    assert ended.code == 0, ended.err
    files = stored(s3, "busy")
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
    assert {name.split("/")[0] for name in left} <= {"begun", "manifest", "run.yaml"}
    assert "manifest/_commit.json" in left
    again = mine(tmp_path, f"s3://{BUCKET}/gone")
    assert again.code == 0, again.err
    files = stored(s3, "gone")
    assert differing(tables(files), tables(golden)) == []
    assert telling(files) == []

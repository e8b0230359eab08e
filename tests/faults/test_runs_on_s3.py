"""Whole runs whose images and output folder are on S3, while the store is busy, cuts answers off, or is gone."""

import io
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from s3 import BUCKET, CANARY, S3, Faults, serving
from whole import IMAGES, LABELS, Command, differing, mine, put_images, stored, tables

pytestmark = pytest.mark.release


def telling(files: dict[str, bytes]) -> list[str]:
    """Files with the secret key; tables are compressed, so they are read."""
    found = [name for name, data in files.items() if CANARY.encode() in data]
    for name, data in files.items():
        if name.endswith(".parquet"):
            table = pq.read_table(io.BytesIO(data))
            found += [name] if CANARY in str(table.to_pydict()) or CANARY in str(table.schema.metadata) else []
    return found


@pytest.fixture(scope="module")
def s3(whole_run: dict[str, bytes]) -> Iterator[S3]:
    """The server, with the images of two labels in its bucket, which it empties first: the other run has ended."""
    with serving(seed=3) as server:
        put_images(server)
        yield server


def test_the_run_that_others_are_compared_with_is_whole(whole_run: dict[str, bytes]) -> None:
    assert "report/index.html" in whole_run
    for folder in ("manifest", "latents", "samples", "typicality", "patches", "features", "clusters", "members"):
        assert f"{folder}/part-00000.parquet" in whole_run
    assert [name for name in whole_run if name.startswith("model/") and name.endswith(".safetensors")]
    assert pq.read_metadata(io.BytesIO(whole_run["manifest/part-00000.parquet"])).num_rows == LABELS * IMAGES
    assert telling(whole_run) == []


def test_a_busy_store_that_cuts_bodies_off(s3: S3, whole_run: dict[str, bytes], tmp_path: Path) -> None:
    faults = Faults(busy=0.4, truncated=0.2, late=0.02, late_s=2)
    s3.reset(faults)
    ended = mine(tmp_path, f"s3://{BUCKET}/busy")
    counts = s3.counts
    print(f"{ended.seconds:.0f} s, {counts}")
    s3.reset()
    assert ended.code == 0, ended.err
    files = stored(s3, "busy")
    assert differing(tables(files), tables(whole_run)) == []
    assert files.keys() == whole_run.keys()
    assert telling(files) == []
    assert counts.faults["busy"] > 0.8 * faults.busy * counts.requests.total()
    assert counts.faults["truncated"] >= 10 * faults.truncated
    assert counts.faults["late"] >= 100 * faults.late


def test_a_store_that_goes_away_and_comes_back(s3: S3, whole_run: dict[str, bytes], tmp_path: Path) -> None:
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
    assert differing(tables(files), tables(whole_run)) == []
    assert telling(files) == []

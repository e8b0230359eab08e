"""Clusters whose nodes come and go: what is asked for comes, what dies is replaced, the tables are the same.

The work is a light stage that goes through the product's own stream (tests/faults/work.py).
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from local import LocalCluster
from processes import end, family

pytestmark = pytest.mark.release
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "faults" / "work.py"
LONGEST_S = 240
SEEDS = range(int(os.environ.get("DIFFMINE_FAULT_SEEDS", "1")))
Tree = dict[str, bytes]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Of a cluster: a short path, for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="dm", ignore_cleanup_errors=True) as name:
        yield Path(name)


@contextmanager
def driver(
    cluster: LocalCluster | None, place: Path, shards: int, **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """The stage's driver, on the cluster or on an embedded Ray."""
    (place / "ledger").mkdir(parents=True)
    variables = {**(cluster.environment if cluster else os.environ), "PYTHONPATH": str(ROOT), **environment}
    variables |= {"RAY_ADDRESS": cluster.address} if cluster else {}
    command = [sys.executable, str(SCRIPT), str(place / "run"), str(place / "ledger"), str(shards)]
    with (place / "said").open("wb") as said:
        process = subprocess.Popen(command, env=variables, stdout=said, stderr=said, start_new_session=True)
    try:
        yield process
    finally:
        end(process)


def parts(place: Path) -> int:
    return len(list((place / "run" / "latents").glob("part-*.parquet")))


def actors(place: Path) -> set[int]:
    """Pids of the processes that have started a shard."""
    return {int(file.name) for file in (place / "ledger").iterdir()}


def finish(process: subprocess.Popen[bytes], place: Path) -> None:
    assert process.wait(LONGEST_S) == 0, (place / "said").read_text()[-3000:]


def tree(place: Path) -> Tree:
    """What counts: a process that is killed while it writes leaves a .tmp, which nobody reads."""
    run = place / "run"
    files = [p for p in run.rglob("*") if p.is_file() and not p.name.endswith(".tmp")]
    return {p.relative_to(run).as_posix(): p.read_bytes() for p in files}


def undisturbed(place: Path, shards: int) -> Tree:
    with driver(None, place, shards) as process:
        finish(process, place)
    return tree(place)


def test_nodes_come_when_they_are_needed_and_go(folder: Path, tmp_path: Path) -> None:
    """Two GPU actors need two nodes; the cluster has none at rest. (The GPUs are numbers: nothing computes on them.)"""
    shards, place = 24, tmp_path / "growing"
    node = {"CPU": 2, "GPU": 1, "object_store_memory": 100 << 20}
    with LocalCluster(folder, grows={"gpu": (node, 2)}) as cluster:
        assert cluster.alive() == ["ray.head.default"]
        with driver(cluster, place, shards, DEVICE="gpu", WORK_S="1") as process:
            most, start = 0, time.monotonic()
            while process.poll() is None and time.monotonic() - start < LONGEST_S:
                most = max(most, cluster.alive().count("gpu"))
                time.sleep(0.3)
            finish(process, place)
        print(f"{most} nodes, {len(actors(place))} actors, {time.monotonic() - start:.0f} s")
        assert most == 2
        assert len(actors(place)) >= 2
        start = time.monotonic()
        while len(cluster.alive()) > 1:
            assert time.monotonic() - start < 60
            time.sleep(0.3)
        print(f"given back {time.monotonic() - start:.0f} s later")
    assert tree(place) == undisturbed(tmp_path / "embedded", shards)


def test_what_no_node_type_holds_is_said(folder: Path, tmp_path: Path) -> None:
    """Not a silent wait: the autoscaler knows that it will never come."""
    node = {"CPU": 2, "object_store_memory": 100 << 20}
    with (
        LocalCluster(folder, grows={"cpu": (node, 2)}) as cluster,
        driver(cluster, tmp_path / "never", 3, DEVICE="gpu") as process,
    ):
        start = time.monotonic()
        assert process.wait(LONGEST_S) == 1
        said = (tmp_path / "never" / "said").read_text()
        assert "no node type of the cluster holds a process with 1 CPU and 1 GPU" in said, said[-3000:]
        print(f"{time.monotonic() - start:.0f} s")
        assert time.monotonic() - start < 90


@pytest.mark.parametrize("seed", SEEDS)
def test_two_of_three_nodes_are_killed(seed: int, folder: Path, tmp_path: Path) -> None:
    """Each has an actor at work, and another node comes in its place."""
    shards, place, rng = 60, tmp_path / "killed", random.Random(seed)
    with LocalCluster(folder) as cluster:
        workers = [cluster.add_node(1) for _ in range(3)]
        with driver(cluster, place, shards, WORK_S="0.6") as process:
            for at in sorted(rng.sample(range(3, shards - 15), 2)):
                start = time.monotonic()
                while parts(place) < at:
                    assert process.poll() is None, (place / "said").read_text()[-3000:]
                    assert time.monotonic() - start < LONGEST_S
                    time.sleep(0.05)
                victim = rng.choice([node for node in workers if family(node) & actors(place)])
                cluster.kill_node(victim)
                workers[workers.index(victim)] = cluster.add_node(1)
                print(f"seed {seed}: a node killed at {at} parts of {shards}")
            finish(process, place)
        print(f"seed {seed}: {len(actors(place))} actors in all")
        assert len(actors(place)) >= 3
    assert tree(place) == undisturbed(tmp_path / "embedded", shards)

"""Training outlives its workers, their nodes and its driver, and ends where an undisturbed one ends."""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from local import LocalCluster
from metadata import Metadata
from processes import end, family, kill, name
from train import CHECKPOINT_EVERY

pytestmark = pytest.mark.release
ROOT = Path(__file__).parents[2]
LONGEST_S = 240
STEPS = 120
SEEDS = range(int(os.environ.get("DIFFMINE_FAULT_SEEDS", "1")))
NOTICE_S = 8  # between a notice and the end of a node
CLOUDS = ("aws", "gcp")


@contextmanager
def training(place: Path, workers: int, cluster: LocalCluster | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """The driver, on the cluster or on an embedded Ray."""
    place.mkdir(exist_ok=True)
    variables = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
    variables |= {"PYTHONPATH": str(ROOT)}
    if cluster:
        patience = {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10"}
        variables |= {**cluster.environment, **patience, "RAY_ADDRESS": cluster.address}
    command = [sys.executable, str(Path(__file__).with_name("train.py")), str(place / "run"), str(STEPS), str(workers)]
    with (place / "said").open("ab") as said:
        process = subprocess.Popen(command, env=variables, stdout=said, stderr=said, start_new_session=True)
    try:
        yield process
    finally:
        end(process)


def finish(process: subprocess.Popen[bytes], place: Path) -> None:
    assert process.wait(LONGEST_S) == 0, (place / "said").read_text()[-3000:]


def checkpoints(place: Path) -> list[int]:
    """Steps of the whole checkpoints that are there."""
    return sorted(
        int(file.parent.name.removeprefix("step-")) for file in place.glob("run/checkpoints/step-*/done.json")
    )


def await_checkpoint(process: subprocess.Popen[bytes], place: Path, least: int) -> None:
    start = time.monotonic()
    while max(checkpoints(place), default=0) < least:
        assert process.poll() is None, (place / "said").read_text()[-3000:]
        assert time.monotonic() - start < LONGEST_S
        time.sleep(0.02)


def losses(place: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (place / "run/model/metrics.jsonl").read_text().splitlines()]


def model(place: Path) -> dict[str, bytes]:
    folder = place / "run" / "model"
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "_commit.json"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("undisturbed")
    with training(place, 1) as process:
        finish(process, place)
    return place


@pytest.mark.parametrize("seed", SEEDS)
def test_a_worker_and_then_the_driver_are_killed(seed: int, undisturbed: Path, tmp_path: Path) -> None:
    """At random steps; Ray starts the worker again, and the same command the driver."""
    rng = random.Random(seed)
    first, second = sorted(rng.sample(range(CHECKPOINT_EVERY, STEPS - CHECKPOINT_EVERY, CHECKPOINT_EVERY), 2))
    with training(tmp_path, 1) as process:
        await_checkpoint(process, tmp_path, first)
        time.sleep(rng.random() * 2)
        [worker] = [pid for pid in family(process) if "RayTrainWorker" in name(pid)]
        kill(worker)
        print(f"seed {seed}: worker killed after the checkpoint of step {first}")
        await_checkpoint(process, tmp_path, second)
        time.sleep(rng.random())
        left = checkpoints(tmp_path)
    assert left
    print(f"seed {seed}: driver killed after the checkpoint of step {left[-1]}")
    with training(tmp_path, 1) as process:
        finish(process, tmp_path)
    assert losses(tmp_path) == losses(undisturbed)
    assert model(tmp_path) == model(undisturbed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_node_is_drained_and_killed(seed: int, undisturbed: Path, tmp_path: Path) -> None:
    """Training saves itself at the cloud's notice and goes on from there with the worker that is left."""
    rng, cloud = random.Random(seed), CLOUDS[seed % 2]
    with (
        tempfile.TemporaryDirectory(prefix="dm", ignore_cleanup_errors=True) as folder,
        LocalCluster(Path(folder)) as cluster,
        Metadata() as metadata,
    ):
        nodes = [cluster.add_node(1) for _ in range(2)]
        victim = rng.choice(nodes)
        with training(tmp_path, 2, cluster) as process, cluster.watched(victim, cloud, metadata.address) as said:
            await_checkpoint(process, tmp_path, CHECKPOINT_EVERY)
            assert metadata.asked, said.read_text()
            metadata.notice(NOTICE_S)
            noticed, start = time.monotonic() + NOTICE_S, time.monotonic()
            seen: set[int] = set()
            while time.monotonic() < noticed:
                seen |= set(checkpoints(tmp_path))
                time.sleep(0.1)
            cluster.kill_node(victim)
            assert "its node is drained" in said.read_text()
            finish(process, tmp_path)
            after = time.monotonic() - start
            print(f"seed {seed}: notice of {cloud}, checkpoints {sorted(seen)}, done {after:.0f} s later")
    assert any(step % CHECKPOINT_EVERY for step in seen), "none at the notice"
    assert np.allclose(losses(tmp_path), losses(undisturbed), rtol=1e-3)

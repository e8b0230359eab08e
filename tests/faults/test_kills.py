"""Actors and drivers killed in the middle of a stage: the tables are those of an undisturbed run, byte for byte.

Kills are placed by progress (notes in a ledger), never by the clock, and hit only processes that the run itself
started: pids that the ledger names and that descend from the driver. `DIFFMINE_FAULT_SEEDS` says how many runs of each
kind.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

pytestmark = pytest.mark.long
SCRIPT = Path(__file__).parent / "work.py"
ROOT = Path(__file__).parents[2]
ACTORS = 2
LONGEST_S = 400
RUNS = int(os.environ.get("DIFFMINE_FAULT_SEEDS", "0"))
ACTOR_SEEDS, DRIVER_SEEDS = range(RUNS or 3), range(RUNS or 2)


class Place:
    """A run folder and its ledger."""

    def __init__(self, folder: Path) -> None:
        self.run, self.ledger = folder / "run", folder / "ledger"
        self.ledger.mkdir(parents=True)

    def notes(self) -> list[tuple[int, str, int]]:
        """(pid, start or end, shard), each pid's in order."""
        found = []
        for file in self.ledger.iterdir():
            for line in file.read_text().splitlines():
                what, shard = line.split()
                found.append((int(file.name), what, int(shard)))
        return found

    def done(self) -> int:
        return len(list((self.run / "latents").glob("part-*.parquet")))

    def tree(self) -> dict[str, bytes]:
        """Files and their bytes; markers, which hold times, and temporary files left out."""
        files = [p for p in self.run.rglob("*") if p.is_file() and not p.name.endswith((".tmp", "_commit.json"))]
        return {p.relative_to(self.run).as_posix(): p.read_bytes() for p in files}


@contextmanager
def driver(place: Place, shards: int, *fault: str) -> Iterator[subprocess.Popen]:
    """The stage's driver in a session of its own; whatever is left of that session is ended."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(place.run), str(place.ledger), str(shards), *fault]
    with (place.ledger.parent / "messages").open("ab") as messages:
        process = subprocess.Popen(command, stdout=messages, stderr=messages, env=environment, start_new_session=True)
    try:
        yield process
    finally:
        end([process.pid, *descendants(process.pid)])
        process.wait()


def descendants(pid: int) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def wait_until_gone(pids: set[int]) -> float:
    """Seconds until none of the processes lives."""
    start = time.monotonic()
    while any(lives(pid) for pid in pids):
        assert time.monotonic() - start < 60, [psutil.Process(pid).cmdline() for pid in pids if lives(pid)]
        time.sleep(0.1)
    return time.monotonic() - start


def end(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def lives(pid: int) -> bool:
    """A dead process that its parent has not asked for does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def ended(process: subprocess.Popen, place: Place) -> None:
    assert process.wait(LONGEST_S) == 0, (place.ledger.parent / "messages").read_text()[-2000:]


def busy(place: Place) -> list[int]:
    """Pids that have started a shard and not ended it."""
    counts: Counter[int] = Counter()
    for pid, what, _ in place.notes():
        counts[pid] += 1 if what == "start" else -1
    return [pid for pid, open_shards in counts.items() if open_shards > 0 and lives(pid)]


def wait_for(place: Place, process: subprocess.Popen, parts: int) -> None:
    """Until so many parts are in place and somebody is at work."""
    start = time.monotonic()
    while process.poll() is None and (place.done() < parts or not busy(place)):
        assert time.monotonic() - start < LONGEST_S
        time.sleep(0.01)


def undisturbed(folder: Path, shards: int, *fault: str) -> dict[str, bytes]:
    place = Place(folder)
    with driver(place, shards, *fault) as process:
        ended(process, place)
    return place.tree()


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, bytes]]:
    return {shards: undisturbed(tmp_path_factory.mktemp("golden"), shards) for shards in (90, 160)}


def check(place: Place, golden: dict[str, bytes], shards: int) -> None:
    found = place.tree()
    assert found == golden
    ids = [i for name, data in found.items() if "failures" not in name for i in _ids(place.run / name)]
    failed = [i for name in found if name.startswith("failures") for i in _ids(place.run / name)]
    assert sorted(ids + failed) == [f"{shard:04d}/{i}" for shard in range(shards) for i in range(4)]


def _ids(path: Path) -> list[str]:
    return pq.read_table(path, columns=["image_id"])["image_id"].to_pylist()


@pytest.mark.parametrize("seed", ACTOR_SEEDS)
def test_twenty_killed_actors(seed: int, golden: dict[int, dict[str, bytes]], tmp_path: Path) -> None:
    """Each dies with a shard in its hands."""
    shards, kills, place, rng = 160, 20, Place(tmp_path), random.Random(seed)
    at, hit = sorted(rng.sample(range(4, shards - 10), kills)), 0
    with driver(place, shards) as process:
        for parts in at:
            wait_for(place, process, parts)
            victims = sorted(set(busy(place)) & set(descendants(process.pid)))
            if victims:
                os.kill(rng.choice(victims), signal.SIGKILL)
                hit += 1
        ended(process, place)
    starts = sum(what == "start" for _, what, _ in place.notes())
    print(f"seed {seed}: {hit} of {kills} kills hit a busy actor; {starts - shards} shards computed again")
    assert hit >= 15
    check(place, golden[shards], shards)
    assert starts - shards <= 2 * hit  # the shard in its hands, and one whose part was in place but not yet told of


@pytest.mark.parametrize("seed", DRIVER_SEEDS)
def test_three_killed_drivers(seed: int, golden: dict[int, dict[str, bytes]], tmp_path: Path) -> None:
    """The same command again, each time; what was in place is not made again."""
    shards, kills, place, rng = 90, 3, Place(tmp_path), random.Random(100 + seed)
    for parts in sorted(rng.sample(range(shards // 10, 9 * shards // 10), kills)):
        with driver(place, shards) as process:
            wait_for(place, process, parts)
            assert process.poll() is None
            assert 0 < place.done() < shards, "work was under way"
            family = descendants(process.pid)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            gone = wait_until_gone({pid for pid, _, _ in place.notes()} & set(family))
            left = [psutil.Process(pid).cmdline()[0] for pid in family if lives(pid)]
            print(f"seed {seed}: killed at {parts} parts; its actors ended in {gone:.0f} s; still there: {left}")
            end(family)  # Ray's two agents stay for minutes, idle
    with driver(place, shards) as process:
        ended(process, place)
    starts = sum(what == "start" for _, what, _ in place.notes())
    print(f"seed {seed}: {starts - shards} shards computed again")
    check(place, golden[shards], shards)
    assert starts - shards <= ACTORS * kills


def test_two_drivers_at_once(golden: dict[int, dict[str, bytes]], tmp_path: Path) -> None:
    shards, place = 90, Place(tmp_path)
    with driver(place, shards) as one, driver(place, shards) as other:
        ended(one, place)
        ended(other, place)
    check(place, golden[shards], shards)


@pytest.mark.parametrize("fault", ["--named-by-chance", "--with-pid"])
def test_the_comparison_sees_chance(fault: str, tmp_path: Path) -> None:
    assert undisturbed(tmp_path / "a", 12, fault) != undisturbed(tmp_path / "b", 12, fault)

"""Actors and drivers killed in the middle of a stage: the tables are those of an undisturbed run, byte for byte.

Promised, and how it is counted:

- Killed actors: the run ends by itself with exit code 0. Every file of the run, the stage's marker included, has the
  bytes of an undisturbed run's; every image is there once, as a row or as a failure. A kill counts as a hit when the
  dead actor's last note in the ledger says that it had started a shard.
- A killed driver: the same command again ends with the same bytes. A shard is computed again for each start in the
  ledger beyond one a shard: at most one per actor and kill.
- Two drivers at once on one run folder: both end with exit code 0, with the same bytes.

Kills are placed by progress (parts in place, and an actor at work by the ledger), never by the clock, and hit only
processes that the run itself started: each driver has a session of its own, to which all its Ray processes belong.
`DIFFMINE_FAULT_SEEDS` says how many runs of each kind. The figures are printed: `pytest -s`.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from processes import end, family, kill, name

from diffmine.run import Run

pytestmark = pytest.mark.release
SCRIPT = Path(__file__).parent / "work.py"
ROOT = Path(__file__).parents[2]
ACTORS = 2
IMAGES = 4  # of a shard, as in work.py
LONGEST_S = 400
ORPHANED_S = 60  # that an actor may outlive its driver
LINGERING_S = 5  # that other processes of Ray are waited for, before they are reported
SEEDS = range(int(os.environ.get("DIFFMINE_FAULT_SEEDS", "1")))
Tree = dict[str, bytes]


class Place:
    """A run folder, the ledger of its workers and what its drivers said."""

    def __init__(self, folder: Path) -> None:
        self.run, self.ledger, self.messages = folder / "run", folder / "ledger", folder / "messages"
        self.ledger.mkdir(parents=True)

    def notes(self) -> dict[int, list[tuple[str, int]]]:
        """pid -> (start or end, shard) in order; a line that is being written is left out."""
        found = {}
        for file in self.ledger.iterdir():
            lines = [line.split() for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
            found[int(file.name)] = [(what, int(shard)) for what, shard in lines]
        return found

    def starts(self) -> list[int]:
        """A shard for each time that an actor started it."""
        return [shard for notes in self.notes().values() for what, shard in notes if what == "start"]

    def in_hand(self) -> set[int]:
        """Pids that have started a shard and not ended it, alive or not."""
        return {pid for pid, notes in self.notes().items() if notes and notes[-1][0] == "start"}

    def done(self) -> int:
        return len(list((self.run / "latents").glob("part-*.parquet")))

    def tree(self) -> Tree:
        """All files and their bytes, but for the temporary ones that a kill may leave."""
        files = [p for p in self.run.rglob("*") if p.is_file() and not p.name.endswith(".tmp")]
        return {p.relative_to(self.run).as_posix(): p.read_bytes() for p in files}


@contextmanager
def driver(place: Place, shards: int, *fault: str) -> Iterator[subprocess.Popen]:
    """The stage's driver in a session of its own; whatever is left of that session is ended, and nothing else."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(place.run), str(place.ledger), str(shards), *fault]
    with place.messages.open("ab") as messages:
        process = subprocess.Popen(command, stdout=messages, stderr=messages, env=environment, start_new_session=True)
    try:
        yield process
    finally:
        end(process)


def finish(process: subprocess.Popen, place: Place) -> None:
    assert process.wait(LONGEST_S) == 0, place.messages.read_text()[-2000:]


def wait_for(place: Place, process: subprocess.Popen, parts: int) -> list[int]:
    """Pids of the driver's actors that are at work, once so many parts are in place; none if the driver has ended."""
    start = time.monotonic()
    while process.poll() is None:
        assert time.monotonic() - start < LONGEST_S, place.messages.read_text()[-2000:]
        if place.done() >= parts and (held := place.in_hand()) and (busy := held & family(process)):
            return sorted(busy)
        time.sleep(0.01)
    return []


def wait_until_gone(process: subprocess.Popen, actors: set[int]) -> tuple[float, list[str]]:
    """Seconds until none of a dead driver's actors lives, and what else of its session then stays."""
    start = time.monotonic()
    while left := family(process) & actors:
        assert time.monotonic() - start < ORPHANED_S, [name(pid) for pid in left]
        time.sleep(0.1)
    gone = time.monotonic()
    while family(process) and time.monotonic() - gone < LINGERING_S:
        time.sleep(0.1)
    return gone - start, sorted(map(name, family(process)))


def undisturbed(folder: Path, shards: int, *fault: str) -> Place:
    place = Place(folder)
    with driver(place, shards, *fault) as process:
        finish(process, place)
    return place


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Tree]:
    """Number of shards -> files of an undisturbed run, which starts each shard once."""

    @cache
    def golden(shards: int) -> Tree:
        place = undisturbed(tmp_path_factory.mktemp("golden"), shards)
        assert sorted(place.starts()) == list(range(shards))
        return place.tree()

    return golden


def check(place: Place, golden: Tree, shards: int) -> None:
    """Identical files; every image once; the marker names every part with its digest."""
    found = place.tree()
    assert set(found) == set(golden)
    assert [name for name in found if found[name] != golden[name]] == []
    parts = [name for name in found if "/part-" in name]
    ids = [i for name in parts for i in pq.read_table(place.run / name, columns=["image_id"])["image_id"].to_pylist()]
    assert sorted(ids) == [f"{shard:04d}/{i}" for shard in range(shards) for i in range(IMAGES)]
    run = Run(str(place.run))
    marker = run.committed("latents")
    assert marker is not None
    assert marker["files"] == run.digests(["latents", "failures/latents"])
    assert marker["failures"] == len(range(0, shards, 7))
    assert marker["rows"] + marker["failures"] == shards * IMAGES


@pytest.mark.parametrize("seed", SEEDS)
def test_twenty_killed_actors(seed: int, golden: Callable[[int], Tree], tmp_path: Path) -> None:
    """Each dies with a shard in its hands."""
    shards, kills, place, rng = 160, 20, Place(tmp_path), random.Random(seed)
    expected, victims, start = golden(shards), set(), time.monotonic()
    with driver(place, shards) as process:
        for parts in sorted(rng.sample(range(4, shards - 10), kills)):
            if busy := wait_for(place, process, parts):
                victim = rng.choice(busy)
                kill(victim)
                victims.add(victim)
        finish(process, place)
    seconds, hit, again = time.monotonic() - start, len(victims & place.in_hand()), len(place.starts()) - shards
    print(f"seed {seed}: {hit} of {kills} kills hit a busy actor; {again} shards computed again; {seconds:.0f} s")
    assert hit >= 15
    check(place, expected, shards)
    assert again <= 2 * hit  # the shard in its hands, and one whose part was in place but not yet told of


@pytest.mark.parametrize("seed", SEEDS)
def test_three_killed_drivers(seed: int, golden: Callable[[int], Tree], tmp_path: Path) -> None:
    """The same command again, each time; what was in place is not made again."""
    shards, kills, place, rng = 90, 3, Place(tmp_path), random.Random(100 + seed)
    expected, start = golden(shards), time.monotonic()
    for parts in sorted(rng.sample(range(shards // 10, 8 * shards // 10), kills)):
        with driver(place, shards) as process:
            busy = wait_for(place, process, parts)
            kill(process.pid)
            assert process.wait() == -signal.SIGKILL, "it had not ended before"
            done = place.done()
            gone, left = wait_until_gone(process, set(place.notes()))
        print(
            f"seed {seed}: killed at {done} parts of {shards}, {len(busy)} actors at work; they ended in {gone:.1f} s"
        )
        print(f"seed {seed}: still there {LINGERING_S} s later, ended with the session: {left}")
        assert busy
        assert 0.1 <= done / shards <= 0.9
    with driver(place, shards) as process:
        finish(process, place)
    again = len(place.starts()) - shards
    print(f"seed {seed}: {again} shards computed again; {time.monotonic() - start:.0f} s")
    check(place, expected, shards)
    assert again <= ACTORS * kills


def test_two_drivers_at_once(golden: Callable[[int], Tree], tmp_path: Path) -> None:
    """They work on the same shards."""
    shards, place = 90, Place(tmp_path)
    expected, start = golden(shards), time.monotonic()
    with driver(place, shards, "--together") as one, driver(place, shards, "--together") as other:
        finish(one, place)
        finish(other, place)
    both = sum(times > 1 for times in Counter(place.starts()).values())
    print(f"two drivers: {both} of {shards} shards computed by both; {time.monotonic() - start:.0f} s")
    check(place, expected, shards)
    assert both > 0


@pytest.mark.parametrize(
    ("number", "there", "code", "said"),
    [
        (signal.SIGTERM, "latents/part-00000.parquet", 143, "ended by SIGTERM"),
        (signal.SIGINT, "checkpoints/step-00000020", 130, "interrupted"),
    ],
)
def test_a_signal_ends_a_run_at_once(number: int, there: str, code: int, said: str, tmp_path: Path) -> None:
    """With a sentence and an exit code, though threads still wait for Ray, and with all of its processes."""
    settings = ["dataset.limit_per_label=12", "finetune.steps=100000", "finetune.checkpoint_every=20"]
    command = [sys.executable, "jobs/mine.py", "configs/toytown.yaml", f"--output={tmp_path / 'run'}"]
    command += [f"--{setting}" for setting in settings]
    with (tmp_path / "messages").open("wb") as messages:
        process = subprocess.Popen(command, cwd=ROOT, stdout=messages, stderr=messages, start_new_session=True)
    try:
        start = time.monotonic()
        while not (tmp_path / "run" / there).exists():
            assert process.poll() is None
            assert time.monotonic() - start < LONGEST_S
            time.sleep(0.1)
        process.send_signal(number)
        sent = time.monotonic()
        assert process.wait(20) == code
        print(f"ended in {time.monotonic() - sent:.1f} s")
        last = (tmp_path / "messages").read_text().splitlines()[-1]
        assert last == f"diffmine: {said}; what is committed is kept, and the same command goes on"
        time.sleep(1)
        assert sorted(map(name, family(process))) == []
    finally:
        end(process)


@pytest.mark.parametrize("fault", ["--named-by-chance", "--with-pid"])
def test_the_comparison_sees_chance(fault: str, tmp_path: Path) -> None:
    """Negative control: of a stage that is not deterministic no run passes the check against another."""
    shards = 12
    one, other = (undisturbed(tmp_path / name, shards, fault) for name in "ab")
    check(one, one.tree(), shards)
    assert (set(one.tree()) == set(other.tree())) == (fault == "--with-pid")
    with pytest.raises(AssertionError):
        check(one, other.tree(), shards)

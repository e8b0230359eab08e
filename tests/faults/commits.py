"""One commit sequence, what a reader may find while and after it runs, and processes that run it and die or fail in it.

The sequence is three shards put in place by `commit_part` (shard 1 has failures too), then the stage's marker. Run as a
script, this file imports diffmine once and forks a process for each job that it reads; `Forks` is the other end.
"""

import builtins
import errno
import hashlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

STAGE = "latents"
MARKER = f"{STAGE}/_commit.json"
PARTS = [f"{STAGE}/part-{shard:05d}.parquet" for shard in range(3)]
FAILURES = f"failures/{STAGE}/part-00001.parquet"
KILLED = 137  # exit status of a process that dies at a step
PIECE = 4096  # bytes that one write takes: a part is written in several steps
ROWS = [3, 6, 4]  # of each shard; shard 1 is the largest file
Tree = dict[str, bytes]
Clean = tuple[Tree, list[str]]  # of a run to which nothing happens: its files and its steps
_JOB_S = 60  # a job that takes longer is killed
_EVENTS = {"os.mkdir": 0, "os.link": 1, "os.rename": 1, "os.remove": 0, "os.rmdir": 0, "os.truncate": 0}  # -> its path
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass
class Job:
    """One process that runs a sequence once. Steps are counted from 0; a fault starts at a step and stays."""

    folder: str
    sequence: str = "real"  # a key of `SEQUENCES`
    changed: bool = False  # shard 2 has other rows
    die_at: int | None = None
    fail_at: int | None = None
    errno: int = errno.ENOSPC
    removal_fails: bool = False  # whether the fault keeps files from being removed
    largest_file: int | None = None  # bytes: RLIMIT_FSIZE
    nap: float = 0.0  # seconds before each step, so that other processes come between the steps


@dataclass
class Outcome:
    """What became of a job. A process that died says nothing but its exit status."""

    status: int
    error: str = ""  # of a StoreError
    steps: tuple[str, ...] = ()  # "open latents/part-00000.parquet.<...>.tmp"
    marked: dict[str, str] = field(default_factory=dict)  # files with the digests that it put into the marker
    start: float = 0.0
    end: float = 0.0


# ------------------------------------------------------------------------------------------------------------ readers


def tree(folder: Path) -> dict[str, bytes]:
    """Every file that a reader can see, with its bytes."""
    return {name: (folder / name).read_bytes() for name in _names(folder) if not name.endswith(".tmp")}


def asides(folder: Path) -> list[str]:
    """Temporary files that were left."""
    return [name for name in _names(folder) if name.endswith(".tmp")]


def look(folder: Path, golden: dict[str, bytes]) -> tuple[int, list[str]]:
    """Files read, and what is wrong with them. It may run beside a writer: what came later is read first."""
    found, reads = [], 0
    if (folder / MARKER).is_file():
        reads += 1
        named = _marked((folder / MARKER).read_bytes())
        if not named:
            found.append(f"{MARKER}: names nothing")
        for name, digest in named.items():
            reads += 1
            if not (folder / name).is_file():
                found.append(f"{MARKER}: names {name}, which is not there")
            elif hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
                found.append(f"{MARKER}: {name} has another digest")
    for name, data in tree(folder).items():
        reads += 1
        if name not in golden:
            found.append(f"{name}: should not be there")
        elif data != golden[name]:
            found.append(f"{name}: {len(data)} bytes, not the {len(golden[name])} it should have")
    return reads, found


class Reader(threading.Thread):
    """Looks at a folder again and again, while others write there."""

    def __init__(self, golden: dict[str, bytes]) -> None:
        super().__init__(daemon=True)
        self.golden = golden
        self.reads, self.passes = 0, 0
        self.bad: list[str] = []
        self._folder: Path | None = None
        self._stopped = False

    def __enter__(self) -> "Reader":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        self.join()

    def look_at(self, folder: Path) -> None:
        self._folder = folder

    def finish_pass(self) -> None:
        """Wait until a pass that began after this call has ended."""
        last = self.passes + 2
        while self.passes < last and self.is_alive():
            time.sleep(0.002)  # two cores are for the writers

    def run(self) -> None:
        while not self._stopped:
            if (folder := self._folder) is not None:
                try:
                    reads, found = look(folder, self.golden)
                except OSError as error:  # no file that a reader can see may go away
                    reads, found = 1, [str(error)]
                self.reads += reads
                self.bad += found
            self.passes += 1
            time.sleep(0.002)  # two cores are for the writers


def _names(folder: Path) -> Iterator[str]:
    for place, _, files in os.walk(folder):
        yield from sorted((Path(place) / file).relative_to(folder).as_posix() for file in files)


def _marked(data: bytes) -> dict[str, str]:
    with suppress(ValueError, KeyError):
        return dict(json.loads(data)["files"])
    return {}


# ---------------------------------------------------------------------------------------------------------- processes


class Forks:
    """Runs jobs in processes of their own, which end with them."""

    def __enter__(self) -> "Forks":
        self.server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.communicate(timeout=_JOB_S)

    def run(self, *jobs: Job) -> list[Outcome]:
        """Run jobs, which begin at the same time, and wait for all of them."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps([asdict(job) for job in jobs]).encode() + b"\n")
        self.server.stdin.flush()
        return [Outcome(**outcome) for outcome in json.loads(self.server.stdout.readline())]

    def golden(self, folder: Path) -> tuple[dict[str, bytes], list[str]]:
        """The files that the sequence leaves when nothing happens, and its steps."""
        [outcome] = self.run(Job(str(folder)))
        assert (outcome.status, outcome.error) == (0, "")
        return tree(folder), list(outcome.steps)


def serve() -> None:
    """Jobs from the standard input, a list in each line -> their outcomes on the standard output."""
    for line in sys.stdin:
        print(json.dumps([asdict(o) for o in _fork([Job(**job) for job in json.loads(line)])]), flush=True)


def _fork(jobs: list[Job]) -> list[Outcome]:
    closed, gate = os.pipe()  # the jobs begin when it is closed
    children = []
    for job in jobs:
        answer, told = os.pipe()
        if not (child := os.fork()):
            os.close(gate)
            os.read(closed, 1)
            signal.alarm(_JOB_S)
            os.write(told, json.dumps(asdict(_work(job))).encode())
            os._exit(0)
        os.close(told)
        children.append((child, answer))
    os.close(gate)
    os.close(closed)
    outcomes = []
    for child, answer in children:
        with open(answer, "rb") as file:
            said = file.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        outcomes.append(Outcome(**json.loads(said) | {"status": status}) if said else Outcome(status))
    return outcomes


def _work(job: Job) -> Outcome:
    from diffmine.errors import StoreError

    steps: list[str] = []

    def step(what: str, path: str) -> None:
        time.sleep(job.nap)
        if job.die_at == len(steps):
            os._exit(KILLED)
        steps.append(f"{what} {os.path.relpath(path, job.folder)}")
        failing = job.fail_at is not None and len(steps) > job.fail_at
        if failing and (job.removal_fails or what != "remove"):
            raise OSError(job.errno, os.strerror(job.errno), path)

    if job.largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job.largest_file, job.largest_file))
    before_each_step(job.folder, step)
    start, error, marked = time.monotonic(), "", {}
    try:
        marked = SEQUENCES[job.sequence](job.folder, job.changed)
    except StoreError as raised:
        error = str(raised)
    return Outcome(0, error, tuple(steps), marked, start, time.monotonic())


def before_each_step(folder: str, step: Callable[[str, str], None]) -> None:
    """Call `step` with a verb and a path before each change below a folder, from now to the end of this process."""
    inside = f"{os.path.abspath(folder)}/"
    open_file = io.open

    def below(path: object) -> bool:
        return isinstance(path, str | os.PathLike) and os.path.abspath(path).startswith(inside)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and arguments[2] & _WRITING and below(arguments[0]):
            step("open", os.fspath(arguments[0]))
        elif event in _EVENTS and below(path := arguments[_EVENTS[event]]):
            step(event.removeprefix("os."), os.fspath(path))

    class Pieces(io.FileIO):
        """A file that takes only a piece at a time; no audit event tells of a write."""

        def write(self, data: Any, /) -> int:
            step("write", str(self.name))
            return super().write(memoryview(data)[:PIECE])

    def open_in_pieces(file: Any, mode: str = "r", *arguments: Any, **more: Any) -> Any:
        if mode in ("wb", "xb", "ab") and below(file):
            return io.BufferedWriter(Pieces(file, mode))
        return open_file(file, mode, *arguments, **more)

    def counted_sync(fd: int) -> None:  # no more than counted: only a power cut would tell, and a busy disk takes long
        step("fsync", os.readlink(f"/proc/self/fd/{fd}"))

    builtins.open = io.open = open_in_pieces
    os.fsync = counted_sync
    sys.addaudithook(hook)


# ---------------------------------------------------------------------------------------------------------- sequences


def commit_all(folder: str, changed: bool) -> dict[str, str]:
    """What the stages do."""
    from diffmine.run import Run
    from diffmine.stages.shards import commit_part

    run = Run(folder)
    receipts = [commit_part(run, STAGE, shard, part) for shard, part in enumerate(_parts(changed))]
    return _mark(run, {name: digest for receipt in receipts for name, digest in receipt["files"].items()})


def commit_marker_first(folder: str, changed: bool) -> dict[str, str]:
    """Wrong: the marker names files that are not there yet."""
    from diffmine.run import Run

    run, files = Run(folder), _files(changed)
    marked = _mark(run, {name: hashlib.sha256(data).hexdigest() for name, data in files.items()})
    for name, data in files.items():
        run.put(name, data)
    return marked


def commit_failures_once(folder: str, changed: bool) -> dict[str, str]:
    """Wrong: only who creates a part writes its failures, and that process may die in between."""
    from diffmine.run import Run

    run, files = Run(folder), _files(changed)
    for name in PARTS:
        if run.put_if_absent(name, files[name]) and name == PARTS[1]:
            run.put(FAILURES, files[FAILURES])
    return _mark(run, {name: run.digest(name) for name in run.files("")})


def commit_plainly(folder: str, changed: bool) -> dict[str, str]:
    """Wrong: a file is seen while it is written, and two writers write over each other."""
    from diffmine.errors import StoreError
    from diffmine.run import Run

    files = _files(changed)
    for name, data in files.items():
        path = f"{folder}/{name}"
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(data)
        except OSError as error:
            raise StoreError(f"{path}: cannot be written ({error})") from error
    return _mark(Run(folder), {name: hashlib.sha256(data).hexdigest() for name, data in files.items()})


SEQUENCES: dict[str, Callable[[str, bool], dict[str, str]]] = {
    "real": commit_all,
    "marker first": commit_marker_first,
    "failures once": commit_failures_once,
    "plain": commit_plainly,
}


def _parts(changed: bool) -> list[Any]:
    import numpy as np

    from diffmine.run import rows_to_table
    from diffmine.stages.shards import Part

    parts = []
    for shard, count in enumerate(ROWS):
        random = np.random.default_rng([shard, changed and shard == 2])
        rows = [
            {
                "image_id": f"{shard}-{n}", "width": 128, "height": 128, "h": 16, "w": 16, "scale": 1.0, "crop_x": 0,
                "crop_y": 0, "latent": random.standard_normal(4 * 16 * 16).astype(np.float16),
            }
            for n in range(count)
        ]  # fmt: skip
        failures = [
            {"image_id": f"{shard}-{n}", "uri": f"{n}.jpg", "reason": "truncated", "detail": "ends too early"}
            for n in (8, 7)
        ]
        parts.append(Part(rows_to_table(STAGE, rows), failures if shard == 1 else []))
    return parts


def _files(changed: bool) -> dict[str, bytes]:
    """The files of the sequence, in its order, without the marker."""
    from diffmine.run import rows_to_table, to_parquet
    from diffmine.stages.shards import part_file

    parts = _parts(changed)
    failed = rows_to_table("failures", sorted(parts[1].failures, key=lambda f: f["image_id"]))
    files = {name: part_file(part) for name, part in zip(PARTS, parts, strict=True)}
    return {
        PARTS[0]: files[PARTS[0]],
        PARTS[1]: files[PARTS[1]],
        FAILURES: to_parquet(failed),
        PARTS[2]: files[PARTS[2]],
    }


def _mark(run: Any, files: dict[str, str]) -> dict[str, str]:
    run.commit(STAGE, {"fingerprint": "f"}, files)
    return files


if __name__ == "__main__":
    import diffmine.stages.shards  # noqa: F401  # once, for all the processes that are forked

    serve()

"""A finished run -> what Ray costs: processor seconds of the scoring stage, beside plain processes with the same actor.

    python benchmarks/overhead.py --run runs/toytown --draws 340 --out benchmarks/results/overhead.json

Both sides score the same latents with the same draws and write the same parts: once as the stage does (reading tasks,
an actor pool, receipts), once in as many plain processes as the pool has actors, each going through its share of the
shards. Each side is a process in a session of its own, with all its children in it; what they have used is read from
the system until the last has ended, start-up and imports included. Other work on the machine is not counted, but may
slow a side down: the two take turns, `--rounds` times, in turned order. 340 draws of toytown are ten minutes or more
on two cores.
"""

import argparse
import hashlib
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from shutil import copytree

import psutil
from gpu import record

from diffmine.configfile import load
from diffmine.progress import Progress
from diffmine.run import Run
from diffmine.stages import session
from diffmine.stages.race import read_round
from diffmine.stages.shards import commit_part
from diffmine.stages.typicality import Scorer, Settings, scoring_settings, typicality

_LOOK_S = 0.5


def prepare(source: Run, folder: Path, draws: int) -> session.Context:
    """A run folder that has everything but typicality."""
    for name in ("manifest", "latents", "model"):
        copytree(source.path(name), folder / name)
    overrides = [f"--output={folder}", f"--typicality.draws={draws}"]
    return session.Context(Run(str(folder)), load(source.path("run.yaml"), overrides), Progress())


def with_ray(context: session.Context) -> None:
    with session.connected(context):
        typicality(context)


def plain(context: session.Context, processes: int) -> None:
    shards, settings = context.run.parts("latents"), scoring_settings(context)
    spawn = multiprocessing.get_context("spawn")
    each = [spawn.Process(target=work, args=(settings, shards[i::processes])) for i in range(processes)]
    for process in each:
        process.start()
    for process in each:
        process.join()
        assert process.exitcode == 0


def work(settings: Settings, shards: list[int]) -> None:
    import torch

    torch.set_num_threads(1)
    run, scorer = Run(settings.run), Scorer(settings, ())
    for shard in shards:
        commit_part(run, "typicality", shard, scorer(read_round(run, shard, b"")))


def measure(side: str, args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Processor seconds and wall time of a side, and of which processes they are."""
    command = [sys.executable, __file__, f"--run={args.run}", f"--draws={args.draws}", f"--side={side}:{folder}"]
    start, used, names = time.monotonic(), {}, {}
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        for one in psutil.process_iter():
            try:
                if os.getsid(one.pid) == process.pid:
                    times = one.cpu_times()
                    used[one.pid] = times.user + times.system
                    names[one.pid] = kind(one)
            except (psutil.Error, OSError):
                continue  # it has just ended
        time.sleep(_LOOK_S)
    if process.returncode:
        raise RuntimeError(f"{side} ended with {process.returncode}")
    found = {"busy_s": sum(used.values()), "wall_s": time.monotonic() - start}
    of: dict[str, float] = defaultdict(float)
    for pid, seconds in used.items():
        of[names[pid]] += seconds
    listed = ", ".join(
        f"{name} {seconds:.0f}" for name, seconds in sorted(of.items(), key=lambda n: -n[1]) if seconds > 1
    )
    print(f"{side:<8}{found['busy_s']:>10.1f} processor s{found['wall_s']:>10.1f} s   ({listed})", flush=True)
    return found


def kind(process: psutil.Process) -> str:
    """What a process is, in a word."""
    words = " ".join(process.cmdline())
    if "MapWorker" in words or "spawn_main" in words:
        return "actors"
    if __file__ in words:
        return "this program"
    of_ray = {"ray::": "Ray's other workers", "raylet": "raylet", "gcs_server": "GCS"}
    return next((name for part, name in of_ray.items() if part in words.split(" ")[0]), "Ray's agents")


def parts(run: Run) -> str:
    """Digest of all maps, which must be the same on both sides."""
    return hashlib.sha256("".join(run.digest(f"typicality/{n}") for n in run.names("typicality")).encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="folder of a finished run")
    parser.add_argument("--draws", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--side", help=argparse.SUPPRESS)  # what a side's own process is told
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.side:
        side, _, folder = args.side.partition(":")
        context = prepare(Run(args.run), Path(folder), args.draws)
        with_ray(context) if side == "ray" else plain(context, os.cpu_count() or 1)
        return
    os.environ.update(session.ENVIRONMENT, OMP_NUM_THREADS="1")
    rounds = []
    for i in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            order = ("plain", "ray") if i % 2 == 0 else ("ray", "plain")
            sides = {side: measure(side, args, Path(folder) / side) for side in order}
            digests = {parts(Run(f"{folder}/{side}")) for side in sides}
            if len(digests) > 1:
                raise RuntimeError("the two sides did not write the same bytes")
        rounds.append(sides)
    overhead = statistics.median(sides["ray"]["busy_s"] / sides["plain"]["busy_s"] - 1 for sides in rounds)
    print(f"overhead of Ray: {overhead:+.1%} of processor seconds")
    if args.out:
        record(args.out, rounds=rounds, overhead=overhead)


if __name__ == "__main__":
    main()

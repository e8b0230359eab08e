"""A finished run -> what Ray costs: processor seconds of the scoring stage, beside plain processes with the same actor.

    python benchmarks/overhead.py --run runs/toytown --draws 80 --out benchmarks/results/overhead.json

Both sides score the same latents with the same draws and write the same parts: once as the stage does (reading tasks,
an actor pool, receipts), once in as many plain processes as the pool has actors, each going through its share of the
shards. Counted are the busy processor seconds of the whole machine (/proc/stat) until everything has ended, start-up
included; so the machine must have nothing else to do. 80 draws of toytown are about ten minutes' work.
"""

import argparse
import hashlib
import multiprocessing
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu import record

from diffmine.config import load
from diffmine.progress import Progress
from diffmine.run import Run
from diffmine.stages import session
from diffmine.stages.race import read_round
from diffmine.stages.shards import commit_part
from diffmine.stages.typicality import Scorer, Settings, scoring_settings, typicality


def busy_seconds() -> float:
    """Of all processors since the machine started: all but idle and waiting for disks."""
    fields = [int(v) for v in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    return (sum(fields[:8]) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def prepare(source: Run, folder: Path, draws: int) -> session.Context:
    """A run folder that has everything but typicality."""
    for name in ("manifest", "latents", "model"):
        shutil.copytree(source.path(name), folder / name)
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


def measure(label: str, job: Any, *arguments: Any) -> dict[str, float]:
    busy, start = busy_seconds(), time.monotonic()
    job(*arguments)
    found = {"busy_s": busy_seconds() - busy, "wall_s": time.monotonic() - start}
    print(f"{label:<8}{found['busy_s']:>10.1f} processor s{found['wall_s']:>10.1f} s")
    return found


def parts(run: Run) -> str:
    """Digest of all maps, which must be the same on both sides."""
    return hashlib.sha256("".join(run.digest(f"typicality/{n}") for n in run.names("typicality")).encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="folder of a finished run")
    parser.add_argument("--draws", type=int, default=80)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    processes, figures = os.cpu_count() or 1, {}
    with tempfile.TemporaryDirectory() as folder:
        contexts = {name: prepare(Run(args.run), Path(folder) / name, args.draws) for name in ("plain", "ray")}
        figures["plain"] = measure("plain", plain, contexts["plain"], processes)
        figures["ray"] = measure("ray", with_ray, contexts["ray"])
        assert parts(contexts["plain"].run) == parts(contexts["ray"].run), "both sides write the same bytes"
    figures["overhead"] = figures["ray"]["busy_s"] / figures["plain"]["busy_s"] - 1
    print(f"overhead of Ray: {figures['overhead']:+.1%} of processor seconds")
    if args.out:
        record(args.out, **figures)


if __name__ == "__main__":
    main()

"""Whole runs: the embedded dataset and scenes by another hand, measured; real photographs, which come through."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import otherhand
import pytest

from diffmine.run import Run
from diffmine.stages.report import hits

ROOT = Path(__file__).parents[2]
# What is mined is not looked at: few steps, and one process a stage, as the start of each takes longer than its work.
ONLY_THROUGH = ("--finetune.steps=100", "--finetune.decay_steps=60", "--finetune.workers=1", "--compute.workers=1")


def mine(output: Path, *arguments: str) -> tuple[Run, str, float, float]:
    """`jobs/mine.py` as a user calls it: the run, its messages, seconds, and GiB of all its processes at the peak."""
    command = [sys.executable, "jobs/mine.py", "configs/toytown.yaml", f"--output={output}", *arguments]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
    start, peak = time.monotonic(), 0.0
    with (output.parent / "stdout").open("w+") as out, (output.parent / "stderr").open("w+") as err:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=err, env=environment, start_new_session=True)
        while process.poll() is None:
            peak = max(peak, memory(process.pid))
            time.sleep(5)  # reading the kernel's page counts is not free
        seconds = time.monotonic() - start
        err.seek(0)
        out.seek(0)
        messages = err.read()
        assert process.returncode == 0, messages
        assert out.read().splitlines()[-1] == str(output)
    return Run(str(output)), messages, seconds, peak


def memory(leader: int) -> float:
    """GiB of private memory of a process and of everything it started, and of what they share in /dev/shm."""
    total = 0
    parents = {int(p.name): p for p in Path("/proc").iterdir() if p.name.isdigit()}
    children: dict[int, list[int]] = {}
    for pid, folder in parents.items():
        try:
            children.setdefault(int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1]), []).append(pid)
        except OSError:
            continue
    waiting = [leader]
    while waiting:
        pid = waiting.pop()
        waiting += children.get(pid, [])
        try:
            lines = (Path("/proc") / str(pid) / "smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 2**20


def rates(run: Run) -> dict[str, Any]:
    return {row["label"]: row for row in hits(run) or []}


def best_medians(run: Run, top: int = 30) -> dict[str, float]:
    """Median T of each label's best patches."""
    patches = run.table("patches").to_pandas()
    best = patches[(patches["kind"] == "top") & (patches["rank"] < top)]
    return best.groupby("label")["typicality"].median().to_dict()


@pytest.fixture(scope="module")
def toytown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str, float, float]:
    return mine(tmp_path_factory.mktemp("toytown") / "run")


@pytest.mark.long
def test_toytown_is_mined_right(toytown: tuple[Run, str, float, float]) -> None:
    run, _, _, _ = toytown
    found, medians = rates(run), best_medians(run)
    print(json.dumps({"hits": found, "medians": medians}, indent=1))
    assert len(found) == 6
    assert all(row["top"][1] == 30 for row in found.values())
    assert all(row["chance"] < 0.15 for row in found.values())
    # The aim is 0.95 for each label, which this seed reaches (benchmarks/README.md); another processor trains another
    # model.
    shares = [on / of for on, of in (row["top"] for row in found.values())]
    assert np.mean(shares) >= 0.95
    assert min(shares) >= 0.9
    located = run.table("localisation").to_pandas()
    precision = located.groupby("label")[["patch_average_precision", "prevalence"]].mean()
    print(precision)
    assert precision["patch_average_precision"].mean() >= 0.5  # 0.68 was measured, and 0.18 without finetuning
    assert (precision["patch_average_precision"] >= 5 * precision["prevalence"]).all()
    assert medians["Greyfield"] <= 0.5 * min(value for label, value in medians.items() if label != "Greyfield")


@pytest.mark.long
def test_toytown_is_quick_and_small(toytown: tuple[Run, str, float, float]) -> None:
    _, messages, seconds, gib = toytown
    print(f"{seconds:.0f} s, {gib:.1f} GiB")
    assert gib <= 8
    assert seconds <= 1800  # the aim is 240 on two quiet cores; slower machines took three times as long
    assert "WARNING" not in messages
    assert "ray::" not in messages


@pytest.mark.long
def test_the_model_opens_in_diffusers(toytown: tuple[Run, str, float, float]) -> None:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(toytown[0].path("model"))
    pipe.set_progress_bar_config(disable=True)
    image = pipe("An image of Ashford.", num_inference_steps=4, height=128, width=128, output_type="np").images[0]
    assert image.shape == (128, 128, 3)
    losses = [json.loads(line)["loss"] for line in toytown[0].read("model/metrics.jsonl").splitlines()]
    assert np.isfinite(losses).all()
    assert len(toytown[0].table("samples")) == 14


@pytest.mark.release
def test_scenes_by_another_hand(tmp_path: Path) -> None:
    (tmp_path / "scenes").mkdir()
    otherhand.draw(tmp_path / "scenes", 120)
    run, _, _, _ = mine(
        tmp_path / "run", "--dataset.layout=folder", f"--dataset.source={tmp_path / 'scenes'}",
        f"--dataset.boxes={tmp_path / 'scenes' / 'boxes.csv'}",
    )  # fmt: skip
    found = rates(run)
    print(json.dumps({"hits": found, "medians": best_medians(run)}, indent=1))
    assert len(found) == 5
    # The aim is 0.90 for each label: benchmarks/README.md has the measured figures.
    assert np.mean([on / of for on, of in (row["top"] for row in found.values())]) >= 0.85


@pytest.mark.release
def test_facades(real_data: Path, tmp_path: Path) -> None:
    run, _, _, _ = mine(
        tmp_path / "run", "--dataset.layout=folder", f"--dataset.source={real_data / 'facades'}",
        f"--dataset.boxes={real_data / 'facades' / 'boxes.csv'}", "--dataset.limit_per_label=20",
        *ONLY_THROUGH,
    )  # fmt: skip
    assert run.table("failures/latents").num_rows == 0
    assert len(run.table("latents")) == 40
    assert {(row["h"], row["w"]) for row in run.table("latents", ["h", "w"]).to_pylist()} == {(16, 28), (28, 16)}
    assert set(rates(run)) == {"arch"}
    assert run.exists("report/index.html")


@pytest.mark.release
def test_ahe64(real_data: Path, tmp_path: Path) -> None:
    run, _, _, _ = mine(
        tmp_path / "run", "--dataset.layout=folder", f"--dataset.source={real_data / 'ahe64'}",
        "--dataset.limit_per_label=15", "--dataset.image.short_side=64", "--patches.size=24",
        *ONLY_THROUGH,
    )  # fmt: skip
    assert len(set(run.table("clusters")["label"].to_pylist())) == 10
    print(json.dumps(best_medians(run), indent=1))
    assert run.exists("report/index.html")

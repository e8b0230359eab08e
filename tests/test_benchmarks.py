"""The benchmark that runs where nobody can try it first: every measurement works, on a small model."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

GPU = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def test_every_measurement_of_the_gpu_benchmark_works(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    done = subprocess.run([sys.executable, GPU, "--tiny", f"--out={out}"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    rows = found["rows"]
    groups = {"scoring", "official", "dift", "vae", "precision", "finetune", "procedure"}
    assert {row["group"] for row in rows} >= groups
    assert all(found["ratios"][name] > 0 for name in ("end_to_end", "finetuning"))
    assert [row["note"] for row in rows if "note" in row] == []


def test_headline_ratios_are_of_what_a_run_can_do() -> None:
    """Ways that no setting chooses are named apart, where they are faster."""
    spec = importlib.util.spec_from_file_location("gpu", GPU)
    assert spec is not None
    assert spec.loader is not None
    gpu = importlib.util.module_from_spec(spec)
    sys.modules["gpu"] = gpu
    spec.loader.exec_module(gpu)
    speeds = [
        ("vae", "encoder, batch 16", 10), ("dift", "batch 64", 10), ("official", "one image, 10 draws x 2", 1),
        ("official", "features of one patch", 5), ("scoring", "eager, batch 64", 50),
        ("scoring", "channels_last, batch 64", 4), ("scoring", "channels_last, cuDNN by trial, batch 64", 60),
        ("compile", "default, batch 64", 5), ("compile", "max-autotune-no-cudagraphs, batch 64", 80),
        ("procedure", "batch 32", 1), ("finetune", "contiguous_format, batch 32", 30),
        ("finetune", "channels_last, batch 32", 2), ("finetune", "channels_last, compiled, batch 32", 3),
    ]  # fmt: skip
    rows = [{"group": group, "name": name, "images_per_s": speed} for group, name, speed in speeds]
    rows.append({"group": "compile", "name": "default, batch 128", "note": "out of memory"})
    found = gpu.ratios(rows)
    assert found["end_to_end"] == (1 / 10 + 1 + 1 / 5) / (1 / 10 + 1 / 5 + 1 / 10)
    assert found["finetuning"] == 3
    assert gpu.faster_ways(rows) == [
        "compile, max-autotune-no-cudagraphs, batch 64: 16.00 times the images/s, but no setting chooses it",
        "finetune, contiguous_format, batch 32: 10.00 times the images/s, but no setting chooses it",
    ]
    assert gpu.faster_ways([row for row in rows if "channels_last, batch" in row["name"]]) == []

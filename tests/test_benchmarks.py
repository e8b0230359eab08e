"""The benchmark that runs where nobody can try it first: every measurement works, on a small model."""

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

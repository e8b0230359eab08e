"""A run that was cut off: the same command makes what is missing, and leaves what is there."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from diffmine.cli import main
from diffmine.configfile import load
from diffmine.run import MARKER, Run, index_name, part_name
from diffmine.stages import shards
from diffmine.stages.latents import latents
from diffmine.stages.session import Context

LOST = {"latents": 2, "typicality": 1, "patches": 0, "features": 2}  # table -> part
KEPT = ("manifest", "latents", "typicality", "patches", "features", "clusters", "members", "localisation", "failures")


def parts(run: Run) -> dict[str, tuple[int, bytes]]:
    """File -> time of its last change, and its bytes; markers left out."""
    files = [p for table in KEPT for p in (Path(run.root) / table).rglob("*") if p.is_file() and p.name != MARKER]
    return {p.relative_to(run.root).as_posix(): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


def test_lost_parts_are_made_again_byte_for_byte_and_others_left_alone(
    first: Run, mine: Callable[..., tuple[int, Run]], images: Path, tmp_path: Path
) -> None:
    run = Run(str(tmp_path / "run"))
    shutil.copytree(first.root, run.root)  # keeps times
    before, lost = parts(run), {part_name(table, part) for table, part in LOST.items()}
    markers = {table: run.committed(table) or {} for table in (*LOST, "clusters")}
    for name in [*lost, *(f"{table}/{MARKER}" for table in (*LOST, "clusters", "report"))]:
        run.remove(name)
    assert set(parts(run)) == set(before) - lost
    code, _ = mine(
        tmp_path, output=run.root, dataset__source=images, dataset__boxes=images / "boxes.csv",
        typicality__batch_size=16, features__batch_size=16,
    )  # fmt: skip
    assert code == 0
    after = parts(run)
    assert {name: data for name, (_, data) in after.items()} == {name: data for name, (_, data) in before.items()}
    assert {name for name in after if after[name][0] != before[name][0]} == lost
    for table, marker in markers.items():
        again = run.committed(table) or {}
        of_its_time = dict.fromkeys(("finished", "wall_s", "newly_done"))
        assert again | of_its_time == marker | of_its_time, table


def test_many_finished_shards_are_read_again_by_tasks(
    unscored: Callable[..., Context], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their files, failures and index are what the driver finds by itself."""
    context = unscored()
    monkeypatch.setattr(shards, "_FEW", 1)
    monkeypatch.setattr(shards, "_TOGETHER", 2)
    marker, index = context.run.committed("latents") or {}, context.run.read(index_name("latents"))
    context.run.remove(index_name("latents"))
    context.run.remove("failures")
    result = latents(context)
    assert "latents: 3 shards are there; they are read again" in capsys.readouterr().err
    assert result.files == marker["files"]
    assert result.marker | {"rows": 21, "failures": 1, "reasons": {"truncated": 1}} == result.marker
    assert context.run.read(index_name("latents")) == index
    assert context.run.failures()["image_id"].to_pylist() == ["Ashford/zz.png"]


def test_after_a_rerun_the_folder_holds_the_config_that_made_it(ray_session: None, first: Run, tmp_path: Path) -> None:
    run = Run(str(tmp_path / "run"))
    shutil.copytree(first.root, run.root)
    flags = [f"--output={run.root}", "--clusters.k=1", "--report.enabled=false"]
    assert main(["mine", run.path("run.yaml"), *flags, "--rerun"]) == 0
    assert set(run.table("clusters")["cluster"].to_pylist()) == {0}
    assert load(run.path("run.yaml")).clusters.k == 1
    assert main(["mine", run.path("run.yaml")]) == 0

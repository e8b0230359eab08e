"""What is fresh and what must run."""

import json
from pathlib import Path

import pytest

from diffmine import pipeline
from diffmine.config import Config
from diffmine.errors import StaleRunError
from diffmine.pipeline import STAGES, check_fresh, fingerprints, remove_stale, settings_of, wanted
from diffmine.run import Run


def config(output: Path, **changes: object) -> Config:
    tree: dict = {"output": str(output), "dataset": {"source": "/data", "layout": "folder"}}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            tree.setdefault(section, {})[name] = value
        else:
            tree[section] = value
    return Config.model_validate(tree)


def changed(tmp_path: Path, **changes: object) -> set[str]:
    before, after = fingerprints(config(tmp_path)), fingerprints(config(tmp_path, **changes))
    return {name for name in before if before[name] != after[name]}


def test_a_change_touches_its_stage_and_the_later_ones_only(tmp_path: Path) -> None:
    everything = {s.name for s in STAGES}
    assert changed(tmp_path, seed=1) == everything
    assert changed(tmp_path, prompt__null_prompt="x") == everything - {"manifest", "latents"}
    assert changed(tmp_path, dataset__finetune_split=0.1) == everything - {"manifest", "latents"}
    assert changed(tmp_path, finetune__posterior="sample") == everything - {"manifest"}
    assert changed(tmp_path, typicality__draws=50) == {"typicality", "patches", "features", "clusters", "report"}
    assert changed(tmp_path, typicality__labels="all") == changed(tmp_path, typicality__draws=50)
    assert changed(tmp_path, patches__fresh_draws=8) == {"patches", "features", "clusters", "report"}
    assert changed(tmp_path, patches__per_label=5) == {"patches", "features", "clusters", "report"}
    assert changed(tmp_path, clusters__k=5) == {"clusters", "report"}


def test_settings_of_speed_touch_nothing(tmp_path: Path) -> None:
    assert changed(tmp_path / "elsewhere") == set()
    for key, value in {
        "compute__workers": 3, "compute__shard_images": 7, "typicality__batch_size": 3, "features__batch_size": 3,
        "typicality__compile": True, "finetune__workers": 2, "finetune__checkpoint_every": 7,
        "finetune__micro_batch": 3, "finetune__gradient_checkpointing": True, "finetune__sharding": "full",
        "finetune__compile": True, "finetune__trackers": ["wandb"],
        "compute__stall_seconds": 5, "compute__device": "cpu", "compute__open_cluster": True,
    }.items():  # fmt: skip
        assert changed(tmp_path, **{key: value}) == set(), key


def test_every_setting_is_read_by_a_stage_or_is_free(tmp_path: Path) -> None:
    read = {key for stage in STAGES for key in settings_of(stage, config(tmp_path))}
    tree = config(tmp_path).model_dump(mode="json")
    unread = {
        f"{section}.{key}" for section, body in tree.items() if isinstance(body, dict) for key in body
        if not any(r.startswith(f"{section}.{key}") for r in read)
    }  # fmt: skip
    assert unread == {
        "compute.workers", "compute.device", "compute.open_cluster", "compute.shard_images", "compute.stall_seconds",
        "finetune.workers", "finetune.checkpoint_every", "finetune.micro_batch", "finetune.gradient_checkpointing",
        "finetune.sharding", "finetune.compile", "finetune.trackers", "typicality.batch_size", "typicality.compile",
        "features.batch_size",
    }  # fmt: skip


def test_settings_of_a_finetuning_that_is_off_do_not_count(tmp_path: Path) -> None:
    a = fingerprints(config(tmp_path, finetune={"enabled": False}))
    b = fingerprints(config(tmp_path, finetune={"enabled": False, "steps": 5}, dataset__finetune_split=0.1))
    assert a == b
    assert "finetune" not in {s.name for s in wanted(config(tmp_path, finetune={"enabled": False}))}


def committed(run: Run, c: Config, names: set[str]) -> None:
    for stage in STAGES:
        if stage.name in names:
            digest = run.put(f"{stage.folders[0]}/part-00000.parquet", stage.name.encode())
            marker = {"fingerprint": fingerprints(c)[stage.name], "settings": settings_of(stage, c)}
            run.commit(stage.folders[0], marker, {f"{stage.folders[0]}/part-00000.parquet": digest})


def test_another_config_is_refused_with_the_changed_keys(tmp_path: Path) -> None:
    run, before = Run(str(tmp_path)), config(tmp_path)
    committed(run, before, {"manifest", "latents", "typicality", "patches"})
    check_fresh(run, before)
    with pytest.raises(StaleRunError) as caught:
        check_fresh(run, config(tmp_path, typicality__draws=8, patches__size=48))
    message = str(caught.value)
    assert "typicality.draws: was 40, is 8" in message
    assert "patches.size: was 64, is 48" in message
    assert "stages touched: typicality, patches" in message


def test_tables_of_another_version_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, same = Run(str(tmp_path)), config(tmp_path)
    committed(run, same, {"manifest", "latents"})
    monkeypatch.setattr(pipeline, "SCHEMA_VERSION", pipeline.SCHEMA_VERSION - 1)
    with pytest.raises(StaleRunError, match="its tables are of another version") as caught:
        check_fresh(run, same)
    assert "stages touched: manifest, latents\n" in str(caught.value)


def test_rerun_removes_what_is_touched_and_keeps_the_rest(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    committed(run, config(tmp_path), {"manifest", "latents", "typicality", "patches"})
    for name in ("failures/typicality/part-00000.parquet", "typicality/pilot.json", "rounds/0/part-00000.parquet"):
        run.put(name, b"x")
    after = config(tmp_path, typicality__draws=8)
    assert remove_stale(run, after) == ["typicality", "patches"]
    assert run.committed("latents") is not None
    assert not run.exists("typicality")
    assert not run.exists("failures/typicality")
    assert not run.exists("rounds")
    check_fresh(run, after)


def test_markers_go_before_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If removal dies half-way, no marker is left over missing files."""
    run = Run(str(tmp_path))
    committed(run, config(tmp_path), {"typicality", "patches"})
    removed: list[str] = []
    monkeypatch.setattr(Run, "remove", lambda self, name: removed.append(name))
    remove_stale(run, config(tmp_path, typicality__draws=8))
    markers = [i for i, name in enumerate(removed) if name.endswith("_commit.json")]
    assert markers == list(range(len(markers)))
    assert len(markers) == 2


def test_run_json_and_markers_are_json(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    committed(run, config(tmp_path), {"manifest"})
    assert json.loads(run.read("manifest/_commit.json"))["settings"]["dataset.source"] == "/data"

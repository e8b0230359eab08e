"""What is fresh and what must run."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from diffmine import pipeline
from diffmine.config import Config
from diffmine.errors import InputError, StaleRunError, StoreError
from diffmine.pipeline import STAGES, fingerprints, made_with, refuse, remove, settings_of, stale_stages, wanted
from diffmine.progress import Progress
from diffmine.run import Run, rows_to_table
from diffmine.stages.manifest import manifest
from diffmine.stages.session import Context, Result


def config(output: Path, **changes: object) -> Config:
    tree: dict = {"output": str(output), "dataset": {"source": "/data", "layout": "folder"}}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            tree.setdefault(section, {})[name] = value
        else:
            tree[section] = value
    return Config.model_validate(tree)


def check_fresh(run: Run, c: Config) -> None:
    refuse(run, c, stale_stages(run, c))


def remove_stale(run: Run, c: Config) -> list[str]:
    stale = stale_stages(run, c)
    remove(run, stale)
    return [stage.name for stage in stale]


def changed(tmp_path: Path, **changes: object) -> set[str]:
    before, after = fingerprints(config(tmp_path)), fingerprints(config(tmp_path, **changes))
    return {name for name in before if before[name] != after[name]}


def test_a_change_touches_its_stage_and_the_later_ones_only(tmp_path: Path) -> None:
    everything = {s.name for s in STAGES}
    assert changed(tmp_path, seed=1) == everything
    assert changed(tmp_path, prompt__null_prompt="x") == everything - {"manifest", "latents"}
    assert changed(tmp_path, dataset__finetune_split=0.1) == everything - {"manifest", "latents"}
    assert changed(tmp_path, finetune__posterior="sample") == everything - {"manifest"}
    later = {"patches", "features", "clusters", "localisation", "report"}
    assert changed(tmp_path, typicality__draws=50) == {"typicality", *later}
    assert changed(tmp_path, typicality__labels="all") == changed(tmp_path, typicality__draws=50)
    assert changed(tmp_path, patches__fresh_draws=8) == {"patches", "features", "clusters", "report"}
    assert changed(tmp_path, patches__per_label=5) == {"patches", "features", "clusters", "report"}
    assert changed(tmp_path, dataset__boxes="b.csv") == {"manifest", "localisation", "report"}
    assert changed(tmp_path, clusters__k=5) == {"clusters", "report"}
    race = {"typicality__racing": True, "patches__per_label": 5}
    assert changed(tmp_path, **race) == changed(tmp_path, typicality__draws=50)
    before, after = (fingerprints(config(tmp_path, **race | {"patches__per_label": n})) for n in (5, 6))
    assert before["typicality"] != after["typicality"]  # who leaves a race depends on how many are wanted


def test_groups_matter_to_training_where_images_are_held_out(tmp_path: Path) -> None:
    touched = {}
    for split in (0, 0.1):
        table = {"dataset__layout": "table", "dataset__finetune_split": split}
        before, after = (fingerprints(config(tmp_path, **table, dataset__group_column=name)) for name in (None, "who"))
        touched[split] = {name for name in before if before[name] != after[name]}
    assert touched[0] == {"report"}
    assert "finetune" in touched[0.1]


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
            marker = made_with(stage.name, c)
            run.begin(stage.name, marker)
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
    with pytest.raises(StaleRunError, match="Ein Gemälde"):
        check_fresh(run, config(tmp_path, prompt__template="Ein Gemälde, {label}."))


def test_tables_of_another_version_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, same = Run(str(tmp_path)), config(tmp_path)
    committed(run, same, {"manifest", "latents"})
    monkeypatch.setattr(pipeline, "SCHEMA_VERSION", pipeline.SCHEMA_VERSION - 1)
    with pytest.raises(StaleRunError, match="its tables are of another version") as caught:
        check_fresh(run, same)
    assert "stages touched: manifest, latents\n" in str(caught.value)


def test_a_stage_of_another_version_is_stale_with_what_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, same = Run(str(tmp_path)), config(tmp_path)
    committed(run, same, {"manifest", "latents", "typicality"})
    check_fresh(run, same)
    newer = [replace(s, version=s.version + 1) if s.name == "latents" else s for s in pipeline.STAGES]
    monkeypatch.setattr(pipeline, "STAGES", tuple(newer))
    with pytest.raises(StaleRunError, match="its tables are of another version") as caught:
        check_fresh(run, same)
    assert "stages touched: latents, typicality\n" in str(caught.value)


def test_rerun_removes_what_is_touched_and_keeps_the_rest(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    committed(run, config(tmp_path), {"manifest", "latents", "typicality", "patches"})
    for name in ("failures/typicality/part-00000.parquet", "typicality/_pilot.json", "rounds/0/part-00000.parquet"):
        run.put(name, b"x")
    after = config(tmp_path, typicality__draws=8)
    assert remove_stale(run, after) == ["typicality", "patches"]
    assert run.committed("latents") is not None
    assert not run.exists("typicality")
    assert not run.exists("failures/typicality")
    assert not run.exists("rounds")
    check_fresh(run, after)


def begun(run: Run, c: Config, stage: str) -> None:
    """A stage that was cut off after its first part."""
    run.begin(stage, made_with(stage, c))
    run.put(f"{stage}/part-00000.parquet", b"x")


def test_an_unfinished_stage_goes_on_with_its_own_settings_only(tmp_path: Path) -> None:
    run, before, after = Run(str(tmp_path)), config(tmp_path), config(tmp_path, typicality__draws=8)
    committed(run, before, {"manifest", "latents"})
    begun(run, before, "typicality")
    check_fresh(run, before)
    assert remove_stale(run, before) == []  # --rerun, said again after a crash, keeps what was done since
    assert run.exists("typicality/part-00000.parquet")
    with pytest.raises(StaleRunError, match=r"typicality\.draws: was 40, is 8\nstages touched: typicality\n"):
        check_fresh(run, after)
    assert remove_stale(run, after) == ["typicality"]
    assert not run.exists("typicality")
    check_fresh(run, after)


def test_a_removal_that_was_cut_off_is_known_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, before, after = Run(str(tmp_path)), config(tmp_path), config(tmp_path, typicality__draws=8)
    committed(run, before, {"manifest", "latents", "typicality"})
    run.put("rounds/0/part-00000.parquet", b"x")
    remove = Run.remove

    def dies(self: Run, name: str) -> None:
        if name == "rounds":
            raise KeyboardInterrupt
        remove(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "remove", dies)
        with pytest.raises(KeyboardInterrupt):
            remove_stale(run, after)
    with pytest.raises(StaleRunError):
        check_fresh(run, after)
    assert remove_stale(run, after) == ["typicality"]


def test_what_an_older_version_left_unfinished_is_stale(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    run.put("run.json", b"{}")
    run.put("typicality/part-00000.parquet", b"x")
    with pytest.raises(StaleRunError, match="its tables are of another version"):
        check_fresh(run, config(tmp_path))
    assert remove_stale(run, config(tmp_path)) == ["typicality"]


def test_a_stage_that_is_not_asked_for_may_stay_unfinished(tmp_path: Path) -> None:
    run, before = Run(str(tmp_path)), config(tmp_path)
    begun(run, before, "report")
    check_fresh(run, config(tmp_path, report__enabled=False))
    with pytest.raises(StaleRunError):
        check_fresh(run, config(tmp_path, report__clusters_per_label=1))


def test_a_folder_of_unknown_origin_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("dear")
    for refused in (check_fresh, remove_stale):
        with pytest.raises(InputError, match="model is there, and no run made it; choose another output"):
            refused(Run(str(tmp_path)), config(tmp_path))
    assert (tmp_path / "model" / "mine.txt").read_text() == "dear"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__text_encoder": "/no/such"}, "no such folder"),
        ({"dataset__image": {"short_side": 8}, "patches__size": 8}, "dataset.image.short_side is 8"),
        ({"prompt__template": "word " * 80 + "{label}"}, "tokens, the text encoder reads 77"),
        ({"typicality__labels": ["Q"]}, "the dataset has no label 'Q'"),
        ({"finetune": {"epochs": 1, "batch_size": 9, "decay_steps": 5}}, "finetune.decay_steps"),
        ({"dataset": {"source": "/no/such", "layout": "folder"}}, "/no/such"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_removed(
    tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    run, before = Run(str(tmp_path)), config(tmp_path, model__base="tiny")
    committed(run, before, {"latents", "typicality"})
    for label in ("a", "b"):
        rows = [{"image_id": f"{label}{i}", "uri": "x", "labels": [label], "boxes": []} for i in range(9)]
        digest = run.write_part("manifest", "ab".index(label), rows_to_table("manifest", rows))
    run.begin("manifest", made_with("manifest", before))
    run.commit("manifest", {**made_with("manifest", before), "rows": 18}, {"manifest/part-00001.parquet": digest})
    before_it = {name: run.digest(name) for name in run.files("")}
    after = config(tmp_path, model__base="tiny", **changes)
    with pytest.raises(InputError, match=said):
        pipeline.mine(after, rerun=True)
    assert {name: run.digest(name) for name in run.files("")} == before_it


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


def test_a_manifest_that_was_cut_off_is_made_anew(tmp_path: Path) -> None:
    """It was begun with more images and other sizes of shards, or what it drew was refused."""
    run, c = Run(str(tmp_path / "run")), config(tmp_path / "run", model__base="tiny")
    for label in ("a", "b"):
        (tmp_path / "data" / label).mkdir(parents=True)
        (tmp_path / "data" / label / "1.png").write_bytes(b"x")
    c = c.model_copy(update={"dataset": c.dataset.model_copy(update={"source": str(tmp_path / "data")})})
    run.begin("manifest", made_with("manifest", c))
    for part in (0, 1):
        run.put(f"manifest/part-{part:05d}.parquet", b"of more images")
    assert stale_stages(run, c) == []
    pipeline._check_images(run, c, list(wanted(c)), [])
    result = manifest(Context(run, c, Progress()))
    assert run.files("manifest") == [*result.files] == ["manifest/part-00000.parquet"]
    assert run.table("manifest")["labels"].to_pylist() == [["a"], ["b"]]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of stages as `mine` comes to them; their work is not done."""
    found: list[str] = []
    monkeypatch.setattr(pipeline, "_run_stage", lambda _, stage: found.append(stage.name))
    monkeypatch.setattr(pipeline, "_say_what_was_found", lambda _: None)
    monkeypatch.setattr("diffmine.stages.session.connected", lambda _: nullcontext())
    return found


@pytest.fixture
def mined(tmp_path: Path) -> Config:
    """Of a finished run of two images in shards of one, a/1.png and b/1.png."""
    for name in ("a/1.png", "b/1.png"):
        image = tmp_path / "data" / name
        image.parent.mkdir(parents=True)
        image.write_bytes(b"x")
    dataset = {"source": str(tmp_path / "data"), "layout": "folder"}
    c = config(tmp_path / "run", model__base="tiny", dataset=dataset, finetune__enabled=False, compute__shard_images=1)
    run = Run(c.output)
    result = manifest(Context(run, c, Progress()))
    run.commit("manifest", {**made_with("manifest", c), **result.marker}, result.files)
    committed(run, c, {stage.name for stage in wanted(c)} - {"manifest"})
    return c


def with_boxes(c: Config, boxes: Path | None) -> Config:
    dataset = c.dataset.model_copy(update={"boxes": None if boxes is None else str(boxes)})
    return c.model_copy(update={"dataset": dataset, "compute": c.compute.model_copy(update={"shard_images": 8})})


def test_a_rerun_sees_that_the_dataset_has_changed(tmp_path: Path, mined: Config, ran: list[str]) -> None:
    """Without it the run keeps its images; a look at a large dataset takes its time."""
    image = tmp_path / "data" / "a" / "1.png"
    pipeline.mine(mined, rerun=True)
    assert ran == []
    image.rename(image.with_name("2.png"))
    pipeline.mine(mined)
    assert ran == []
    pipeline.mine(mined, rerun=True)
    assert ran == [stage.name for stage in wanted(mined)]
    assert not Run(mined.output).exists("manifest")


def test_boxes_that_come_later(tmp_path: Path, mined: Config, ran: list[str]) -> None:
    """They cost what looks at boxes, not what was mined; and nothing is lost when they cannot be read."""
    run, boxes = Run(mined.output), tmp_path / "boxes.csv"
    c = with_boxes(mined, boxes)
    with pytest.raises(InputError, match="boxes"):
        pipeline.mine(c, rerun=True)
    for written, width in (("a/1.png,a,0,0,4,4", 4), ("a/1.png,a,0,0,6,4", 6)):
        boxes.write_text(f"image,label,x,y,w,h\n{written}\n")
        if width == 4:
            with pytest.raises(StaleRunError, match="stages touched: manifest, report\n"):
                pipeline.mine(c)
        pipeline.mine(c, rerun=True)
        assert ran == ["localisation", "report"]
        assert run.table("manifest")["boxes"].to_pylist()[0][0]["width"] == width
        assert [run.pieces("manifest", 0, lambda file: file.num_row_groups), run.parts("manifest")] == [2, [0]]
        marker = run.committed("manifest")
        assert marker is not None
        assert (marker["files"], marker["shard_images"]) == (run.digests(["manifest"]), 1)
        assert stale_stages(run, c) == []
        ran.clear()
        committed(run, c, {"localisation", "report"})
    pipeline.mine(with_boxes(mined, None), rerun=True)
    assert ran == ["report"]
    assert not run.exists("localisation")
    assert run.table("manifest")["boxes"].to_pylist() == [None, None]


def test_boxes_that_come_with_other_images(tmp_path: Path, mined: Config, ran: list[str]) -> None:
    (tmp_path / "boxes.csv").write_text("image,label,x,y,w,h\na/1.png,a,0,0,4,4\n")
    (tmp_path / "data" / "b" / "2.png").write_bytes(b"x")
    c = with_boxes(mined, tmp_path / "boxes.csv")
    pipeline.mine(c, rerun=True)
    assert ran == [stage.name for stage in wanted(c)]


def test_a_report_is_not_made_without_what_it_shows(tmp_path: Path) -> None:
    c = config(tmp_path, dataset={"source": "toytown", "layout": "toytown"})
    for there, missing in (([], "clusters"), (["clusters"], "localisation")):
        committed(Run(c.output), c, {*there})
        with pytest.raises(InputError, match=f"has no {missing} yet"):
            pipeline.remake_report(Run(c.output), c)


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("draws", [40, 100])
def test_another_job_on_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool, draws: int) -> None:
    """It was started later, and reached typicality while this one finetuned."""
    ours, theirs = (config(tmp_path, model__base="tiny", typicality__draws=n) for n in (40, draws))
    ran: list[str] = []

    def run_stage(context: Context, stage: pipeline.Stage) -> None:
        ran.append(stage.name)
        committed(context.run, ours, {stage.name})
        if stage.name == "finetune":
            context.run.begin("typicality", made_with("typicality", theirs))
            context.run.put("typicality/part-00000.parquet", b"typicality")
            if finished:
                committed(context.run, theirs, {"typicality"})

    monkeypatch.setattr(pipeline, "_run_stage", run_stage)
    monkeypatch.setattr(pipeline, "_say_what_was_found", lambda _: None)
    monkeypatch.setattr("diffmine.stages.session.connected", lambda _: nullcontext())
    monkeypatch.setattr("diffmine.stages.room.require_training", lambda _: None)
    if draws == 100:
        with pytest.raises(StaleRunError, match="another job has begun typicality with other settings"):
            pipeline.mine(ours)
        assert ran == ["manifest", "latents", "finetune"]
    else:
        pipeline.mine(ours)
        assert ("typicality" in ran) != finished
        assert ran[-1] == "report"


def test_checkpoints_go_with_the_commit_and_not_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(str(tmp_path))
    run.put("checkpoints/step-00000009/done.json", b"")
    context = Context(run, config(tmp_path), Progress())
    [stage] = [stage for stage in STAGES if stage.name == "finetune"]
    monkeypatch.setattr("diffmine.stages.finetune.finetune", lambda _: Result({}))
    with monkeypatch.context() as patch:
        patch.setattr(Run, "commit", lambda *_: (_ for _ in ()).throw(StoreError("no answer")))
        with pytest.raises(StoreError):
            pipeline._run_stage(context, stage)
    assert run.exists("checkpoints/step-00000009/done.json")
    monkeypatch.setattr("diffmine.stages.metrics.count", lambda *_: None)
    pipeline._run_stage(context, stage)
    assert not run.exists("checkpoints")
    run.put("checkpoints/step-00000009/done.json", b"")  # of a driver that died between the two
    monkeypatch.setattr(pipeline, "_run_stage", lambda *_: None)
    monkeypatch.setattr(pipeline, "_say_what_was_found", lambda *_: None)
    pipeline.mine(context.config)
    assert not run.exists("checkpoints")


def test_room_for_training_is_looked_for_before_the_first_stage_on_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def refused(_: Config) -> None:
        raise InputError("no room")

    monkeypatch.setattr(pipeline, "_run_stage", lambda _, stage: ran.append(stage.name))
    monkeypatch.setattr(pipeline, "_say_what_was_found", lambda _: None)
    monkeypatch.setattr("diffmine.stages.session.connected", lambda _: nullcontext())
    monkeypatch.setattr("diffmine.stages.room.require_training", refused)
    with pytest.raises(InputError, match="no room"):
        pipeline.mine(config(tmp_path, model__base="tiny"))
    assert ran == ["manifest"]
    pipeline.mine(config(tmp_path, model__base="tiny", finetune__enabled=False))
    assert ran[1:] == [stage.name for stage in STAGES if stage.name not in ("finetune", "localisation")]

"""A training worker without Ray: killed and continued, shared, validated, ended early, exported."""

import hashlib
import io
import json
import os
import random
import re
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load as load_tensors
from safetensors.torch import save
from trainings import LABELS, losses, prepared, run_worker, run_workers, weights

from diffmine.diffusion.training import Training
from diffmine.diffusion.validation import Losses
from diffmine.errors import InputError, NonFiniteError, StageError, StoreError
from diffmine.run import TINY, Run
from diffmine.stages import trainer
from diffmine.stages.checkpoints import Checkpoints, History

KILLED = -9


def trained(folder: Path, **changes: object) -> Run:
    config = prepared(folder, **changes)
    trainer.train(Run(config.output), config, 1, lambda **news: None)
    return Run(config.output)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return trained(tmp_path_factory.mktemp("undisturbed") / "run")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_a_pass_is_tried_before_the_first_step_and_changes_nothing(
    undisturbed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, that is; here a worker is told that it has one."""
    tried, fit = [], Training.fit

    def noted(self: Training, shape: tuple[int, int]) -> list[str]:
        tried.append(shape)
        return fit(self, shape)

    monkeypatch.setattr(Training, "fit", noted)
    monkeypatch.setattr(trainer._Worker, "_must_fit", lambda self: True)
    run = trained(tmp_path / "run")
    assert tried == [(8, 8)]
    assert losses(run) == losses(undisturbed)
    assert weights(run) == weights(undisturbed)


# ------------------------------------------------------------------------------------------------ killed and continued


@pytest.mark.parametrize("series", range(min(5, int(os.environ.get("DIFFMINE_FAULT_SEEDS", "1")))))
def test_a_killed_training_ends_with_the_weights_of_an_undisturbed_one(
    undisturbed: Run, tmp_path: Path, series: int
) -> None:
    """Four kills each; in five series 20 of random steps, one of them for each step of the training at the least."""
    order = [step for seed in range(2) for step in random.Random(seed).sample(range(12), 12)]
    config = prepared(tmp_path / "run")
    for kill_at in sorted(order[4 * series : 4 * series + 4]):
        assert run_worker(config, kill_at) == KILLED
    assert run_worker(config) == 0
    assert losses(Run(config.output)) == losses(undisturbed)
    assert weights(Run(config.output)) == weights(undisturbed)


def test_a_training_that_forgot_its_moments_would_be_seen(
    undisturbed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above: what it compares differs when a checkpoint is not taken over whole."""
    config = prepared(tmp_path / "run")
    assert run_worker(config, 7) == KILLED
    restore = Training.restore

    def forgetful(self: Training, tensors: dict[str, torch.Tensor], step: int) -> None:
        lost = {name: torch.zeros_like(t) if name.startswith("first/") else t for name, t in tensors.items()}
        restore(self, lost, step)

    monkeypatch.setattr(Training, "restore", forgetful)
    trainer.train(Run(config.output), config, 1, lambda **news: None)
    assert weights(Run(config.output)) != weights(undisturbed)


def test_damaged_and_foreign_checkpoints_are_passed_over(undisturbed: Run, tmp_path: Path) -> None:
    config, said = prepared(tmp_path / "run"), []
    run = Run(config.output)
    assert run_worker(config, 11) == KILLED
    names = sorted(run.names("checkpoints"), reverse=True)
    newest, older, *_ = (name for name in names if run.exists(f"checkpoints/{name}/done.json"))
    done = json.loads(run.read(f"checkpoints/{older}/done.json"))
    run.replace(f"checkpoints/{newest}/state.safetensors", b"half a file")
    another = save({"weight/conv_in.weight": torch.zeros(3)})
    run.replace("checkpoints/step-00000010/state.safetensors", another)
    foreign = {**done, "step": 10, "sha256": hashlib.sha256(another).hexdigest()}
    run.replace("checkpoints/step-00000010/done.json", json.dumps(foreign).encode())
    run.replace("checkpoints/step-00000011/state.safetensors", b"being written")  # no done.json: nothing to be said
    trainer.train(run, config, 1, lambda **news: said.append(news))
    assert [news["warning"] for news in said if "warning" in news] == [
        "finetune: passed over checkpoints/step-00000010, which is of another model, "
        f"checkpoints/{newest}, whose bytes have changed; begins at step {done['step']}"
    ]
    assert weights(run) == weights(undisturbed)


def test_missing_workers_are_said_and_their_share_is_done(undisturbed: Run, tmp_path: Path) -> None:
    config, said = prepared(tmp_path / "run"), []
    trainer.train(Run(config.output), config, 2, lambda **news: said.append(news))
    assert [news["warning"] for news in said if "warning" in news] == [
        "finetune: 1 of 2 workers train; more can join when nodes come"
    ]
    assert np.allclose(losses(Run(config.output)), losses(undisturbed), rtol=1e-5)


def test_a_checkpoint_is_written_while_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, run, replace = threading.Event(), Run(str(tmp_path)), Run.replace
    monkeypatch.setattr(Run, "replace", lambda self, name, data: go.wait(10) and replace(self, name, data))
    checkpoints, history = Checkpoints(run), History(3, [{"step": 2}])
    checkpoints.save({"weight/a": torch.zeros(2)}, {}, history)
    history.step, history.metrics = 4, []
    assert run.names("checkpoints") == []
    go.set()
    checkpoints.wait()
    done = json.loads(run.read("checkpoints/step-00000003/done.json"))
    assert (done["step"], done["metrics"]) == (3, [{"step": 2}])


def test_a_lost_checkpoint_ends_no_training_and_three_in_a_row_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, fails = Run.replace, [False, True, False, True, True, True]

    def write(self: Run, name: str, data: bytes | Path) -> None:
        if name.endswith("done.json") and fails.pop(0):
            raise StoreError("the store is busy")
        replace(self, name, data)

    monkeypatch.setattr(Run, "replace", write)
    checkpoints, said = Checkpoints(Run(str(tmp_path))), []
    for step in range(1, 7):
        checkpoints.save({"weight/a": torch.zeros(2)}, {}, History(step))
        if step == 4:  # the last two that are whole
            assert Run(str(tmp_path)).names("checkpoints")[:2] == ["step-00000001", "step-00000003"]
        if step < 6:
            said.append(checkpoints.wait())
    assert said == [None, "the store is busy", None, "the store is busy", "the store is busy"]
    with pytest.raises(StoreError, match="busy"):
        checkpoints.wait()


def test_a_state_is_copied_when_the_one_before_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two are never in memory at once, however slow the store is."""
    write, tensors, writing, copied = Checkpoints._write, Training.tensors, threading.Event(), []

    def slowly(self: Checkpoints, *what: Any) -> None:
        writing.set()
        time.sleep(0.2)
        write(self, *what)
        writing.clear()

    def noted(self: Training) -> dict[str, torch.Tensor]:
        copied.append(writing.is_set())
        return tensors(self)

    monkeypatch.setattr(Checkpoints, "_write", slowly)
    monkeypatch.setattr(Training, "tensors", noted)
    trained(tmp_path / "run", finetune__checkpoint_every=1, finetune__steps=5)
    assert copied == [False] * 4


@pytest.mark.parametrize(("seconds", "every"), [(0.01, 8), (1.5, 2), (9.0, 1)])
def test_notices_are_looked_for_every_few_seconds(monkeypatch: pytest.MonkeyPatch, seconds: float, every: int) -> None:
    """At steps that the first process chooses for all: another, whose clock runs five times as fast, looks with it."""
    clock, rate, looks, news = [0.0], 1, [], {"first": [], "other": []}
    monkeypatch.setattr(trainer.time, "monotonic", lambda: rate * clock[0])

    def look() -> str | None:
        looks.append(step)
        return "node 3 in 30 s" if step > 150 else None

    first = trainer.Notices(look, lambda own: own, 100)
    other = trainer.Notices(look, lambda own: first._every, 100)
    for step in range(101, 165):
        clock[0], rate = clock[0] + seconds, 1
        news["first"] += [step] if first.new(step) else []
        rate = 5
        news["other"] += [step] if other.new(step) else []
    assert looks[::2] == looks[1::2] == [101, *(s for s in range(102, 165) if s % every == 0)]
    assert news["first"] == news["other"] == [next(s for s in looks if s > 150)]


def test_a_checkpoint_that_cannot_be_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Run, name: str, data: object) -> None:
        raise StoreError(f"{name}: no space left")

    monkeypatch.setattr(Run, "replace", full)
    with pytest.raises(StoreError, match=r"state.safetensors: no space left"):
        trained(tmp_path / "run")


# ------------------------------------------------------------------------------------------------------------- shared


@pytest.mark.long
@pytest.mark.parametrize(("sharding", "micro_batch"), [("none", 1), ("full", 2)])
def test_workers_share_a_batch(undisturbed: Run, tmp_path: Path, sharding: str, micro_batch: int) -> None:
    """Two have the losses of one, whole or spread over them (FSDP); both go on from a checkpoint, then one alone."""
    config = prepared(tmp_path / "run", finetune__sharding=sharding, finetune__micro_batch=micro_batch)
    run = Run(config.output)
    assert run_workers(config, 2, free_port()) == 0
    assert np.allclose(losses(run), losses(undisturbed), rtol=1e-5)
    assert "step-00000009" in run.names("checkpoints")
    for world in (2, 1):
        run.remove("model")
        assert run_workers(config, world, free_port()) == 0
        assert np.allclose(losses(run), losses(undisturbed), rtol=1e-5)


@pytest.mark.long
def test_workers_with_spread_weights_train_on_after_a_validation(tmp_path: Path) -> None:
    """Validation puts averaged weights in the place of the trained ones for a while, gathered ones too (FSDP)."""
    wanted = {"dataset__finetune_split": 0.25, "finetune__validate_every": 2, "finetune__ema_decay": 0.9}
    alone = trained(tmp_path / "alone", **wanted)
    config = prepared(tmp_path / "run", finetune__sharding="full", finetune__micro_batch=2, **wanted)
    assert run_workers(config, 2, free_port()) == 0
    assert np.allclose(losses(Run(config.output)), losses(alone), rtol=1e-5)


def test_a_long_training_keeps_the_metrics_of_every_nth_step(
    undisturbed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints carry them; the last step's are always kept."""
    monkeypatch.setattr(trainer, "_METRICS", 5)
    run = trained(tmp_path / "run")
    assert losses(run) == [losses(undisturbed)[step] for step in (0, 3, 6, 9, 11)]
    assert weights(run) == weights(undisturbed)


def test_a_continued_training_goes_on_in_the_trackers_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B and MLflow give new names to what is started without one."""
    started: list[dict[str, Any]] = []

    def init_trackers(self: Any, project: str, config: Any = None, init_kwargs: Any = None) -> None:
        started.append(init_kwargs)
        ids = [
            init_kwargs[name][key] or f"{name}-{len(started)}" for name, key in (("wandb", "id"), ("mlflow", "run_id"))
        ]
        runs = SimpleNamespace(id=ids[0]), SimpleNamespace(info=SimpleNamespace(run_id=ids[1]))
        nothing: Any = lambda *args, **more: None  # noqa: E731
        self.trackers = [
            SimpleNamespace(name=name, tracker=run, log=nothing, finish=nothing)
            for name, run in zip(("wandb", "mlflow"), runs, strict=True)
        ]

    def cut_off(self: Training, number: int, examples: Any) -> Any:
        if number == 7 and len(started) == 1:
            raise RuntimeError("cut off")
        return step(self, number, examples)

    step = Training.step
    monkeypatch.setattr(trainer.Accelerator, "init_trackers", init_trackers)
    monkeypatch.setattr(Training, "step", cut_off)
    with pytest.raises(RuntimeError, match="cut off"):
        trained(tmp_path / "run")
    trained(tmp_path / "run")
    assert [(one["wandb"]["id"], one["mlflow"]["run_id"]) for one in started] == [(None, None), ("wandb-1", "mlflow-1")]


# ---------------------------------------------------------------------------------------------- validation, and its use


def validations(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.read("model/validation.jsonl").splitlines()]


def test_the_best_validated_weights_are_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate at which training soon makes it worse: the end comes early, and what is exported is from before."""
    run = trained(
        tmp_path / "run", dataset__finetune_split=0.25, finetune__learning_rate=0.02, finetune__validate_every=2,
        finetune__patience=2, finetune__steps=40,
    )  # fmt: skip
    found = validations(run)
    best = min(found, key=lambda line: line["loss"])
    assert [line["step"] for line in found] == list(range(0, 2 * len(found), 2))
    assert found[-1]["step"] == best["step"] + 4 < 40
    assert {label: own["images"] for label, own in found[0]["labels"].items()} == dict.fromkeys(LABELS, 2)
    held = set(run.table("held_out")["image_id"].to_pylist())
    assert len(held) == 6
    assert json.loads(run.read("model/metrics.jsonl").splitlines()[-1])["step"] == found[-1]["step"] - 1
    base = load_tensors((TINY / "unet" / "diffusion_pytorch_model.safetensors").read_bytes())
    exported = load_tensors(weights(run))
    same = all(torch.equal(base[name], exported[name]) for name in base)
    assert same == (best["step"] == 0)
    assert [line["step"] for line in found if line["exported"]] == [best["step"]]


def test_the_best_can_be_that_whose_labels_tell_most() -> None:
    history = History(4, [], [
        {"step": 0, "loss": 0.1, "typicality": 0.0}, {"step": 2, "loss": 0.3, "typicality": 0.02},
        {"step": 4, "loss": 0.2, "typicality": 0.01},
    ])  # fmt: skip
    assert (history.best("loss")["step"], history.since_best("loss")) == (0, 2)
    assert (history.best("typicality")["step"], history.since_best("typicality")) == (2, 1)
    assert History().since_best("loss") == 0


@pytest.mark.parametrize(
    ("best_by", "losses", "typicalities", "warning"),
    [
        ("loss", [0.3, 0.2, 0.25], [1e-4, 2e-4, 0.0], None),
        ("loss", [0.3, 0.2, 0.25], [1e-4, 5e-5, 2e-4], r"held-out images \(5e-05\) than .* base model \(0.0001\)"),
        ("loss", [0.1, 0.2, 0.25], [1e-4, 2e-4, 3e-4], r"no step denoises .* finetune\.best_by typicality"),
        ("typicality", [0.1, 0.2, 0.25], [1e-4, 2e-4, 1e-4], None),
        ("typicality", [0.3, 0.2, 0.1], [1e-4, 1e-5, 5e-5], r"images \(0.0001\) than .* base model \(0.0001\)"),
    ],
)
def test_validations_are_said_and_whether_they_were_of_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best_by: str, losses: list[float], typicalities: list[float],
    warning: str | None,
) -> None:  # fmt: skip
    coming = iter(zip(losses, typicalities, strict=True))

    def found(*_: object) -> dict[str, Losses]:
        loss, told = next(coming)
        return {"round": Losses(loss, loss + told, told, 2)}

    monkeypatch.setattr(trainer, "validate", found)
    config, said = prepared(
        tmp_path / "run", dataset__finetune_split=0.25, finetune__validate_every=2, finetune__steps=4,
        finetune__best_by=best_by,
    ), []  # fmt: skip
    trainer.train(Run(config.output), config, 1, lambda **news: said.append(news.get("warning")))
    lines = [line for line in said if line]
    assert lines[:3] == [
        f"finetune: step {2 * i}: held-out loss {losses[i]:.4f}, typicality {typicalities[i]:.3g}" for i in range(3)
    ]
    assert len(lines) == (3 if warning is None else 4)
    assert warning is None or re.search(warning, lines[3])


def test_a_killed_training_remembers_its_validations(tmp_path: Path) -> None:
    settings = {"dataset__finetune_split": 0.25, "finetune__validate_every": 2, "finetune__steps": 8}
    whole = trained(tmp_path / "whole", **settings)
    config = prepared(tmp_path / "cut", **settings)
    assert run_worker(config, 6) == KILLED
    assert run_worker(config) == 0
    assert validations(Run(config.output)) == validations(whole)
    assert weights(Run(config.output)) == weights(whole)


# ------------------------------------------------------------------------------------------------- length, export, news


def test_a_length_in_epochs_or_images_is_counted_in_steps(tmp_path: Path) -> None:
    assert len(losses(trained(tmp_path / "epochs", finetune__epochs=1.5))) == 6  # 36 of 24 images, 6 a step
    with pytest.raises(InputError, match=r"20 images of 24 images are 4 steps, fewer than the 3 of finetune\.warmup"):
        trained_or_error(tmp_path / "short", finetune__images=20, finetune__warmup_steps=3, finetune__decay_steps=2)


def trained_or_error(folder: Path, **changes: object) -> None:
    """What a worker says goes wrong."""
    config = prepared(folder, **changes)

    def tell(**news: Any) -> None:
        if news.get("error"):
            raise news["error"]

    trainer.train(Run(config.output), config, 1, tell)


def test_adapters_are_merged_into_the_exported_model(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", finetune__lora_rank=2, finetune__steps=4)
    base = load_tensors((TINY / "unet" / "diffusion_pytorch_model.safetensors").read_bytes())
    exported = load_tensors(weights(run))
    assert set(exported) == set(base)
    changed = {name for name in base if not torch.equal(base[name], exported[name])}
    assert changed
    assert all(any(part in name for part in ("to_q", "to_k", "to_v", "to_out")) for name in changed)


def test_samples_and_losses_are_shown_on_the_way(tmp_path: Path) -> None:
    run = trained(
        tmp_path / "run", finetune__samples_per_label=1, finetune__sample_every=2, finetune__steps=4,
        finetune__trackers="[tensorboard]",
    )  # fmt: skip
    assert run.names("samples") == ["part-00000.parquet", "step-00000002.png"]
    assert run.table("samples")["label"].to_pylist() == sorted(LABELS)
    with Image.open(io.BytesIO(run.read("samples/step-00000002.png"))) as page:
        assert page.size == (160 + 64, 3 * 64)
    assert run.names("tensorboard") == ["events.out.tfevents.00000000"]
    assert b"grad_norm" in run.read("tensorboard/events.out.tfevents.00000000")


def test_what_a_worker_cannot_do_is_said_and_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NonFiniteError, match=r"the loss of step \d+ is (nan|inf) .*lower finetune.learning_rate"):
        trained_or_error(tmp_path / "diverged", finetune__learning_rate=1e30)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Training, "step", full)
    with pytest.raises(StageError, match=r"hold a pass; lower finetune.micro_batch .* finetune.gradient_checkpointing"):
        trained_or_error(tmp_path / "full")

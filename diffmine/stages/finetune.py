"""Latents and labels -> model/: the base model finetuned by Ray Train, and samples of it.

A step is a function of (seed, step): which images, which noise, which labels are dropped. A checkpoint therefore holds
weights, their average and the optimizer's moments, and nothing about data. `done.json` is written last, with the digest
of the state: a checkpoint without it, or whose bytes differ, is passed over.

Workers come and go with their nodes: training goes on from the newest checkpoint with those that are left, and is
joined by those that come back. A batch is the same however many share it, so the losses are, too.
"""

import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
from PIL import Image
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from safetensors.torch import load_file, save_file

from diffmine.config import Config
from diffmine.diffusion.model import Model, freeze, load
from diffmine.diffusion.training import Training
from diffmine.errors import NonFiniteError, StageError
from diffmine.prompts import prompts
from diffmine.randomness import generator
from diffmine.run import Run, fetch_model, rows_to_table
from diffmine.stages.board import Board
from diffmine.stages.card import model_card
from diffmine.stages.ingest import Ingest
from diffmine.stages.latents import device
from diffmine.stages.room import Room, require, training_room, training_workers
from diffmine.stages.session import Context, Result
from diffmine.stages.watch import in_background, unless_stalled
from diffmine.store import file_digest

_KEPT_CHECKPOINTS = 2
_SAMPLED_LABELS = 64  # at most: a page of samples, not a data set
_POLL_S = 0.5
_CRASHES_SURVIVED = 3
_JOINED_S = 300.0  # between looks for more workers; each change costs the steps since the newest checkpoint,
_SAVED_S = 240.0  # which is no older while workers are missing
_NOTICE_STEPS = 8  # between looks for nodes that are about to be taken away; all workers wait for each other
_STATE = "state.safetensors"
_LOWER = "lower finetune.learning_rate"


def finetune(context: Context) -> Result:
    """Train, export and sample; continues from the newest whole checkpoint."""
    run, wanted, progress = context.run, context.config.finetune, context.progress
    workers = training_workers(context.config)
    for leftover in ("model", "samples"):  # of an export that was cut off; the checkpoints stay
        run.remove(leftover)
    progress.start("finetune", wanted.steps, "steps")
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # others may go away
    board = Board.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    settings = {"run": run.uri, "config": context.config, "board": board, "most": workers}
    each = training_room(context.config, workers)
    require("finetune", each, workers)

    def awaited(_: int) -> str:
        return f"step {shown + 1} of {wanted.steps}" if shown < wanted.steps else "the model and its samples"

    shown, warned = 0, None
    with tempfile.TemporaryDirectory(prefix="diffmine-") as record:  # Ray Train's own: it keeps nothing of worth there
        trainer = _trainer(settings, workers, each, record)
        for state in unless_stalled(context, "finetune", _news(trainer, board), awaited, each):
            if state["warning"] != warned:
                warned = state["warning"]
                progress.say(warned)
            if state["step"] > shown:
                progress.advance(state["step"] - shown, f"loss {state['loss']:.4f}")
                shown = state["step"]
    state = ray.get(board.read.remote())
    if state["error"]:
        raise NonFiniteError(state["error"])
    if not run.exists("model/model_index.json"):
        raise StageError("finetune: the workers ended without exporting a model")
    progress.finish(f"loss {state['loss']:.4f}")
    run.remove("checkpoints")
    return Result(run.digests(["model", "samples"]), {"steps": wanted.steps, "workers": workers, "loss": state["loss"]})


def _trainer(settings: dict[str, Any], workers: int, each: Room, record: str) -> TorchTrainer:
    # A lone CPU worker owns the cores: its threads may spin a little while they wait, which trains half as fast again.
    # Spinning for ever (ACTIVE) trains no faster, and comes to a stop where something else needs a core.
    environment = {"GOMP_SPINCOUNT": "30000"} if workers == 1 and not each.gpus else {}
    room = {name: n for name, n in (("CPU", each.cpus), ("GPU", each.gpus), ("memory", each.memory)) if n}
    return TorchTrainer(
        _train,
        train_loop_config=settings,
        scaling_config=ScalingConfig(
            num_workers=(1, workers) if workers > 1 else 1,  # type: ignore[arg-type]  # Ray Train 2, not ray.air
            use_gpu=each.gpus > 0,
            resources_per_worker=room,
            elastic_resize_monitor_interval_s=_JOINED_S,  # type: ignore[call-arg]
        ),
        run_config=RunConfig(
            storage_path=record,
            failure_config=FailureConfig(max_failures=_CRASHES_SURVIVED),
            worker_runtime_env={"env_vars": environment},  # type: ignore[call-arg]  # Ray Train 2, not ray.air
        ),
    )


def _news(trainer: TorchTrainer, board: Any) -> Iterator[dict[str, Any]]:
    """Train; the board, whenever something was written on it."""
    training, beat = in_background(trainer.fit), 0
    while not training.done():
        wait([training], timeout=_POLL_S)
        state = ray.get(board.read.remote())
        if state["beat"] > beat:
            beat = state["beat"]
            yield state
    training.result()


# ------------------------------------------------------------------------------------------------- inside the workers


def _train(settings: dict[str, Any]) -> None:
    """One worker's whole life; rank 0 also writes checkpoints and exports."""
    worker = ray.train.get_context()
    rank, world, most = worker.get_world_rank(), worker.get_world_size(), settings["most"]
    run, board, config = Run(settings["run"]), settings["board"], settings["config"]
    wanted = config.finetune
    ingest = Ingest(run, config.seed, wanted.batch_size, wanted.crop)
    text_encoder = fetch_model(config.model.text_encoder) if config.model.text_encoder else None
    model = load(fetch_model(config.model.base), "float32", device(), text_encoder)
    counts = ingest.label_counts()
    labels = list(counts)
    texts = model.embed(prompts(labels, config.prompt.template, config.prompt.null_prompt)).clone()
    training = Training(
        model, wanted, config.seed, dict(zip([None, *labels], texts, strict=True)),
        bfloat16=config.model.dtype != "float32",
        at_once=-(-wanted.batch_size // most),  # a share where no worker is missing
    )  # fmt: skip
    start, metrics, passed_over = _resume(run, training)
    if rank == 0 and passed_over:
        board.write.remote(warning=f"finetune: passed over {', '.join(passed_over)}; begins at step {start}")
    told, saved, notice = 0.0, time.monotonic(), None
    for step, batch in zip(range(start, wanted.steps), ingest.batches(start), strict=False):
        try:
            done = training.step(step, list(enumerate(batch))[rank::world])
        except NonFiniteError as error:  # in all workers alike: none is left waiting, and Ray has nothing to try again
            if rank == 0:
                names = ", ".join(image.image_id for image in batch[:4])
                ray.get(board.write.remote(error=f"finetune: {error} (images {names}, ...); {_LOWER}"))
            return
        if rank == 0:
            metrics.append({
                "step": step, "loss": round(done.loss, 6), "grad_norm": round(done.grad_norm, 5),
                "learning_rate": done.learning_rate,
            })  # fmt: skip
            if time.monotonic() - told > _POLL_S:  # not every step: each message wakes up processes that take a core
                told = time.monotonic()
                board.write.remote(step=step + 1, loss=_recent(metrics))
        noticed = notice
        if step % _NOTICE_STEPS == 0:
            notice = ray.train.get_preemption_info()
        due = (step + 1) % wanted.checkpoint_every == 0 or notice != noticed
        due |= world < most and time.monotonic() - saved > _SAVED_S
        if rank == 0 and due and step + 1 < wanted.steps:
            _checkpoint(run, training, step + 1, metrics)
            saved = time.monotonic()
    if rank == 0:
        training.use_average()
        _export(run, model, model_card(config, ingest.images, counts, metrics), metrics)
        _sample(run, model, labels, config, ingest.common_shape(), tell=board.write.remote)
        ray.get(board.write.remote(step=wanted.steps, loss=_recent(metrics)))


def _recent(metrics: Sequence[dict[str, Any]]) -> float:
    """Mean loss of the newest steps."""
    return float(np.mean([m["loss"] for m in metrics[-50:]]))


def _checkpoint(run: Run, training: Training, step: int, metrics: list[dict[str, Any]]) -> None:
    folder = f"checkpoints/step-{step:08d}"
    with tempfile.TemporaryDirectory() as scratch:  # streamed to the store: a checkpoint is four times the UNet
        file = Path(scratch) / _STATE
        save_file(training.tensors(), file)
        digest = file_digest(file)
        run.replace(f"{folder}/{_STATE}", file)
    done = {"step": step, "sha256": digest, "metrics": metrics}
    run.replace(f"{folder}/done.json", json.dumps(done).encode())
    for old in _checkpoints(run)[_KEPT_CHECKPOINTS:]:
        run.remove(f"checkpoints/{old}")


def _checkpoints(run: Run) -> list[str]:
    """Folders of checkpoints, newest first."""
    return sorted((name for name in run.names("checkpoints") if name.startswith("step-")), reverse=True)


def _resume(run: Run, training: Training) -> tuple[int, list[dict[str, Any]], list[str]]:
    """Restore the newest whole checkpoint.

    Returns:
        The step to begin with, the metrics until there, and what is wrong with newer checkpoints.
    """
    passed_over: list[str] = []
    for name in _checkpoints(run):
        folder = f"checkpoints/{name}"
        if not run.exists(f"{folder}/done.json"):  # being written when the worker died
            continue
        done = json.loads(run.read(f"{folder}/done.json"))
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / _STATE
            run.fetch(f"{folder}/{_STATE}", file)
            if file_digest(file) != done["sha256"]:
                passed_over.append(f"{folder}, whose bytes have changed")
            elif not training.restore(load_file(file), done["step"]):
                passed_over.append(f"{folder}, which is of another model")
            else:
                return done["step"], done["metrics"], passed_over
    return 0, [], passed_over


def _export(run: Run, model: Model, card: str, metrics: list[dict[str, Any]]) -> None:
    freeze(model.unet)
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder))
        (Path(folder) / "README.md").write_text(card, "utf-8")
        (Path(folder) / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
        run.upload(Path(folder), "model")


def _sample(
    run: Run, model: Model, labels: list[str], config: Config, shape: tuple[int, int], tell: Callable[[], Any]
) -> None:
    """Images of each label, drawn by the finetuned model at the dataset's most common size."""
    count, (h, w) = config.finetune.samples_per_label, shape
    if not count:
        return
    texts = prompts(labels, config.prompt.template, config.prompt.null_prompt)
    rows = []
    for label, text in list(zip(labels, texts[1:], strict=True))[:_SAMPLED_LABELS]:
        tell()
        seeds = [int(generator(config.seed, "sample", label, i).integers(2**31)) for i in range(count)]
        for i, pixels in enumerate(model.sample(text, texts[0], seeds, h * model.cell, w * model.cell)):
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "PNG")
            rows.append({"label": label, "index": i, "image": {"bytes": png.getvalue(), "path": None}})
    run.write_part("samples", 0, rows_to_table("samples", rows))

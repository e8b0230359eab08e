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
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import ray.train
import torch
from PIL import Image
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from safetensors.torch import load_file, save_file
from torch import nn

from diffmine.diffusion.finetune import batches, denoising_loss, example, learning_rate
from diffmine.diffusion.model import Model, freeze, load
from diffmine.errors import NonFiniteError, StageError
from diffmine.prompts import prompts
from diffmine.randomness import generator
from diffmine.run import Run, fetch_model, rows_to_table
from diffmine.stages.board import Board
from diffmine.stages.latents import device, latent_array
from diffmine.stages.room import Room, require, training_room, training_workers
from diffmine.stages.session import Context, Result
from diffmine.stages.watch import in_background, unless_stalled
from diffmine.store import file_digest

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel

_KEPT_CHECKPOINTS = 2
_SAMPLED_LABELS = 64  # at most: a page of samples, not a data set
_POLL_S = 0.5
_CRASHES_SURVIVED = 3
_JOINED_S = 300.0  # between looks for more workers; each change costs the steps since the newest checkpoint,
_SAVED_S = 240.0  # which is no older while workers are missing
_NOTICE_STEPS = 8  # between looks for nodes that are about to be taken away; all workers wait for each other
_STATE = "state.safetensors"


def finetune(context: Context) -> Result:
    """Train, export and sample; continues from the newest whole checkpoint."""
    run, wanted, progress = context.run, context.config.finetune, context.progress
    workers = training_workers(context.config)
    for leftover in ("model", "samples"):  # of an export that was cut off; the checkpoints stay
        run.remove(leftover)
    progress.start("finetune", wanted.steps, "steps")
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # others may go away
    board = Board.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    settings = {
        "run": run.uri, "seed": context.config.seed, "board": board, "most": workers,
        **context.config.model.model_dump(), **context.config.prompt.model_dump(), **wanted.model_dump(),
    }  # fmt: skip
    each = training_room(context.config, workers)
    require("finetune", each, workers)

    def awaited(_: int) -> str:
        return f"step {shown + 1} of {wanted.steps}" if shown < wanted.steps else "the model and its samples"

    shown = 0
    with tempfile.TemporaryDirectory(prefix="diffmine-") as record:  # Ray Train's own: it keeps nothing of worth there
        trainer = _trainer(settings, workers, each, record)
        for state in unless_stalled(context, "finetune", _news(trainer, board), awaited, each):
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


@dataclass
class _Images:
    """Latents and labels in memory, sorted by image_id."""

    ids: list[str] = field(default_factory=list)
    latents: list[np.ndarray] = field(default_factory=list)  # float16 [C, h, w] each
    labels: list[list[str]] = field(default_factory=list)

    def cropped_shapes(self, crop: int | None) -> list[tuple[int, int]]:
        return [(min(crop or h, h), min(crop or w, w)) for _, h, w in (latent.shape for latent in self.latents)]


def read_images(run: Run) -> _Images:
    """Every image that has a latent."""
    manifest = run.table("manifest", ["image_id", "labels"])
    labels = dict(zip(manifest["image_id"].to_pylist(), manifest["labels"].to_pylist(), strict=True))
    images = _Images()
    for part in run.parts("latents"):
        for row in run.read_part("latents", part, ["image_id", "h", "w", "latent"]).to_pylist():
            images.ids.append(row["image_id"])
            images.latents.append(latent_array(row))
            images.labels.append(labels[row["image_id"]])
    return images


def _train(settings: dict[str, Any]) -> None:
    """One worker's whole life; rank 0 also writes checkpoints and exports."""
    worker = ray.train.get_context()
    rank, world = worker.get_world_rank(), worker.get_world_size()
    run, board = Run(settings["run"]), settings["board"]
    images = read_images(run)
    text_encoder = fetch_model(settings["text_encoder"]) if settings["text_encoder"] else None
    model = load(fetch_model(settings["base"]), "float32", device(), text_encoder)
    labels = sorted({label for own in images.labels for label in own})
    texts = model.embed(prompts(labels, settings["template"], settings["null_prompt"])).clone()
    row_of: dict[str | None, int] = {None: 0, **{label: i + 1 for i, label in enumerate(labels)}}

    model.unet.train().requires_grad_(True)
    unet: nn.Module = nn.parallel.DistributedDataParallel(model.unet) if world > 1 else model.unet
    optimizer = torch.optim.AdamW(
        model.unet.parameters(),
        lr=settings["learning_rate"],
        weight_decay=settings["weight_decay"],
        betas=(0.9, 0.999),
        fused=True,
        eps=1e-8,
    )
    from diffusers.training_utils import EMAModel  # seconds, which only a worker should spend

    ema = EMAModel(model.unet.parameters(), decay=settings["ema_decay"], foreach=True)
    state, dropout, crop = _State(model.unet, optimizer, ema), settings["label_dropout"], settings["crop"]
    gamma, timesteps = settings["min_snr_gamma"], (round(1000 * settings["t_min"]), round(1000 * settings["t_max"]))
    start, metrics = _resume(run, state)
    told, saved, notice = 0.0, time.monotonic(), None
    most_at_once = -(-settings["batch_size"] // settings["most"])  # images: a share where no worker is missing
    order = batches(settings["seed"], images.cropped_shapes(crop), settings["batch_size"])
    autocast = torch.autocast(
        "cuda", dtype=torch.bfloat16, enabled=device() == "cuda" and settings["dtype"] != "float32"
    )

    for step, batch in zip(range(start, settings["steps"]), islice(order, start, None), strict=False):
        examples = [
            example(
                settings["seed"], step, position, images.ids[i], images.latents[i], images.labels[i], dropout, crop,
                timesteps,
            )
            for position, i in list(enumerate(batch))[rank::world]
        ]  # fmt: skip
        optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=model.device)  # of the batch, this worker's share of it
        for first in range(0, len(examples), most_at_once):
            part, last = examples[first : first + most_at_once], first + most_at_once >= len(examples)
            with nullcontext() if last or world == 1 else unet.no_sync():  # type: ignore[operator]
                with autocast:
                    share = denoising_loss(model, unet, part, texts[[row_of[e.label] for e in part]], gamma)
                share = share * (len(part) / len(batch))
                (share * world).backward()  # gradients are averaged over the workers
            loss += share.detach()
        value = _sum_over_workers(loss, world)
        if not np.isfinite(value):  # the same on every worker, so all stop at this line, before the weights change
            if rank == 0:
                names = ", ".join(images.ids[i] for i in batch[:4])
                ray.get(
                    board.write.remote(
                        error=f"finetune: the loss of step {step} is {value} (images {names}, ...); "
                        "lower finetune.learning_rate"
                    )
                )
            return
        rate = learning_rate(
            step, settings["steps"], settings["learning_rate"], settings["warmup_steps"], settings["decay_steps"]
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        norm = nn.utils.clip_grad_norm_(model.unet.parameters(), settings["max_grad_norm"])
        optimizer.step()
        ema.step(model.unet.parameters())
        if rank == 0:
            metrics.append(
                {
                    "step": step,
                    "loss": round(value, 6),
                    "grad_norm": round(float(norm), 5),
                    "learning_rate": rate,
                }
            )
            if time.monotonic() - told > _POLL_S:  # not every step: each message wakes up processes that take a core
                told = time.monotonic()
                board.write.remote(step=step + 1, loss=float(np.mean([m["loss"] for m in metrics[-50:]])))
        noticed = notice
        if step % _NOTICE_STEPS == 0:
            notice = ray.train.get_preemption_info()
        due = (step + 1) % settings["checkpoint_every"] == 0 or notice != noticed
        due |= world < settings["most"] and time.monotonic() - saved > _SAVED_S
        if rank == 0 and due and step + 1 < settings["steps"]:
            _checkpoint(run, state, step + 1, metrics)
            saved = time.monotonic()
    if rank == 0:
        ema.copy_to(model.unet.parameters())
        _export(run, model, metrics)
        _sample(
            run,
            model,
            labels,
            settings,
            Counter(latent.shape[1:] for latent in images.latents).most_common(1)[0][0],
            tell=board.write.remote,
        )
        ray.get(board.write.remote(step=settings["steps"], loss=float(np.mean([m["loss"] for m in metrics[-50:]]))))


def _sum_over_workers(loss: torch.Tensor, world: int) -> float:
    if world > 1:
        torch.distributed.all_reduce(loss)
    return float(loss)


@dataclass
class _State:
    """What a checkpoint holds, as one flat dictionary of tensors."""

    unet: nn.Module
    optimizer: torch.optim.Optimizer
    ema: "EMAModel"

    def tensors(self) -> dict[str, torch.Tensor]:
        found = {}
        for (name, parameter), average in zip(self.unet.named_parameters(), self.ema.shadow_params, strict=True):
            moments = self.optimizer.state[parameter]
            found[f"weight/{name}"] = parameter.detach()
            found[f"average/{name}"] = average
            found[f"first/{name}"], found[f"second/{name}"] = moments["exp_avg"], moments["exp_avg_sq"]
        return {name: tensor.contiguous().cpu() for name, tensor in found.items()}

    def restore(self, tensors: dict[str, torch.Tensor], step: int) -> None:
        with torch.no_grad():
            for (name, parameter), average in zip(self.unet.named_parameters(), self.ema.shadow_params, strict=True):
                parameter.copy_(tensors[f"weight/{name}"])
                average.copy_(tensors[f"average/{name}"])
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(step)),
                    "exp_avg": tensors[f"first/{name}"].to(parameter.device),
                    "exp_avg_sq": tensors[f"second/{name}"].to(parameter.device),
                }
        self.ema.optimization_step = step


def _checkpoint(run: Run, state: _State, step: int, metrics: list[dict[str, Any]]) -> None:
    folder = f"checkpoints/step-{step:08d}"
    with tempfile.TemporaryDirectory() as scratch:  # streamed to the store: a checkpoint is four times the UNet
        file = Path(scratch) / _STATE
        save_file(state.tensors(), file)
        digest = file_digest(file)
        run.replace(f"{folder}/{_STATE}", file)
    done = {"step": step, "sha256": digest, "metrics": metrics}
    run.replace(f"{folder}/done.json", json.dumps(done).encode())
    for old in _checkpoints(run)[_KEPT_CHECKPOINTS:]:
        run.remove(f"checkpoints/{old}")


def _checkpoints(run: Run) -> list[str]:
    """Folders of checkpoints, newest first."""
    return sorted((name for name in run.names("checkpoints") if name.startswith("step-")), reverse=True)


def _resume(run: Run, state: _State) -> tuple[int, list[dict[str, Any]]]:
    """Restore the newest whole checkpoint; the step to begin with and the metrics until there."""
    for name in _checkpoints(run):
        folder = f"checkpoints/{name}"
        if not run.exists(f"{folder}/done.json"):
            continue
        done = json.loads(run.read(f"{folder}/done.json"))
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / _STATE
            run.fetch(f"{folder}/{_STATE}", file)
            if file_digest(file) == done["sha256"]:
                state.restore(load_file(file), done["step"])
                return done["step"], done["metrics"]
    return 0, []


def _export(run: Run, model: Model, metrics: list[dict[str, Any]]) -> None:
    freeze(model.unet)
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder))
        (Path(folder) / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
        run.upload(Path(folder), "model")


def _sample(
    run: Run, model: Model, labels: list[str], settings: dict[str, Any], shape: tuple[int, int], tell: Callable[[], Any]
) -> None:
    """Images of each label, drawn by the finetuned model at the dataset's most common size."""
    count, (h, w) = settings["samples_per_label"], shape
    if not count:
        return
    texts = prompts(labels, settings["template"], settings["null_prompt"])
    rows = []
    for label, text in list(zip(labels, texts[1:], strict=True))[:_SAMPLED_LABELS]:
        tell()
        seeds = [int(generator(settings["seed"], "sample", label, i).integers(2**31)) for i in range(count)]
        for i, pixels in enumerate(model.sample(text, texts[0], seeds, h * model.cell, w * model.cell)):
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "PNG")
            rows.append({"label": label, "index": i, "image": {"bytes": png.getvalue(), "path": None}})
    run.write_part("samples", 0, rows_to_table("samples", rows))

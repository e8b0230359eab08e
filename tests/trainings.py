"""Small trainings without Ray: latents of noise, the tiny model, and workers as processes that can be killed."""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffmine.config import Config
from diffmine.configfile import load
from diffmine.run import Run, rows_to_table

LABELS = ("round", "square", "star")
IMAGES = 24
_SPAWN = multiprocessing.get_context("forkserver")  # a process that has imported much and computed nothing is forked
_SPAWN.set_forkserver_preload(["diffmine.stages.trainer", "diffusers", "peft", "transformers"])


def prepared(folder: Path, **changes: object) -> Config:
    """A run of 24 images of three labels, 8 x 8 cells, whose latents are there; settings with `__` for the dots."""
    run, rng = Run(str(folder)), np.random.default_rng(0)
    ids = [f"{i:03d}.png" for i in range(IMAGES)]
    rows = [{"image_id": name, "uri": name, "labels": [LABELS[i % 3]], "boxes": None} for i, name in enumerate(ids)]
    run.write_part("manifest", 0, rows_to_table("manifest", rows))
    for part in range(0, IMAGES, 6):
        shard = [
            {"image_id": name, "width": 64, "height": 64, "h": 8, "w": 8, "scale": 1.0, "crop_x": 0, "crop_y": 0,
             "latent": rng.normal(size=512).astype(np.float16)}
            for name in ids[part : part + 6]
        ]  # fmt: skip
        run.write_part("latents", part // 6, rows_to_table("latents", shard))
    settings = {
        "output": folder, "dataset.source": "made", "dataset.layout": "table", "model.base": "tiny",
        "model.dtype": "float32", "finetune.steps": 12, "finetune.batch_size": 6, "finetune.learning_rate": 1e-3,
        "finetune.ema_decay": 0.5, "finetune.checkpoint_every": 3, "finetune.samples_per_label": 0,
        "finetune.trackers": "[]",
    } | {key.replace("__", "."): value for key, value in changes.items()}  # fmt: skip
    empty = folder.parent / f"{folder.name}.yaml"
    empty.write_text("{}\n")
    return load(empty, [f"--{key}={value}" for key, value in settings.items()])


def worker(config: Config, kill_at: int | None = None, rank: int = 0, world: int = 1, port: int = 0) -> None:
    """The life of one worker; it dies by SIGKILL in the middle of a step."""
    import torch

    from diffmine.stages import trainer

    torch.set_num_threads(1)
    if world > 1:
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in own.items()} | {"MASTER_ADDR": "127.0.0.1"})
    plain = trainer.Training.step

    def step(self: Any, number: int, examples: Sequence[Any]) -> Any:
        done = plain(self, number, examples)  # the weights have changed; nobody has been told
        if number == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    trainer.Training.step = step  # type: ignore[method-assign]
    trainer.train(Run(config.output), config, world, said)


def said(**news: Any) -> None:
    if news.get("error"):
        raise news["error"]


def run_worker(config: Config, kill_at: int | None = None) -> int:
    """Exit code of a worker in a process of its own."""
    return together(lambda: [_SPAWN.Process(target=worker, args=(config, kill_at))])


def run_workers(config: Config, world: int, port: int) -> int:
    """The first exit code that is not 0, of so many workers that share each batch."""
    return together(
        lambda: [_SPAWN.Process(target=worker, args=(config, None, rank, world, port)) for rank in range(world)]
    )


def together(make: Callable[[], list[Any]]) -> int:
    processes = make()
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return next((process.exitcode for process in processes if process.exitcode), 0)


def losses(run: Run) -> list[float]:
    return [json.loads(line)["loss"] for line in run.read("model/metrics.jsonl").splitlines()]


def weights(run: Run) -> bytes:
    return run.read("model/unet/diffusion_pytorch_model.safetensors")

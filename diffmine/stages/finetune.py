"""Latents and labels -> model/: the base model finetuned by Ray Train, and samples of it.

What a worker does is in `trainer`; here it is started, watched and started again. Workers come and go with their nodes:
training goes on from the newest checkpoint with those that are left, and is joined by those that come back. A batch is
the same however many share it, so the losses are, too.
"""

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from socket import gethostname
from typing import Any

import ray
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from diffmine.errors import StageError
from diffmine.run import run_here
from diffmine.stages import checkpoints
from diffmine.stages.board import Board
from diffmine.stages.room import Room, embedded, require, training_room, training_workers
from diffmine.stages.session import Context, Result
from diffmine.stages.watch import in_background, unless_stalled

_POLL_S = 0.5
_CRASHES_SURVIVED = 3  # of one start; notices of the end of a node do not count
_JOINED_S = 300.0  # between looks for more workers; each change costs the steps since the newest checkpoint


def finetune(context: Context) -> Result:
    """Train, export and sample; continues from the newest whole checkpoint."""
    run, progress = context.run, context.progress
    workers = training_workers(context.config)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # others may go away
    board = Board.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    each = training_room(context.config, workers)
    settings = {"run": run.uri, "config": context.config, "board": board, "most": workers, "on_gpu": each.gpus > 0}
    require("finetune", each, workers)
    state: dict[str, Any] = {"steps": 0, "step": 0, "warnings": []}
    shown = began = 0  # steps: what was shown last, and those of an earlier run

    def awaited(_: int) -> str:
        return f"step {shown + 1} of {state['steps'] or '?'}" if shown < (state["steps"] or 1) else "the model"

    progress.start("finetune")
    with tempfile.TemporaryDirectory(prefix="diffmine-") as record:  # Ray Train's own: it keeps nothing of worth there
        newest = checkpoints.Checkpoints(run).newest_digest
        news_of_all = _news(lambda: _trainer(settings, workers, each, record), board, newest)
        for news in unless_stalled(context, "finetune", news_of_all, awaited, each):
            for warning in news["warnings"][len(state["warnings"]) :]:
                progress.say(warning)
            if news["steps"] != state["steps"]:  # the worker has counted the images
                shown, began = news["step"], news["began"]
                progress.start("finetune", news["steps"], "steps", began)
                progress.advance(shown - news["began"])
            elif news["step"] > shown:
                progress.advance(news["step"] - shown, f"loss {news['loss']:.4f}")
                shown = news["step"]
            state = news
    told, state = len(state["warnings"]), ray.get(board.read.remote())
    for warning in state["warnings"][told:]:
        progress.say(warning)
    if not run.exists("model/model_index.json"):
        raise StageError("finetune: the workers ended without exporting a model")
    progress.finish(f"loss {state['loss']:.4f}")
    marker = {"steps": state["step"], "workers": workers, "loss": state["loss"]}
    folders = ["model", "samples", *(["held_out"] if run.exists("held_out") else [])]
    return Result(run.digests(folders), marker, state["step"] - began)


class _Trainer(TorchTrainer):
    """On an embedded Ray without the guard that frees the workers' place when a cluster outlives the controller.

    It asks an API server whether the controller lives, and an embedded Ray has none. So it asks whatever Ray was last
    started by hand on the machine: one that is gone delays each training's end by 12 s, another knows no such
    controller.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]  # Ray Train 2, not ray.air
        return [c for c in callbacks if not (embedded() and isinstance(c, PlacementGroupCleanerCallback))]


def _trainer(settings: dict[str, Any], workers: int, each: Room, record: str) -> TorchTrainer:
    # A lone CPU worker owns the cores: its threads may spin a little while they wait, which trains half as fast again.
    # Spinning for ever (ACTIVE) trains no faster, and comes to a stop where something else needs a core.
    environment = {"GOMP_SPINCOUNT": "30000"} if workers == 1 and not each.gpus else {}
    room = {name: n for name, n in (("CPU", each.cpus), ("GPU", each.gpus), ("memory", each.memory)) if n}
    return _Trainer(
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


def _news(
    trainer: Callable[[], TorchTrainer], board: Any, reached: Callable[[], str | None]
) -> Iterator[dict[str, Any]]:
    """Train; the board, whenever it changes.

    Workers that crash are started again by Ray a few times, and by this as long as there is another checkpoint then.

    Args:
        reached: names the newest checkpoint.
    """
    while True:
        before, training, beat = reached(), in_background(trainer().fit), 0
        while not training.done():
            wait([training], timeout=_POLL_S)
            state = ray.get(board.read.remote())
            if state["beat"] > beat:
                beat = state["beat"]
                yield state
        error = ray.get(board.read.remote())["error"]  # in a worker's own words
        try:
            training.result()
        except TrainingFailedError as failure:
            if reached() != before:
                continue
            raise (failure if error is None else error) from None
        if error is not None:
            raise error
        return


def _train(settings: dict[str, Any]) -> None:
    """One worker, as Ray Train starts it."""
    from diffmine.stages.trainer import train  # seconds of imports, which the driver need not wait for

    board = settings["board"]

    def tell(**news: Any) -> None:
        written = board.write.remote(**news)
        if "error" in news:  # the last that this process says
            ray.get(written)

    if settings["on_gpu"] and not torch.cuda.is_available():  # or it would train on a core, for ever
        raise StageError(
            f"finetune: PyTorch {torch.__version__} finds no GPU on {gethostname()}, where Ray gave it one"
        )
    notice = ray.train.get_preemption_info
    train(run_here(settings["run"]), settings["config"], settings["most"], tell, notice, settings["on_gpu"])

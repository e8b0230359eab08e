"""One training worker's life: steps, validations, samples and checkpoints, then the export. Runs without Ray, too.

A step is a function of (seed, step): which images, which noise, which words. A checkpoint therefore holds weights and
what has happened, and nothing about data.
"""

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache

from diffmine.config import Config
from diffmine.diffusion.finetune import Example, LabelledImage
from diffmine.diffusion.memory import out_of_memory
from diffmine.diffusion.model import Model, freeze, load
from diffmine.diffusion.parallel import accelerator
from diffmine.diffusion.training import Training, put_weights, text_states
from diffmine.diffusion.validation import validate
from diffmine.errors import InputError, NonFiniteError, StageError
from diffmine.run import Run, fetch_model, fetch_text_encoder, part_name, rows_to_table
from diffmine.stages.card import model_card
from diffmine.stages.checkpoints import Checkpoint, Checkpoints, History, Tensors
from diffmine.stages.ingest import Ingest
from diffmine.stages.samples import grid, png, samples
from diffmine.stages.watch import kept_alive

_TOLD_S = 0.5  # between messages: each wakes up processes that take a core
_SAVED_S = 240.0  # age of the newest checkpoint while workers are missing: their return costs the steps since then
_NOTICE_S, _NOTICE_STEPS = 4.0, 8  # about so long, and at most so many, between looks for nodes about to be taken away
_NO_GAIN = (
    "no step denoises the held-out images better than the base model, which is therefore exported; train longer, with "
    "finetune.decay_steps or a lower rate, or choose by what the label tells: finetune.best_by typicality"
)
_TELLS_NO_MORE = (
    "labels tell no more of the held-out images ({:.3g}) than they told the base model ({:.3g}), so T may say little; "
    "see finetune.best_by in docs/finetuning.md, and docs/tuning.md"
)
_LOGGED_STEPS = 10  # between those that trackers are told of
_METRICS = 20_000  # lines of metrics.jsonl, at most: a longer training keeps those of every n-th step
_TOO_LARGE = (
    "finetune: the device's memory does not hold a pass; lower finetune.micro_batch (or finetune.samples_per_label, "
    "where it sampled), or set finetune.gradient_checkpointing to true"
)

Tell = Callable[..., Any]


def train(
    run: Run, config: Config, most: int, tell: Tell, notice: Callable[[], Any] = lambda: None, on_gpu: bool = True
) -> None:
    """Train from the newest whole checkpoint to the end, and export.

    Every process of the group runs this; the first one also writes.

    Args:
        most: processes there are when none is missing.
        tell: is given news by name: steps, step, loss, warning (any line for the user), error.
        notice: what is known of nodes that are about to be taken away; all processes ask equally often.
        on_gpu: whether a GPU is this process's own.
    """
    with tempfile.TemporaryDirectory(prefix="diffmine-") as scratch:
        wanted = config.finetune
        spread = accelerator(
            config.model.dtype != "float32",
            wanted.sharding == "full",
            wanted.trackers,
            Path(scratch) / "trackers",
            on_gpu,
        )
        try:
            _Worker(run, config, most, spread, tell).work(notice)
        except NonFiniteError as error:  # in all processes alike: none waits, and to try again is no use
            tell(error=error)
        except InputError as error:  # it may be this node's alone
            tell(error=error)
            raise
        except RuntimeError as error:
            if out_of_memory(error):
                tell(error=StageError(_TOO_LARGE))
            raise
        finally:
            for tracker in spread.trackers:
                tracker.finish()


class _Worker:
    """The state of a worker: the model in training, and what has happened."""

    def __init__(self, run: Run, config: Config, most: int, spread: Accelerator, tell: Tell) -> None:
        wanted = config.finetune
        self.run, self.config, self.wanted, self.spread = run, config, wanted, spread
        self.most, self.first = most, spread.is_main_process
        self.tell: Tell = tell if self.first else lambda **news: None
        self.told = 0.0  # time.monotonic() of the newest sign of life
        self.ingest = Ingest(run, config.seed, config.dataset, wanted)
        self.steps = wanted.length(self.ingest.images)
        self.record_every = -(-self.steps // _METRICS)  # steps from one line of metrics to the next
        if why := wanted.too_short(self.ingest.images):
            raise InputError(f"finetune: {why}")
        self.labels = self.ingest.label_counts()
        encoder = fetch_text_encoder(config.model.text_encoder)
        self.open_base = partial(load, fetch_model(config.model.base), "float32", str(spread.device), encoder)
        model = self.open_base()
        self.text = text_states(model, config.prompt.template, config.prompt.null_prompt)
        at_once = -(-wanted.batch_size // most) if wanted.micro_batch == "auto" else wanted.micro_batch
        self.training = Training(model, wanted, config.seed, self.steps, self.text, spread, at_once)
        self.checkpoints = Checkpoints(run)
        self.history, self.best = self._continued()
        self.began = self.history.step
        self.held: list[tuple[str, LabelledImage]] = []
        if config.dataset.finetune_split:
            self.held = self.ingest.validation(wanted.validation_images)
        if self.first and (untrained := self.ingest.untrained_ids()):
            self.run.write_part("held_out", 0, pa.table({"image_id": untrained}), over=True)
        self._track()

    def _track(self) -> None:
        """Start the trackers, or go on with what they have of this training."""
        known = self.history.trackers
        wanted = {
            "tensorboard": {"purge_step": self.began},
            "wandb": {"name": self.run.uri, "id": known.get("wandb"), "resume": "allow"},
            "mlflow": {"run_name": self.run.uri, "run_id": known.get("mlflow")},
        }
        self.spread.init_trackers("diffmine", init_kwargs=wanted)
        if self.first:
            id_of = {"wandb": lambda own: own.id, "mlflow": lambda own: own.info.run_id}
            found = {t.name: id_of[t.name](t.tracker) for t in self.spread.trackers if t.name in id_of}
            self.history.trackers = known | found

    def _continued(self) -> tuple[History, Tensors]:
        """Go on from the newest checkpoint, which the first process reads for all.

        Returns:
            What has happened until then, and the best weights, which the first process alone has.
        """
        with kept_alive():  # gigabytes may come
            found = self.checkpoints.newest(self.training) if self.first else Checkpoint()
        if found.passed_over:
            listed = ", ".join(found.passed_over)
            self.tell(warning=f"finetune: passed over {listed}; begins at step {found.history.step}")
        history = self._common(found.history)
        if history.step:
            self.training.restore(found.tensors, history.step)
        return history, found.best

    def _common(self, own: Any) -> Any:
        """What the first process has."""
        shared = [own]
        if self.spread.num_processes > 1:
            torch.distributed.broadcast_object_list(shared)
        return shared[0]

    def work(self, notice: Callable[[], Any]) -> None:
        """Train to the end, and export."""
        history, wanted, saved = self.history, self.wanted, time.monotonic()
        self.tell(steps=self.steps, began=self.began, step=history.step, error=None)
        if self._missing():
            there = self.spread.num_processes
            self.tell(warning=f"finetune: {there} of {self.most} workers train; more can join when nodes come")
        if history.step < self.steps and self._must_fit():
            for note in self.training.fit(self.ingest.largest_shape(history.step, self.steps)):
                self.tell(warning=f"finetune: {note}")
        if self.held and not history.validations:
            self._validate()
        coming, notices = self._examples(history.step), Notices(notice, self._common, history.step)
        while history.step < self.steps and not self._given_up():
            self._step(next(coming))
            self._beat(lambda: {"step": history.step, "loss": self._loss()})
            last = history.step == self.steps
            if self.held and (last or history.step % wanted.validate_every == 0):
                self._validate()
            if wanted.sample_every and not last and history.step % wanted.sample_every == 0:
                self._show_samples()
            due = notices.new(history.step) or history.step % wanted.checkpoint_every == 0
            if self._agreed(due or (self._missing() and time.monotonic() - saved > _SAVED_S)) and not last:
                self._save()
                saved = time.monotonic()
        self._export()
        self.tell(step=history.step, loss=self._loss())

    def _beat(self, news: Callable[[], dict[str, Any]] = dict) -> None:
        """Tell that this worker is alive, unless it has just done so."""
        if time.monotonic() - self.told > _TOLD_S:
            self.told = time.monotonic()
            self.tell(**news())

    def _must_fit(self) -> bool:
        """Whether a pass may be too large for a GPU; with weights spread over processes, none can try alone."""
        lone = self.wanted.sharding == "none" or self.spread.num_processes == 1
        return self.wanted.micro_batch == "auto" and self.spread.device.type == "cuda" and lone

    def _examples(self, start: int) -> Iterator[list[Example]]:
        """What each step from `start` on sees, made while the step before is computed."""
        batches = self.ingest.batches(start, self.spread.process_index, self.spread.num_processes)

        def make(step: int) -> list[Example]:
            shape, share = next(batches)
            return self.training.examples(step, share, shape)

        with ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(make, start)
            for step in count(start + 1):
                now, coming = coming.result(), ahead.submit(make, step)
                yield now

    def _step(self, examples: Sequence[Example]) -> None:
        step = self.history.step
        try:
            done = self.training.step(step, examples)
        except NonFiniteError as error:
            names = ", ".join(one.image_id for one in examples[:4])
            raise NonFiniteError(f"finetune: {error} (images {names}, ...); lower finetune.learning_rate") from error
        metrics = {
            "loss": round(done.loss, 6), "grad_norm": round(done.grad_norm, 5), "learning_rate": done.learning_rate,
        }  # fmt: skip
        self.history.step += 1
        if step % self.record_every == 0 or self.history.step == self.steps:
            self.history.metrics.append({"step": step, **metrics})
        if step % _LOGGED_STEPS == 0:
            self.spread.log(metrics, step)

    def _validate(self) -> None:
        """Losses of the averaged weights on held-out images; the best weights so far are kept."""
        wanted, history = self.wanted, self.history
        with self.training.averaged() as model:
            found = validate(
                model, self.held, self.text, self.config.seed, wanted.validation_draws, self.training.timesteps,
                self.spread, self.training.at_once, self._beat,
            )  # fmt: skip
        kinds = ("loss", "null_loss", "typicality")
        means = {k: float(np.mean([getattr(own, k) for own in found.values()])) for k in kinds}
        labels = {label: asdict(own) for label, own in found.items()}
        history.validations.append({"step": history.step, **means, "labels": labels})
        if not history.since_best(wanted.best_by):
            self.best = self.training.averages()
        self.spread.log({f"validation/{name}": mean for name, mean in means.items()}, history.step)
        found_by = f"held-out loss {means['loss']:.4f}, typicality {means['typicality']:.3g}"
        self.tell(warning=f"finetune: step {history.step}: {found_by}")

    def _given_up(self) -> bool:
        """Whether the held-out images say that more steps are of no use."""
        wanted = self.wanted
        return wanted.patience is not None and self.history.since_best(wanted.best_by) >= wanted.patience

    def _missing(self) -> bool:
        return self.spread.num_processes < self.most

    def _agreed(self, due: bool) -> bool:
        """What the first process says, where all must take part, as the state is spread over them."""
        if self.wanted.sharding == "none" or self.spread.num_processes == 1:
            return due
        return bool(self.spread.reduce(torch.tensor(float(due and self.first), device=self.spread.device), "sum"))

    def _save(self) -> None:
        self._wait()  # the state is four times the weights: two copies need not be in memory at once
        tensors = self.training.tensors()
        if self.first:
            self.checkpoints.save(tensors, self.best, self.history)
            self._publish()

    def _wait(self) -> None:
        """Until the checkpoint before is written."""
        with kept_alive():
            lost = self.checkpoints.wait()
        if lost:
            self.tell(warning=f"finetune: a checkpoint is lost, training goes on: {lost}")

    def _publish(self) -> None:
        """Put what TensorBoard reads into the run, under a name without time and host: that of the first step in it."""
        for file in Path(self.spread.project_dir).rglob("events.*"):
            self.run.replace(f"tensorboard/events.out.tfevents.{self.began:08d}", file)

    def _loss(self) -> float:
        """Mean loss of the newest steps."""
        return float(np.mean([m["loss"] for m in self.history.metrics[-50:]] or [math.nan]))

    # -------------------------------------------------------------------------------------------------------- samples

    def _samples(self, model: Model) -> Iterator[tuple[str, np.ndarray]]:
        for label, images in samples(model, self.config, [*self.labels], self.ingest.common_shape()):
            self.tell()
            yield label, images

    def _show_samples(self) -> None:
        """Samples of the averaged weights on the way, as one picture and for the trackers."""
        with self.training.averaged() as model:  # all processes sample, as weights may be spread over them
            found = dict(self._samples(model))
        if self.first and found:
            for tracker in self.spread.trackers:
                if hasattr(tracker, "log_images"):
                    log = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    tracker.log_images(found, self.history.step, **log)
            self.run.replace(f"samples/step-{self.history.step:08d}.png", grid(found))

    # --------------------------------------------------------------------------------------------------------- export

    def _export(self) -> None:
        validations = self.history.validations
        best = self.history.best(self.wanted.best_by) if validations else None
        weights = self.best if best else self.training.averages()  # which all processes must ask for
        if best and best["step"] == 0 and self.wanted.best_by == "loss":
            self.tell(warning=f"finetune: {_NO_GAIN}")
        elif best and best["typicality"] <= validations[0]["typicality"]:  # the first one is of the base model
            told = _TELLS_NO_MORE.format(best["typicality"], validations[0]["typicality"])
            self.tell(warning=f"finetune: {told}")
        if not self.first:
            return
        self._wait()
        self._publish()
        if self.run.committed("model") is not None:  # another group of workers was faster
            return
        del self.training, self.text  # the device may not hold another model beside what was trained
        self.spread.free_memory()
        clear_device_cache(garbage_collection=True)
        for leftover in ("model", part_name("samples", 0)):  # of an export that was cut off
            self.run.remove(leftover)
        model = self.open_base()
        if self.wanted.lora_rank is not None:
            model.adapt(self.wanted.lora_rank, self.config.seed)
        put_weights(model, weights)
        if self.wanted.lora_rank is not None:
            model.merge()
        freeze(model.unet)
        with tempfile.TemporaryDirectory() as folder:
            model.save(Path(folder))
            texts = {
                "README.md": model_card(self.config, self.ingest.images, self.labels, self.history),
                "metrics.jsonl": _lines(self.history.metrics),
                "validation.jsonl": _lines([{**v, "exported": v is best} for v in validations]),
            }
            for name, text in texts.items():
                if text:
                    (Path(folder) / name).write_text(text, "utf-8")
            with kept_alive():
                self.run.upload(Path(folder), "model")
        rows = [
            {"label": label, "index": i, "image": {"bytes": png(pixels), "path": None}}
            for label, images in self._samples(model)
            for i, pixels in enumerate(images)
        ]
        if rows:
            self.run.write_part("samples", 0, rows_to_table("samples", rows))


class Notices:
    """What is known of nodes that are about to be taken away: looked for every 1, 2, 4 or 8 steps, at the same steps by
    all processes, as each look waits for all of them.

    Args:
        common: a value -> the first process's.
    """

    def __init__(self, look: Callable[[], Any], common: Callable[[Any], Any], step: int) -> None:
        self._look, self._common, self._every = look, common, 1
        self._known, self._step, self._time = None, step, time.monotonic()

    def new(self, step: int) -> bool:
        """Whether something is known after a step that was not known before; is asked after each."""
        if step % self._every:
            return False
        before, self._known, now = self._known, self._look(), time.monotonic()
        steps = (step - self._step) * _NOTICE_S / max(now - self._time, 1e-9)  # that take so long
        self._every = self._common(2 ** int(np.log2(np.clip(steps, 1, _NOTICE_STEPS))))
        self._step, self._time = step, now
        return bool(self._known != before)


def _lines(found: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in found)

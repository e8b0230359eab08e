"""A training's state -> checkpoints/ of the run, written while training goes on; and back.

A checkpoint is a folder: `state.safetensors`, then `done.json` with its digest and what has happened so far. One
without `done.json` was being written when its process died; one whose bytes differ, or that another model made, is
passed over.
"""

import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from diffmine.diffusion.training import Training
from diffmine.errors import StoreError
from diffmine.run import Run
from diffmine.store import file_digest

FOLDER = "checkpoints"
Tensors = dict[str, Tensor]
_KEPT = 2
_LOST_IN_A_ROW = 3  # that end a training: the store is not busy any more, it is gone
_STATE = "state.safetensors"
_BEST = "best/"  # names of the best validated weights begin with it


@dataclass
class History:
    """What has happened in a training."""

    step: int = 0  # steps done
    metrics: list[dict[str, Any]] = field(default_factory=list)  # of each step, or of every n-th
    validations: list[dict[str, Any]] = field(default_factory=list)  # step, loss, null_loss, typicality, labels
    trackers: dict[str, str] = field(default_factory=dict)  # tracker -> what it calls this training

    def best(self, by: str) -> dict[str, Any]:
        """The validation with the least `loss` or the largest `typicality`, the first of equals."""
        return min(self.validations, key=lambda v: v["loss"] if by == "loss" else -v["typicality"])

    def since_best(self, by: str) -> int:
        """Validations after the best one."""
        return len(self.validations) - 1 - self.validations.index(self.best(by)) if self.validations else 0


@dataclass
class Checkpoint:
    """A checkpoint to go on from; empty where there is none."""

    history: History = field(default_factory=History)
    tensors: Tensors = field(default_factory=dict)  # the state
    best: Tensors = field(default_factory=dict)  # weights
    passed_over: list[str] = field(default_factory=list)  # newer checkpoints, and what is wrong with each


class Checkpoints:
    """Those of a run. One is written at a time: `wait` comes before the next is asked for."""

    def __init__(self, run: Run) -> None:
        self.run, self.lost = run, 0  # one after the other
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def save(self, tensors: Tensors, best: Tensors, history: History) -> None:
        """Write a checkpoint in the background. The tensors must not change any more; the history may.

        Args:
            best: averaged weights of the best validation; empty where there was none.
        """
        done = {
            "step": history.step, "metrics": [*history.metrics], "validations": [*history.validations],
            "trackers": history.trackers,
        }  # fmt: skip
        assert self._writing is None
        whole = tensors | {f"{_BEST}{name}": weights for name, weights in best.items()}
        self._writing = self._writer.submit(self._write, whole, done)

    def wait(self) -> str | None:
        """Until what was asked for is written; or why it could not be, as the weights in memory are good.

        Raises:
            StoreError: it could not be, and neither could those before it.
        """
        writing, self._writing = self._writing, None
        try:
            if writing is not None:
                writing.result()
                self.lost = 0
        except StoreError as error:
            self.lost += 1
            if self.lost == _LOST_IN_A_ROW:
                raise
            return str(error)
        return None

    def _write(self, tensors: Tensors, done: dict[str, Any]) -> None:
        folder = f"{FOLDER}/step-{done['step']:08d}"
        with tempfile.TemporaryDirectory() as scratch:  # streamed to the store: a checkpoint is four times the UNet
            file = Path(scratch) / _STATE
            save_file(tensors, file)
            digest = file_digest(file)
            self.run.replace(f"{folder}/{_STATE}", file)
        self.run.replace(f"{folder}/done.json", json.dumps({**done, "sha256": digest}).encode())
        whole = [name for name, _ in self._written() if name <= folder]  # newer ones were passed over
        for name in self._names():
            if f"{FOLDER}/{name}" not in whole[:_KEPT]:
                self.run.remove(f"{FOLDER}/{name}")

    def newest_digest(self) -> str | None:
        """Of the newest checkpoint, as it was written; None where there is none."""
        return next((done["sha256"] for _, done in self._written()), None)

    def newest(self, training: Training) -> Checkpoint:
        """The newest whole checkpoint of such a training."""
        passed_over: list[str] = []
        for folder, done in self._written():
            digest = done.pop("sha256")
            with tempfile.TemporaryDirectory() as scratch:
                file = Path(scratch) / _STATE
                self.run.fetch(f"{folder}/{_STATE}", file)
                if file_digest(file) != digest:
                    passed_over.append(f"{folder}, whose bytes have changed")
                    continue
                tensors = load_file(file)
            best = {name.removeprefix(_BEST): tensors.pop(name) for name in [*tensors] if name.startswith(_BEST)}
            if training.takes(tensors):
                return Checkpoint(History(**done), tensors, best, passed_over)
            passed_over.append(f"{folder}, which is of another model")
        return Checkpoint(passed_over=passed_over)

    def _written(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Folders of the checkpoints that were written to the end, newest first, and what their `done.json` says."""
        for name in self._names():
            if self.run.exists(f"{FOLDER}/{name}/done.json"):
                yield f"{FOLDER}/{name}", json.loads(self.run.read(f"{FOLDER}/{name}/done.json"))

    def _names(self) -> list[str]:
        """Folders of checkpoints, newest first."""
        return sorted((name for name in self.run.names(FOLDER) if name.startswith("step-")), reverse=True)

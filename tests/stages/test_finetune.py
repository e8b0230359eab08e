"""Training is started again as long as it gets further, and never waited for in vain; Ray is pretended."""

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import TrainingFailedError

from diffmine.errors import InputError
from diffmine.run import Run
from diffmine.stages import finetune


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is on the board."""
    monkeypatch.setattr(finetune.ray, "get", lambda reference: reference)
    return {"beat": 1, "error": None}


def watched(run: Run, state: dict[str, Any], fit: Callable[[], None]) -> None:
    board = SimpleNamespace(read=SimpleNamespace(remote=lambda: state))
    list(finetune._news(lambda: SimpleNamespace(fit=fit), board, run))


@pytest.mark.parametrize(("checkpoints_of", "starts"), [([3, 6, 9], 4), ([3, 6, 6, 9], 3), ([None], 1)])
def test_training_is_started_again_as_long_as_it_gets_further(
    tmp_path: Path, state: dict[str, Any], checkpoints_of: list[int | None], starts: int
) -> None:
    """Each start ends in crashes, after a checkpoint of some step; the fourth ends well."""
    run, started = Run(str(tmp_path)), []

    def fit() -> None:
        started.append(1)
        if len(started) > len(checkpoints_of):
            return
        if (step := checkpoints_of[len(started) - 1]) is not None:
            run.replace(f"checkpoints/step-{step:08d}/done.json", b"{}")
        raise TrainingFailedError("a worker died")

    if starts > len(checkpoints_of):
        watched(run, state, fit)
    else:
        with pytest.raises(TrainingFailedError):
            watched(run, state, fit)
    assert len(started) == starts


def test_what_one_worker_says_ends_training_although_the_others_wait(
    tmp_path: Path, state: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "_GOODBYE_S", 0.1)
    monkeypatch.setattr(finetune, "_POLL_S", 0.05)
    stop = threading.Event()
    state["error"] = InputError("the node has no room for the model")
    with pytest.raises(InputError, match="no room"):
        watched(Run(str(tmp_path)), state, stop.wait)
    stop.set()

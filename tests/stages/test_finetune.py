"""Training is started again as long as it gets further, and ends with what a worker says; Ray is pretended."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import TrainingFailedError

from diffmine.errors import InputError, NonFiniteError
from diffmine.stages import finetune
from diffmine.stages.room import Room


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is on the board."""
    monkeypatch.setattr(finetune.ray, "get", lambda reference: reference)
    return {"beat": 1, "error": None}


def watched(state: dict[str, Any], fit: Callable[[], None], reached: Callable[[], str | None] = lambda: None) -> None:
    board = SimpleNamespace(read=SimpleNamespace(remote=lambda: state))
    list(finetune._news(lambda: SimpleNamespace(fit=fit), board, reached))


@pytest.mark.parametrize(("checkpoints", "starts"), [("abc", 4), ("aab", 2), ([None], 1)])
def test_training_is_started_again_as_long_as_it_gets_further(
    state: dict[str, Any], checkpoints: Sequence[str | None], starts: int
) -> None:
    """Each start ends in crashes, after a checkpoint; the one after the last ends well."""
    started, there = [], [None]

    def fit() -> None:
        started.append(1)
        if len(started) <= len(checkpoints):
            there[0] = checkpoints[len(started) - 1]
            raise TrainingFailedError("a worker died")

    with nullcontext() if starts > len(checkpoints) else pytest.raises(TrainingFailedError):
        watched(state, fit, lambda: there[0])
    assert len(started) == starts


def test_training_ends_with_what_a_worker_says(state: dict[str, Any]) -> None:
    def crash() -> None:
        state["error"] = InputError("the node has no room for the model")
        raise TrainingFailedError("a worker died")

    def stop() -> None:
        state["error"] = NonFiniteError("the loss of step 3 is nan")

    with pytest.raises(InputError, match="no room"):
        watched(state, crash)
    with pytest.raises(NonFiniteError, match="step 3"):
        watched(state, stop)


@pytest.mark.parametrize(("address", "there"), [(None, 0), ("192.0.2.1:6379", 1)])
def test_the_end_of_an_embedded_ray_is_what_frees_the_workers_place(
    address: str | None, there: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a cluster, which stays, Ray Train's own guard does; the case with an address is the control."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    callbacks = finetune._trainer({}, 1, Room(1), str(tmp_path))._create_default_callbacks()
    assert [type(c).__name__ for c in callbacks].count("PlacementGroupCleanerCallback") == there

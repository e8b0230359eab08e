"""No silent waits: what cannot run is refused, what does not come ends with an error."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import RpcError

from diffmine.errors import StageError, StallError
from diffmine.stages import watch
from diffmine.stages.room import Room, require
from diffmine.stages.session import Context
from diffmine.stages.typicality import typicality
from diffmine.stages.watch import unless_stalled

pytestmark = pytest.mark.usefixtures("ray_session")


def context(seconds: float) -> Any:
    return SimpleNamespace(
        config=SimpleNamespace(compute=SimpleNamespace(stall_seconds=seconds)), progress=SimpleNamespace(say=print)
    )


def test_items_come_through_in_order_and_errors_too() -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise KeyError("five")

    found: list[int] = []
    with pytest.raises(KeyError, match="five"):
        found.extend(unless_stalled(context(9), "s", items(), str, Room(1)))
    assert found == [0, 1, 2, 3, 4]
    assert list(unless_stalled(context(9), "s", [], str, Room(1))) == []


def test_silence_ends_with_an_error_that_says_what_was_waited_for() -> None:
    never = threading.Event()

    def items() -> Iterator[int]:
        yield 0
        never.wait()

    stalled = unless_stalled(context(0.3), "typicality", items(), lambda done: f"{7 - done} shards", Room(1, 1))
    assert next(stalled) == 0
    with pytest.raises(StallError) as caught:
        next(stalled)
    never.set()
    text = str(caught.value)
    assert text.startswith("typicality: no progress for 0 s (compute.stall_seconds) while waiting for 6 shards.")
    assert re.search(
        r"A process needs 1 CPU and 1 GPU; free: 4 CPUs, 0 GPUs, \S+ GiB of memory of 4 CPUs, 0 GPUs, ", text
    )


@pytest.mark.parametrize("says", ["nothing", "alive", "kept alive", "alive for ever"])
def test_one_that_says_it_is_alive_may_take_longer(monkeypatch: pytest.MonkeyPatch, says: str) -> None:
    """Twice as long as `stall_seconds`; not for ever, as its process may die and begin again and again."""
    monkeypatch.setattr(watch, "_LOOK_S", 0.3)
    monkeypatch.setattr(watch, "_LONGEST", 1.5 if says == "alive for ever" else 20)

    @ray.remote(num_cpus=1)
    def work(seconds: float) -> str:
        watch._LOOK_S = 0.3
        with watch.kept_alive() if says == "kept alive" else nullcontext():
            for _ in range(round(seconds / 0.1)):
                time.sleep(0.1)
                if says.startswith("alive"):
                    watch.alive()
        return "done"

    ray.get(work.remote(0.1))  # what is imported at the start takes its time
    task = work.remote(4)
    found = unless_stalled(context(2), "s", (ray.get(one) for one in [task]), str, Room(1))
    if says in ("alive", "kept alive"):
        assert list(found) == ["done"]
    else:
        with pytest.raises(StallError):
            list(found)
        ray.wait([task])  # the next test would see that it is at work


@pytest.mark.parametrize("asked_for", ["", "2 x gpu_spot asked for (the last one refused: no capacity)"])
def test_a_wait_for_nodes_is_no_stall(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], asked_for: str
) -> None:
    monkeypatch.setattr(watch, "_LOOK_S", 0.1)
    monkeypatch.setattr(watch, "_TELL_S", 0.3)
    monkeypatch.setattr(watch, "nodes_asked_for", lambda: asked_for)
    items = (time.sleep(2 if asked_for else 9) or "done" for _ in range(1))
    found = unless_stalled(context(1), "features", items, lambda _: "shard 0", Room(1, 1))
    if asked_for:
        assert list(found) == ["done"]
        assert f"; {asked_for}; waiting for shard 0; free: 4 CPUs" in capsys.readouterr().out
    else:
        with pytest.raises(StallError):
            list(found)


@pytest.mark.parametrize("says", [[True] * 9, [True, False] * 9, [RpcError("Deadline Exceeded")] * 9])
def test_only_what_is_said_twice_that_nothing_can_come_ends_a_wait(
    monkeypatch: pytest.MonkeyPatch, says: list[Any]
) -> None:
    """Nor does a head end it that is too busy to say anything."""

    def never(_: Room) -> bool:
        if isinstance(found := says.pop(0), Exception):
            raise found
        return bool(found)

    monkeypatch.setattr(watch, "_LOOK_S", 0.1)
    monkeypatch.setattr(watch, "never", never)
    expected = "no node type of the cluster holds a process" if says[1] is True else "no progress for"
    with pytest.raises(StallError, match=expected):
        list(
            unless_stalled(context(0.7), "features", (time.sleep(3) for _ in range(1)), lambda _: "shard 0", Room(1, 1))
        )


@pytest.mark.parametrize(
    ("each", "count", "beside", "needed"),
    [
        (Room(1, 1), 1, 0.5, "a process with 1 CPU and 1 GPU on one node, and 0.5 CPU to read beside"),
        (Room(1), 8, 0, "8 x 1 CPU"),
        (Room(4), 1, 0.5, "a process with 4 CPU on one node, and 0.5 CPU to read beside"),
        (Room(1, 0, 1 << 50), 1, 0, "a process with 1 CPU and 1048576.0 GiB of memory on one node"),
    ],
)
def test_what_the_cluster_can_never_give_is_refused(each: Room, count: int, beside: float, needed: str) -> None:
    with pytest.raises(StageError) as caught:
        require("features", each, count, beside)
    assert str(caught.value).startswith(f"features: needs {needed}; the cluster has 4 CPUs, 0 GPUs, ")
    require("features", Room(1, 0, 1 << 30), 3, 0.5)


def test_a_stage_whose_processors_are_taken_ends(unscored: Callable[..., Context]) -> None:
    """Somebody else's actor holds the cluster: the stage says so instead of waiting for ever."""

    @ray.remote(num_cpus=4)
    class Hog:
        def ready(self) -> bool:
            return True

    hog = Hog.remote()
    assert ray.get(hog.ready.remote())
    expected = r"waiting for shards 0, 1, 2\. A process needs 1 CPU and 1\.0 GiB of memory; free: 0 CPUs"
    with pytest.raises(StallError, match=expected):
        typicality(unscored(compute__stall_seconds=4))
    ray.kill(hog)

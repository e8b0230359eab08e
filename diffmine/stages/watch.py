"""Never a silent wait: what a stage needs against what the cluster has, and an error when nothing comes any more."""

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
import ray._private.state

from diffmine.errors import StageError, StallError
from diffmine.progress import duration
from diffmine.stages.session import Context, resources

_T = TypeVar("_T")
Inbox = queue.SimpleQueue[tuple[Any, BaseException | None]]
_TELL_S = 60.0  # of silence, before the user is told what is waited for
_END = object()


@dataclass(frozen=True)
class Room:
    """What a process takes of a node."""

    cpus: float
    gpus: float = 0.0

    def __str__(self) -> str:
        return f"{self.cpus:g} CPU" + (f" and {self.gpus:g} GPU" if self.gpus else "")


def require(stage: str, each: Room, count: int = 1, beside: float = 0.0) -> None:
    """Refuse to start what could never run: `count` processes of `each`, and `beside` CPUs for what feeds them.

    On a cluster that grows, what its configuration allows counts as well as what is there.

    Raises:
        StageError: with what is needed and what there is.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fitting = sum(_times(each, node.get("CPU", 0), node.get("GPU", 0)) for node in nodes)
    total = sum(node.get("CPU", 0) for node in nodes)
    most = ray._private.state.state.get_max_resources_from_cluster_config()
    if most is not None:
        fitting = max(fitting, _times(each, most.get("CPU", 0), most.get("GPU", 0)))
        total = max(total, most.get("CPU", 0))
    if fitting < count or total < count * each.cpus + beside:
        extra = f", and {beside:g} CPU to read beside" if beside else ""
        needed = f"{count} x {each}" if count > 1 else f"a process with {each}"
        raise StageError(
            f"{stage}: needs {needed} on one node{extra}; the cluster {'can grow to' if most else 'has'} "
            f"{resources(most or ray.cluster_resources())}"
        )


def _times(each: Room, cpus: float, gpus: float) -> int:
    by_cpu = cpus / each.cpus if each.cpus else float("inf")
    return int(min(by_cpu, gpus / each.gpus if each.gpus else float("inf")))


def unless_stalled(
    context: Context, stage: str, items: Iterable[_T], awaited: Callable[[int], str], needs: Room
) -> Iterator[_T]:
    """The items as they come. They are taken in a thread of their own, so that the wait for one can end.

    Args:
        awaited: what is waited for after so many items: "shard 3 and 17 more".
        needs: of each process that makes items.

    Raises:
        StallError: nothing came for `compute.stall_seconds`. Each minute of silence before, the user is told.
    """
    inbox: Inbox = queue.SimpleQueue()

    def take() -> None:
        try:
            for item in items:
                inbox.put((item, None))
            inbox.put((_END, None))
        except BaseException as error:
            inbox.put((_END, error))

    threading.Thread(target=take, daemon=True).start()
    for done in itertools.count():
        item, error = _wait(context, stage, inbox, awaited(done), needs)
        if error is not None:
            raise error
        if item is _END:
            return
        yield item


def _wait(context: Context, stage: str, inbox: Inbox, awaited: str, needs: Room) -> tuple[Any, BaseException | None]:
    start, seconds = time.monotonic(), context.config.compute.stall_seconds
    while (left := seconds - (time.monotonic() - start)) > 0:
        try:
            return inbox.get(timeout=min(left, _TELL_S))
        except queue.Empty:
            if left > _TELL_S:
                waited = duration(time.monotonic() - start)
                context.progress.say(f"{stage}: nothing came for {waited}; waiting for {awaited}; {_free()}")
    raise StallError(
        f"{stage}: no progress for {duration(seconds)} (compute.stall_seconds) while waiting for {awaited}. "
        f"A process needs {needs}; {_free()}. The same command continues the run."
    )


def in_background(call: Callable[[], _T]) -> "Future[_T]":
    """Start a call in a thread that nobody has to wait for."""
    future: Future[_T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _free() -> str:
    return f"free: {resources(ray.available_resources())} of {resources(ray.cluster_resources())}"

"""Never a silent wait: what is waited for is said, and an error ends the run when nothing comes any more."""

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import ray

from diffmine.errors import StallError
from diffmine.progress import duration
from diffmine.stages.room import Room, never, resources
from diffmine.stages.session import Context

_T = TypeVar("_T")
Inbox = queue.SimpleQueue[tuple[Any, BaseException | None]]
_LOOK_S = 10.0  # of silence, before the autoscaler is asked whether it ends
_TELL_S = 60.0  # before the user is told what is waited for
_END = object()


def unless_stalled(
    context: Context, stage: str, items: Iterable[_T], awaited: Callable[[int], str], needs: Room
) -> Iterator[_T]:
    """The items as they come. They are taken in a thread of their own, so that the wait for one can end.

    Args:
        awaited: what is waited for after so many items: "shard 3 and 17 more".
        needs: of each process that makes items.

    Raises:
        StallError: nothing came for `compute.stall_seconds`, or before that when the cluster's autoscaler says that no
            node type holds the process. Each minute of silence before, the user is told.
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
    start, seconds, told = time.monotonic(), context.config.compute.stall_seconds, 0
    while (left := seconds - (time.monotonic() - start)) > 0:
        try:
            return inbox.get(timeout=min(left, _LOOK_S))
        except queue.Empty:
            silent = time.monotonic() - start
        if never(needs):
            raise StallError(
                f"{stage}: waited {duration(silent)} for {awaited}; no node type of the cluster holds a process with "
                f"{needs}; {_free()}"
            )
        if silent // _TELL_S > told and silent < seconds:
            told += 1
            context.progress.say(f"{stage}: nothing came for {duration(silent)}; waiting for {awaited}; {_free()}")
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

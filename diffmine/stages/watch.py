"""Never a silent wait: what is waited for is said, and an error ends the run when nothing comes any more.

One item may take longer than the wait for it may: whoever makes it says from time to time that it is `alive`.
"""

import itertools
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import ray
from ray.exceptions import RpcError
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from diffmine.errors import StallError
from diffmine.progress import duration
from diffmine.stages.room import Room, never, nodes_asked_for, resources
from diffmine.stages.session import Context

_T = TypeVar("_T")
Inbox = queue.SimpleQueue[tuple[Any, BaseException | None]]
_LOOK_S = 10.0  # of silence, before the autoscaler is asked whether it ends
_HOPELESS = 2  # such looks in which it says that nothing can come
_TELL_S = 60.0  # before the user is told what is waited for, then after twice as long, and so on
_LONGEST = 20  # times `compute.stall_seconds` for one item: processes that are alive may be dying again and again
_END = object()
_told = -math.inf  # when this process last said that it is alive


def unless_stalled(
    context: Context, stage: str, items: Iterable[_T], awaited: Callable[[int], str], needs: Room
) -> Iterator[_T]:
    """The items as they come. They are taken in a thread of their own, so that the wait for one can end.

    Args:
        awaited: what is waited for after so many items: "shard 3 and 17 more".
        needs: of each process that makes items.

    Raises:
        StallError: nothing came, nobody was alive, and no node was on its way, for `compute.stall_seconds`; or nothing
            came for 20 times as long; or, before that, it turns out that no node type of the cluster holds the process.
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
        item, error = _wait(context, stage, inbox, partial(awaited, done), needs)
        if error is not None:
            raise error
        if item is _END:
            return
        yield item


def _wait(
    context: Context, stage: str, inbox: Inbox, awaited: Callable[[], str], needs: Room
) -> tuple[Any, BaseException | None]:
    start = alive_at = now = time.monotonic()
    hopeless = 0  # looks one after the other: a node may come up between what the autoscaler says of it
    seconds, tell, heard = context.config.compute.stall_seconds, _TELL_S, _internal_kv_get(_key())
    while now - alive_at < seconds and now - start < _LONGEST * seconds:
        try:
            return inbox.get(timeout=min(seconds - (now - alive_at), _LOOK_S))
        except queue.Empty:
            now = time.monotonic()
        try:
            nodes, hopeless = nodes_asked_for(), hopeless + 1 if never(needs) else 0
        except RpcError:  # a busy head ends no run
            nodes = ""
        if hopeless == _HOPELESS:
            raise StallError(
                f"{stage}: waited {duration(now - start)} for {awaited()}; no node type of the cluster holds a process "
                f"with {needs}; {_free()}"
            )
        if (beat := _internal_kv_get(_key())) != heard:
            heard, alive_at = beat, now
        if nodes:
            alive_at = now
        if now - start >= tell:
            tell *= 2
            at_work = nodes or ("processes are at work" if now - alive_at < _TELL_S else "")
            context.progress.say(
                f"{stage}: nothing came for {duration(now - start)}; {at_work}{'; ' if at_work else ''}"
                f"waiting for {awaited()}; {_free()}"
            )
    raise StallError(
        f"{stage}: no progress for {duration(now - start)} (compute.stall_seconds) while waiting for {awaited()}. "
        f"A process needs {needs}; {_free()}. The same command continues the run."
    )


def alive() -> None:
    """Tell the driver that work goes on; does nothing outside of Ray."""
    global _told
    now = time.monotonic()
    if now - _told > _LOOK_S and ray.is_initialized():
        _told = now
        _internal_kv_put(_key(), os.urandom(8), overwrite=True)


@contextmanager
def kept_alive() -> Iterator[None]:
    """As if `alive` were called all the time: for calls that take long, but not for ever, and come back only then."""
    done = threading.Event()

    def tell() -> None:
        while not done.wait(1):
            alive()

    threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _key() -> str:
    """Where Ray keeps what the processes of this job say; no process more is needed for it."""
    return f"diffmine/alive/{ray.get_runtime_context().get_job_id()}"


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

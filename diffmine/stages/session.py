"""config -> a connection to Ray, and what a stage may know of it. The one place that starts and stops Ray."""

import logging
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray._private.utils import get_num_cpus

from diffmine.config import Config
from diffmine.errors import InputError
from diffmine.progress import Progress
from diffmine.run import Run
from diffmine.stages.room import cluster_status, require_device, resources

_ANSWER_S = 10  # that a cluster may take to answer
_OBJECT_STORE_BYTES = 1 << 30  # shards in flight; enough for 8 shards of 64 images of 512 x 768
_FAILED_STARTS = 3  # of actors, one after the other, that a stage goes on after
ENVIRONMENT = {  # of the processes of an embedded Ray, unless it is set already
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads of two workers starve each other
    # glibc gives a large tensor's memory back and fetches it again, page by page: up to a tenth of a UNet pass on a CPU
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
}


@dataclass(frozen=True)
class Context:
    """What every stage works with."""

    run: Run
    config: Config
    progress: Progress


@dataclass(frozen=True)
class Result:
    """What a stage has written."""

    files: dict[str, str]  # name -> SHA-256
    marker: dict[str, Any] = field(default_factory=dict)  # what else its marker records, however often it was cut off
    newly: int | None = None  # images or steps that were done since its last start


@contextmanager
def connected(context: Context) -> Iterator[None]:
    """Join the Ray cluster of `RAY_ADDRESS` (set for submitted jobs), or run an embedded Ray and stop it at the end."""
    if ray.is_initialized():
        yield
        return
    log = Path(tempfile.gettempdir()) / f"diffmine-ray-{os.getpid()}.log"
    with _native_messages_to(log):
        address, on_end = os.environ.get("RAY_ADDRESS"), signal.getsignal(signal.SIGTERM)
        if address:
            _require_lasting(context.run)
            _join(address, context.config.compute.open_cluster)
        else:
            start_embedded()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_end)  # Ray has put its own there, which ends the process without a word
        kind = f"joined the cluster at {address}" if address else "embedded"
        context.progress.say(f"ray: {kind}, {resources(ray.cluster_resources())}; its own messages are in {log}")
        try:
            require_device(context.config)
            yield
        except SystemExit:  # the process ends; Ray's end would be noticed by threads that wait for it, and end it first
            raise
        except BaseException:
            ray.shutdown()
            raise
        else:
            ray.shutdown()


def _require_lasting(run: Run) -> None:
    """
    Raises:
        InputError: a submitted job's output lies in its copy of the working directory, as a relative path does.
    """
    if run.local and "runtime_resources" in Path(run.root).parts:
        raise InputError(
            f"output: {run.root} is in the copy of the working directory that Ray keeps for this job only; give a URI, "
            "or an absolute path that all nodes share"
        )


def _join(address: str, open_cluster: bool) -> None:
    """
    Raises:
        InputError: nothing answers there; the token is missing or wrong; the cluster asks for none, so that anyone who
            reaches it can run code there; its Ray or Python is another.
    """
    if not open_cluster and not is_token_auth_enabled():
        raise InputError(
            f"the Ray cluster at {address} would be joined without a token, and anyone who reaches such a cluster can "
            "run code on it; set RAY_AUTH_MODE=token on all its nodes and here, or accept that with "
            "--compute.open_cluster true"
        )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():  # otherwise "auto": Ray looks on this machine. Ray itself would try for minutes, then exit.
        try:
            socket.create_connection((host, int(port)), _ANSWER_S).close()
            cluster_status(f"{host}:{port}")
        except OSError as error:
            raise InputError(f"no Ray cluster answers at {address} (RAY_ADDRESS): {error}") from error
        except ray.exceptions.RayError as error:
            if "InvalidAuthToken" not in str(error):
                raise InputError(f"the Ray cluster at {address} (RAY_ADDRESS) does not answer: {error}") from error
            raise InputError(
                f"the Ray cluster at {address} does not take the token; set RAY_AUTH_MODE=token, and "
                "RAY_AUTH_TOKEN_PATH to a file with the token that the cluster was started with"
            ) from error
    _set_up_data()
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (RuntimeError, ConnectionError) as error:
        text = " ".join(str(error).split())
        raise InputError(f"the Ray cluster at {address} cannot be joined: {text}") from error


@contextmanager
def _native_messages_to(log: Path) -> Iterator[None]:
    """Ray's C++ side and its loggers write to file descriptor 2: that becomes `log`, and Python's stderr stays."""
    if sys.stderr is not sys.__stderr__:  # somebody captures it already
        yield
        return
    terminal, original = os.dup(2), sys.stderr
    with log.open("ab") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = os.fdopen(terminal, "w", buffering=1)
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        sys.stderr.close()
        sys.stderr = original


def start_embedded(cpus: int | None = None) -> None:
    """Ray in this process's own children, without a dashboard.

    One logical CPU more than there are cores feeds the model's actors, which take a core each: with none left for the
    reading tasks Ray would wait for ever.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    _set_up_data()
    ray.init(
        address="local", num_cpus=(cpus or _cores()) + 1, include_dashboard=False, log_to_driver=False,
        logging_level=logging.ERROR, object_store_memory=_OBJECT_STORE_BYTES,
    )  # fmt: skip


def _cores() -> int:
    """Cores that this process may use: a container, a batch system or `taskset` may allow fewer than there are."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, int(get_num_cpus(override_docker_cpu_warning=True))))


def _set_up_data() -> None:
    """Ray Data as the stages need it."""
    settings = ray.data.DataContext.get_current()
    settings.enable_progress_bars = False  # ours say how far a stage is
    settings.execution_no_progress_timeout_s = -1  # `unless_stalled` knows who is alive, and what the user allows
    # A node that cannot load the model now, or at all, does not end the work of the others.
    settings.actor_init_retry_on_errors, settings.actor_init_max_retries = True, 1
    settings.max_consecutive_actor_init_deaths = _FAILED_STARTS


def describe(context: Context) -> dict[str, Any]:
    """What ran: versions, machine, revision, seed, command."""
    packages = (
        "diffmine",
        "ray",
        "torch",
        "diffusers",
        "transformers",
        "pyarrow",
        "numpy",
        "pillow",
        "faiss-cpu",
    )
    return {
        "versions": {"python": platform.python_version(), **{p: v for p in packages if (v := _version(p))}},
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count()},
        "git_revision": _git_revision(),
        "seed": context.config.seed,
        "command": sys.argv,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()

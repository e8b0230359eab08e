"""Processes that a test starts, each in a session of its own, and what of that session is still alive."""

import os
import signal
import subprocess
import time

import psutil


def family(process: subprocess.Popen) -> set[int]:
    """Pids of the process's session that are alive: Ray's processes stay in it, and stay in it without the driver."""
    return {pid for pid in psutil.pids() if _session(pid) == process.pid and _lives(pid)}


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def end(process: subprocess.Popen) -> None:
    """Whatever is left of its session is ended, and nothing else."""
    while left := family(process):
        for member in left:
            kill(member)
        time.sleep(0.05)
    process.wait()


def name(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline()).strip()[:80]
    except psutil.NoSuchProcess:
        return "gone"


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return None


def _lives(pid: int) -> bool:
    """A dead process that its parent has not asked for does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

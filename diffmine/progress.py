"""What a stage has done -> lines on standard error: which stage, how much, how fast, time left."""

import os
import sys
import time
from typing import TextIO

_PLAIN_INTERVAL_S = 15.0  # between lines when nobody watches a terminal
_LIVE_INTERVAL_S = 0.2


class Progress:
    """One line per event; on a terminal the current stage's line is rewritten in place."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._given = stream
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._stage, self._unit = "", ""
        self._total = self._done = self._before = 0
        self._started = self._shown = 0.0
        self._first = (0.0, 0)  # when units first came, and how many were done then
        self._note = ""

    @property
    def _stream(self) -> TextIO:
        return self._given or sys.stderr  # looked up anew: while Ray runs it is another object

    def start(self, stage: str, total: int = 0, unit: str = "", done: int = 0) -> None:
        """Begin a stage of `total` units, `done` of them by an earlier run."""
        self._stage, self._unit, self._total, self._done, self._before, self._note = stage, unit, total, done, done, ""
        self._started = self._shown = time.monotonic()
        self._first = (0.0, 0)
        resumed = f", {done} of them done before" if done else ""
        self._line(f"{stage}: {f'{total} {unit}{resumed}' if total else 'started'}", keep=not self._live)

    def advance(self, units: int, note: str = "") -> None:
        """`units` more are done."""
        self._done += units
        self._note = note or self._note
        now = time.monotonic()
        if not self._first[0]:
            self._first = (now, self._done)
        if now - self._shown >= (_LIVE_INTERVAL_S if self._live else _PLAIN_INTERVAL_S):
            self._shown = now
            self._line(self._state(now), keep=not self._live)

    def finish(self, note: str = "") -> None:
        """The stage is complete."""
        seconds = time.monotonic() - self._started
        fresh = self._done - self._before
        speed = f", {fresh / seconds:.3g} {self._unit}/s" if fresh and seconds > 1 else ""
        self._line(f"{self._stage}: done in {duration(seconds)}{speed}{f' ({note})' if note else ''}", keep=True)

    def say(self, text: str) -> None:
        """One line about something that a person should know."""
        self._line(text, keep=True)

    def _state(self, now: float) -> str:
        """How fast the stage is since its first units came: before, models were loaded."""
        since, done = self._first
        rate = (self._done - done) / (now - since) if now > since else 0.0
        speed = f", {rate:.3g}/s, {duration((self._total - self._done) / rate)} left" if rate else ""
        note = f", {self._note}" if self._note else ""
        return f"{self._stage}: {self._done}/{self._total} {self._unit}{speed}{note}"

    def _line(self, text: str, keep: bool) -> None:
        text = f"\r\x1b[2K{text}" if self._live else text
        self._stream.write(text + ("\n" if keep else ""))
        self._stream.flush()


def duration(seconds: float) -> str:
    """42 -> '42 s', 200 -> '3 min 20 s', 7500 -> '2 h 5 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"

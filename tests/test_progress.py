"""What a user reads while a stage runs."""

import io

import pytest

from diffmine import progress
from diffmine.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_the_time_left_does_not_count_the_start(clock: list[float]) -> None:
    """A model is loaded for a minute, then ten units a second are done; an earlier run did 40."""
    out = io.StringIO()
    told = Progress(out)
    told.start("typicality", 1000, "images", done=40)
    for second in (60, 80):
        clock[0] = 100 + second
        told.advance(160 if second == 60 else 200)
    assert out.getvalue().splitlines() == [
        "typicality: 1000 images, 40 of them done before",
        "typicality: 200/1000 images",
        "typicality: 400/1000 images, 10/s, 1 min 0 s left",
    ]


def test_a_finished_stage_says_how_long_it_took_in_all(clock: list[float]) -> None:
    out = io.StringIO()
    told = Progress(out)
    told.start("latents", 100, "images")
    clock[0] += 50
    told.advance(100)
    told.finish("1 failed")
    assert out.getvalue().splitlines()[-1] == "latents: done in 50 s, 2 images/s (1 failed)"

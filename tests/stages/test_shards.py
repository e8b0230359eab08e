"""A pool whose actors cannot start: now and then, or ever."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from socket import gethostname

import pyarrow as pa
import pytest
import ray.data

from diffmine.errors import InputError, StageError
from diffmine.pipeline import _as_ours
from diffmine.run import MARKER, SCHEMAS, Run
from diffmine.stages.session import Context
from diffmine.stages.shards import Part, Payload, _Actor, pack, stream


def read(run: Run, shard: int, told: bytes) -> Payload:
    return {}


@dataclass
class Worker:
    """Each start leaves a file; the first ones fail."""

    starts: Path
    fail: int
    device: str = "cpu"

    def __post_init__(self) -> None:
        number = len(list(self.starts.iterdir()))
        (self.starts / str(number)).touch()
        if number < self.fail:
            raise OSError("the hub is busy")

    def __call__(self, payload: Mapping[str, pa.Table]) -> Part:
        return Part(SCHEMAS["typicality"].empty_table(), [])


@pytest.mark.parametrize("fail", [1, 3, 99])
def test_a_start_that_fails_is_made_again(unscored: Callable[..., Context], tmp_path: Path, fail: int) -> None:
    """In the same process, then in others; one that never succeeds ends the stage, and says where it was."""
    context = unscored()
    shards = dict.fromkeys(range(3), b"")
    if fail < 99:
        assert len(stream(context, "typicality", shards, read, partial(Worker, tmp_path, fail), 3).files) == 3
    else:
        with pytest.raises(Exception, match="the hub is busy") as caught:
            stream(context, "typicality", shards, read, partial(Worker, tmp_path, fail), 3)
        ended = _as_ours(caught.value, "typicality")
        assert isinstance(ended, StageError)
        assert str(ended) == f"typicality: cannot start on {gethostname()} (OSError: the hub is busy)"
        assert len(list(tmp_path.iterdir())) < 20


def test_a_machine_that_fails_at_work_is_named(tmp_path: Path) -> None:
    (tmp_path / "manifest").mkdir()
    (tmp_path / "manifest" / MARKER).touch()

    def broken(_: Payload) -> Part:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")

    actor = _Actor(str(tmp_path), "typicality", lambda device: broken, False)
    with pytest.raises(StageError, match=rf"^typicality: shard 7 failed on {gethostname()} \(RuntimeError: CUDA error"):
        actor(pa.table({"shard": [7], "payload": [[{"name": "x", "data": pack(pa.table({}))}]]}))


def test_a_run_on_the_disk_of_another_machine(unscored: Callable[..., Context], tmp_path: Path) -> None:
    """Parts would be left on that machine, and missed by the next stage."""
    context = unscored()
    context.run.remove(f"manifest/{MARKER}")
    with pytest.raises(Exception, match="is not the run's folder") as caught:
        stream(context, "typicality", {0: b""}, read, partial(Worker, tmp_path, 0), 1)
    ended = _as_ours(caught.value, "typicality")
    assert isinstance(ended, InputError)
    assert str(ended).startswith(f"output: {context.run.uri} is not the run's folder on {gethostname()}: use a disk")
    assert not context.run.parts("typicality")


def test_a_shard_may_take_longer_than_ray_data_waits(ray_session: None) -> None:
    """Who is alive is for `unless_stalled` to judge: Ray Data's own limit of half an hour counts finished blocks."""
    assert ray.data.DataContext.get_current().execution_no_progress_timeout_s == -1

"""cluster/notice.py against a metadata service on this machine; test_training.py has it drain a node for real."""

import subprocess
import sys
import time
from collections.abc import Iterator
from threading import Thread
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import notice
import pytest
from local import NOTICE, free_port
from metadata import Metadata

SECONDS = {"aws": 120, "gcp": notice.GCP_NOTICE_S}  # that a machine has, by its cloud


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    with Metadata() as service:
        yield service


@pytest.mark.parametrize("cloud", SECONDS)
def test_a_notice_says_when_the_machine_goes(cloud: str, metadata: Metadata) -> None:
    ask = notice.CLOUDS[cloud]
    assert ask(metadata.address) is None
    metadata.notice(SECONDS[cloud])
    deadline = ask(metadata.address)
    assert deadline is not None
    assert abs(deadline - time.time() - SECONDS[cloud]) < 5


@pytest.mark.parametrize("cloud", SECONDS)
@pytest.mark.parametrize("broken", [False, True])
def test_no_answer_is_no_notice(cloud: str, broken: bool, metadata: Metadata) -> None:
    metadata.broken = True
    with pytest.raises(OSError):  # noqa: PT011 - each has words of its own
        notice.CLOUDS[cloud](metadata.address if broken else f"http://127.0.0.1:{free_port()}")


@pytest.mark.parametrize("path", ["latest/meta-data/spot/instance-action", "computeMetadata/v1/instance/preempted"])
def test_the_service_refuses_who_asks_otherwise(path: str, metadata: Metadata) -> None:
    """Negative control: as the clouds do, so the headers are needed."""
    metadata.notice(30)
    with pytest.raises(HTTPError, match=r"40[13]"):
        urlopen(Request(f"{metadata.address}/{path}"))


@pytest.mark.parametrize("cloud", SECONDS)
def test_the_node_is_drained_once_it_is_there(
    cloud: str, metadata: Metadata, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither a service that fails for a while nor a node that is not there yet ends the watching."""
    drained: list[tuple[str, str, float]] = []

    def drain(address: str, instance: str, deadline: float) -> bool:
        drained.append((address, instance, deadline))
        return len(drained) == 3

    monkeypatch.setattr(notice, "drain", drain)
    monkeypatch.setattr(notice, "EVERY_S", 0.02)
    metadata.broken = True
    watching = Thread(target=notice.watch, args=(cloud, metadata.address, "10.0.0.1:6379", "machine"), daemon=True)
    watching.start()
    for metadata.broken in (True, False):
        start, until = time.monotonic(), metadata.asked + 5
        while metadata.asked < until:
            assert watching.is_alive()
            assert time.monotonic() - start < 30
            time.sleep(0.01)
    assert drained == [], "nothing was said yet"
    metadata.notice(SECONDS[cloud])
    watching.join(10)
    assert not watching.is_alive()
    assert {(address, instance) for address, instance, _ in drained} == {("10.0.0.1:6379", "machine")}
    assert len(drained) == 3
    assert abs(drained[-1][2] - time.time() - SECONDS[cloud]) < 5
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2, "a failure that lasts is said once"
    assert "503" in lines[0]
    assert "its node is drained" in lines[1]


def test_the_command_needs_a_machine() -> None:
    ended = subprocess.run([sys.executable, str(NOTICE), "aws", "--address", "10.0.0.1:6379"], capture_output=True)
    assert ended.returncode == 2
    assert b"--instance" in ended.stderr

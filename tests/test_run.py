"""The run folder: what is put stays, is whole, and is the same for the same rows."""

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import huggingface_hub
import pyarrow as pa
import pytest

from diffmine import store
from diffmine.errors import InputError, StoreError
from diffmine.run import SCHEMAS, Run, fetch_model, part_name, rows_to_table, small_columns, to_parquet


@pytest.fixture(params=["local", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    return Run(str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path.name}")


def test_put_creates_once(run: Run) -> None:
    first = run.put("a/b.bin", b"one")
    assert run.put("a/b.bin", b"one") == first
    with pytest.raises(StoreError, match=r"a/b\.bin: exists with other bytes"):
        run.put("a/b.bin", b"two")
    assert run.read("a/b.bin") == b"one"
    run.replace("a/b.bin", b"two")
    assert run.read("a/b.bin") == b"two"


def test_nothing_is_left_aside(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    run.put("t/x", b"1")
    run.put("t/x", b"1")
    run.replace("t/x", b"2")
    assert [p.name for p in (tmp_path / "t").iterdir()] == ["x"]


def test_tables_come_back_in_order_of_parts(run: Run) -> None:
    rows = [{"image_id": f"{i}", "uri": "u", "reason": "empty", "detail": ""} for i in range(5)]
    run.write_part("failures/latents", 1, rows_to_table("failures", rows[3:]))
    run.write_part("failures/latents", 0, rows_to_table("failures", rows[:3]))
    assert run.parts("failures/latents") == [0, 1]
    assert run.table("failures/latents")["image_id"].to_pylist() == ["0", "1", "2", "3", "4"]
    assert run.table("failures/typicality", ["reason"]).schema == pa.schema([("reason", pa.string())])


def test_an_index_answers_for_small_columns_in_the_place_of_parts(run: Run) -> None:
    rows = [{"image_id": f"{i}.png", "h": 1, "w": i, "latent": [float(i)], "crop_x": -i} for i in range(5)]
    parts = {3: rows_to_table("latents", rows[:3]), 12: rows_to_table("latents", rows[3:])}
    for part, own in parts.items():
        run.write_part("latents", part, own)
    small = small_columns("latents").names
    assert {*SCHEMAS["latents"].names} - {*small} == {"latent", "latent_std"}
    assert small_columns("samples").names == ["label", "index"]
    assert small_columns("manifest").names == SCHEMAS["manifest"].names
    plain = [run.read_parts("latents", columns) for columns in (["w", "image_id"], ["image_id", "latent"])]
    assert plain == [
        {n: own.select(c) for n, own in parts.items()} for c in (["w", "image_id"], ["image_id", "latent"])
    ]
    run.write_index("latents", {part: own.select(small) for part, own in parts.items()})
    assert [run.read_parts("latents", columns) for columns in (["w", "image_id"], ["image_id", "latent"])] == plain
    run.remove(part_name("latents", 12))
    assert run.read_parts("latents", ["w", "image_id"]) == plain[0]
    assert [*run.read_parts("latents", ["image_id", "latent"])] == [*run.read_parts("latents")] == [3]


def test_who_has_read_a_table_ends_in_peace(tmp_path: Path) -> None:
    """Read by pyarrow.dataset from memory, every second process aborts at its end: its read-ahead holds the bytes."""
    rows = [{"image_id": f"{i}", "uri": "u", "reason": "empty", "detail": ""} for i in range(3)]
    Run(str(tmp_path)).write_part("failures/latents", 0, rows_to_table("failures", rows))
    command = [sys.executable, "-c", f"from diffmine.run import Run; Run({str(tmp_path)!r}).table('failures/latents')"]
    readers = [subprocess.Popen(command) for _ in range(12)]
    assert [reader.wait(60) for reader in readers] == [0] * 12


def test_a_temporary_file_is_no_part(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    run.put("latents/part-00000.parquet.123.tmp", b"half")
    assert run.parts("latents") == []


def test_commit_names_files_with_digests(run: Run) -> None:
    assert run.committed("latents") is None
    digest = run.put("latents/part-00000.parquet", b"data")
    run.commit("latents", {"fingerprint": "f"}, {"latents/part-00000.parquet": digest})
    assert run.committed("latents") == {"fingerprint": "f", "files": {"latents/part-00000.parquet": digest}}
    assert run.digests(["latents"]) == {"latents/part-00000.parquet": digest}
    assert json.loads(run.read("latents/_commit.json"))["fingerprint"] == "f"


@pytest.mark.parametrize("whole", [1, 1 << 24], ids=["in pieces", "whole"])
def test_a_part_is_looked_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: int) -> None:
    """Small columns and digest are those of the file, and a flipped byte in a map is found."""
    monkeypatch.setattr("diffmine.run._READ_WHOLE", whole)
    rows = [
        {"image_id": f"{n}.png", "label": "a", "own": True, "h": 2, "w": 2, "map": [0.25 * n] * 4, "draws": 9}
        for n in range(700)
    ]
    table, run = (
        rows_to_table("typicality", rows).replace_schema_metadata({b"diffmine.failures": b"[]"}),
        Run(str(tmp_path)),
    )
    digest = run.put(name := part_name("typicality", 3), data := to_parquet(table))
    found, of_file = run.looked_through("typicality", 3)
    assert found.equals(table.select(small_columns("typicality").names), check_metadata=True)
    assert of_file == digest
    flipped = bytearray(data)
    flipped[data.index(b"\x28\xb5\x2f\xfd", len(data) // 4) + 9] ^= 1  # in a zstd frame
    run.replace(name, bytes(flipped))
    with pytest.raises(StoreError, match=r"part-00003\.parquet: .*CRC checksum verification failed"):
        run.looked_through("typicality", 3)


def test_read_only_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    with pytest.raises(StoreError, match="cannot be written"):
        Run(str(tmp_path / "run")).put("t/x", b"1")


def test_fetch_model_from_a_store_and_from_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    store = Run(f"memory://models-{tmp_path.name}")
    store.put("m/unet/config.json", b"{}")
    folder = fetch_model(f"{store.uri}/m")
    assert (folder / "unet" / "config.json").read_bytes() == b"{}"
    assert fetch_model(f"{store.uri}/m") == folder
    store.replace("m/unet/config.json", b"[]")  # the same place and size, another model
    assert (fetch_model(f"{store.uri}/m") / "unet" / "config.json").read_bytes() == b"[]"
    with pytest.raises(InputError, match="nothing is there"):
        fetch_model(f"{store.uri}/absent")
    with pytest.raises(InputError, match="no such folder"):
        fetch_model("./absent")


class Hub:
    """A hub that gives the same answer to whatever it is asked, and the hub's own client, which asks it."""

    def __init__(self) -> None:
        self.status, self.error, self.asked = 503, "", 0

        class Handler(BaseHTTPRequestHandler):
            def do_GET(handler) -> None:
                self.asked += 1
                handler.send_response(self.status)
                handler.send_header("X-Error-Code", self.error)
                handler.send_header("Content-Length", "0")
                handler.end_headers()

            def log_message(handler, *_: object) -> None:
                """Nothing: a request is not worth a line."""

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    download = partial(huggingface_hub.snapshot_download, endpoint=hub.url, cache_dir=tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(store, "PATIENCE_S", 0.5)
    monkeypatch.setattr(store, "_FIRST_WAIT_S", 0.05)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield hub
    hub.server.shutdown()
    thread.join()
    hub.server.server_close()


@pytest.mark.parametrize("status", [429, 500, 503, 504])
def test_a_busy_hub_is_asked_again_and_is_no_bad_input(hub: Hub, status: int) -> None:
    hub.status = status
    with pytest.raises(StoreError, match=f"model owner/name: cannot be fetched from the hub on {socket.gethostname()}"):
        fetch_model("owner/name")
    assert hub.asked > 1


@pytest.mark.parametrize(
    ("status", "error"),
    [(401, "RepoNotFound"), (404, "RepoNotFound"), (403, "GatedRepo"), (404, "RevisionNotFound"), (401, ""), (403, "")],
)
def test_what_the_hub_refuses_is_bad_input(hub: Hub, status: int, error: str) -> None:
    hub.status, hub.error = status, error
    with pytest.raises(InputError, match="model owner/name: not a folder here"):
        fetch_model("owner/name")
    assert hub.asked == 1


def test_what_is_not_in_the_cache_of_who_is_offline_is_bad_input(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="model owner/name: not a folder here"):
        fetch_model("owner/name")
    assert hub.asked == 0


def test_a_hub_that_comes_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Unreachable, slow, cut off in a file; a download that goes wrong in a way of its own is not bad input either."""
    httpx = pytest.importorskip("httpx2")
    lost = huggingface_hub.errors.LocalEntryNotFoundError("cannot find it here")
    lost.__cause__ = httpx.ConnectError("refused")
    faults: list[Exception] = [lost, httpx.ReadTimeout("slow"), httpx.RemoteProtocolError("cut off"), OSError("short")]

    def download(*_: object, **__: object) -> str:
        if faults:
            raise faults.pop(0)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(store, "_FIRST_WAIT_S", 0.01)
    assert fetch_model("owner/name") == tmp_path
    faults[:] = [RuntimeError("Data processing error")]
    with pytest.raises(StoreError, match="Data processing error"):
        fetch_model("owner/name")
    faults[:] = [httpx.UnsupportedProtocol("no http://")]
    with pytest.raises(InputError, match="no http://"):
        fetch_model("owner/name")

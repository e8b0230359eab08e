"""The run folder: what is put stays, is whole, and is the same for the same rows."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from diffmine.errors import InputError, StoreError
from diffmine.run import Run, fetch_model, rows_to_table


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

"""The same promises on Google Cloud Storage, by its client: created once, read whole, asked again while busy."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from gcs import BUCKET, GCS, serving
from whole import differing, images, mine, tables

from diffmine import store as module
from diffmine.data.reading import read_file
from diffmine.errors import ImageError, StoreError
from diffmine.store import Store, fetch_folder, read_uri

RACERS, ROUNDS = 8, 3


@pytest.fixture(scope="module")
def server() -> Iterator[GCS]:
    with serving(seed=1) as started:
        yield started


@pytest.fixture
def gcs(server: GCS, monkeypatch: pytest.MonkeyPatch) -> Iterator[GCS]:
    """The server without faults; waits are a tenth of what they are."""
    server.reset()
    monkeypatch.setattr(module, "_FIRST_WAIT_S", 0.02)
    monkeypatch.setattr(module, "_LONGEST_WAIT_S", 0.8)
    yield server
    server.reset()


@pytest.fixture
def store(gcs: GCS, request: pytest.FixtureRequest) -> Store:
    return Store(f"gs://{BUCKET}/{request.node.name}")


def test_bytes_are_put_once(gcs: GCS, store: Store) -> None:
    first = store.put("a/x", b"one")
    assert store.put("a/x", b"one") == first
    with pytest.raises(StoreError, match="exists with other bytes"):
        store.put("a/x", b"two")
    assert store.read("a/x") == b"one"
    assert gcs.requests["refused"] == 2
    store.fs.pipe_file(store.path("a/x"), b"two")  # the control: without the condition
    assert store.read("a/x") == b"two"


@pytest.mark.filterwarnings("ignore:Sending a large body")  # gcsfs does, knowingly
def test_a_file_in_parts_is_put_once(gcs: GCS, store: Store, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(os.urandom(60 << 20))  # gcsfs sends 50 MiB at once
    two.write_bytes(b"2")
    digest = store.put("x", one)
    assert gcs.conditional
    assert store.put("x", one) == digest == store.digest("x")
    with pytest.raises(StoreError, match="exists with other bytes"):
        store.put("x", two)


def test_one_racer_wins(store: Store) -> None:
    def enter(name: str, racer: int) -> bool:
        try:
            store.put(name, b"%d" % racer * 1000)
        except StoreError:
            return False
        return True

    with ThreadPoolExecutor(RACERS) as pool:
        for turn in range(ROUNDS):
            won = list(pool.map(enter, [f"race-{turn}"] * RACERS, range(RACERS)))
            assert sum(won) == 1
            assert store.read(f"race-{turn}") == b"%d" % won.index(True) * 1000


def test_names_files_and_folders(store: Store, tmp_path: Path) -> None:
    assert (store.names("a"), store.files("a"), store.exists("a")) == ([], [], False)
    for name in ("a/2", "a/1", "a/b/3", "a/4.tmp"):
        store.put(name, name.encode())
    assert store.names("a") == ["1", "2", "b"]
    assert store.files("") == ["a/1", "a/2", "a/b/3"]
    copy = fetch_folder(f"{store.uri}/a", tmp_path)
    assert copy
    assert (copy / "b" / "3").read_bytes() == b"a/b/3"
    store.replace("a/b/3", b"other")
    newer = fetch_folder(f"{store.uri}/a", tmp_path)
    assert newer
    assert (newer / "b" / "3").read_bytes() == b"other"
    assert store.stream("a/1", lambda file: file.read(2)) == b"a/"
    assert read_uri(f"{store.uri}/a/1") == b"a/1"
    assert read_uri(f"{store.uri}/a/1", 2) == b"a/"
    store.remove("a/b")
    store.remove("a/1")
    assert store.files("") == ["a/2"]
    with pytest.raises(StoreError, match="none: cannot be read"):
        store.read("none")


def test_a_busy_store_is_asked_again(gcs: GCS, store: Store) -> None:
    gcs.reset(busy=0.4)
    for i in range(40):
        store.put(f"{i:02d}", b"%d" % i)
    assert [store.read(f"{i:02d}") for i in range(40)] == [b"%d" % i for i in range(40)]
    assert len(store.files("")) == 40
    print(gcs.requests)
    assert gcs.requests["busy"] >= 20


def test_a_dead_store(gcs: GCS, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 1.0)
    gcs.reset(busy=1)
    start = time.monotonic()
    with pytest.raises(StoreError, match="/x: cannot be written"):
        store.put("x", b"x")
    assert time.monotonic() - start < 20  # gcsfs's own patience is half a minute for each request
    assert gcs.requests["busy"] > 2


@pytest.mark.parametrize("code", [401, 403])
def test_who_is_refused_does_not_ask_again(gcs: GCS, store: Store, code: int) -> None:
    gcs.reset(busy=1)
    gcs.code = code
    with pytest.raises(StoreError, match="/x: cannot be read"):
        store.read("x")
    assert gcs.requests["busy"] <= 2


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (401, "Invalid Credentials"),
        (401, "Anonymous caller does not have storage.objects.get access to the Google Cloud Storage object."),
        (403, "Request had insufficient authentication scopes."),
        (403, "Request is prohibited by organization's policy. vpcServiceControlsUniqueIdentifier: x"),
    ],
)
def test_an_image_is_not_missing_for_who_is_not_known(gcs: GCS, store: Store, code: int, message: str) -> None:
    store.put("x", b"x")
    gcs.reset(busy=1)
    gcs.code, gcs.message = code, message
    with pytest.raises(StoreError, match="/x: cannot be read") as raised:
        read_file(f"{store.uri}/x", 10)
    assert ("renew the credentials" in str(raised.value)) == (code == 401)
    assert gcs.requests["busy"] == 1


def test_an_object_that_may_not_be_read_or_is_not_there_is_a_missing_image(gcs: GCS, store: Store) -> None:
    """The control: these are the image's."""
    with pytest.raises(ImageError, match="missing: cannot be read"):
        read_file(f"{store.uri}/x", 10)
    gcs.reset(busy=1)
    gcs.code = 403
    gcs.message = "a@b does not have storage.objects.get access to the Google Cloud Storage object."
    with pytest.raises(ImageError, match="missing: cannot be read"):
        read_file(f"{store.uri}/x", 10)
    assert gcs.requests["busy"] == 1


@pytest.mark.release
def test_a_whole_run_on_a_busy_store(whole_run: dict[str, bytes], gcs: GCS, tmp_path: Path) -> None:
    """The tables are those of a run in a local folder, but for those with the addresses of images."""
    bucket = Store(f"gs://{BUCKET}")
    for name, data in images():
        bucket.put(f"photos/{name}", data)
    gcs.reset(busy=0.2)
    ended = mine(tmp_path, f"gs://{BUCKET}/run", f"gs://{BUCKET}/photos")
    print(f"{ended.seconds:.0f} s, {dict(gcs.requests)}")
    assert ended.code == 0, ended.err
    assert gcs.requests["busy"] > 50
    gcs.reset()
    stored = {name.removeprefix("run/"): bucket.read(name) for name in bucket.files("run")}
    assert tables(stored).keys() == tables(whole_run).keys()
    addressed = "manifest/", "report/labels/"
    assert [name for name in differing(tables(stored), tables(whole_run)) if not name.startswith(addressed)] == []

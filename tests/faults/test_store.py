"""Files in an object store: created once, read whole, asked for again while the store is busy, and no longer than that.

Each test about faults prints how many there were, and has a control that the same faults break.
"""

import asyncio
import errno
import io
import logging
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import s3fs
import s3fs.core
from botocore.exceptions import ClientError
from s3 import BUCKET, CANARY, S3, Faults, serving
from s3fs.errors import translate_boto_error

from diffmine import store as module
from diffmine.config import Dataset, Finetune
from diffmine.data.reading import read_file
from diffmine.errors import ImageError, StoreError
from diffmine.run import Run, part_name, rows_to_table
from diffmine.stages.ingest import Ingest
from diffmine.store import PATIENCE_S, Store, fetch_folder, local_copy, read_uri

RACERS, ROUNDS = 16, 5
OBJECTS = 100


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with serving(seed=1) as started:
        yield started


@pytest.fixture
def s3(server: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """The server without faults; waits are a tenth of what they are."""
    server.reset()
    monkeypatch.setattr(module, "_FIRST_WAIT_S", 0.02)
    monkeypatch.setattr(module, "_LONGEST_WAIT_S", 0.8)
    yield server
    server.reset()


@pytest.fixture
def store(s3: S3, request: pytest.FixtureRequest) -> Store:
    """A folder of its own for each test."""
    return Store(f"s3://{BUCKET}/{request.node.name}")


@pytest.fixture(autouse=True)
def no_secret(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Whatever a test logs or prints, the secret key is not in it."""
    caplog.set_level(logging.INFO)
    yield
    out, err = capfd.readouterr()
    assert CANARY not in caplog.text + out + err


def key(store: Store, name: str) -> str:
    return store.path(name).removeprefix(f"{BUCKET}/")


def requests_for(s3: S3, store: Store, name: str) -> int:
    return s3.counts.of(f"/{store.path(name)}")


def error_of(act: Callable[[], object]) -> str:
    """Text of the StoreError that `act` raises; what a traceback would show of it and its causes has no secret."""
    with pytest.raises(StoreError) as raised:
        act()
    assert CANARY not in "".join(traceback.format_exception(raised.value)) + repr(raised.value)
    return str(raised.value)


# ---------------------------------------------------------------------------------------------------- without a fault


def test_the_wait_is_bounded() -> None:
    assert 30 <= PATIENCE_S <= 50


def test_bytes_are_put_once(s3: S3, store: Store) -> None:
    first = store.put("a/x", b"one")
    assert store.put("a/x", b"one") == first
    assert error_of(lambda: store.put("a/x", b"two")).startswith(f"{store.uri}/a/x: exists with other bytes")
    assert store.read("a/x") == b"one"
    store.put_if_absent("a/x", b"two")
    assert store.read("a/x") == b"one"


def test_a_file_is_put_once(store: Store, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"one" * 1000)
    two.write_bytes(b"two" * 1000)
    assert store.put("a/x", one) == store.put("a/x", one) == store.digest("a/x")
    assert error_of(lambda: store.put("a/x", two)).startswith(f"{store.uri}/a/x: exists with other bytes")
    assert store.read("a/x") == one.read_bytes()


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> int:
    """Files from 12 MiB on are uploaded in parts of 6 MiB (S3 wants at least 5), not from 100 MiB on."""
    monkeypatch.setattr(s3fs.core, "calculate_chunksize", lambda size, chunksize=None: 6 << 20)
    return 12 << 20


def test_a_file_in_parts_is_put_once(s3: S3, store: Store, tmp_path: Path, in_parts: int) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"1" * (in_parts + 5))
    two.write_bytes(b"2" * (in_parts + 5))
    store.put("x", one)
    assert s3.counts.requests["POST", f"/{store.path('x')}"] == 2  # begun and completed
    assert s3.counts.requests["PUT", f"/{store.path('x')}"] == 3
    assert store.put("x", one) == store.digest("x")
    assert "exists with other bytes" in error_of(lambda: store.put("x", two))
    assert store.read("x") == one.read_bytes()
    assert s3.client().list_multipart_uploads(Bucket=BUCKET).get("Uploads", []) == []


def race(store: Store, create: Callable[[str, bytes], object]) -> list[tuple[int, list[str]]]:
    """For each round: winners, and what the losers were told."""
    together = Barrier(RACERS)

    def enter(name: str, racer: int) -> str:
        together.wait(30)
        try:
            create(name, b"%d" % racer * 1000)
        except StoreError as error:
            return str(error)
        return ""

    rounds = []
    with ThreadPoolExecutor(RACERS) as pool:
        for turn in range(ROUNDS):
            name = f"race-{turn}"
            told = list(pool.map(enter, [name] * RACERS, range(RACERS)))
            winners = [racer for racer, error in enumerate(told) if not error]
            if len(winners) == 1:
                assert store.read(name) == b"%d" % winners[0] * 1000
            rounds.append((len(winners), [error for error in told if error]))
    return rounds


def test_one_racer_wins(s3: S3, store: Store) -> None:
    rounds = race(store, store.put)
    print(f"{RACERS} racers, {ROUNDS} rounds, {s3.counts}")
    assert [winners for winners, _ in rounds] == [1] * ROUNDS
    assert all("exists with other bytes" in error for _, errors in rounds for error in errors)


def test_racers_that_overwrite_are_found_out(s3: S3, store: Store) -> None:
    """The control: the same race with a put that has no condition."""
    rounds = race(store, lambda name, data: store.fs.pipe_file(store.path(name), data))
    assert [winners for winners, _ in rounds] == [RACERS] * ROUNDS
    store.put("x", b"one")
    store.fs.pipe_file(store.path("x"), b"two")
    assert store.read("x") == b"two"


def test_names_and_files(store: Store, tmp_path: Path) -> None:
    assert (store.names("a"), store.files("a"), store.exists("a")) == ([], [], False)
    for name in ("a/2", "a/1", "a/b/3", "a/4.tmp"):
        store.put(name, name.encode())
    assert store.names("a") == ["1", "2", "b"]
    assert store.files("a") == ["a/1", "a/2", "a/b/3"]
    assert store.files("") == ["a/1", "a/2", "a/b/3"]
    assert (store.exists("a"), store.exists("a/1"), store.exists("a/none")) == (True, True, False)
    store.replace("a/1", b"other")
    (tmp_path / "new").write_bytes(b"new")
    store.replace("a/2", tmp_path / "new")
    assert (store.read("a/1"), store.read("a/2")) == (b"other", b"new")
    store.remove("a/1")
    store.remove("a/1")
    store.remove("a/b")
    assert store.files("") == ["a/2"]
    store.fetch("a/2", tmp_path / "fetched")
    assert (tmp_path / "fetched").read_bytes() == b"new"
    assert store.stream("a/2", lambda file: file.read(2)) == b"ne"
    assert "none: cannot be read" in error_of(lambda: store.read("none"))


def test_folders_go_up_and_come_down(store: Store, tmp_path: Path) -> None:
    (tmp_path / "from" / "b").mkdir(parents=True)
    (tmp_path / "from" / "a").write_bytes(b"a")
    (tmp_path / "from" / "b" / "c").write_bytes(b"c")
    assert sorted(store.upload(tmp_path / "from", "up")) == ["up/a", "up/b/c"]
    copy = fetch_folder(f"{store.uri}/up", tmp_path / "cache")
    assert copy
    assert (copy / "b" / "c").read_bytes() == b"c"
    assert fetch_folder(f"{store.uri}/up", tmp_path / "cache") == copy
    store.replace("up/b/c", b"d")
    newer = fetch_folder(f"{store.uri}/up", tmp_path / "cache")
    assert newer
    assert (newer / "b" / "c").read_bytes() == b"d"
    assert fetch_folder(f"{store.uri}/none", tmp_path / "cache") is None
    assert read_uri(f"{store.uri}/up/a") == b"a"
    store.put("large", b"0123456789")
    store.put("empty", b"")
    assert [read_uri(f"{store.uri}/large", most) for most in (4, 10, 11)] == [b"0123", b"0123456789", b"0123456789"]
    assert read_uri(f"{store.uri}/empty", 4) == b""
    with local_copy(f"{store.uri}/up/b/c") as path:
        assert Path(path).read_bytes() == b"d"
    with pytest.raises(FileNotFoundError):
        read_uri(f"{store.uri}/up/none")


def test_many_on_one_machine_fetch_a_folder_once(s3: S3, store: Store, tmp_path: Path) -> None:
    """As the actors of a machine with many GPUs do when they start."""
    store.put("model/weights", b"w" * 1000)
    s3.reset(Faults(late=1, late_s=0.2))
    with ThreadPoolExecutor(8) as pool:
        copies = set(pool.map(lambda _: fetch_folder(f"{store.uri}/model", tmp_path), range(8)))
    assert [copy.joinpath("weights").stat().st_size for copy in copies if copy] == [1000]
    assert s3.counts.requests["GET", f"/{store.path('model/weights')}"] == 1


def test_a_listing_is_not_remembered(s3: S3, store: Store) -> None:
    client = s3.client()
    store.put("a/1", b"1")
    assert (store.names("a"), store.files("a")) == (["1"], ["a/1"])
    assert not store.exists("a/2")
    client.put_object(Bucket=BUCKET, Key=key(store, "a/2"), Body=b"2")
    assert (store.names("a"), store.files("a")) == (["1", "2"], ["a/1", "a/2"])
    assert store.exists("a/2")
    client.put_object(Bucket=BUCKET, Key=key(store, "a/1"), Body=b"another")
    assert store.read("a/1") == b"another"
    client.delete_object(Bucket=BUCKET, Key=key(store, "a/2"))
    assert (store.names("a"), store.exists("a/2")) == (["1"], False)
    client.close()


def test_who_needs_little_of_a_large_part_fetches_little(s3: S3) -> None:
    """As every training worker does, of all parts, when it starts: 512 latents of 512 px are 17 MB."""
    run, rng = Run(f"s3://{BUCKET}/run"), np.random.default_rng(0)
    ids = [f"{i:04d}.png" for i in range(512)]
    images = [{"image_id": i, "uri": i, "labels": ["a"], "boxes": None} for i in ids]
    latents = [
        {"image_id": i, "width": 512, "height": 512, "h": 32, "w": 64, "scale": 1.0, "crop_x": 0, "crop_y": 0,
         "latent": rng.normal(size=4 * 32 * 64).astype(np.float16)}
        for i in ids
    ]  # fmt: skip
    run.write_part("manifest", 0, rows_to_table("manifest", images))
    run.write_part("latents", 0, rows_to_table("latents", latents))
    size = run.fs.size(run.path(part_name("latents", 0)))
    s3.reset()
    ingest = Ingest(run, 0, Dataset(source="images"), Finetune())
    print(f"{s3.counts}, {s3.counts.sent:,} bytes sent, of a part of {size:,}")
    assert ingest.images == 512
    assert ingest.common_shape() == (32, 64)
    assert s3.counts.sent < 0.05 * size
    s3.reset()
    assert run.table("latents", ["image_id", "scale"])["scale"].to_pylist() == [1.0] * 512
    assert s3.counts.sent < 0.05 * size


# -------------------------------------------------------------------------------------------------------- with faults


def content(number: int) -> bytes:
    return b"%d\n" % number * (1 + 997 * number % 3000)


def put_and_read(s3: S3, store: Store, folder: Path) -> list[str]:
    """What is wrong after `OBJECTS` files were put and read, in every way a file can be read."""
    readers: list[Callable[[str], bytes]] = [
        store.read,
        lambda name: store.stream(name, lambda file: bytes(file.read())),
        lambda name: fetched(name).read_bytes(),
        lambda name: read_uri(f"{store.uri}/{name}"),
    ]

    def fetched(name: str) -> Path:
        store.fetch(name, folder / name)
        return folder / name

    def one(number: int) -> str:
        name, data = f"{number:03d}", content(number)
        try:
            if number % 5:
                store.put(name, data)
            else:
                store.replace(name, data)
            read = readers[number % len(readers)](name)
        except (StoreError, OSError, ClientError) as error:
            return f"{name}: {type(error).__name__}: {error}"
        return "" if read == data else f"{name}: {len(read)} bytes, not the {len(data)} that were put"

    with ThreadPoolExecutor(8) as pool:
        found = [problem for problem in pool.map(one, range(OBJECTS)) if problem]
    print(f"{OBJECTS} puts and reads, {s3.counts}, {len(found)} wrong: {found[:2]}")
    return found


FAULTS = {
    "20 % busy": Faults(busy=0.2),
    "40 % busy": Faults(busy=0.4),
    "30 % truncated": Faults(truncated=0.3),
    "late": Faults(late=0.2, late_s=0.2),
    "all": Faults(busy=0.2, truncated=0.3, late=0.1, late_s=0.2),
}


@pytest.mark.parametrize("faults", FAULTS)
def test_what_is_put_comes_back(s3: S3, store: Store, tmp_path: Path, faults: str) -> None:
    s3.reset(FAULTS[faults])
    assert put_and_read(s3, store, tmp_path) == []
    for fault in ("busy", "truncated", "late"):
        assert s3.counts.faults[fault] >= 50 * getattr(FAULTS[faults], fault)
    s3.reset()
    assert store.names("") == [f"{number:03d}" for number in range(OBJECTS)]
    assert [number for number in range(OBJECTS) if store.read(f"{number:03d}") != content(number)] == []


@pytest.mark.parametrize("faults", ["40 % busy", "30 % truncated"])
def test_a_store_without_patience_is_found_out(
    s3: S3, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: str
) -> None:
    """The control: every request once, by s3fs too, which repeats a SlowDown and a read that was cut off."""
    monkeypatch.setattr(module, "patiently", lambda request: request())
    monkeypatch.setattr(module, "_SHORT_WAITS_S", ())
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3.reset(FAULTS[faults])
    found = put_and_read(s3, store, tmp_path)
    assert len(found) > 5
    assert all("Error" in problem for problem in found)  # and even so, no short read is taken for a whole file


def test_listings_of_a_busy_store(s3: S3, store: Store) -> None:
    for number in range(30):
        store.put(f"a/{number:02d}", b"x")
    s3.reset(Faults(busy=0.4, truncated=0.3))
    with ThreadPoolExecutor(8) as pool:
        found = list(
            pool.map(
                lambda _: (store.names("a"), store.files("a"), store.exists("a/07"), store.exists("a/70")), range(8)
            )
        )
    print(s3.counts)
    names = [f"{number:02d}" for number in range(30)]
    assert found == [(names, [f"a/{name}" for name in names], True, False)] * 8
    assert s3.counts.faults["busy"] > 20
    assert s3.counts.faults["truncated"] > 0
    store.remove("a/07")
    store.remove("a/70")
    s3.reset()
    assert store.names("a") == [name for name in names if name != "07"]


def test_a_file_in_parts_on_a_busy_store(s3: S3, store: Store, tmp_path: Path, in_parts: int) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(range(256)) * (in_parts // 256 + 1))
    s3.reset(Faults(busy=0.4, truncated=0.3))
    assert store.put("x", file) == store.digest("x")
    store.fetch("x", tmp_path / "back")
    counts = s3.counts
    s3.reset()
    left = s3.client().list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
    print(f"{counts}, {len(left)} uploads left open")
    assert (tmp_path / "back").read_bytes() == file.read_bytes()
    assert counts.faults["busy"] >= 1


def test_what_takes_many_requests_does_not_need_them_all_to_succeed_at_once(
    s3: S3, store: Store, tmp_path: Path, in_parts: int
) -> None:
    """Every second one fails. A look for what is absent is two, the file nine or more."""
    file = tmp_path / "file"
    file.write_bytes(b"x" * (6 * in_parts // 2))
    s3.reset(Faults(every=2))
    assert not store.exists("x")
    assert s3.counts.requests.total() <= 4
    store.put("x", file)
    parts = s3.counts.requests["PUT", f"/{store.path('x')}"]
    s3.reset()
    assert store.digest("x") == module.file_digest(file)
    assert parts < 6 * 4, "parts that were there were put again"


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(module, "PATIENCE_S", 1.0)
    monkeypatch.setattr(module, "_SHORT_WAITS_S", (0.1,))
    return 1.0


ACTS: dict[str, Callable[[Store, Path], object]] = {
    "read": lambda store, file: store.read("x"),
    "stream": lambda store, file: store.digest("x"),
    "fetch": lambda store, file: store.fetch("x", file.with_name("fetched")),
    "exists": lambda store, file: store.exists("x"),
    "put": lambda store, file: store.put("x", b"new"),
    "put of a file": lambda store, file: store.put("x", file),
    "replace": lambda store, file: store.replace("x", b"new"),
    "remove": lambda store, file: store.remove("x"),
    "names": lambda store, file: store.names("x"),
}


@pytest.mark.parametrize("act", ACTS)
def test_a_dead_store(s3: S3, store: Store, tmp_path: Path, hurried: float, act: str) -> None:
    """An error that names the file, soon; nothing is half written."""
    (tmp_path / "file").write_bytes(b"new")
    s3.reset(Faults(busy=1))
    start = time.monotonic()
    error = error_of(lambda: ACTS[act](store, tmp_path / "file"))
    seconds = time.monotonic() - start
    print(f"{act}: {seconds:.1f} s, {s3.counts}: {error}")
    assert error.startswith(f"{store.uri}/x: cannot be ")
    assert seconds < hurried + 20  # not for ever: s3fs itself repeats a SlowDown for two seconds, and machines are slow
    assert s3.counts.faults["busy"] > 2
    s3.reset()
    assert store.files("") == []
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_dead_store_for_what_is_read_elsewhere(s3: S3, store: Store, hurried: float) -> None:
    s3.reset(Faults(busy=1))
    assert f"{store.uri}/x" in error_of(lambda: read_uri(f"{store.uri}/x"))


@pytest.mark.parametrize("refused", ["AccessDenied", "ExpiredToken"])
@pytest.mark.parametrize("act", ACTS)
def test_who_is_refused_does_not_ask_again(s3: S3, store: Store, tmp_path: Path, act: str, refused: str) -> None:
    (tmp_path / "file").write_bytes(b"new")
    s3.reset(Faults(refused=refused))
    start = time.monotonic()
    error = error_of(lambda: ACTS[act](store, tmp_path / "file"))
    print(f"{act}: {s3.counts}: {error}")
    assert error.startswith(f"{store.uri}/x: cannot be ")
    assert 1 <= s3.counts.requests.total() <= 3
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("refused", "advice"),
    [
        *((code, "renew the credentials") for code in ("ExpiredToken", "InvalidToken", "InvalidAccessKeyId")),
        ("SignatureDoesNotMatch", "renew the credentials"),
        ("RequestTimeTooSkewed", "set the clock"),
        ("AllAccessDisabled", "AllAccessDisabled"),
    ],
)
def test_an_image_is_not_missing_for_who_is_not_known(s3: S3, store: Store, refused: str, advice: str) -> None:
    """Expired credentials or a wrong clock of one machine are no fault of the images; and nothing is asked twice."""
    store.put("x", b"x")
    s3.reset(Faults(refused=refused))
    error = error_of(lambda: read_file(f"{store.uri}/x", 10))
    assert error.startswith(f"{store.uri}/x: cannot be read (")
    assert advice in error
    assert (socket.gethostname() in error) == (refused != "AllAccessDisabled")
    assert s3.counts.requests.total() == 1
    s3.reset()
    assert read_file(f"{store.uri}/x", 10) == b"x"


@pytest.mark.parametrize("refused", ["AccessDenied", "InvalidObjectState", ""])
def test_an_object_that_may_not_be_read_or_is_not_there_is_a_missing_image(s3: S3, store: Store, refused: str) -> None:
    """The control: these are the image's. One request each."""
    s3.reset(Faults(refused=refused))
    with pytest.raises(ImageError, match="missing: cannot be read"):
        read_file(f"{store.uri}/x", 10)
    assert s3.counts.requests.total() == 1


def test_a_bucket_that_is_not_there_is_no_missing_image(s3: S3) -> None:
    assert "bucket does not exist" in error_of(lambda: read_file("s3://none/x", 10))


@pytest.mark.parametrize("code", ["AccessDenied", "ExpiredTokenException", "InvalidClientTokenId"])
def test_who_gets_no_credentials_has_no_missing_image(code: str) -> None:
    """A role's credentials are asked for in the middle of a read, and their refusal is not the object's."""
    told = ClientError({"Error": {"Code": code, "Message": "no"}}, "AssumeRole")
    assert not module._of_the_file(translate_boto_error(told))
    assert not module.may_pass(translate_boto_error(told))
    told = ClientError({"Error": {"Code": "AccessDenied", "Message": "no"}}, "GetObject")
    assert module._of_the_file(translate_boto_error(told))


@pytest.mark.parametrize("reason", [errno.EIO, errno.EMFILE, errno.ESTALE, errno.ENOTCONN, errno.EPERM])
def test_a_machine_that_cannot_read_has_no_missing_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    def failing(*_: object) -> bytes:
        raise OSError(reason, os.strerror(reason), str(tmp_path))

    monkeypatch.setattr(module, "_whole", failing)
    error = error_of(lambda: read_file(f"{tmp_path}/x", 10))
    assert error.startswith(f"{tmp_path}/x: cannot be read on {socket.gethostname()} (")
    assert os.strerror(reason) in error


def test_what_is_not_there_or_may_not_be_read_is_a_missing_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control, in a folder: a file that is gone, a folder, a file as a folder, a long name, a file of others."""
    (tmp_path / "file").write_bytes(b"x")
    for name in ("gone", ".", "file/x", "x" * 300):
        with pytest.raises(ImageError, match="missing: cannot be read"):
            read_file(f"{tmp_path}/{name}", 10)
    assert read_file(f"{tmp_path}/file", 10) == b"x"

    def refused(*_: object) -> bytes:  # the tests may be root's, who may read everything
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(module, "_whole", refused)
    with pytest.raises(ImageError, match="missing: cannot be read"):
        read_file(f"{tmp_path}/file", 10)


@pytest.mark.parametrize(
    "act",
    ["put", "put of a file", "replace", "put in parts", "put in parts, the end", "replace in parts, the end"],
)
def test_an_answer_that_was_lost(
    s3: S3, store: Store, tmp_path: Path, request: pytest.FixtureRequest, act: str
) -> None:
    """The store has carried out the write, and says 503."""
    file, size = tmp_path / "file", 1000
    if "in parts" in act:
        size = request.getfixturevalue("in_parts")
    file.write_bytes(b"x" * size)
    s3.reset(Faults(lost=1, lost_of="uploadId=" if act.endswith("the end") else ""))
    if act == "put":
        store.put("x", file.read_bytes())
    elif act.startswith("replace"):
        store.replace("x", file)
    else:
        store.put("x", file)
    assert s3.counts.faults["lost"] == 1
    assert store.read("x") == file.read_bytes()


@pytest.mark.parametrize(
    ("method", "told"), [("complete_multipart_upload", OSError), ("get_object", FileNotFoundError)]
)
def test_an_upload_that_is_no_more_after_a_lost_answer_may_be_complete(method: str, told: type[Exception]) -> None:
    """Where the store does not, as moto does, say once more that it is complete."""
    answers = [OSError("busy"), FileNotFoundError("no such upload")]

    async def request(_: str) -> None:
        raise answers.pop(0)

    with pytest.raises(Exception) as raised:  # noqa: PT011
        asyncio.run(module._again(request, method))
    assert type(raised.value) is told


def test_an_answer_that_was_lost_does_not_hide_another_writer(s3: S3, store: Store) -> None:
    store.put("x", b"another's")
    s3.reset(Faults(lost=1))
    assert "exists with other bytes" in error_of(lambda: store.put("x", b"mine"))
    assert store.read("x") == b"another's"


def test_a_stream_begins_anew(s3: S3, store: Store) -> None:
    """What was taken from a file before it was cut off is not taken twice."""
    data = content(2999)
    store.put("x", data)
    s3.reset(Faults(truncated=0.5, busy=0.3))
    for _ in range(10):
        taken = io.BytesIO()

        def take(file: io.BytesIO, taken: io.BytesIO = taken) -> bytes:
            taken.seek(0)
            while block := file.read(1000):
                taken.write(block)
            return taken.getvalue()

        assert store.stream("x", take) == data
    assert s3.counts.faults["truncated"] >= 3


# ------------------------------------------------------------------------------------------------------ known mistakes


def test_a_busy_bucket_is_not_an_empty_one(s3: S3, hurried: float) -> None:
    store = Store(f"s3://{BUCKET}")
    store.put("x", b"x")
    s3.reset(Faults(busy=1))
    error_of(lambda: store.files(""))


def test_a_long_request_that_fails_is_repeated(hurried: float) -> None:
    failures = [OSError("cut off")] * 3

    def long() -> str:
        time.sleep(hurried / 2 + 0.1 if failures else 0)
        if failures:
            raise failures.pop()
        return "whole"

    assert module.patiently(long) == "whole"


def test_a_store_that_hangs(s3: S3, hurried: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module._OPTIONS["s3"]["config_kwargs"], "read_timeout", 0.3)
    s3.reset(Faults(late=1, late_s=1))
    start = time.monotonic()
    error_of(lambda: Store(f"s3://{BUCKET}/hangs").read("x"))
    seconds = time.monotonic() - start
    print(f"{seconds:.1f} s, {s3.counts}")
    assert seconds < hurried + 20  # not for ever

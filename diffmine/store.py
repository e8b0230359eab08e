"""Files of a folder on any filesystem (local, S3, Google Cloud Storage): whole or absent, created once, retried.

A local file is written aside, synced, and linked to its name, which fails if the name is taken. An object store gets
one conditional put (`If-None-Match: *` on S3, `ifGenerationMatch=0` on GCS), in parts when the file is large; an object
is seen when it is complete. So two writers of one name never mix, and the loser can look at what the winner wrote.

Object stores are busy, slow or cut off now and then. One policy for all that is asked of them: wait and try again,
longer each time, for up to `PATIENCE_S`, and at least four times. A large file is many requests, and the look for a
file that is absent two; so each request is repeated for some seconds by itself, before all of them are. What cannot get
better by waiting (no permission, expired credentials, nothing there) is not tried again. The clients' own retries are
off, or a dead store would be waited for many times as long.
"""

import asyncio
import errno
import hashlib
import os
import posixpath
import random
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from filelock import FileLock

from diffmine.errors import StoreError

PATIENCE_S = 45.0  # from the first failure of a request to giving up
_LEAST_TRIES = 4  # of one that takes longer than that: gigabytes
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.2, 8.0
_SHORT_WAITS_S, _SHORT_S = (0.2, 0.4, 0.8, 1.6), 10.0  # of a single request; not of one that was waited for longer
_BLOCK = 1 << 22  # bytes, of what is streamed
AHEAD, FAR_AHEAD = 1 << 17, 1 << 24  # bytes that are asked for beyond what is read: of pieces, and of whole files
_FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_FINAL_ERRNO = {errno.EINVAL, errno.ENAMETOOLONG, errno.ENOSYS, errno.EPERM, errno.EMSGSIZE}
# parts of the names of the clients' classes
_FINAL_CLIENT_ERRORS = ("Credential", "Token", "Profile", "Validation", "Region", "Unsupported", "InvalidURL")
_NO_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
_NO_FILE_ERRNO = {errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES}
# S3's names for what is wrong, some of them of the service that gives credentials. InvalidObjectState: in an archive
_OF_ONE_OBJECT = ("AccessDenied", "InvalidObjectState")
_CREDENTIALS = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken", "InvalidClientTokenId",
                "InvalidAccessKeyId", "SignatureDoesNotMatch")  # fmt: skip
_PASSING_CODES = ("408", "429")  # too slow, too many requests
_CLIENTS = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "httpx", "httpx2")
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {"config_kwargs": {"retries": {"total_max_attempts": 1}, "connect_timeout": 10, "read_timeout": 60}},
}
# gcsfs else asks for each bucket's kind, which few accounts may do, and warns each time; zonal buckets need "true"
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
_DIGESTS = ("ETag", "etag", "md5Hash", "content_md5")  # in listings, of one store or another
_TIMES = ("LastModified", "last_modified", "mtime", "created")
_AT_ONCE = 16  # parts or other files
_A = TypeVar("_A")
_T = TypeVar("_T")


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of a URI or a local path, and the path on it. Listings are not remembered: others write too."""
    scheme = uri.partition("://")[0] if "://" in uri else "file"
    options = _OPTIONS.get("s3" if scheme == "s3a" else scheme, {})
    fs, path = fsspec.core.url_to_fs(uri, use_listings_cache=False, **options)
    if "s3" in fs.protocol:
        fs.retries = 1
        fs._call_s3 = partial(_again, partial(type(fs)._call_s3, fs))
    if "gs" in fs.protocol:  # gcsfs has no setting for its six tries, of up to half a minute
        fs._request = partial(_again, partial(type(fs)._request.__wrapped__, fs))
    return fs, path


async def _again(request: Callable[..., Coroutine[Any, Any, _T]], method: str, *args: Any, **kwargs: Any) -> _T:
    """The answer to one of the requests that an operation is made of."""
    start, failed = time.monotonic(), None
    for wait in _SHORT_WAITS_S:
        try:
            return await request(method, *args, **kwargs)
        except Exception as error:
            if failed and method == "complete_multipart_upload" and isinstance(error, FileNotFoundError):
                raise failed from None  # carried out, and the answer was lost: the operation is repeated, and finds it
            if not may_pass(error) or time.monotonic() - start > _SHORT_S:
                raise
            failed = error
            await asyncio.sleep(random.uniform(wait / 2, wait))
    return await request(method, *args, **kwargs)


def read_uri(uri: str, most: int | None = None) -> bytes:
    """Bytes of any file; at most so many, from its beginning.

    Raises:
        OSError: nothing is there, or this file may not be read.
        StoreError: the store did not answer or knows nobody with these credentials, or this machine is in trouble.
    """
    fs, path = filesystem(uri)
    try:
        return patiently(lambda: _whole(fs, path, most)) if _remote(fs) else _whole(fs, path, most)
    except Exception as error:
        if _of_the_file(error) or not (_remote(fs) or isinstance(error, OSError)):
            raise
        where = "" if _remote(fs) else f" on {socket.gethostname()}"
        raise StoreError(f"{uri}: cannot be read{where} ({_said(error)})") from error


def is_refusal(error: BaseException | None) -> bool:
    """Whether an error of `read_uri` says that the file may not be read: of a disk, of S3 or of Google's store."""
    return isinstance(error, PermissionError) or str(error).startswith("Forbidden")


def _of_the_file(error: Exception) -> bool:
    """Whether a read failed because of this file; not of its store, the credentials, or the machine that asks.

    s3fs makes a PermissionError not only of an object that may not be read, but also of expired credentials and a wrong
    clock. gcsfs makes "Forbidden" of every 403; what Google says next names the permission, if that is what is missing.
    """
    if not isinstance(error, OSError):
        return False
    if str(error).startswith("Forbidden"):
        return "storage.objects.get" in str(error)
    code, asked = _s3_code(error), getattr(error.__cause__, "operation_name", "")
    if isinstance(error, PermissionError) and code:
        return code in _OF_ONE_OBJECT and asked == "GetObject"  # not: who asks for credentials is refused
    return code != "NoSuchBucket" and (isinstance(error, _NO_FILE) or error.errno in _NO_FILE_ERRNO)


def _s3_code(error: BaseException) -> str:
    """S3's name for what is wrong, of which its client makes an error of Python; "" of other errors."""
    response = getattr(error.__cause__, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


@contextmanager
def local_copy(uri: str) -> Iterator[str]:
    """Path of a local file with the bytes of any file, which are streamed.

    Raises:
        OSError: nothing is there, it may not be read, or the store did not answer.
    """
    fs, path = filesystem(uri)
    if not _remote(fs):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = f"{folder}/{posixpath.basename(path)}"
        patiently(lambda: fs.get_file(path, copy))
        yield copy


def at_once(ask: Callable[[_A], _T], of: Iterable[_A]) -> list[_T]:
    """An answer for each, in order; some are asked for at the same time, as most of it is waiting for a store."""
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        return list(threads.map(ask, of))


def patiently(request: Callable[[], _T]) -> _T:
    """The answer to a request to an object store, which is repeated while it fails for reasons that may pass."""
    first, wait, tries = None, _FIRST_WAIT_S, 0
    while True:
        tries += 1
        try:
            return request()
        except Exception as error:
            first = first or time.monotonic()
            pause = random.uniform(wait / 2, wait)  # so that many workers do not come back at the same time
            patient = time.monotonic() - first + pause <= PATIENCE_S or tries < _LEAST_TRIES
            if not may_pass(error) or not patient:
                raise
            time.sleep(pause)
            wait = min(2 * wait, _LONGEST_WAIT_S)


def may_pass(error: BaseException) -> bool:
    """Whether a request that failed like this can succeed when it is repeated."""
    package = type(error).__module__.split(".")[0]
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:  # an answer of the Hugging Face hub
        return status >= 500 or str(status) in _PASSING_CODES
    if package == "huggingface_hub":  # "not in the cache" is caused by what kept it from asking, if it was to ask
        return error.__cause__ is not None and may_pass(error.__cause__)
    if isinstance(error, OSError):
        refused = str(error).startswith("Forbidden")  # all that gcsfs says of a 403
        final = isinstance(error, _FINAL) or error.errno in _FINAL_ERRNO or _s3_code(error) in _CREDENTIALS
        return not final and not refused
    if package not in _CLIENTS:
        return False
    code = str(getattr(error, "code", ""))  # of gcsfs's HttpError
    final = any(word in type(error).__name__ for word in _FINAL_CLIENT_ERRORS)
    return not final and getattr(error, "retryable", True) and not (code.startswith("4") and code not in _PASSING_CODES)


class Store:
    """A folder. Names of files are relative to it and use '/'. What goes wrong is a StoreError that names the file."""

    def __init__(self, uri: str) -> None:
        self.fs, root = filesystem(uri)
        self.root = root.rstrip("/")
        self.local = not _remote(self.fs)
        self.uri = self.root if self.local else self.fs.unstrip_protocol(self.root)

    def path(self, name: str) -> str:
        """Path of a file, as its filesystem spells it."""
        return f"{self.root}/{name}"

    def exists(self, name: str) -> bool:
        return bool(self._ask(name, "looked for", lambda: self.fs.exists(self.path(name))))

    def read(self, name: str, most: int | None = None) -> bytes:
        """A file's bytes; at most so many, from its beginning."""
        return self._ask(name, "read", lambda: _whole(self.fs, self.path(name), most))

    def stream(self, name: str, use: Callable[[Any], _T], ahead: int = AHEAD) -> _T:
        """What `use` makes of a file opened for reading; it is called again when the store fails meanwhile."""

        def opened() -> _T:
            with self.fs.open(self.path(name), "rb", block_size=ahead) as file:  # s3fs's own are 50 MiB
                return use(file)

        return self._ask(name, "read", opened)

    def digest(self, name: str) -> str:
        """SHA-256 of a file."""
        return self.stream(name, lambda file: hashlib.file_digest(file, "sha256").hexdigest(), FAR_AHEAD)

    def put(self, name: str, data: bytes | Path, over: bool = False) -> str:
        """Create a file if it is absent; its SHA-256.

        Args:
            data: bytes, or a local file, which is streamed.
            over: other bytes are replaced: they are of an attempt that was cut off.

        Raises:
            StoreError: it exists with other bytes, or cannot be written.
        """
        digest = hashlib.sha256(data).hexdigest() if isinstance(data, bytes) else file_digest(data)
        if not self.put_if_absent(name, data) and self.digest(name) != digest:
            if not over:
                raise StoreError(f"{self.uri}/{name}: exists with other bytes; another run or version wrote it")
            self.replace(name, data)
        return digest

    def put_if_absent(self, name: str, data: bytes | Path) -> bool:
        """Create a file unless it is there, whatever its bytes; whether it was created."""
        path = self.path(name)

        def create() -> bool:
            try:
                if self.local:
                    self._link(path, data)
                elif isinstance(data, bytes):
                    self.fs.pipe_file(path, data, mode="create")
                else:
                    self.fs.put_file(str(data), path, mode="create")
            except FileExistsError:
                return False
            return True

        return self._ask(name, "written", create)

    def replace(self, name: str, data: bytes | Path) -> None:
        """Write a file whole, over what was there."""
        path = self.path(name)

        def write() -> None:
            if self.local:
                self._rename(path, data)
            elif isinstance(data, bytes):
                self.fs.pipe_file(path, data)
            else:
                self.fs.put_file(str(data), path)

        self._ask(name, "written", write)

    def fetch(self, name: str, target: Path) -> None:
        """Copy a file to a local one."""
        self._ask(name, "read", lambda: self.fs.get_file(self.path(name), str(target)))

    def remove(self, name: str) -> None:
        """Remove a file or a folder, if it is there."""
        if self.exists(name):
            self._ask(name, "removed", lambda: self._remove(self.path(name)))

    def names(self, folder: str) -> list[str]:
        """Names of the finished files directly in a folder, sorted."""

        def listing() -> list[str]:
            try:
                return list(self.fs.ls(self.path(folder), detail=False))
            except (FileNotFoundError, NotADirectoryError):
                return []

        paths = self._ask(folder, "listed", listing)
        names = (posixpath.basename(p.rstrip("/")) for p in paths)
        return sorted(n for n in names if n and not n.endswith(".tmp"))

    def files(self, folder: str) -> list[str]:
        """Names of the finished files anywhere below a folder, relative to the store, sorted."""
        return sorted(self._listing(folder))

    def tags(self, folder: str) -> dict[str, str]:
        """Files below a folder -> what is another once their bytes are: size, and the store's digest or time."""
        return {
            name: f"{info['size']} {next((info[key] for key in (*_DIGESTS, *_TIMES) if info.get(key)), '')}"
            for name, info in self._listing(folder).items()
        }

    def times(self, folder: str) -> dict[str, float]:
        """Files below a folder -> when they were written, in seconds since 1970; those of which the store knows."""
        found = {
            name: next((info[key] for key in _TIMES if info.get(key)), None)
            for name, info in self._listing(folder).items()
        }
        return {n: t.timestamp() if isinstance(t, datetime) else float(t) for n, t in found.items() if t is not None}

    def upload(self, folder: Path, name: str) -> dict[str, str]:
        """Copy a local folder into this one; the files' names and SHA-256. What is there with equal bytes is kept."""
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        targets = [f"{name}/{file.relative_to(folder).as_posix()}" for file in files]
        return {target: self.put(target, file) for target, file in zip(targets, files, strict=True)}

    # -------------------------------------------------------------------------------------------------------- inside

    def _listing(self, folder: str) -> dict[str, dict[str, Any]]:
        """Finished files anywhere below a folder, with what the store says of them."""
        found = self._ask(folder, "listed", lambda: self.fs.find(self.path(folder), detail=True))
        return {path[len(self.root) + 1 :]: info for path, info in found.items() if not path.endswith(".tmp")}

    def _ask(self, name: str, verb: str, request: Callable[[], _T]) -> _T:
        try:
            return request() if self.local else patiently(request)
        except Exception as error:
            if self.local and not isinstance(error, OSError):
                raise
            raise StoreError(f"{self.uri}/{name}: cannot be {verb} ({_said(error)})") from error

    def _link(self, path: str, data: bytes | Path) -> None:
        aside = self._write_aside(path, data)
        try:
            os.link(aside, path)  # fails if the name is taken: never half a file, never over another's
            _sync_folder(path)
        finally:
            os.unlink(aside)

    def _rename(self, path: str, data: bytes | Path) -> None:
        aside = self._write_aside(path, data)
        try:
            os.replace(aside, path)
        except BaseException:
            os.unlink(aside)
            raise
        _sync_folder(path)

    def _write_aside(self, path: str, data: bytes | Path) -> str:
        os.makedirs(posixpath.dirname(path), exist_ok=True)
        aside = f"{path}.{uuid.uuid4().hex}.tmp"
        try:
            with open(aside, "wb") as file:
                if isinstance(data, bytes):
                    file.write(data)
                else:
                    with data.open("rb") as source:
                        shutil.copyfileobj(source, file, _BLOCK)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise
        return aside

    def _remove(self, path: str) -> None:
        with suppress(FileNotFoundError):  # gone since: another process, or a first try whose answer was lost
            self.fs.rm(path, recursive=True)


def file_digest(file: Path) -> str:
    """SHA-256 of a local file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def fetch_folder(uri: str, cache: Path) -> Path | None:
    """A folder of any filesystem as a local one in `cache`, there when it is complete; None if nothing is there.

    It is copied once per machine, and again when a file of it is another.
    """
    source = Store(uri)
    tags = source.tags("")
    if not tags:
        return None
    target = cache / hashlib.sha256(repr((uri, sorted(tags.items()))).encode()).hexdigest()[:24]
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):  # many processes of a machine want it; the system unlocks it for one that dies
        if not target.is_dir():
            aside = Path(f"{target}.tmp")
            shutil.rmtree(aside, ignore_errors=True)  # of one that died
            for name in tags:
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                source.fetch(name, aside / name)
            aside.rename(target)
    return target


def _whole(fs: fsspec.AbstractFileSystem, path: str, most: int | None = None) -> bytes:
    """A file's bytes, by one request: s3fs would ask for its size before, so that it can read large ones in pieces."""
    options: dict[str, int] = {"max_concurrency": 1} if "s3" in fs.protocol else {}
    if most is not None:
        options |= {"start": 0, "end": most}
    try:
        return bytes(fs.cat_file(path, **options))
    except Exception as error:
        if most is not None and "not satisfiable" in str(error):  # the answer to who wants a piece of an empty file
            return b""
        raise


def _remote(fs: fsspec.AbstractFileSystem) -> bool:
    return "file" not in ([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol)


def _sync_folder(path: str) -> None:
    """A new name outlives a power cut only when its folder is synced too."""
    folder = os.open(posixpath.dirname(path), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _said(error: BaseException) -> str:
    if "Bad Request" in str(error):  # S3's answer to a question about an object, which has no room for a reason
        return f"{error}; are the credentials valid?"
    said = f"{type(error).__name__}: {error}" if not isinstance(error, OSError) or not str(error) else str(error)
    return said + _what_to_do(error)


def _what_to_do(error: BaseException) -> str:
    """What the machine needs before the same request can succeed; "" if nothing is known of that."""
    code, name, machine = _s3_code(error), type(error).__name__, socket.gethostname()
    if code == "RequestTimeTooSkewed":
        return f"; set the clock of {machine}, then give the same command again"
    unknown = str(getattr(error, "code", "")) == "401" or "Credential" in name or "Token" in name
    if code in _CREDENTIALS or unknown or name == "RefreshError":
        return f"; renew the credentials of {machine}, then give the same command again"
    return ""

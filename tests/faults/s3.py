"""A local S3 server with seeded faults, and an environment in which S3 clients use it.

The server is moto's. Whether a request fails depends on the seed, its method, its path, and how often it came before;
not on the order in which requests of different threads arrive.
"""

import io
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import boto3
import pytest
import s3fs
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "bucket"
CANARY = "canary-3f9a1c/not+to+be/seen"  # the secret key; it must be nowhere but in the environment
_DENIED = {  # code -> S3's status
    "ExpiredToken": "400 Bad Request",
    "InvalidToken": "400 Bad Request",
    **dict.fromkeys(("AccessDenied", "InvalidObjectState", "AllAccessDisabled", "InvalidAccessKeyId"), "403 Forbidden"),
    **dict.fromkeys(("SignatureDoesNotMatch", "RequestTimeTooSkewed"), "403 Forbidden"),
}


@dataclass
class Faults:
    """What the server does wrong. Shares are of requests; `truncated` is of the GET requests that have a body."""

    busy: float = 0.0  # answered 503, not carried out
    truncated: float = 0.0  # cut off half way, with the length of the whole body in the header
    late: float = 0.0  # answered after `late_s`
    late_s: float = 0.5
    refused: str = ""  # a key of _DENIED: every request
    every: int = 0  # 503 for each request whose number is a multiple of it
    lost: int = 0  # so many of the next writes are carried out, then answered 503
    lost_of: str = ""  # only of those whose query begins so: "uploadId=" ends the upload of a file in parts


@dataclass
class Counts:
    """Requests and faults since the last reset."""

    requests: Counter[tuple[str, str]] = field(default_factory=Counter)  # (method, path) -> requests
    faults: Counter[str] = field(default_factory=Counter)  # name of a field of `Faults` -> times
    sent: int = 0  # bytes of the answers' bodies

    def of(self, path: str) -> int:
        """Requests for one object, by any method."""
        return sum(count for (_, requested), count in self.requests.items() if requested == path)

    def __str__(self) -> str:
        methods: Counter[str] = Counter()
        for (method, _), count in self.requests.items():
            methods[method] += count
        return f"{self.requests.total()} requests {dict(methods)}, faults {dict(self.faults)}"


class S3:
    """The server's application: moto behind the faults."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.faults = Faults()
        self.counts = Counts()
        self.url = ""
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._counting = threading.Lock()
        self._one = threading.Lock()  # moto looks whether an object is there, then writes it; S3 does both in one step

    def reset(self, faults: Faults | None = None) -> None:
        """Other faults, and counts from zero."""
        with self._counting:
            self.faults, self.counts = faults or Faults(), Counts()

    def client(self) -> Any:
        """A client that has nothing to do with diffmine and s3fs."""
        return boto3.client("s3")

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        with self._counting:
            faults, counts = self.faults, self.counts
            counts.requests[method, path] += 1
            number = counts.requests.total()
            chance = random.Random(f"{self.seed} {method} {path} {counts.requests[method, path]}")
            written = method in ("PUT", "POST") and environ["QUERY_STRING"].startswith(faults.lost_of)
            lost = faults.lost > 0 and written
            faults.lost -= lost
        late, busy, code, truncated = chance.random(), chance.random(), chance.random(), chance.random()
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))  # else the client cannot go on
        environ["wsgi.input"] = io.BytesIO(body)
        if late < faults.late:
            counts.faults["late"] += 1
            time.sleep(faults.late_s)
        if faults.refused:
            counts.faults["refused"] += 1
            return _error(start_response, method, _DENIED[faults.refused], faults.refused)
        if busy < faults.busy or (faults.every and number % faults.every == 0):
            counts.faults["busy"] += 1
            return _error(start_response, method, "503 Busy", "SlowDown" if code < 0.5 else "ServiceUnavailable")
        status, headers, answer = self._ask_moto(environ)
        if lost:
            counts.faults["lost"] += 1
            return _error(start_response, method, "503 Busy", "ServiceUnavailable")
        if method == "GET" and status.startswith("2") and len(answer) > 1 and truncated < faults.truncated:
            counts.faults["truncated"] += 1
            headers = [(k, v) for k, v in headers if k.lower() != "content-length"]
            headers.append(("Content-Length", str(len(answer))))
            answer = answer[: len(answer) // 2]
        with self._counting:
            counts.sent += len(answer)
        start_response(status, headers)
        return [answer]

    def _ask_moto(self, environ: dict[str, Any]) -> tuple[str, list[tuple[str, str]], bytes]:
        said: list[Any] = []

        def start(status: str, headers: list[tuple[str, str]], exc_info: object = None) -> None:
            said[:] = [status, headers]

        with self._one:
            try:
                answer = b"".join(self._moto(environ, start))
            except KeyError:  # moto's answer to a part of an upload that was aborted meanwhile
                answer = b"".join(_error(start, environ["REQUEST_METHOD"], "404 Not Found", "NoSuchUpload"))
        return said[0], said[1], answer


def _error(start_response: Callable[..., Any], method: str, status: str, code: str) -> list[bytes]:
    xml = (
        f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>{code}, on purpose</Message></Error>"
    )
    body = b"" if method == "HEAD" else xml.encode()
    start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
    return [body]


class _Quiet(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        """Nothing: a request is not worth a line."""


@contextmanager
def serving(seed: int = 0) -> Iterator[S3]:
    """The server with an empty bucket, and an environment (of this process and its children) that points to it."""
    s3 = S3(seed)
    server = make_server("127.0.0.1", 0, s3, threaded=True, request_handler=_Quiet)
    s3.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name in [name for name in os.environ if name.startswith("AWS_")]:
                patch.delenv(name)
            patch.setenv("AWS_ENDPOINT_URL", s3.url)
            patch.setenv("AWS_ACCESS_KEY_ID", "key")
            patch.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
                patch.setenv(name, os.devnull)
            patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
            patch.setenv("NO_PROXY", "127.0.0.1")
            s3fs.S3FileSystem.clear_instance_cache()
            _empty_bucket(s3)
            s3.reset()
            yield s3
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.shutdown()
        thread.join()
        server.server_close()


def _empty_bucket(s3: S3) -> None:
    """moto's objects belong to the process: those of an earlier server are still there."""
    client = s3.client()
    client.create_bucket(Bucket=BUCKET)
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
        for entry in page.get("Contents", []):
            client.delete_object(Bucket=BUCKET, Key=entry["Key"])
    client.close()

"""A local server of Google Cloud Storage with seeded faults, and an environment in which its client uses it.

The server is gcp-storage-emulator, which knows no conditions. The one that diffmine leans on is added here: an upload
with `ifGenerationMatch=0` is answered 412 once the object is there, when it begins and when it ends.
"""

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlparse

import gcsfs
import pytest
from gcp_storage_emulator import server as emulator
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

BUCKET = "bucket"
Handler = Callable[..., Any]


@dataclass
class GCS:
    """What the server does wrong, and what it was asked since the last reset."""

    seed: int
    busy: float = 0.0  # share of requests that are answered with `code` and not carried out
    code: int = 503
    message: str = "on purpose"
    requests: Counter[str] = field(default_factory=Counter)  # by method; "busy" and "refused" among them
    conditional: set[str] = field(default_factory=set)  # uploads in parts that were begun with the condition

    def reset(self, busy: float = 0.0) -> None:
        self.busy, self.code, self.message, self.requests = busy, 503, "on purpose", Counter()


def _conditional(handler: Handler, gcs: GCS) -> Handler:
    """An emulator's handler of uploads that respects the condition."""

    def handle(request: Any, response: Any, storage: Any, *args: Any) -> Any:
        bucket, upload = request.params["bucket_name"], request.query.get("upload_id", [""])[0]
        wanted = request.query.get("ifGenerationMatch") == ["0"] or upload in gcs.conditional
        if wanted and _there(storage, bucket, _name(request, storage, upload)):
            gcs.requests["refused"] += 1
            response.status = HTTPStatus.PRECONDITION_FAILED
            return response.json({"error": {"code": 412, "message": "conditionNotMet, on purpose"}})
        result = handler(request, response, storage, *args)
        if wanted and "Location" in response._headers:
            gcs.conditional.add(parse_qs(urlparse(response._headers["Location"]).query)["upload_id"][0])
        return result

    return handle


def _cancel(request: Any, response: Any, storage: Any) -> None:
    """An upload in parts is given up."""
    response.status = SimpleNamespace(value=499, phrase="Client Closed Request")


def _name(request: Any, storage: Any, upload: str) -> str:
    if upload:
        return str(storage.get_resumable_file_obj(upload)["name"])
    if "name" in request.query:
        return str(request.query["name"][0])
    return str(request.data["meta"]["name"])


def _there(storage: Any, bucket: str, name: str) -> bool:
    try:
        return bool(storage.get_file_obj(bucket, name))
    except NotFound:
        return False


def _faulty(handle: Handler, gcs: GCS) -> Handler:
    """The emulator's way of handling a request, behind the faults."""

    def answer(router: Any, method: str) -> None:
        gcs.requests[method] += 1
        path = router._request_handler.path.partition("?")[0]
        if random.Random(f"{gcs.seed} {method} {path} {gcs.requests[method]}").random() < gcs.busy:
            gcs.requests["busy"] += 1
            length = int(router._request_handler.headers.get("Content-Length") or 0)
            router._request_handler.rfile.read(length)  # else the client cannot go on
            body = json.dumps({"error": {"code": gcs.code, "message": gcs.message}}).encode()
            router._request_handler.send_response(gcs.code)
            router._request_handler.send_header("Content-Length", str(len(body)))
            router._request_handler.end_headers()
            router._request_handler.wfile.write(body)
        else:
            handle(router, method)

    return answer


@contextmanager
def serving(seed: int = 0) -> Iterator[GCS]:
    """The server with an empty bucket, and an environment (of this process and its children) that points to it."""
    gcs = GCS(seed)
    with pytest.MonkeyPatch.context() as patch:
        for _, handlers in emulator.HANDLERS:
            for method, handler in list(handlers.items()):
                if handler in (objects.insert, objects.upload_partial):
                    patch.setitem(handlers, method, _conditional(handler, gcs))
                    patch.setitem(handlers, "DELETE", _cancel)
        patch.setattr(emulator.Router, "handle", _faulty(emulator.Router.handle, gcs))
        server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
        server.start()
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server._api._httpd.server_port}")
        patch.setenv("GOOGLE_APPLICATION_CREDENTIALS", os.devnull)
        gcsfs.GCSFileSystem.clear_instance_cache()
        try:
            yield gcs
        finally:
            gcsfs.GCSFileSystem.clear_instance_cache()
            server.stop()

"""URIs -> bytes of image files, read ahead, or prepared images; what is wrong with one leaves as an `ImageError`."""

import os
import posixpath
import socket
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from diffmine.config import Config
from diffmine.data.images import decode, prepare
from diffmine.errors import ImageError, StoreError
from diffmine.store import read_uri

_AHEAD = 8  # files on their way: a store takes longer to begin an answer than a core to decode an image


def files_ahead(uris: Iterable[str], max_bytes: int) -> Iterator[Future[bytes]]:
    """What `read_file` gives for each URI, in their order. The next files are on their way while one is used."""
    coming: deque[Future[bytes]] = deque()
    with ThreadPoolExecutor(_AHEAD) as readers:
        for uri in uris:
            coming.append(readers.submit(read_file, uri, max_bytes))
            if len(coming) > _AHEAD:
                yield coming.popleft()
        while coming:
            yield coming.popleft()


def read_file(uri: str, max_bytes: int) -> bytes:
    """Bytes of an image file; of a larger one so many that `decode` sees it is too large.

    Raises:
        ImageError: "missing": it is not there, or this file may not be read.
        StoreError: its store does not answer, the credentials are not valid, or this machine cannot read; that ends
            the stage, as the image may well be there.
    """
    try:
        return read_uri(uri, max_bytes + 1)
    except OSError as error:
        raise ImageError("missing", f"cannot be read: {error}") from error


def require_folder(uri: str, image_id: str) -> None:
    """Of an image that was not found: look whether its folder is on this machine, or nothing is known of the image.

    A disk that is not mounted leaves no folder, or an empty one. Of a folder that is gone from a dataset that is there,
    the images are gone. An object store has no folders: a prefix whose objects are gone is none; and who asks a bucket
    of S3 that is not there for an object is told so. Nothing is asked of a store here.

    Args:
        image_id: path below the dataset's folder, or the URI of an image elsewhere.

    Raises:
        StoreError: no such folder, or nothing is in it.
    """
    if "://" in uri:
        return
    root, folder = uri.removesuffix(image_id).rstrip("/"), posixpath.dirname(uri)
    while root and folder != root and not os.path.lexists(folder):
        folder = posixpath.dirname(folder)
    try:
        with os.scandir(folder) as entries:
            there = any(True for _ in entries)
    except (PermissionError, NotADirectoryError):
        there = True
    except OSError:
        there = False
    if not there:
        raise StoreError(
            f"{uri}: not found, and {folder} is absent or empty on {socket.gethostname()}: mount it, then give the "
            "same command again; if all its images were removed, remove the folder too, or leave them out (--rerun)"
        )


def require_dataset(uri: str, image_id: str) -> None:
    """Of any image of a dataset: look whether there is such a dataset on this machine.

    Raises:
        StoreError: the image is not there, and nor is its folder.
    """
    if "://" not in uri and not os.path.lexists(uri):
        require_folder(uri, image_id)


def require_rights(rows: list[dict[str, Any]]) -> None:
    """Of a shard none of whose files may be read: it is this machine's rights that are missing, not the images.

    Args:
        rows: with `uri`, and of a file that could not be read `detail` and whether it was `refused`. One file alone
            tells nothing of the machine.

    Raises:
        StoreError: more than one, and all were refused.
    """
    if len(rows) > 1 and all(row.get("refused") for row in rows):
        first = rows[0]
        raise StoreError(
            f"{first['uri']}: {first['detail']}; {socket.gethostname()} may read none of {len(rows)} images in a row: "
            "give it the right, then give the same command again; if nobody is to read them, leave them out (--rerun)"
        )


def prepared_images(uris: Iterable[str], config: Config) -> Iterator[np.ndarray | ImageError]:
    """What the model saw of images, uint8 [H, W, 3], in their order; or why one can no longer be read."""
    size, limits = config.dataset.image, config.compute
    for data in files_ahead(uris, limits.max_image_bytes):
        try:
            upright = decode(data.result(), max_pixels=limits.max_image_pixels, max_bytes=limits.max_image_bytes)
            yield prepare(upright, size.short_side, size.multiple_of)[0]
        except ImageError as error:
            yield error

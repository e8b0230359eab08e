"""URIs -> bytes of image files, read ahead, or prepared images; what is wrong with one leaves as an `ImageError`."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from diffmine.config import Config
from diffmine.data.images import decode, prepare
from diffmine.errors import ImageError
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
        ImageError: "missing".
        StoreError: its store does not answer; that ends the stage, as the image may well be there.
    """
    try:
        return read_uri(uri, max_bytes + 1)
    except OSError as error:
        raise ImageError("missing", f"cannot be read: {error}") from error


def prepared_images(uris: Iterable[str], config: Config) -> Iterator[np.ndarray | ImageError]:
    """What the model saw of images, uint8 [H, W, 3], in their order; or why one can no longer be read."""
    size, limits = config.dataset.image, config.compute
    for data in files_ahead(uris, limits.max_image_bytes):
        try:
            decoded = decode(data.result(), max_pixels=limits.max_image_pixels, max_bytes=limits.max_image_bytes)
            yield prepare(decoded.pixels, size.short_side, size.multiple_of)[0]
        except ImageError as error:
            yield error

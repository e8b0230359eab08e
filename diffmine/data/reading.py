"""A URI -> the bytes of an image file, or its prepared image; whatever is wrong with it leaves as an `ImageError`."""

import numpy as np

from diffmine.config import Config
from diffmine.data.images import decode, prepare
from diffmine.errors import ImageError
from diffmine.store import read_uri


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


def prepared_image(uri: str, config: Config) -> np.ndarray:
    """What the model saw of an image, uint8 [H, W, 3].

    Raises:
        ImageError: it can no longer be read.
    """
    size, limits = config.dataset.image, config.compute
    decoded = decode(
        read_file(uri, limits.max_image_bytes), max_pixels=limits.max_image_pixels, max_bytes=limits.max_image_bytes
    )
    return prepare(decoded.pixels, size.short_side, size.multiple_of)[0]

"""bytes of an image file -> upright RGB pixels -> the prepared image that the model sees, and the geometry in between.

    file --decode--> upright RGB [H, W, 3] --prepare--> prepared [height, width, 3]
                                                    patches <--to_original--+

Nothing here opens a file: the caller reads the bytes. Whatever is wrong with one image leaves as an `ImageError`.
"""

import io
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from PIL import ExifTags, Image, ImageFile

from diffmine.errors import FailureReason, ImageError

FORMATS: dict[str, tuple[str, ...]] = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",),
    "GIF": (".gif",),
}
EXTENSIONS: frozenset[str] = frozenset(extension for extensions in FORMATS.values() for extension in extensions)
MAX_ASPECT = 8

_SIGNATURES = {  # format -> how its files begin; "?" is any byte
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "WEBP": (b"RIFF????WEBP",),
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    "BMP": (b"BM",),
    "GIF": (b"GIF87a", b"GIF89a"),
}
_TIFF_BITS_PER_SAMPLE, _TIFF_PHOTOMETRIC = 258, 262
_WHITE_12, _WHITE_16 = 2**12 - 1, 2**16 - 1
_ONE_AT_A_TIME = threading.Lock()
# What Pillow raises where the pixels are sound and only EXIF is not.
_BAD_METADATA = (
    *(OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, AttributeError),
    *(ArithmeticError, RuntimeError, struct.error),
)
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: pixels[::-1].transpose(1, 0, 2),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: pixels.transpose(1, 0, 2)[::-1],
}


# ----------------------------------------------------------------------------------------------------- bytes to pixels


def decode(data: bytes, *, max_pixels: int, max_bytes: int) -> np.ndarray:
    """Bytes of an image file -> upright RGB pixels as a viewer would show them, uint8 [H, W, 3] in C order.

    The format is told from the content, never from a name, and must be one of `FORMATS`. EXIF orientation is applied;
    transparency is laid over white; of an animation or a multi-page file the first frame is taken. Colour profiles are
    not applied. CMYK goes to RGB by (255 - c)(255 - k) / 255; CMYK JPEG files are read as inverted, the way Adobe
    writes them and browsers read them.

    Of grey 16-bit samples white is 65535, or 4095 where no value of the image is above it (12-bit data); of 32-bit
    integers and floats it is the first of 1 (floats only), 255, 4095 and 65535 that no value is above. Of 16 bits per
    colour the upper eight are taken.

    Args:
        data: the whole file; of one that is larger than `max_bytes`, its beginning will do.
        max_pixels: width times height above which the file is refused, before anything is decoded.
        max_bytes: size of the file above which it is refused.

    Raises:
        ImageError: reason `empty`, `format`, `truncated`, `too_large`, `too_small` (no pixels) or `non_finite`.
    """
    if not data:
        raise ImageError("empty", "the file has no bytes")
    if len(data) > max_bytes:
        raise ImageError("too_large", f"more than {max_bytes:,} bytes (compute.max_image_bytes)")
    with _strict_pillow(max_pixels):
        try:
            return _decode(data, max_pixels)
        except (ImageError, MemoryError):
            raise
        except Image.DecompressionBombError as error:
            raise ImageError("too_large", f"{error} compute.max_image_pixels allows {max_pixels:,}") from error
        except Image.UnidentifiedImageError as error:
            raise ImageError(*_unidentified(data)) from error
        except Exception as error:  # hostile bytes make Pillow raise nearly anything: this is where a bad image ends
            raise ImageError("truncated", f"{type(error).__name__}: {error}") from error


@contextmanager
def _strict_pillow(max_pixels: int) -> Iterator[None]:
    """Pillow with our pixel limit, no warnings, and no tolerance for missing data; as it was before, afterwards.

    All three are settings of the process, so one image is decoded at a time: use processes, not threads, for speed.
    """
    with _ONE_AT_A_TIME, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
        # Pillow itself raises at twice this number, inside plugins that allocate before we can see the size.
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = max_pixels, False
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = before


def _decode(data: bytes, max_pixels: int) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=tuple(FORMATS)) as image:
        width, height = image.size
        if width * height > max_pixels:
            allowed = f"compute.max_image_pixels allows {max_pixels:,}"
            raise ImageError("too_large", f"{width} x {height} = {width * height:,} pixels; {allowed}")
        if not width or not height:
            raise ImageError("too_small", f"the header says {width} x {height} pixels")
        image.load()
        # After load(): Pillow turns TIFF files upright itself, and then no longer reports an orientation.
        return np.ascontiguousarray(_UPRIGHT.get(_orientation(image), np.asarray)(_to_rgb(image)))


def _unidentified(data: bytes) -> tuple[FailureReason, str]:
    """Reason and detail for bytes that no plugin could open."""
    for name, signatures in _SIGNATURES.items():
        if any(_begins_like(data, signature) for signature in signatures):
            return "truncated", f"begins like {name}, but its header is cut off, damaged or of an unsupported kind"
    return "format", f"begins with {data[:12]!r}, which is none of {', '.join(FORMATS)}"


def _begins_like(data: bytes, signature: bytes) -> bool:
    """Also true of a file that is cut off inside its signature."""
    return all(wanted in (got, ord("?")) for got, wanted in zip(data, signature, strict=False))


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8, also from XMP; 1 where EXIF cannot be read: damaged metadata must not cost the pixels."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except _BAD_METADATA:
        return 1


# ------------------------------------------------------------------------------------------------------ colours to RGB


def _to_rgb(image: Image.Image) -> np.ndarray:
    """Loaded image of any mode -> uint8 [H, W, 3]."""
    if image.mode.startswith("I;16"):
        return _grey(_from_16_bit(image))
    if image.mode in ("I", "F"):
        return _grey(_from_undeclared_range(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))  # 16 bits per colour: Pillow has already taken the upper eight


def _grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[:, :, None], 3, axis=2)  # [H, W, 3]


def _from_16_bit(image: Image.Image) -> np.ndarray:
    """Mode I;16 -> uint8 [H, W], scaled. Pillow's own conversion to RGB makes everything from 255 on white."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})  # TIFF only
    bits = tags.get(_TIFF_BITS_PER_SAMPLE, (16,))[0]  # scanners write 12
    full = 2 ** min(max(bits, 1), 16) - 1
    if full == _WHITE_16 and values.max() <= _WHITE_12:  # of 12 bits, or as good as black
        full = _WHITE_12
    grey = (np.minimum(np.arange(2**16), full) * 255 + full // 2) // full  # of every possible sample
    if tags.get(_TIFF_PHOTOMETRIC) == 0:  # white is zero; Pillow inverts 8 bits only
        grey = 255 - grey
    if "transparency" in image.info:
        grey[image.info["transparency"]] = 255
    return grey.astype(np.uint8)[values]


def _from_undeclared_range(values: np.ndarray) -> np.ndarray:
    """32-bit integers or floats [H, W] -> uint8 [H, W].

    Such files do not say what white is: the first of 0..1 (floats only), 0..255, 0..4095 and 0..65535 that holds all
    values, else their own minimum..maximum.
    """
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ImageError("non_finite", "its float pixels are not all finite numbers")
    usual = ([1.0] if values.dtype.kind == "f" else []) + [255.0, _WHITE_12, _WHITE_16]
    black, white = next(((0.0, top) for top in usual if low >= 0 and high <= top), (low, high))
    grey = np.rint((values.astype(np.float64) - black) * (255 / ((white - black) or 1.0)))
    return grey.astype(np.uint8)


# ----------------------------------------------------------------------------------- upright pixels to prepared pixels


@dataclass(frozen=True)
class Geometry:
    """Where the prepared image lies: prepared = upright x scale, then cropped. Exactly, on both axes (see `geometry`).

    Attributes:
        scale: prepared pixels per upright pixel.
        crop_x, crop_y: left and upper edge of the prepared image in the scaled one, pixels.
        width, height: size of the prepared image, pixels.
    """

    scale: float
    crop_x: int
    crop_y: int
    width: int
    height: int


def geometry(width: int, height: int, short_side: int, multiple_of: int) -> Geometry:
    """Size of an upright image -> how it is prepared: short side to `short_side`, central crop to multiples.

    There is one scale for both axes. The long side then rarely comes out as a whole number of pixels; the fraction at
    its far end (less than one pixel) is cut off with the rest of the crop instead of being stretched away, so that
    `to_original` is exact with no rounding anywhere.

    Raises:
        ImageError: `aspect` when one side is over 8 times the other; `too_small` when no multiple fits.
    """
    short, long = min(width, height), max(width, height)
    if short < 1:
        raise ImageError("too_small", f"{width} x {height} pixels")
    if long > MAX_ASPECT * short:
        raise ImageError("aspect", f"{width} x {height} pixels: one side is over {MAX_ASPECT} times the other")
    if short_side < multiple_of:
        raise ImageError("too_small", f"a short side of {short_side} pixels holds no multiple of {multiple_of}")
    resized = [side * short_side // short for side in (width, height)]
    cropped = [side - side % multiple_of for side in resized]
    crop = [(whole - kept) // 2 for whole, kept in zip(resized, cropped, strict=True)]
    return Geometry(short_side / short, *crop, *cropped)


def prepare(pixels: np.ndarray, short_side: int, multiple_of: int) -> tuple[np.ndarray, Geometry]:
    """Upright image uint8 [H, W, 3] -> prepared image uint8 [height, width, 3] and its geometry.

    Lanczos, antialiased when reducing. Raises as `geometry` does.
    """
    height, width = pixels.shape[:2]
    g = geometry(width, height, short_side, multiple_of)
    if g.scale == 1:
        return pixels[g.crop_y : g.crop_y + g.height, g.crop_x : g.crop_x + g.width].copy(), g
    left, top = g.crop_x / g.scale, g.crop_y / g.scale
    right, bottom = (g.crop_x + g.width) / g.scale, (g.crop_y + g.height) / g.scale
    # The box is in upright pixels and may end between two of them: resize and crop in one, without a second rounding.
    box = (left, top, min(right, width), min(bottom, height))
    prepared = Image.fromarray(pixels).resize((g.width, g.height), Image.Resampling.LANCZOS, box=box)
    return np.array(prepared), g


def to_original(g: Geometry, x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
    """Box (x, y, width, height) in prepared pixels -> in upright pixels, after clipping to the prepared image."""
    x, width = _clip(x, width, g.width)
    y, height = _clip(y, height, g.height)
    return (x + g.crop_x) / g.scale, (y + g.crop_y) / g.scale, width / g.scale, height / g.scale


def to_prepared(boxes: ArrayLike, scale: float, crop_x: float, crop_y: float) -> np.ndarray:
    """Boxes [M, 4] (x, y, width, height) in upright pixels -> in prepared pixels, not clipped: float64 [M, 4]."""
    return np.asarray(boxes, np.float64).reshape(-1, 4) * scale - np.array([crop_x, crop_y, 0, 0])


def _clip(start: float, length: float, size: int) -> tuple[float, float]:
    """Start and length of the part of an interval that lies in 0..size."""
    low, high = min(max(start, 0.0), size), min(max(start + length, 0.0), size)
    return low, high - low

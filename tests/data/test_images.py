"""Decoding: a zoo of formats with known pixels, files that lie, and the geometry of original and prepared image."""

import io
import math
import random
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from diffmine.data.images import FORMATS, Geometry, decode, geometry, prepare, to_original
from diffmine.errors import FAILURE_REASONS, ImageError

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def read(data: bytes, max_pixels: int = 1_000_000, max_bytes: int = 2**24) -> np.ndarray:
    return decode(data, max_pixels=max_pixels, max_bytes=max_bytes)


def reason(data: bytes, max_pixels: int = 1_000_000, max_bytes: int = 2**24) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data, max_pixels=max_pixels, max_bytes=max_bytes)
    assert caught.value.detail
    assert caught.value.reason in FAILURE_REASONS
    return caught.value.reason


def saved(image: Image.Image, fmt: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def noise(height: int = 24, width: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, data: bytes, *extra: bytes) -> bytes:
    """A PNG written by hand: Pillow cannot save 16-bit colour."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = png_chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + body + png_chunk(b"IEND", b"")


# ----------------------------------------------------------------------------------------------------------- the zoo


@pytest.mark.parametrize("fmt", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_give_the_very_pixels(fmt: str) -> None:
    options = {"lossless": True} if fmt == "WEBP" else {}
    pixels = read(saved(Image.fromarray(noise()), fmt, **options))
    assert np.array_equal(pixels, noise())
    assert pixels.dtype == np.uint8
    assert pixels.flags["C_CONTIGUOUS"]
    assert pixels.flags["WRITEABLE"]


@pytest.mark.parametrize("colour", [RED, GREEN, BLUE, (200, 120, 40)])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg(colour: tuple[int, int, int], progressive: bool) -> None:
    pixels = read(saved(Image.new("RGB", (32, 16), colour), "JPEG", quality=95, progressive=progressive))
    assert pixels.shape == (16, 32, 3)
    assert np.abs(pixels.astype(int) - colour).max() <= 2


def test_cmyk_jpeg_as_adobe_writes_it() -> None:
    cyan, rich = (255, 0, 0, 0), (0, 128, 255, 64)
    assert np.abs(read(cmyk_jpeg(cyan))[0, 0].astype(int) - (0, 255, 255)).max() <= 2
    expected = [(255 - ink) * (255 - 64) / 255 for ink in rich[:3]]
    assert np.abs(read(cmyk_jpeg(rich))[0, 0] - expected).max() <= 3


def cmyk_jpeg(inks: tuple[int, int, int, int], transform: int = 0) -> bytes:
    """Pillow writes inverted samples and an Adobe marker, as Photoshop does."""
    data = saved(Image.new("CMYK", (16, 16), inks), "JPEG", quality=100, subsampling=0)
    at = data.index(b"Adobe") + 11
    return data[:at] + bytes([transform]) + data[at + 1 :]


def test_ycck_jpeg() -> None:
    y, cb, cr, k = 150, 90, 170, 55
    data = cmyk_jpeg((255 - y, 255 - cb, 255 - cr, k), transform=2)  # the same samples, read as YCbCr and K
    inks = y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y + 1.772 * (cb - 128)
    expected = [(255 - ink) * (255 - k) / 255 for ink in inks]
    assert np.abs(read(data)[0, 0] - expected).max() <= 3


def test_cmyk_tiff() -> None:
    assert read(saved(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF"))[0, 0].tolist() == [255, 0, 0]


def test_grey_and_one_bit() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(read(saved(Image.fromarray(ramp), "PNG")), np.repeat(ramp[:, :, None], 3, axis=2))
    bits = Image.fromarray(ramp > 99)
    for fmt in ("PNG", "TIFF", "BMP"):
        assert np.array_equal(read(saved(bits, fmt))[:, :, 0], np.where(ramp > 99, 255, 0)), fmt


def test_palette_with_and_without_transparency() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    for fmt in ("PNG", "GIF", "BMP", "TIFF"):
        assert read(saved(image, fmt))[0].tolist() == [[*RED], [*BLUE]], fmt
    for fmt in ("PNG", "GIF"):
        assert read(saved(image, fmt, transparency=1))[0].tolist() == [[*RED], [*WHITE]], fmt
    half = saved(image, "PNG", transparency=bytes([255, 128]))
    assert np.abs(read(half)[0].astype(int) - [RED, (127, 127, 255)]).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("fmt", ["PNG", "TIFF", "WEBP"])
def test_alpha_lies_over_white(mode: str, fmt: str) -> None:
    grey, alpha = 40, np.array([0, 64, 255])
    colours = [grey] * (len(mode) - 1)
    image = Image.fromarray(np.array([[[*colours, a] for a in alpha]], dtype=np.uint8), mode)
    data = saved(image, fmt, **({"lossless": True, "exact": True} if fmt == "WEBP" else {}))
    expected = grey * alpha / 255 + 255 * (1 - alpha / 255)
    assert np.abs(read(data)[0].astype(float) - expected[:, None]).max() <= 1


def test_transparent_colour_of_grey_and_colour_png() -> None:
    assert read(saved(Image.new("RGB", (1, 1), GREEN), "PNG", transparency=GREEN))[0, 0].tolist() == [*WHITE]
    assert read(saved(Image.new("L", (1, 1), 7), "PNG", transparency=7))[0, 0].tolist() == [*WHITE]
    sixteen = png(2, 1, 16, 0, struct.pack(">xHH", 700, 25700), png_chunk(b"tRNS", struct.pack(">H", 700)))
    assert read(sixteen)[0, :, 0].tolist() == [255, 100]


def test_16_bit_grey_is_scaled_where_pillow_clips() -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    expected = np.rint(ramp / 257).astype(np.uint8)
    for fmt in ("PNG", "TIFF"):
        data = saved(Image.fromarray(ramp), fmt)
        assert np.array_equal(read(data)[:, :, 0], expected), fmt
        clipped = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))[:, :, 0]  # negative control
        assert (clipped == 255).sum() == 63


def test_16_bit_grey_tiff_whose_white_is_zero() -> None:
    data = saved(Image.fromarray(np.array([[0, 65535]], np.uint16)), "TIFF", tiffinfo={262: 0})
    assert read(data)[0, :, 0].tolist() == [255, 0]


def test_12_bit_grey_tiff_reaches_white() -> None:
    entries = [(256, 3, 2), (257, 3, 1), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (279, 4, 3)]
    directory = b"".join(struct.pack("<HHIHH", tag, kind, 1, value, 0) for tag, kind, value in entries)
    data = b"II*\0" + struct.pack("<I", 12) + b"\xff\xf8\x00\0" + struct.pack("<H", len(entries)) + directory + bytes(4)
    assert read(data)[0, :, 0].tolist() == [255, round(0x800 / 4095 * 255)]


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_12_bit_values_that_no_tag_declares_reach_white(kind: type) -> None:
    """As X-ray images come out of DICOM; a single value above 4095 makes them 16-bit ones."""
    ramp = np.linspace(0, 4095, 64).astype(kind).reshape(8, 8)
    more = ramp.copy()
    more[0, 0] = 4096
    for fmt in ("TIFF", "PNG") if kind == np.uint16 else ("TIFF",):
        found = read(saved(Image.fromarray(ramp), fmt))[:, :, 0]
        assert np.abs(found - ramp * (255 / 4095)).max() <= 0.5, fmt
        assert read(saved(Image.fromarray(more), fmt)).max() == 16, fmt  # negative control


def test_12_bit_grey_tiff_whose_white_is_zero() -> None:
    data = saved(Image.fromarray(np.array([[0, 4095]], np.uint16)), "TIFF", tiffinfo={262: 0})
    assert read(data)[0, :, 0].tolist() == [255, 0]


def test_16_bit_colour_is_scaled() -> None:
    samples = np.array([[0, 257 * 100, 65535], [32768, 12345, 50000]])
    data = png(2, 1, 16, 2, b"\0" + samples.astype(">u2").tobytes())
    assert np.abs(read(data)[0] - samples / 257).max() <= 1
    half_transparent_black = png(1, 1, 16, 6, b"\0" + struct.pack(">4H", 0, 0, 0, 32768))
    assert abs(int(read(half_transparent_black)[0, 0, 0]) - 127) <= 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 100.0, 255.0]], np.float32), [0, 100, 255]),
        (np.array([[-1.0, 0.0, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0, 1, 255]], np.int32), [0, 1, 255]),
        (np.array([[0, 25700, 65535]], np.int32), [0, 100, 255]),
        (np.array([[0, 50_000, 100_000]], np.int32), [0, 128, 255]),
        (np.array([[-7, -7, -7]], np.int32), [0, 0, 0]),
    ],
)
def test_32_bit_values_are_stretched(values: np.ndarray, expected: list[int]) -> None:
    assert read(saved(Image.fromarray(values), "TIFF"))[0, :, 1].tolist() == expected


def test_float_pixels_that_are_not_numbers() -> None:
    assert reason(saved(Image.fromarray(np.array([[0.0, np.nan]], np.float32)), "TIFF")) == "non_finite"


@pytest.mark.parametrize("fmt", ["GIF", "WEBP", "PNG"])
def test_animation_gives_its_first_frame(fmt: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    data = saved(
        frames[0], fmt, save_all=True, append_images=frames[1:], **({"lossless": True} if fmt == "WEBP" else {})
    )
    assert read(data)[0, 0].tolist() == [*RED]


def test_first_page_of_a_tiff_and_photograph_with_a_preview() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN)]
    for fmt in ("TIFF", "MPO"):
        assert read(saved(frames[0], fmt, save_all=True, append_images=frames[1:]))[0, 0] == pytest.approx(RED, abs=2)


def test_a_damaged_later_page_costs_nothing() -> None:
    frames = [Image.fromarray(noise()), Image.fromarray(255 - noise())]
    data = saved(frames[0], "TIFF", save_all=True, append_images=frames[1:])
    assert np.array_equal(read(data[: len(data) // 2 + 60]), noise())


def test_a_long_gif_is_not_read_to_its_end() -> None:
    head = saved(Image.new("P", (4, 4)), "GIF")[:-1]
    frame = b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    started = time.perf_counter()
    assert read(head + frame * 1_000_000 + b";", max_pixels=100, max_bytes=2**25).shape == (4, 4, 3)
    assert time.perf_counter() - started < 1


# --------------------------------------------------------------------------------------------------- EXIF orientation

# How an upright image is stored under each orientation: the inverse of what a reader must do.
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),  # the reader turns it clockwise
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("fmt", ["PNG", "WEBP", "TIFF", "TIFF lzw", "JPEG"])
def test_orientation(fmt: str, orientation: int) -> None:
    upright = np.repeat(np.repeat(noise(2, 3), 16, axis=0), 16, axis=1) if fmt == "JPEG" else noise()
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, dict[str, Any]] = {
        "WEBP": {"lossless": True},
        "TIFF lzw": {"compression": "tiff_lzw"},
        "JPEG": {"quality": 100, "subsampling": 0},
    }
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    pixels = read(saved(stored, fmt.split()[0], exif=exif, **options.get(fmt, {})))
    assert pixels.shape == upright.shape
    assert pixels.flags["C_CONTIGUOUS"]
    assert np.abs(pixels.astype(int) - upright).max() <= (4 if fmt == "JPEG" else 0)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x05"]
)
def test_damaged_exif_does_not_cost_the_image(exif: bytes) -> None:
    image = Image.fromarray(noise())
    assert read(saved(image, "JPEG", exif=exif)).shape == (24, 40, 3)


def test_orientation_outside_1_to_8_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 99
    assert np.array_equal(read(saved(Image.fromarray(noise()), "PNG", exif=exif)), noise())


# ---------------------------------------------------------------------------------------------------------- bad files


@pytest.mark.parametrize("fmt", list(FORMATS))
def test_truncated(fmt: str) -> None:
    data = saved(Image.fromarray(noise(64, 64)), fmt)
    assert reason(data[: len(data) // 2]) == "truncated"
    assert reason(data[:13]) == "truncated"
    assert reason(data[:2]) == "truncated"
    assert read(data).shape == (64, 64, 3)  # negative control: the whole file is fine


def test_truncated_even_where_another_library_tolerates_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = saved(Image.fromarray(noise()), "JPEG")
    assert reason(data[: len(data) // 2]) == "truncated"
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_empty() -> None:
    assert reason(b"") == "empty"


@pytest.mark.parametrize(
    "data",
    [
        b"<html><body>404</body></html>",
        b"%PDF-1.7 ...",
        b"\0" * 100,
        b"RIFF\x24\0\0\0WAVEfmt ",
        b"P6 1 1 255 abc",  # Pillow could read it; it is not in the list
        saved(Image.new("RGB", (4, 4)), "ICO"),
        saved(Image.new("RGB", (4, 4)), "TGA"),
        b"image,label\na.png,b\n",
    ],
)
def test_foreign(data: bytes) -> None:
    assert reason(data) == "format"


def test_too_many_bytes() -> None:
    data = saved(Image.fromarray(noise()), "PNG")
    assert reason(data, max_bytes=len(data) - 1) == "too_large"
    assert read(data, max_bytes=len(data)).shape == (24, 40, 3)


@pytest.mark.parametrize("fmt", list(FORMATS))
def test_one_pixel_too_many(fmt: str) -> None:
    data = saved(Image.fromarray(noise()), fmt)
    assert reason(data, max_pixels=24 * 40 - 1) == "too_large"
    assert read(data, max_pixels=24 * 40).shape == (24, 40, 3)


def claiming(fmt: str, width: int, height: int) -> bytes:
    """A small file of `fmt` whose header claims another size."""
    if fmt == "PNG":
        return png(width, height, 8, 2, bytes(100))
    data = bytearray(saved(Image.new("RGB", (8, 8)), fmt))
    if fmt == "JPEG":
        at = data.index(b"\xff\xc0")
        data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    elif fmt == "BMP":
        data[18:26] = struct.pack("<ii", width, height)
    elif fmt == "GIF":
        data[6:10] = struct.pack("<HH", width, height)
    elif fmt == "WEBP":
        at = data.index(b"\x9d\x01\x2a") + 3
        data[at : at + 4] = struct.pack("<HH", width, height)
    elif fmt == "TIFF":
        (directory,) = struct.unpack("<I", data[4:8])
        for entry in range(directory + 2, directory + 2 + 12 * 2, 12):
            tag = struct.unpack("<H", data[entry : entry + 2])[0]
            data[entry + 2 : entry + 12] = struct.pack("<HII", 4, 1, width if tag == 256 else height)
    return bytes(data)


@pytest.mark.parametrize("side", [9_000, 16_000])  # between Pillow's warning and its error, and beyond its error
@pytest.mark.parametrize("fmt", list(FORMATS))
def test_bombs_are_refused_from_the_header(fmt: str, side: int) -> None:
    started = time.perf_counter()
    assert reason(claiming(fmt, side, side), max_pixels=64_000_000) == "too_large"
    assert time.perf_counter() - started < 1


PEAK_GROWTH = """
import pathlib, re, sys
from diffmine.data.images import decode
decode(pathlib.Path(sys.argv[1]).read_bytes(), max_pixels=10, max_bytes=10**9)
def peak():  # KiB; ru_maxrss would begin at the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
for path in sys.argv[2:]:
    try:
        decode(pathlib.Path(path).read_bytes(), max_pixels=64_000_000, max_bytes=10**9)
    except Exception as error:
        print(error.reason)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_bombs_take_no_memory(tmp_path: Path) -> None:
    """In a process of its own, whose peak nobody else has raised."""

    def outcome(*files: bytes) -> tuple[list[str], int]:
        """Reasons, and growth of the peak in KiB."""
        paths = [tmp_path / str(i) for i in range(len(files) + 1)]
        for path, data in zip(paths, (saved(Image.new("RGB", (1, 1)), "PNG"), *files), strict=True):
            path.write_bytes(data)
        command = [sys.executable, "-c", PEAK_GROWTH, *map(str, paths)]
        *reasons, growth = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
        return [line.split()[0] for line in reasons], int(growth)

    reasons, growth = outcome(*(claiming(fmt, 16_000, 16_000) for fmt in FORMATS))
    assert reasons == ["too_large"] * len(FORMATS)
    assert growth < 32 * 1024
    assert outcome(saved(Image.new("L", (6000, 6000)), "PNG"))[1] > 64 * 1024  # negative control: one that is allowed


def test_a_higher_limit_than_pillows_own_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = saved(Image.fromarray(noise()), "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(data).shape == (24, 40, 3)
        with pytest.raises(Image.DecompressionBombError):  # negative control
            Image.open(io.BytesIO(data))
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize("error", [RecursionError("deep"), AssertionError(), ZeroDivisionError("x"), struct.error("s")])
def test_any_exception_of_the_library_ends_as_a_failure(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Image, "open", broken)
    assert reason(b"anything") == "truncated"


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_trouble_that_is_not_the_images_fault_passes(monkeypatch: pytest.MonkeyPatch, error: type) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Image, "open", broken)
    with pytest.raises(error):
        read(b"anything")


@pytest.mark.parametrize("rounds", [200, pytest.param(1300, marks=pytest.mark.long)])  # of 17 files each
def test_mutated_files_give_pixels_or_an_image_error(rounds: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [Image.fromarray(noise(12, 16)), Image.fromarray(255 - noise(12, 16))]
    many = {"save_all": True, "append_images": frames[1:]}
    seeds = [
        *(saved(frames[0], fmt, exif=exif) for fmt in ("JPEG", "PNG", "WEBP", "TIFF")),
        *(saved(frames[0], fmt, **many) for fmt in ("GIF", "PNG", "WEBP", "TIFF")),
        *(saved(frames[0].quantize(8), fmt) for fmt in ("BMP", "GIF", "PNG")),
        *(saved(frames[0], "TIFF", compression=c) for c in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg")),
        saved(Image.fromarray(noise()[:, :, 0].astype(np.float32)), "TIFF"),
        cmyk_jpeg((10, 20, 30, 40), transform=2),
    ]
    rng, outcomes, reasons, longest = random.Random(rounds), {"decoded": 0, "refused": 0}, set(), 0.0
    for round_ in range(rounds):
        for seed in seeds:
            data = bytearray(seed)
            span = 64 if round_ % 2 else len(data)  # every other time in the header only, where the lies are
            for _ in range(rng.choice((1, 2, 8))):
                data[rng.randrange(min(span, len(data)))] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
            started = time.perf_counter()
            try:
                pixels = read(bytes(data[: rng.choice((len(data), rng.randrange(len(data)))) or 1]))
            except ImageError as error:
                reasons.add(error.reason)
                outcomes["refused"] += 1
            else:
                assert pixels.dtype == np.uint8
                assert pixels.ndim == 3
                outcomes["decoded"] += 1
            longest = max(longest, time.perf_counter() - started)
    assert longest < 2
    print(f"{rounds * len(seeds)} files, {outcomes}, longest {longest:.3f} s")
    assert min(outcomes.values()) > 300, outcomes  # both ways were taken
    assert {"truncated", "too_large"} <= reasons <= set(FAILURE_REASONS)


# ----------------------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize(
    ("size", "short_side", "multiple_of", "expected"),
    [
        ((512, 512), 512, 8, Geometry(1.0, 0, 0, 512, 512)),
        ((1024, 2048), 512, 8, Geometry(0.5, 0, 0, 512, 1024)),
        ((512, 756), 512, 8, Geometry(1.0, 0, 2, 512, 752)),  # street view in the paper
        ((756, 512), 512, 8, Geometry(1.0, 2, 0, 752, 512)),
        ((640, 427), 512, 8, Geometry(512 / 427, 3, 0, 760, 512)),
        ((64, 64), 512, 8, Geometry(8.0, 0, 0, 512, 512)),  # enlarged
        ((300, 200), 100, 64, Geometry(0.5, 11, 18, 128, 64)),  # the short side is cropped as well
        ((1, 8), 8, 8, Geometry(8.0, 0, 0, 8, 64)),
    ],
)
def test_geometry_closed_form(size: tuple[int, int], short_side: int, multiple_of: int, expected: Geometry) -> None:
    assert geometry(*size, short_side, multiple_of) == expected


def test_geometry_properties() -> None:
    rng = np.random.default_rng(1)
    for _ in range(2000):
        width, height, short_side, multiple = (int(n) for n in rng.integers(1, [3000, 3000, 700, 65]))
        if max(width, height) > 8 * min(width, height) or short_side < multiple:
            continue
        g = geometry(width, height, short_side, multiple)
        assert g.width % multiple == g.height % multiple == 0
        assert min(width, height) * g.scale == pytest.approx(short_side)
        for kept, offset, original in ((g.width, g.crop_x, width), (g.height, g.crop_y, height)):
            size = math.floor(original * g.scale + 1e-9)  # whole pixels after scaling
            assert 0 <= size - kept < multiple
            assert 0 <= (size - kept - offset) - offset <= 1  # central
            assert (offset + kept) / g.scale <= original + 1e-6  # never reaches outside the image


def test_too_long_and_too_small() -> None:
    for size in ((801, 100), (100, 801)):
        with pytest.raises(ImageError, match="over 8 times") as caught:
            geometry(*size, 512, 8)
        assert caught.value.reason == "aspect"
    assert geometry(800, 100, 512, 8).width == 4096
    with pytest.raises(ImageError, match="no multiple") as caught:
        geometry(100, 100, 7, 8)
    assert caught.value.reason == "too_small"
    with pytest.raises(ImageError, match="0 x 100"):
        geometry(0, 100, 512, 8)


def test_round_trip_between_original_and_prepared() -> None:
    rng = np.random.default_rng(2)
    for width, height in ((640, 427), (1000, 667), (512, 756), (37, 200), (4000, 3000)):
        g = geometry(width, height, 500, 8)
        for _ in range(50):
            x, y = rng.uniform(0, [g.width, g.height])
            box = (x, y, rng.uniform(0, g.width - x), rng.uniform(0, g.height - y))
            original = to_original(g, *box)
            scaled = [side * g.scale for side in original]
            assert (scaled[0] - g.crop_x, scaled[1] - g.crop_y, *scaled[2:]) == pytest.approx(box, abs=1e-9)
            assert original[0] >= 0
            assert original[1] >= 0
            assert original[0] + original[2] <= width + 1e-9
            assert original[1] + original[3] <= height + 1e-9


def test_boxes_are_clipped_to_the_prepared_image() -> None:
    g = geometry(756, 512, 512, 8)  # 2 pixels are cut off left and right
    assert to_original(g, -5, 0, 10, 10) == (2, 0, 5, 10)
    assert to_original(g, 750, 500, 100, 100) == (752, 500, 2, 12)


def test_prepare_of_a_fitting_image_changes_nothing() -> None:
    prepared, g = prepare(noise(64, 80), 64, 8)
    assert np.array_equal(prepared, noise(64, 80))
    assert (g.width, g.height) == (80, 64)


def test_prepare_only_crops_where_the_scale_is_one() -> None:
    prepared, g = prepare(noise(64, 85), 64, 8)
    assert g.crop_x == 2
    assert np.array_equal(prepared, noise(64, 85)[:, 2:82])


def test_prepare_agrees_with_resize_then_crop() -> None:
    """Where the long side comes out whole, one resize with a box is resize, then crop."""
    pixels = noise(200, 300)
    prepared, g = prepare(pixels, 100, 64)
    resized = np.asarray(Image.fromarray(pixels).resize((150, 100), Image.Resampling.LANCZOS)).astype(int)
    expected = resized[g.crop_y : g.crop_y + g.height, g.crop_x : g.crop_x + g.width]
    assert prepared.shape == (64, 128, 3)
    assert prepared.dtype == np.uint8
    assert np.abs(prepared - expected).max() <= 1


@pytest.mark.parametrize(("width", "height"), [(640, 427), (1000, 667), (333, 500), (90, 61)])
def test_a_mark_lands_where_the_geometry_says(width: int, height: int) -> None:
    """A white square in the original; its centre of mass in the prepared image, to a hundredth of a pixel."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    x, y, side = width // 3, height // 2, max(width // 10, 8)
    pixels[y : y + side, x : x + side] = 255
    prepared, g = prepare(pixels, 128, 8)
    px, py, length = x * g.scale - g.crop_x, y * g.scale - g.crop_y, side * g.scale
    mass = prepared[:, :, 0].astype(float)
    centre = [(mass.sum(axis=axis) * (np.arange(mass.shape[1 - axis]) + 0.5)).sum() / mass.sum() for axis in (0, 1)]
    assert centre == pytest.approx([px + length / 2, py + length / 2], abs=0.05)
    assert mass.sum() / 255 == pytest.approx(length**2, rel=0.03)

"""Prepared images and patches -> the pictures of the report, as WebP bytes: strips of patches, and whole images.

A strip is one file that holds the patches of a row side by side; the style sheet shows one cell of it per patch.
"""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

CELL = 96  # pixels of a patch's side in a strip
SAMPLE = 192  # pixels of a sampled image's side in its strip
LONGEST_STRIP = 16383 // SAMPLE  # cells; WebP allows no more pixels in a row
_CONTEXT = 480  # pixels of the longer side of a whole image
_QUALITY = 80
_GREY, _DARK = (150, 150, 150, 255), (96, 96, 96, 255)
_LINE, _EDGE = (255, 214, 10), (20, 20, 20)  # outlines: yellow between two dark lines is seen on any picture

Box = tuple[int, int, int, int]  # x, y, width, height


def cell(image: np.ndarray | None, box: Box) -> Image.Image:
    """A patch of an image uint8 [H, W, 3], as large as fits a cell; the grey placeholder without an image."""
    if image is None:
        return _placeholder(CELL, CELL)
    x, y, width, height = box
    return _fitted(Image.fromarray(image[y : y + height, x : x + width]), CELL)


def strip(cells: Sequence[Image.Image]) -> bytes:
    """Square pictures of one size, side by side."""
    side = cells[0].height
    picture = Image.new("RGBA", (side * len(cells), side))
    for i, one in enumerate(cells):
        picture.paste(one, (side * i, 0))
    return _webp(picture)


def sampled(pngs: Sequence[bytes]) -> bytes:
    """PNG files -> their strip."""
    return strip([_fitted(Image.open(io.BytesIO(png)).convert("RGB"), SAMPLE) for png in pngs])


def outlined(image: np.ndarray | None, boxes: Sequence[Box]) -> tuple[bytes, tuple[int, int]]:
    """A whole image uint8 [H, W, 3] with boxes drawn in it, and its width and height."""
    if image is None:
        return _webp(_placeholder(_CONTEXT, _CONTEXT * 3 // 4)), (_CONTEXT, _CONTEXT * 3 // 4)
    scale = _CONTEXT / max(image.shape[:2])
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    picture = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    for x, y, width, height in reversed(boxes):  # the first, the best, on top
        corners = [round(v * scale) for v in (x, y, x + width, y + height)]
        for inset, colour in enumerate([_EDGE, _LINE, _LINE, _LINE, _EDGE]):
            left, top, right, bottom = corners[0] + inset, corners[1] + inset, corners[2] - inset, corners[3] - inset
            if right > left and bottom > top:
                draw.rectangle([left, top, right - 1, bottom - 1], outline=colour)
    return _webp(picture), size


def _fitted(picture: Image.Image, side: int) -> Image.Image:
    """Resized to touch a square of this side, centred in it over nothing."""
    scale = side / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    square = Image.new("RGBA", (side, side))
    square.paste(picture.resize(size, Image.Resampling.BICUBIC), ((side - size[0]) // 2, (side - size[1]) // 2))
    return square


def _placeholder(width: int, height: int) -> Image.Image:
    """Grey with a cross: the image can no longer be read."""
    picture = Image.new("RGBA", (width, height), _GREY)
    x, y, arm = width // 2, height // 2, min(width, height) // 5
    ImageDraw.Draw(picture).line([x - arm, y - arm, x + arm, y + arm], fill=_DARK, width=max(3, arm // 6))
    ImageDraw.Draw(picture).line([x - arm, y + arm, x + arm, y - arm], fill=_DARK, width=max(3, arm // 6))
    return picture


def _webp(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "WEBP", quality=_QUALITY, method=4)
    return out.getvalue()

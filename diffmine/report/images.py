"""Prepared images and patches -> the pictures of the report, as WebP bytes: strips of patches, and sheets of images.

A strip is one file that holds the patches of a row side by side; a sheet holds whole images in a grid. The pages show
one cell of them at a time.
"""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

CELL = 96  # most pixels of a patch's side in a strip,
_LEAST_CELL = 48  # and fewest; between them a patch is kept as large as it is
SAMPLE = 192  # pixels of a sampled image's side in its strip
WHOLE = 320  # pixels of the longer side of a whole image
SHEET_COLUMNS = 6
LONGEST_STRIP = 16383 // SAMPLE  # cells; WebP allows no more pixels in a row
_QUALITY = 70
_UP, _DOWN, _OPACITY = (230, 97, 1), (94, 60, 153), 204  # as in explore.js and style.css
_GREY, _DARK = (150, 150, 150, 255), (96, 96, 96, 255)

Box = tuple[int, int, int, int]  # x, y, width, height


def cell_side(boxes: Sequence[Box]) -> int:
    """Pixels of the side of a cell that holds these patches without making them larger than they are."""
    return min(CELL, max([_LEAST_CELL, *(max(width, height) for _, _, width, height in boxes)]))


def cell(image: np.ndarray | None, box: Box, side: int) -> Image.Image:
    """A patch of an image uint8 [H, W, 3], as large as fits a cell; the grey placeholder without an image."""
    if image is None:
        return _placeholder(side, side)
    x, y, width, height = box
    return _fitted(Image.fromarray(image[y : y + height, x : x + width]), side)


def blank(side: int) -> Image.Image:
    """An empty cell."""
    return Image.new("RGBA", (side, side))


def strip(cells: Sequence[Image.Image]) -> bytes:
    """Square pictures of one size, side by side."""
    return grid(cells, len(cells))


def grid(cells: Sequence[Image.Image], columns: int) -> bytes:
    """Pictures in rows of so many, each at the upper left of a square as large as the largest."""
    side = max(max(one.size) for one in cells)
    picture = Image.new("RGBA", (side * min(columns, len(cells)), side * -(-len(cells) // columns)))
    for i, one in enumerate(cells):
        picture.paste(one, (side * (i % columns), side * (i // columns)))
    return webp(picture)


def sampled(pngs: Sequence[bytes]) -> bytes:
    """PNG files -> their strip."""
    return strip([_fitted(Image.open(io.BytesIO(png)).convert("RGB"), SAMPLE) for png in pngs])


def whole(image: np.ndarray | None) -> Image.Image:
    """An image uint8 [H, W, 3] with a longer side of WHOLE pixels; the grey placeholder without one."""
    if image is None:
        return _placeholder(WHOLE, WHOLE * 3 // 4)
    return _resized(Image.fromarray(image), WHOLE)


def under_map(image: np.ndarray | None, values: np.ndarray | None, unit: float) -> Image.Image:
    """`whole` in grey below its map of T [h, w], in the colours of the pages: orange above zero, violet below.

    Args:
        unit: size of T that has the full colour.
    """
    if image is None or values is None:
        return whole(image)
    grey = whole(np.asarray(Image.fromarray(image).convert("L").convert("RGB")))
    strength = np.rint((np.abs(values) / unit).clip(0, 1) * _OPACITY).astype(np.uint8)
    colours = np.where((values > 0)[..., None], _UP, _DOWN).astype(np.uint8)
    layer = Image.fromarray(np.dstack([colours, strength]), "RGBA").resize(grey.size, Image.Resampling.BILINEAR)
    return Image.alpha_composite(grey.convert("RGBA"), layer)


def webp(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "WEBP", quality=_QUALITY)
    return out.getvalue()


def _fitted(picture: Image.Image, side: int) -> Image.Image:
    """Resized to touch a square of this side, centred in it over nothing."""
    square, picture = blank(side), _resized(picture, side)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def _resized(picture: Image.Image, side: int) -> Image.Image:
    """With a longer side of so many pixels; `ImageOps.contain` leaves nothing of one that is very long."""
    scale = side / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.BICUBIC)


def _placeholder(width: int, height: int) -> Image.Image:
    """Grey with a cross: the image can no longer be read."""
    picture = Image.new("RGBA", (width, height), _GREY)
    x, y, arm = width // 2, height // 2, min(width, height) // 5
    ImageDraw.Draw(picture).line([x - arm, y - arm, x + arm, y + arm], fill=_DARK, width=max(3, arm // 6))
    ImageDraw.Draw(picture).line([x - arm, y + arm, x + arm, y - arm], fill=_DARK, width=max(3, arm // 6))
    return picture

"""A model in or after training -> images sampled for each label, for people to look at."""

import io
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from diffmine.config import Config
from diffmine.diffusion.model import Model
from diffmine.prompts import prompts
from diffmine.randomness import generator

_LABELS = 64  # at most: a page of samples, not a data set
_MARGIN = 160  # pixels beside a row of a page, for its label


def samples(
    model: Model, config: Config, labels: Sequence[str], shape: tuple[int, int]
) -> Iterator[tuple[str, np.ndarray]]:
    """label, its images uint8 [n, H, W, 3]; noise depends on the seed and the label only.

    Args:
        shape: of the latents, h and w in cells.
    """
    (h, w), count = shape, config.finetune.samples_per_label
    null, *texts = prompts(labels, config.prompt.template, config.prompt.null_prompt)
    for label, text in list(zip(labels, texts, strict=True))[: _LABELS if count else 0]:
        seeds = [int(generator(config.seed, "sample", label, i).integers(2**31)) for i in range(count)]
        yield label, model.sample(text, null, seeds, h * model.cell, w * model.cell)


def grid(found: Mapping[str, np.ndarray]) -> bytes:
    """label -> images uint8 [n, H, W, 3]: a PNG with a row for each label."""
    rows = [np.concatenate([*images], axis=1) for images in found.values()]
    height, width, _ = rows[0].shape
    page = Image.new("RGB", (_MARGIN + width, height * len(rows)), "white")
    draw = ImageDraw.Draw(page)
    for i, (label, row) in enumerate(zip(found, rows, strict=True)):
        page.paste(Image.fromarray(row), (_MARGIN, i * height))
        draw.text((4, i * height + 4), label[:24], fill="black")
    return png(np.asarray(page))


def png(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 3] -> the bytes of a file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()

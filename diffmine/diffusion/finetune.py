"""(seed, step) -> which images, which noise, which words: the randomness of finetuning, and its loss.

Nothing here has a state: a step's examples depend on (seed, step, images) only, so a resumed run sees the same ones and
two workers see together what one would see alone.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, count, groupby

import numpy as np
import torch
from torch import Tensor, nn

from diffmine.diffusion.model import Model
from diffmine.randomness import generator

_LANES = 64  # parts of a window, at most
_KEPT = 0.8  # of an image, when it is cropped to share a batch

Shape = tuple[int, int]  # h, w in cells
Words = tuple[str, ...] | None  # what stands for the label in the prompt; None: the null prompt


@dataclass(frozen=True)
class LabelledImage:
    """What training sees of an image."""

    image_id: str
    latent: np.ndarray  # float16 [C, h, w], the mean of the VAE's posterior
    labels: Sequence[str]
    spread: np.ndarray | None = None  # float16 [C, h, w], the posterior's standard deviation
    columns: Mapping[str, str] = field(default_factory=dict)  # what else is known: {"region": "Bretagne"}


@dataclass(frozen=True)
class Example:
    """One image in one step."""

    image_id: str
    latent: Tensor  # float32 [C, h, w], cropped
    eps: Tensor  # float32 [C, h, w]
    t: int
    words: Words


@dataclass(frozen=True)
class Window:
    """Shards whose images are shuffled together."""

    shards: tuple[int, ...]
    batches: list[np.ndarray]  # int64 [batch_size] each: places among the images of the shards, in their order
    shapes: list[Shape]  # of each batch: what training sees of its images


def windows(
    seed: int,
    shards: Sequence[np.ndarray],
    batch_size: int,
    most: int,
    weights: Sequence[np.ndarray] | None = None,
) -> Iterator[Window]:
    """Endless batches, a few shards at a time, so that few need to be in memory.

    An epoch visits every image, in an order that depends on (seed, epoch): shards are shuffled, then the images of as
    many as hold `most` images; one window holds all of a small dataset. A batch has images of one shape; those that are
    left over share batches as `_shared` says.

    Where there are several windows, every place p of a batch takes its images from its own part of the window, number
    p modulo `lanes(batch_size)`, which is a few shards; images that are left over lie anywhere. So processes that share
    batches place by place need to read a share of the shards, and those that hold what is left over; the order is the
    same for any number of them.

    Args:
        shards: int [n, 2] each: h and w of what training sees of its images.
        most: images of a window; a shard is never cut, so it can be one shard more.
        weights: float [n] each: how often an epoch visits an image, on average over epochs; None: once.
    """
    sizes = [len(shard) for shard in shards]
    parts = 1 if sum(sizes) <= most else lanes(batch_size)
    for epoch in count():
        rng = generator(seed, "order", epoch)
        for chosen in _shards_of_windows(seed, epoch, sizes, most):
            sides = np.concatenate([shards[i] for i in chosen])
            places = np.arange(len(sides))
            if weights is not None:
                places = np.repeat(places, _visits(np.concatenate([weights[i] for i in chosen]), rng.random()))
            found = _batches(rng, places, sides, batch_size, parts)
            batches = [found[i] for i in rng.permutation(len(found))]
            yield Window(chosen, batches, [tuple(sides[batch].min(axis=0).tolist()) for batch in batches])


def lanes(batch_size: int) -> int:
    """Parts of a window that the places of a batch are dealt over; 1, 2, 4, 8, ... processes share them evenly."""
    return math.gcd(batch_size, _LANES)


def _batches(
    rng: np.random.Generator, places: np.ndarray, sides: np.ndarray, batch_size: int, parts: int
) -> list[np.ndarray]:
    """All places of a window, in batches; place p of one that has a single shape comes from part p modulo `parts`.

    Args:
        sides: int [n, 2], of the image at each place.
    """
    each, found = batch_size // parts, []
    left: list[tuple[np.ndarray, np.ndarray]] = []
    shapes, codes = np.unique(sides[places], axis=0, return_inverse=True)
    for code in np.argsort(shapes[:, 1] / shapes[:, 0], kind="stable"):
        dealt = [rng.permutation(part) for part in np.array_split(places[codes.ravel() == code], parts)]
        rows = min(map(len, dealt)) // each
        full = np.stack([part[: rows * each] for part in dealt], axis=1).reshape(rows, batch_size)
        found += [*full]
        left.append((np.concatenate([part[rows * each :] for part in dealt]), full.ravel()))
    return found + _shared(left, sides, batch_size)


def _shared(left: list[tuple[np.ndarray, np.ndarray]], sides: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Batches of the images that are in no batch of one shape: each with those of the nearest aspect ratios.

    Images of different shapes are cropped to what all of a batch have. Where that would cost more than a fifth of one,
    a batch that is at least three quarters full is filled up with its like instead, which an epoch then visits again.

    Args:
        left: of each shape, in the order of aspect ratios, the images left over and the others.
    """
    none = np.zeros(0, int)
    found, waiting, others = [], none, none

    def nearly_full() -> bool:
        return 4 * len(waiting) >= 3 * batch_size

    def alike(images: np.ndarray) -> np.ndarray:
        """Which of them could join those that wait."""
        common = np.minimum(sides[images], sides[waiting].min(axis=0)).prod(axis=1)
        return common >= _KEPT * np.maximum(sides[images].prod(axis=1), sides[waiting].prod(axis=1).max())

    def filled_up() -> np.ndarray:
        like = others[alike(others)] if nearly_full() else others
        return np.resize(np.concatenate([waiting, like]), batch_size)

    for rest, full in left:
        if nearly_full() and len(rest) and not alike(rest[:1]):
            found.append(filled_up())
            others, waiting = np.concatenate([waiting, others]), none
        together = np.concatenate([waiting, rest])
        whole = len(together) // batch_size * batch_size
        found += [*together[:whole].reshape(-1, batch_size)]
        others, waiting = np.concatenate([full, together[:whole], others]), together[whole:]
    return [*found, filled_up()] if len(waiting) else found


def _visits(weights: np.ndarray, start: float) -> np.ndarray:
    """Whole numbers of visits, int [n], whose running sum stays within 1 of that of the weights (systematic sampling);
    with `start` uniform in [0, 1) their expectations are the weights."""
    return np.diff(np.floor(np.cumsum(weights) + start).astype(np.int64), prepend=0)


def _shards_of_windows(seed: int, epoch: int, sizes: Sequence[int], most: int) -> Iterator[tuple[int, ...]]:
    if sum(sizes) <= most:
        yield tuple(range(len(sizes)))
        return
    order = generator(seed, "shards", epoch).permutation(len(sizes)).tolist()
    before = dict(
        zip(order, accumulate((sizes[i] for i in order), initial=0), strict=False)
    )  # images of earlier shards
    for _, window in groupby(order, lambda i: before[i] // most):
        yield tuple(window)


def example(
    seed: int,
    step: int,
    position: int,
    image: LabelledImage,
    *,
    dropout: float,
    shape: Shape | None = None,
    timesteps: tuple[int, int] = (0, 1000),
    joined: bool = False,
    columns: Mapping[str, float] | None = None,
) -> Example:
    """What an image is in this step; `position` in the batch tells apart an image that fills a batch up.

    Args:
        dropout: probability of the null prompt.
        shape: of a random crop, no larger than the image; None: the whole image.
        timesteps: t is uniform in this range, whose end is not included.
        joined: all labels of an image make up the prompt; else one of them, drawn uniformly.
        columns: column -> probability that its value joins the label. A missing value never does.
    """
    rng = generator(seed, "finetune", step, position, image.image_id)
    _, h, w = image.latent.shape
    side_y, side_x = shape or (h, w)
    y, x = int(rng.integers(h - side_y + 1)), int(rng.integers(w - side_x + 1))
    seen = (slice(None), slice(y, y + side_y), slice(x, x + side_x))
    part = image.latent[seen].astype(np.float32)  # [C, side_y, side_x]
    dropped = rng.random() < dropout
    words: Words = None if dropped else (image.labels[int(rng.integers(len(image.labels)))],)
    t, eps = int(rng.integers(*timesteps)), rng.standard_normal(part.shape, dtype=np.float32)
    if words and joined:
        words = tuple(image.labels)
    for name, probability in (columns or {}).items():
        if rng.random() < probability and words and (value := image.columns.get(name)):
            words = (*words, value)
    if image.spread is not None:  # z = mean + std * noise, anew in every step
        part += image.spread[seen].astype(np.float32) * rng.standard_normal(part.shape, dtype=np.float32)
    return Example(image.image_id, torch.from_numpy(part), torch.from_numpy(eps), t, words)


def learning_rate(step: int, steps: int, peak: float, warmup: int, decay: int) -> float:
    """Rate of a step: a linear rise over the first `warmup` steps, `peak`, a half cosine to 0 over the last `decay`."""
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    fall = (1 + math.cos(math.pi * max(0, step - (steps - decay)) / decay)) / 2 if decay else 1.0
    return peak * rise * fall


def denoising_errors(model: Model, unet: nn.Module, examples: Sequence[Example], text: Tensor) -> Tensor:
    """Mean squared error of the UNet's prediction (eps, or v for v-prediction models) of each example, float32 [B].

    Args:
        unet: `model.unet`, or a wrapper of it.
        text: [B, L, D] text states, the null's where `words` is None.
    """
    latents = torch.stack([e.latent for e in examples]).to(model.device)  # [B, C, h, w]
    eps = torch.stack([e.eps for e in examples]).to(model.device)
    t = torch.tensor([e.t for e in examples], device=model.device)
    predicted = unet(model.add_noise(latents, eps, t), t, text).sample.float()
    return (predicted - model.training_target(latents, eps, t)).square().mean(dim=(1, 2, 3))


def denoising_loss(
    model: Model, unet: nn.Module, examples: Sequence[Example], text: Tensor, min_snr_gamma: float | None = None
) -> Tensor:
    """What training lowers: the mean of `denoising_errors`, a scalar.

    Args:
        min_snr_gamma: weigh each timestep's error by min(SNR, gamma) / SNR for eps, / (SNR + 1) for v (Hang et al.,
            ICCV 2023, eq. 8): less of the loss is spent on nearly clean images, whose noise no label helps to predict.
    """
    error = denoising_errors(model, unet, examples, text)
    if min_snr_gamma is not None:
        alpha_bar = model.alpha_bar[[e.t for e in examples]]
        snr = alpha_bar / (1 - alpha_bar)
        error = error * snr.clamp(max=min_snr_gamma) / (snr + model.v_prediction)
    return error.mean()

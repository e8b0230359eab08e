"""(seed, step) -> which images, which noise: the randomness of finetuning, and its loss.

Nothing here has a state: a step's examples depend on (seed, step, images) only, so a resumed run sees the same ones and
two workers see together what one would see alone.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, count, groupby

import numpy as np
import torch
from torch import Tensor, nn

from diffmine.diffusion.model import Model
from diffmine.randomness import generator


@dataclass(frozen=True)
class Example:
    """One image in one step."""

    latent: Tensor  # float32 [C, h, w], cropped
    eps: Tensor  # float32 [C, h, w]
    t: int
    label: str | None  # None: dropped, the null prompt is used


@dataclass(frozen=True)
class Window:
    """Shards whose images are shuffled together."""

    shards: tuple[int, ...]
    batches: list[np.ndarray]  # int64 [batch_size] each: places among the images of the shards, in their order


def windows(seed: int, shards: Sequence[np.ndarray], batch_size: int, most: int) -> Iterator[Window]:
    """Endless batches, each of images of one shape; a few shards at a time, so that few need to be in memory.

    An epoch visits every image once, in an order that depends on (seed, epoch): shards are shuffled, then the images of
    as many as hold `most` images; one window holds all of a small dataset. The last batch of a shape in a window is
    filled up from its beginning.

    Args:
        shards: int [n, 2] each: h and w of what training sees of its images.
        most: images of a window; a shard is never cut, so it can be one shard more.
    """
    _, codes = np.unique(np.concatenate(shards), axis=0, return_inverse=True)
    of_shard = np.split(codes.ravel(), np.cumsum([len(shard) for shard in shards])[:-1])
    for epoch in count():
        rng = generator(seed, "order", epoch)
        for chosen in _shards_of_windows(seed, epoch, [len(shard) for shard in shards], most):
            own = np.concatenate([of_shard[i] for i in chosen])
            found = []
            for code in np.unique(own):
                order = rng.permutation(np.flatnonzero(own == code))
                padded = np.resize(order, -(-len(order) // batch_size) * batch_size)
                found += list(padded.reshape(-1, batch_size))
            yield Window(chosen, [found[i] for i in rng.permutation(len(found))])


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
    image_id: str,
    latent: np.ndarray,
    labels: Sequence[str],
    dropout: float,
    crop: int | None,
    timesteps: tuple[int, int] = (0, 1000),
) -> Example:
    """What image `image_id` is in this step; `position` in the batch tells apart an image that fills a batch up.

    A label of a multi-label image is drawn uniformly, t from the range of `timesteps`. `latent` is [C, h, w]; `crop` is
    a side in cells.
    """
    rng = generator(seed, "finetune", step, position, image_id)
    _, h, w = latent.shape
    side_y, side_x = min(crop or h, h), min(crop or w, w)
    y, x = int(rng.integers(h - side_y + 1)), int(rng.integers(w - side_x + 1))
    part = latent[:, y : y + side_y, x : x + side_x].astype(np.float32)
    label = None if rng.random() < dropout else labels[int(rng.integers(len(labels)))]
    t, eps = int(rng.integers(*timesteps)), rng.standard_normal(part.shape, dtype=np.float32)
    return Example(torch.from_numpy(part), torch.from_numpy(eps), t, label)


def learning_rate(step: int, steps: int, peak: float, warmup: int, decay: int) -> float:
    """Rate of a step: a linear rise over the first `warmup` steps, `peak`, a half cosine to 0 over the last `decay`."""
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    fall = (1 + math.cos(math.pi * max(0, step - (steps - decay)) / decay)) / 2 if decay else 1.0
    return peak * rise * fall


def denoising_loss(
    model: Model, unet: nn.Module, examples: Sequence[Example], text: Tensor, min_snr_gamma: float | None = None
) -> Tensor:
    """Mean squared error of the UNet's prediction (eps, or v for v-prediction models), a scalar.

    Args:
        unet: the module to train: `model.unet`, or a wrapper of it.
        text: [B, L, D] text states, the null's where `label` is None.
        min_snr_gamma: weigh each timestep's loss by min(SNR, gamma) / SNR for eps, / (SNR + 1) for v (Hang et al., ICCV
            2023, eq. 8): less of the loss is spent on nearly clean images, whose noise no label helps to predict.
    """
    latents = torch.stack([e.latent for e in examples]).to(model.device)  # [B, C, h, w]
    eps = torch.stack([e.eps for e in examples]).to(model.device)
    t = torch.tensor([e.t for e in examples], device=model.device)
    predicted = unet(model.add_noise(latents, eps, t), t, text).sample.float()
    error = (predicted - model.training_target(latents, eps, t)).square().mean(dim=(1, 2, 3))  # [B]
    if min_snr_gamma is not None:
        snr = model.alpha_bar[t] / (1 - model.alpha_bar[t])
        error = error * snr.clamp(max=min_snr_gamma) / (snr + model.v_prediction)
    return error.mean()

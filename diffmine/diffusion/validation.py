"""Held-out images -> denoising losses with and without the label, from draws that are the same every time.

The losses of two steps therefore compare: what differs is the weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from diffmine.diffusion.finetune import Example, LabelledImage, denoising_errors
from diffmine.diffusion.model import Model
from diffmine.diffusion.training import TextOf
from diffmine.randomness import generator

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Losses:
    """Mean squared errors of a label's held-out images, over draws and cells."""

    loss: float  # with the label's prompt
    null_loss: float  # with the null prompt
    typicality: float  # null_loss - loss, in squared eps error also where the model predicts v
    images: int


@torch.no_grad()
def validate(
    model: Model,
    items: Sequence[tuple[str, LabelledImage]],
    text: TextOf,
    seed: int,
    draws: int,
    timesteps: tuple[int, int],
    spread: "Accelerator",
    at_once: int,
    beat: Callable[[], object] = lambda: None,
) -> dict[str, Losses]:
    """Losses of each label, in all processes alike.

    Args:
        items: labels, each with an image of its own; all of them, of which every process takes its share.
        draws: for each image, t from as many equal parts of `timesteps`.
        at_once: samples of a pass; each draw takes two.
        beat: is called after each image.
    """
    labels = sorted({label for label, _ in items})
    sums = torch.zeros(len(labels), 4, dtype=torch.float64, device=model.device)  # of `Losses`
    for start in range(0, len(items), spread.num_processes):
        place = start + spread.process_index
        label, image = items[min(place, len(items) - 1)]  # all make the same passes, also one that has nothing left
        states = torch.stack([text((label,)), text(None)])
        means = _means(model, image, states, seed, draws, timesteps, at_once)
        if place < len(items):
            sums[labels.index(label)] += torch.cat([means, torch.ones_like(means[:1])])
        beat()
    total = spread.reduce(sums, "sum").tolist()
    return {
        label: Losses(loss / count, null_loss / count, typicality / count, round(count))
        for label, (loss, null_loss, typicality, count) in zip(labels, total, strict=True)
    }


def _means(
    model: Model,
    image: LabelledImage,
    states: Tensor,  # [2, L, D], of its label and of the null prompt
    seed: int,
    draws: int,
    timesteps: tuple[int, int],
    at_once: int,
) -> Tensor:
    """An image's loss, null loss and typicality: float32 [3]."""
    rng, (low, high) = generator(seed, "validation", image.image_id), timesteps
    latent, examples = torch.from_numpy(image.latent.astype(np.float32)), []
    for i in range(draws):
        t = low + int((i + rng.random()) / draws * (high - low))
        eps = torch.from_numpy(rng.standard_normal(image.latent.shape, dtype=np.float32))
        examples.append(Example(image.image_id, latent, eps, t, None))
    samples, texts = examples * len(states), states.repeat_interleave(draws, dim=0)
    errors = [
        denoising_errors(model, model.unet, samples[i : i + at_once], texts[i : i + at_once])
        for i in range(0, len(samples), at_once)
    ]
    loss, null_loss = torch.cat(errors).view(2, draws)
    difference = null_loss - loss
    if model.v_prediction:  # eps_hat - eps = sqrt(alpha_bar) (v_hat - v)
        difference = difference * model.alpha_bar[[e.t for e in examples]]
    return torch.stack([loss.mean(), null_loss.mean(), difference.mean()])

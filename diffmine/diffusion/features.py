"""Latents -> diffusion features of patches (DIFT: Tang et al., NeurIPS 2023).

An image is noised to a fixed timestep, run through the UNet once per noise of the ensemble, and the activations of one
up block are averaged. A patch's feature is their area-weighted mean under the patch, L2-normalised.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from diffmine.diffusion.model import Model
from diffmine.diffusion.passes import groups
from diffmine.randomness import generator


def ensemble_noise(seed: int, n: int, shape: tuple[int, int, int]) -> Tensor:
    """Bank of noises shared by all images, float32 [n, C, h, w]."""
    return torch.from_numpy(
        np.stack([generator(seed, "feature", i).standard_normal(shape, dtype=np.float32) for i in range(n)])
    )


@torch.inference_mode()
def dift(
    model: Model,
    latents: Tensor,  # float [B, C, h, w]
    text: Tensor,  # [B, L, D]
    timestep: int,
    noise: Tensor,  # float32 [E, C, h, w]
    up_block: int,  # index into the UNet's up blocks
    batch_size: int,  # UNet samples per forward pass
) -> Tensor:
    """Activations of an up block, averaged over the ensemble: float32 [B, F, h', w'].

    The UNet is left as soon as the block has answered: at Stable Diffusion's up block 1 this saves 45 % of a pass.
    """
    latents, noise = latents.to(model.device, torch.float32), noise.to(model.device)
    image = torch.arange(len(latents), device=model.device).repeat_interleave(len(noise))  # [B E]
    which = torch.arange(len(noise), device=model.device).repeat(len(latents))

    def activations() -> Iterator[Tensor]:
        for chunk in torch.arange(len(image), device=model.device).split(batch_size):
            t = torch.full((len(chunk),), timestep, device=model.device)
            noisy = model.add_noise(latents[image[chunk]], noise[which[chunk]], t)
            yield _activations(model, noisy, t, text[image[chunk]], up_block)  # [b, F, h', w']

    of_image = groups(activations(), len(noise))  # [E, F, h', w'] each
    return torch.stack([each.mean(dim=0, dtype=torch.float32) for each in of_image]).cpu()


def pool(features: Tensor, boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Area-weighted means under boxes, L2-normalised.

    Args:
        features: float32 [F, h', w'] covering an image of `height` x `width` pixels.
        boxes: [N, 4] as x, y, width, height in pixels of that image.

    Returns:
        float32 [N, F], rows of norm 1 (of norm 0 where the features are all zero).
    """
    _, rows, columns = features.shape
    along_y = _overlap(boxes[:, 1], boxes[:, 3], rows, height / rows)  # [N, h']
    along_x = _overlap(boxes[:, 0], boxes[:, 2], columns, width / columns)  # [N, w']
    pooled = np.einsum("nh,fhw,nw->nf", along_y, features.double().numpy(), along_x, optimize=True)
    norm = np.linalg.norm(pooled, axis=1, keepdims=True)
    return (pooled / np.where(norm > 0, norm, 1)).astype(np.float32)


def _overlap(start: np.ndarray, length: np.ndarray, cells: int, cell: float) -> np.ndarray:
    """Share of each box side that lies in each cell, float64 [N, cells], rows summing to 1."""
    edges = np.arange(cells + 1) * cell
    low = np.maximum(start[:, None], edges[None, :-1])
    high = np.minimum((start + length)[:, None], edges[None, 1:])
    covered = np.clip(high - low, 0, None)
    return covered / covered.sum(axis=1, keepdims=True)


class _Left(Exception):
    """Carries an activation out of the UNet before the pass has ended."""


@contextmanager
def _leave_after(block: torch.nn.Module) -> Iterator[None]:
    def leave(_module: torch.nn.Module, _inputs: object, output: Tensor) -> None:
        raise _Left(output)

    handle = block.register_forward_hook(leave)
    try:
        yield
    finally:
        handle.remove()


def _activations(model: Model, noisy: Tensor, t: Tensor, text: Tensor, up_block: int) -> Tensor:
    with _leave_after(model.unet.up_blocks[up_block]):
        try:
            model.unet(noisy.to(model.dtype), t, text)
        except _Left as left:
            return left.args[0]
    raise AssertionError(f"up block {up_block} was not run")

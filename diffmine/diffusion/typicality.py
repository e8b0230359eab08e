"""Latents and text states -> typicality maps T(x|c) with their standard errors (Siglidis et al., ECCV 2024, eq. 3).

    T(x|c) = E_{eps,t}[ L_t(x, eps, null) - L_t(x, eps, c) ],   L_t(x, eps, c) = mean over channels of (eps - eps_hat)^2

The expectation is a mean over draws (t, eps). The same draws serve every image and both conditions, so their common
noise cancels in the difference. Only running sums are kept: no per-draw map outlives its draw.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffmine.diffusion.model import Model
from diffmine.randomness import generator


@dataclass(frozen=True)
class Draws:
    """N draws for latents of one shape."""

    t: Tensor  # int64 [N]
    eps: Tensor  # float32 [N, C, h, w]


@dataclass(frozen=True)
class Typicality:
    """Results for P (image, label) pairs; T is in units of squared eps error."""

    map: Tensor  # float32 [P, h, w]
    mean: Tensor  # float64 [P], mean of the map
    stderr: Tensor  # float64 [P], standard error of `mean`
    window_stderr: Tensor  # float64 [P, h, w], standard error of the mean over a window centred on each cell


def independent(seed: int, n: int, t_min: float, t_max: float, shape: tuple[int, int, int]) -> Draws:
    """The paper's draws: t uniform over the integers of [1000 t_min, 1000 t_max), independent Gaussian noise.

    Draw i depends on (seed, i) only: more draws extend the bank.
    """
    low, high = round(1000 * t_min), max(round(1000 * t_max), round(1000 * t_min) + 1)
    streams = [generator(seed, "draw", i) for i in range(n)]
    t = torch.tensor([int(s.integers(low, high)) for s in streams])
    eps = np.stack([s.standard_normal(shape, dtype=np.float32) for s in streams])
    return Draws(t, torch.from_numpy(eps))


Sampler = Callable[[int, int, float, float, tuple[int, int, int]], Draws]
SAMPLERS: dict[str, Sampler] = {"independent": independent}


@torch.inference_mode()
def typicality(
    model: Model,
    latents: Tensor,  # float [B, C, h, w], images of one shape
    pairs: Sequence[tuple[int, int]],  # P pairs (image, condition): indices into `latents` and `conditions`
    conditions: Tensor,  # [K, L, D] text states of the labels
    null: Tensor,  # [L, D] text state of the null prompt
    draws: Draws,
    window_rows: Tensor,  # float64 [h, h]: weights of the window mean centred on each cell, along y
    window_columns: Tensor,  # float64 [w, w], along x
    batch_size: int,  # UNet samples per forward pass
) -> Typicality:
    """Typicality of every pair; the null's pass is shared by all labels of an image.

    Returns maps that differ by about 1e-7 between batch sizes (float32) and not at all between orders of `pairs`.
    """
    device, n_images = model.device, len(latents)
    latents = latents.to(device, torch.float32)
    image = torch.tensor([i for i, _ in pairs], device=device)
    sample_image = torch.cat([torch.arange(n_images, device=device), image])  # [B + P]: null passes, then pairs
    text = torch.cat([null[None], conditions]).to(device)  # [1 + K, L, D]
    sample_text = torch.tensor([0] * n_images + [1 + k for _, k in pairs], device=device)
    rows, columns = window_rows.to(device), window_columns.to(device)

    map_sum = torch.zeros((len(pairs), *latents.shape[-2:]), dtype=torch.float64, device=device)
    mean, window = _Moments(), _Moments()
    for t, eps in zip(draws.t.to(device), draws.eps.to(device), strict=True):
        loss = torch.empty((len(sample_image), *latents.shape[-2:]), device=device)
        for chunk in torch.arange(len(sample_image), device=device).split(batch_size):
            steps = t.expand(len(chunk))
            noisy = model.add_noise(latents[sample_image[chunk]], eps, steps)  # [b, C, h, w]
            predicted = model.predict_eps(noisy, steps, text[sample_text[chunk]])
            loss[chunk] = (predicted - eps).square().mean(dim=1)  # [b, h, w]
        difference = (loss[image] - loss[n_images:]).double()  # [P, h, w]
        map_sum += difference
        mean.add(difference.mean(dim=(1, 2)))
        window.add(rows @ difference @ columns.T)
    n = len(draws.t)
    return Typicality((map_sum / n).float().cpu(), mean.mean.cpu(), mean.stderr().cpu(), window.stderr().cpu())


class _Moments:
    """Running mean and standard error of independent draws (Welford 1962)."""

    def __init__(self) -> None:
        self.n = 0
        self.mean = torch.zeros(())
        self._squares = torch.zeros(())

    def add(self, x: Tensor) -> None:
        self.n += 1
        delta = x - self.mean
        self.mean = self.mean + delta / self.n
        self._squares = self._squares + delta * (x - self.mean)

    def stderr(self) -> Tensor:
        return (self._squares / (self.n - 1) / self.n).sqrt()

"""Latents and text states -> typicality maps T(x|c) with their standard errors (Siglidis et al., ECCV 2024, eq. 3).

    T(x|c) = E_{eps,t}[ L_t(x, eps, null) - L_t(x, eps, c) ],   L_t(x, eps, c) = mean over channels of (eps - eps_hat)^2

The same draws (t, eps) serve every image and both conditions, so their common noise cancels in the difference. Only
running sums are kept: no per-draw map outlives its unit of draws.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffmine.diffusion.draws import Draws, Stratum
from diffmine.diffusion.model import Model
from diffmine.diffusion.passes import groups


@dataclass(frozen=True)
class Typicality:
    """Results for P (image, label) pairs; T is in units of squared eps error.

    `window_*` belong to the mean over a window centred on each cell. A 95 % interval reaches to both sides by the
    standard error times the 97.5 % quantile of Student's t with the degrees of freedom.
    """

    map: Tensor  # float32 [P, h, w]
    mean: Tensor  # float64 [P], mean of the map
    stderr: Tensor  # float64 [P], standard error of `mean`
    degrees_of_freedom: Tensor  # float64 [P]
    window_stderr: Tensor  # float64 [P, h, w]
    window_degrees_of_freedom: Tensor  # float64 [P, h, w]
    window_variance: Tensor | None  # float64 [S, P, h, w], of a unit's window mean within each stratum, if wanted
    failed_t: Tensor  # int64 [P], timestep of the first draw whose loss is not finite; -1: all are


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
    pad: bool = False,  # every pass to `batch_size`, as a compiled UNet wants one shape
    by_stratum: bool = False,  # give `window_variance`
    beat: Callable[[], object] = lambda: None,  # is called after each pass
    references: Sequence[int] | None = None,  # P: the condition that each pair is compared with; -1: the null
) -> Typicality:
    """Typicality of every pair; the null's pass is shared by all labels of an image.

    A pair with another condition for reference r gets the difference T(x|c) - T(x|r) = E[L_t(r) - L_t(c)], with the
    standard error of this difference.
    Maps differ by about 1e-7 between batch sizes (float32), and so between orders of `pairs`.
    """
    device = model.device
    rows, columns = window_rows.to(device), window_columns.to(device)
    units = _differences(model, latents, pairs, references, conditions, null, draws, batch_size, pad, beat)
    t_of_unit = iter(draws.t.to(device).split(draws.per_unit))
    cells = torch.zeros((len(pairs), *latents.shape[-2:]), dtype=torch.float64, device=device)
    failed_t = torch.full((len(pairs),), -1, device=device)
    of_mean, of_window, window_variance = _Error(), _Error(), []
    for stratum in draws.strata:
        mean, window = _Moments(), _Moments()
        for _ in range(stratum.units):
            each = next(units)  # [draws of the unit, P, h, w]
            failed_t = _first_failure(each, next(t_of_unit), failed_t)
            difference = each.mean(dim=0)
            cells += stratum.share / stratum.units * difference
            mean.add(difference.mean(dim=(1, 2)))
            window.add(rows @ difference @ columns.T)
        of_mean.add(mean.variance(), stratum)
        of_window.add(window.variance(), stratum)
        if by_stratum:
            window_variance.append(window.variance().cpu())
    return Typicality(
        cells.float().cpu(), cells.mean(dim=(1, 2)).cpu(), *of_mean.found(), *of_window.found(),
        torch.stack(window_variance) if by_stratum else None, failed_t.cpu(),
    )  # fmt: skip


class _Error:
    """Variances of a unit within each stratum -> standard error of the estimate, and its degrees of freedom.

    Strata contribute unequally, and each is known from few units: degrees of freedom after Welch (Biometrika 1947).
    """

    def __init__(self) -> None:
        self._total = self._squares = torch.zeros(())

    def add(self, variance: Tensor, stratum: Stratum) -> None:
        part = stratum.share**2 / stratum.units * variance
        self._total = self._total + part
        self._squares = self._squares + part**2 / (stratum.units + 1)

    def found(self) -> tuple[Tensor, Tensor]:
        freedom = self._total**2 / self._squares.clamp_min(1e-300) - 2
        return self._total.sqrt().cpu(), freedom.clamp_min(1.0).cpu()


def _differences(
    model: Model,
    latents: Tensor,
    pairs: Sequence[tuple[int, int]],
    references: Sequence[int] | None,
    conditions: Tensor,
    null: Tensor,
    draws: Draws,
    batch_size: int,
    pad: bool,
    beat: Callable[[], object],
) -> Iterator[Tensor]:
    """L(r) - L(c) of every pair under each draw of a unit: float64 [draws of a unit, P, h, w], unit after unit.

    A pass holds both conditions of many images and, where these are few, of many draws. It may end within a unit, so
    that the last pass alone is padded.
    """
    device, null_of = model.device, [(i, 0) for i in range(len(latents))]
    latents, text = latents.to(device, torch.float32), torch.cat([null[None], conditions]).to(device)  # [1 + K, L, D]
    own = [(i, 1 + k) for i, k in pairs]  # as (image, text)
    other = [(i, 1 + r) for (i, _), r in zip(pairs, references or [-1] * len(pairs), strict=True)]
    samples = {sample: n for n, sample in enumerate(dict.fromkeys([*null_of, *own, *other]))}
    sample_image, sample_text = torch.tensor([*samples]).T
    t_of, eps_of = draws.t.to(device), draws.eps.to(device)
    passes = _passes(len(draws.t), sample_image, sample_text, batch_size, pad, device)
    with_label, without = (torch.tensor([samples[s] for s in side], device=device) for side in (own, other))

    def losses() -> Iterator[Tensor]:
        for each in passes:
            t, noise = t_of[each.draw], eps_of[each.draw]  # [b], [b, C, h, w]
            noisy = model.add_noise(latents[each.image], noise, t)
            predicted = model.predict_eps(noisy, t, text[each.texts], each.text_of)
            yield (predicted - noise).square().mean(dim=1)[: each.size]  # [b, h, w]
            beat()

    for of_unit in groups(losses(), draws.per_unit * len(samples)):
        by_draw = of_unit.view(draws.per_unit, len(samples), *latents.shape[-2:])
        yield (by_draw[:, without] - by_draw[:, with_label]).double()  # [draws of the unit, P, h, w]


def _first_failure(difference: Tensor, t: Tensor, known: Tensor) -> Tensor:
    """Timestep of the first draw that is not finite, else -1, of each pair: int64 [P]."""
    failed = ~difference.isfinite().all(dim=(2, 3))  # [draws of the unit, P]
    first = torch.where(failed.any(dim=0), t[failed.int().argmax(dim=0)], -1)
    return torch.where(known < 0, first, known)


@dataclass(frozen=True)
class _Pass:
    """Samples of one forward pass; indices on the device, made before the loop so that nothing waits in it."""

    size: int  # samples that count; what follows is padding
    draw: Tensor  # int64 [b]
    image: Tensor  # int64 [b]
    texts: Tensor  # int64 [K]: those the pass needs
    text_of: Tensor | None  # int64 [b], index into `texts`; None: `texts` has one of each sample


def _passes(
    draws: int, sample_image: Tensor, sample_text: Tensor, batch_size: int, pad: bool, device: torch.device
) -> list[_Pass]:
    """Every sample under every draw, draw after draw."""
    found, samples = [], draws * len(sample_image)
    equal = batch_size if pad else -(-samples // -(-samples // batch_size))  # rather than a small one at the end
    for chunk in torch.arange(samples).split(equal):
        padded = torch.cat([chunk, chunk[-1:].expand(batch_size - len(chunk))]) if pad else chunk
        draw, sample = padded // len(sample_image), padded % len(sample_image)
        texts, text_of = sample_text[sample], None
        if not pad:  # a compiled UNet wants one shape of texts, too
            texts, text_of = torch.unique(texts, return_inverse=True)
            text_of = text_of.to(device)
        found.append(_Pass(len(chunk), draw.to(device), sample_image[sample].to(device), texts.to(device), text_of))
    return found


class _Moments:
    """Running mean and sum of squares (Welford 1962)."""

    def __init__(self) -> None:
        self.n = 0
        self.mean = torch.zeros(())
        self._squares = torch.zeros(())

    def add(self, x: Tensor) -> None:
        self.n += 1
        delta = x - self.mean
        self.mean = self.mean + delta / self.n
        self._squares = self._squares + delta * (x - self.mean)

    def variance(self) -> Tensor:
        return self._squares / (self.n - 1)

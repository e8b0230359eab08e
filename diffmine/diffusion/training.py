"""A UNet in training: its weights, their moving average and the optimizer's moments, advanced a step at a time.

What a step sees depends on (seed, step, images) only, so the state says nothing about data: `tensors` and `restore` are
a checkpoint. Processes of a torch.distributed group share each batch, and have the losses that one alone would have.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, distributed, nn

from diffmine.diffusion.finetune import denoising_loss, example, learning_rate
from diffmine.diffusion.model import Model
from diffmine.errors import NonFiniteError

if TYPE_CHECKING:
    from diffmine.config import Finetune

_STATES = ("weight", "average", "first", "second")


@dataclass(frozen=True)
class LabelledImage:
    """What training sees of an image."""

    image_id: str
    latent: np.ndarray  # float16 [C, h, w]
    labels: Sequence[str]


@dataclass(frozen=True)
class Outcome:
    """What a step says of itself."""

    loss: float  # of the whole batch, before the step
    grad_norm: float  # before clipping
    learning_rate: float


class Training:
    """A model's UNet in training, in float32; matrix products in bfloat16 where that is asked for on a GPU.

    Args:
        wanted: how to train; a section of the config.
        texts: label -> text states [L, D]; None -> those of the null prompt.
        bfloat16: autocast on CUDA; ignored elsewhere.
        at_once: images of a pass; a larger share of a batch goes in parts, whose gradients add up.
    """

    def __init__(
        self,
        model: Model,
        wanted: "Finetune",
        seed: int,
        texts: Mapping[str | None, Tensor],
        bfloat16: bool = False,
        at_once: int | None = None,
    ) -> None:
        from diffusers.training_utils import EMAModel  # seconds, which only a process that trains should spend

        self.model, self.wanted, self.seed, self.texts = model, wanted, seed, texts
        self.at_once = at_once or wanted.batch_size
        self.world = distributed.get_world_size() if distributed.is_initialized() else 1
        self.timesteps = round(1000 * wanted.t_min), round(1000 * wanted.t_max)
        self._autocast = torch.autocast("cuda", dtype=torch.bfloat16, enabled=bfloat16 and model.device.type == "cuda")
        model.unet.train().requires_grad_(True)
        self._unet: nn.Module = nn.parallel.DistributedDataParallel(model.unet) if self.world > 1 else model.unet
        self.optimizer = torch.optim.AdamW(
            model.unet.parameters(),
            lr=wanted.learning_rate,
            weight_decay=wanted.weight_decay,
            betas=(0.9, 0.999),
            fused=True,
            eps=1e-8,
        )
        self.average = EMAModel(model.unet.parameters(), decay=wanted.ema_decay, foreach=True)

    def step(self, step: int, share: Sequence[tuple[int, LabelledImage]]) -> Outcome:
        """Advance by a step.

        Args:
            share: this process's images of the batch, with their positions in it.

        Raises:
            NonFiniteError: the loss of the batch is not a number, in all processes alike; the weights are as they were.
        """
        examples = [
            example(
                self.seed, step, position, image.image_id, image.latent, image.labels, self.wanted.label_dropout,
                self.wanted.crop, self.timesteps,
            )
            for position, image in share
        ]  # fmt: skip
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.model.device)
        for first in range(0, len(examples), self.at_once):
            part, last = examples[first : first + self.at_once], first + self.at_once >= len(examples)
            with nullcontext() if last or self.world == 1 else self._unet.no_sync():  # type: ignore[operator]
                text = torch.stack([self.texts[e.label] for e in part])
                with self._autocast:
                    own = denoising_loss(self.model, self._unet, part, text, self.wanted.min_snr_gamma)
                own = own * (len(part) / self.wanted.batch_size)
                (own * self.world).backward()  # gradients are averaged over the processes
            loss += own.detach()
        if self.world > 1:
            distributed.all_reduce(loss)
        value = float(loss)
        if not np.isfinite(value):
            raise NonFiniteError(f"the loss of step {step} is {value}")
        rate = learning_rate(
            step, self.wanted.steps, self.wanted.learning_rate, self.wanted.warmup_steps, self.wanted.decay_steps
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = nn.utils.clip_grad_norm_(self.model.unet.parameters(), self.wanted.max_grad_norm)
        self.optimizer.step()
        self.average.step(self.model.unet.parameters())
        return Outcome(value, float(norm), rate)

    def use_average(self) -> None:
        """Put the moving average in the place of the weights: the end of training."""
        self.average.copy_to(self.model.unet.parameters())

    def tensors(self) -> dict[str, Tensor]:
        """The state after at least one step, on the CPU: `weight/`, `average/`, `first/` and `second/` (moments)."""
        found = {}
        for (name, parameter), average in zip(self._parameters(), self.average.shadow_params, strict=True):
            moments = self.optimizer.state[parameter]
            found[f"weight/{name}"] = parameter.detach()
            found[f"average/{name}"] = average
            found[f"first/{name}"], found[f"second/{name}"] = moments["exp_avg"], moments["exp_avg_sq"]
        return {name: tensor.contiguous().cpu() for name, tensor in found.items()}

    def restore(self, tensors: Mapping[str, Tensor], step: int) -> bool:
        """Take over the state that `tensors` gave after so many steps; False where it is of another UNet."""
        own = {f"{kind}/{name}": p.shape for kind in _STATES for name, p in self._parameters()}
        if own != {name: tensor.shape for name, tensor in tensors.items()}:
            return False
        with torch.no_grad():
            for (name, parameter), average in zip(self._parameters(), self.average.shadow_params, strict=True):
                parameter.copy_(tensors[f"weight/{name}"])
                average.copy_(tensors[f"average/{name}"])
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(step), device=parameter.device),  # fused AdamW wants it there
                    "exp_avg": tensors[f"first/{name}"].to(parameter.device),
                    "exp_avg_sq": tensors[f"second/{name}"].to(parameter.device),
                }
        self.average.optimization_step = step
        return True

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.model.unet.named_parameters())

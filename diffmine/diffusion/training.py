"""A UNet in training: its weights, their moving average and the optimizer's moments, advanced a step at a time.

What a step sees depends on (seed, step, images) only, so the state says nothing about data: `tensors` and `restore` are
a checkpoint. The processes of an accelerator share each batch, and have the losses that one alone would have.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from diffmine.diffusion.finetune import Example, LabelledImage, Shape, Words, denoising_loss, example, learning_rate
from diffmine.diffusion.memory import Batch
from diffmine.diffusion.model import COMPILED_SHAPES, Model
from diffmine.errors import NonFiniteError
from diffmine.prompts import joined

if TYPE_CHECKING:
    from accelerate import Accelerator

    from diffmine.config import Finetune

_STATES = ("weight", "average", "first", "second")
_TEXTS = 4096  # whose states are kept: a gigabyte at 77 x 768
TextOf = Callable[[Words], Tensor]


@dataclass(frozen=True)
class Outcome:
    """What a step says of itself."""

    loss: float  # of the whole batch, before the step
    grad_norm: float  # before clipping
    learning_rate: float


def text_states(model: Model, template: str, null_prompt: str) -> TextOf:
    """words -> text states [L, D], computed once for each prompt and one by one, so that no batch changes a bit."""

    @lru_cache(_TEXTS)
    def of(words: Words) -> Tensor:
        return model.embed([null_prompt if words is None else joined(words, template)])[0].clone()

    return of


class Training:
    """A model's UNet in training, in float32.

    Args:
        wanted: how to train; a section of the config.
        steps: of the whole training.
        text: states of what stands for the label.
        spread: the processes that share each batch.
        at_once: images of a process's pass; a larger share of a batch goes in parts, whose gradients add up.
    """

    def __init__(
        self,
        model: Model,
        wanted: "Finetune",
        seed: int,
        steps: int,
        text: TextOf,
        spread: "Accelerator",
        at_once: int | None = None,
    ) -> None:
        from diffusers.training_utils import EMAModel  # seconds, which only a process that trains should spend

        self.model, self.wanted, self.seed, self.steps = model, wanted, seed, steps
        self.text, self.spread = text, spread
        self.share = -(-wanted.batch_size // spread.num_processes)  # of a batch: the largest that a process has
        self.passes = -(-self.share // min(at_once or self.share, self.share))
        self.timesteps = round(1000 * wanted.t_min), round(1000 * wanted.t_max)
        model.unet.requires_grad_(True)
        if wanted.lora_rank is not None:
            model.adapt(wanted.lora_rank, seed)
        model.unet.train()
        if wanted.gradient_checkpointing:
            model.unet.enable_gradient_checkpointing()
        if wanted.compile:
            torch._dynamo.config.recompile_limit = COMPILED_SHAPES  # else 8; holds for this thread alone
            model.unet.compile(dynamic=False)
        optimizer = torch.optim.AdamW(
            [p for p in model.unet.parameters() if p.requires_grad],
            lr=wanted.learning_rate,
            weight_decay=wanted.weight_decay,
            betas=(0.9, 0.999),
            fused=True,
            eps=1e-8,
        )
        self._sharded = spread.distributed_type == DistributedType.FSDP
        if self._sharded:  # which takes no other layout
            model.unet.to(memory_format=torch.contiguous_format)
        self._unet: nn.Module
        if spread.num_processes == 1:  # a lone process needs no DDP around its model
            self._unet, self.optimizer = spread.prepare_model(model.unet, evaluation_mode=True), optimizer
        else:
            self._unet, self.optimizer = spread.prepare(model.unet, optimizer)
        self._named = [(name, p) for name, p in model.unet.named_parameters() if p.requires_grad]  # as they are spread
        self._trained = [parameter for _, parameter in self._named]
        self.average = EMAModel(self._trained, decay=wanted.ema_decay, foreach=True)

    @property
    def at_once(self) -> int:
        """Images of a process's pass, at most."""
        return -(-self.share // self.passes)

    # ------------------------------------------------------------------------------------------------------- a step

    def examples(
        self, step: int, share: Sequence[tuple[int, LabelledImage]], shape: Shape | None = None
    ) -> list[Example]:
        """What this process's images of a batch, with their places in it, are in a step; needs no device.

        Args:
            shape: of the batch; None: its images have one shape, and are seen whole.
        """
        wanted = self.wanted
        return [
            example(
                self.seed, step, place, image, dropout=wanted.label_dropout, shape=shape,
                timesteps=self.timesteps, joined=wanted.multi_label == "joined", columns=wanted.prompt_columns,
            )
            for place, image in share
        ]  # fmt: skip

    def fit(self, shape: Shape) -> list[str]:
        """Make more passes of fewer images, until one fits into the device beside all that training keeps there.

        Every process tries without the others; all then make as many passes.

        Args:
            shape: the largest of a batch.

        Returns:
            What the user should know.

        Raises:
            RuntimeError: `out_of_memory`, as not even one image fits.
        """
        moments = [torch.empty_like(p) for p in self._trained for _ in range(2) if p not in self.optimizer.state]
        noise = torch.zeros(self.model.channels, *shape)
        batch = Batch(self.at_once)
        with self._eagerly():  # rather than compiled for each number that is tried
            batch(lambda images: self._try([Example("", noise, noise, self.timesteps[0], None)] * images))
        del moments  # which the first step makes
        images = int(self.spread.gather(torch.tensor([batch.size], device=self.model.device)).min())
        self.passes = -(-self.share // images)
        return batch.notes

    def _try(self, examples: Sequence[Example]) -> None:
        """A pass of which nothing stays."""
        try:
            text = torch.stack([self.text(e.words) for e in examples])
            denoising_loss(self.model, self.model.unet, examples, text, self.wanted.min_snr_gamma).backward()
        finally:
            self.optimizer.zero_grad(set_to_none=True)

    def step(self, step: int, examples: Sequence[Example]) -> Outcome:
        """Advance by a step.

        Args:
            examples: this process's share of the batch; at least one.

        Raises:
            NonFiniteError: the loss of the batch is not a number, in all processes alike; the weights are as they were.
        """
        wanted, world = self.wanted, self.spread.num_processes
        loss = torch.zeros((), device=self.model.device)
        for i in range(self.passes):
            own = examples[i :: self.passes]
            part = own or examples[:1]  # all processes make the same passes: one whose images have run out counts for 0
            together = world == 1 or self._sharded or i == self.passes - 1  # FSDP would keep whole gradients
            with nullcontext() if together else self.spread.no_sync(self._unet):
                text = torch.stack([self.text(e.words) for e in part])
                error = denoising_loss(self.model, self._unet, part, text, wanted.min_snr_gamma)
                error = error * (len(own) / wanted.batch_size)
                self.spread.backward(error * world)  # gradients are averaged over the processes
            loss += error.detach()
        value = float(self.spread.reduce(loss, "sum"))
        if not np.isfinite(value):
            raise NonFiniteError(f"the loss of step {step} is {value}")
        rate = learning_rate(step, self.steps, wanted.learning_rate, wanted.warmup_steps, wanted.decay_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = float(_whole(self.spread.clip_grad_norm_(self._unet.parameters(), wanted.max_grad_norm)))
        if not np.isfinite(norm):
            raise NonFiniteError(f"the loss of step {step} is {value}, but its gradient's norm is {norm}")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)  # the average's step, and what comes between steps, need the room
        self.average.step(self._trained)
        return Outcome(value, norm, rate)

    def _eagerly(self) -> AbstractContextManager[object]:
        """Passes that are not those of steps; a compiled UNet would be compiled again for them."""
        return torch.compiler.set_stance("force_eager") if self.wanted.compile else nullcontext()

    @contextmanager
    def averaged(self) -> Iterator[Model]:
        """The model with the moving average in the place of its weights, for a while; it runs eagerly."""
        weights = [p.detach().clone() for p in self._trained]
        self._put(self.average.shadow_params)
        self.model.unet.eval()
        try:
            with self._eagerly():
                yield self.model
        finally:
            self.model.unet.train()
            self._put(weights)

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor]) -> None:
        """Give the trained parameters other values."""
        for parameter, value in zip(self._trained, values, strict=True):
            parameter.copy_(value)
        for module in self._unet.modules():
            if isinstance(module, FSDPModule):  # some keep what they have gathered for a pass without gradients
                module.reshard()

    # -------------------------------------------------------------------------------------------------- checkpoints

    def tensors(self) -> dict[str, Tensor]:
        """A copy of the state after at least one step, on the CPU: `weight/`, `average/`, `first/` and `second/`
        (moments). All processes must ask; only the first is answered."""
        found = {}
        for (name, parameter), average in zip(self._named, self.average.shadow_params, strict=True):
            moments = self.optimizer.state[parameter]
            found[f"weight/{name}"], found[f"average/{name}"] = parameter.detach(), average
            found[f"first/{name}"], found[f"second/{name}"] = moments["exp_avg"], moments["exp_avg_sq"]
        return self._gathered(found)

    def averages(self) -> dict[str, Tensor]:
        """A copy of the moving average, on the CPU: parameter's name -> values. Asked and answered as `tensors`."""
        names = [name for name, _ in self._named]
        return self._gathered(dict(zip(names, self.average.shadow_params, strict=True)))

    def takes(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether this is the state of such a UNet."""
        own = {f"{kind}/{name}": p.shape for kind in _STATES for name, p in self._named}
        return own == {name: tensor.shape for name, tensor in tensors.items()}

    def restore(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Take over the state that `tensors` gave after so many steps.

        All processes must do so; what counts are the first one's tensors, and the others need none.
        """
        with torch.no_grad():
            for (name, parameter), average in zip(self._named, self.average.shadow_params, strict=True):
                weight, mean, first, second = (self._of_first(tensors, f"{kind}/{name}", parameter) for kind in _STATES)
                parameter.copy_(weight)
                average.copy_(mean)
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(step), device=parameter.device),  # fused AdamW wants it there
                    "exp_avg": first,
                    "exp_avg_sq": second,
                }
        self.average.optimization_step = step

    def _of_first(self, tensors: Mapping[str, Tensor], name: str, parameter: Tensor) -> Tensor:
        """The first process's tensor, on the device of a parameter, spread and laid out in memory as that is."""
        device = parameter.device
        first = self.spread.is_main_process
        whole = tensors[name].to(device) if first else torch.empty(parameter.shape, device=device)
        if isinstance(parameter, DTensor):
            return distribute_tensor(whole, parameter.device_mesh, parameter.placements)
        if self.spread.num_processes > 1:
            torch.distributed.broadcast(whole, 0)
        return torch.empty_like(parameter).copy_(whole)  # fused AdamW insists on the memory layout

    def _gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, tensor in tensors.items():
            whole = _whole(tensor)
            if self.spread.is_main_process:
                found[name] = torch.empty(whole.shape, dtype=whole.dtype).copy_(whole)  # contiguous, and never a view
        return found


def put_weights(model: Model, weights: Mapping[str, Tensor]) -> None:
    """Put what `Training.averages` gave into a model that has the same parameters, on any number of processes."""
    own = dict(model.unet.named_parameters())
    with torch.no_grad():
        for name, values in weights.items():
            own[name].copy_(values)


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be spread over processes, which all must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

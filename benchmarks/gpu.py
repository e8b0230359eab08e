"""Speed of the package's own functions on one accelerator, with models of Stable Diffusion 1.5's shape.

    python benchmarks/gpu.py --budget 330 --out benchmarks/results/gpu.json
    python benchmarks/gpu.py --tiny --out /tmp/gpu.json    # on any CPU, in seconds: does every measurement work?
    python benchmarks/gpu.py --only rate,compile           # some groups of the table below

Needs torch, diffusers, transformers, accelerate, numpy, pillow and this repository on PYTHONPATH: no weights, no data,
no network, no Ray. Weights are random, which changes no speed; errors of bfloat16 and float16 are those of random
weights and say only that nothing is broken. Images are latents of 512 x 512 pixels (64 x 64 cells).

Each line is written to the JSON at once, so a run that is cut off leaves what it measured. A measurement whose
estimated time exceeds what is left of `--budget` is skipped and says so; the most wanted come first. Rates count the
floating-point operations of a forward pass (two per multiply-add, counted on tensors without data), training three
times that, and are compared with a large bfloat16 matrix product in the same run. Peak memory is all that the process
held: weights, optimizer, activations.

| group     | a pass is              | variants                                                                       |
|-----------|------------------------|--------------------------------------------------------------------------------|
| scoring   | one UNet sample        | batch sizes up to the memory's end; channels_last; cuDNN choosing by trial     |
| official  | one UNet sample        | the ECCV 2024 code's loop: one image, 10 draws x 2 conditions, float16; its    |
|           |                        | features of one patch: 8 encodings of the image, 8 noises, float32             |
| dift      | one noise of one image | features after up-block 1 at t = 161, 8 noises                                 |
| vae       | one image              | the encoder                                                                    |
| precision |                        | maps in bfloat16 and float16 beside float32                                    |
| finetune  | one image's step       | the training loop of a run: bfloat16, fused AdamW, average; eager, compiled    |
| procedure | one image's step       | that of diffusers' train_text_to_image.py: VAE and text encoder in each step   |
| compile   | one UNet sample        | scoring with the transformer blocks, then the whole UNet, compiled three ways  |

Ratios stand at the end, of rows that a run can be like: the memory layout is channels_last, and the one way to compile
is `default`, whose passes are padded to one shape. A faster row that no setting chooses is named beside them.

*End to end* is images/s of encoding, scoring and the features of one patch, at equal error (40 allocated draws against
100 independent ones: benchmarks/draws.py); the official choice of patches, minutes an image on a CPU, is left out, and
its encoding is counted at our speed. *With fresh scores* adds what the official code does not do: 30 draws more of
every image, though only images with a shown patch get them. *Finetuning* is ours over the procedure's best.
"""

import argparse
import copy
import gc
import json
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffmine.diffusion.draws import Timesteps, antithetic
from diffmine.diffusion.features import dift, ensemble_noise
from diffmine.diffusion.finetune import LabelledImage
from diffmine.diffusion.memory import out_of_memory
from diffmine.diffusion.model import Model, freeze, share_texts
from diffmine.diffusion.parallel import accelerator
from diffmine.diffusion.training import Training
from diffmine.diffusion.typicality import Typicality, typicality
from diffmine.mining.patches import centred_matrix

GROUPS = ("rate", "scoring", "official", "dift", "vae", "precision", "finetune", "procedure", "compile")
FRESH_DRAWS = 30  # of images with a shown patch, once more
DRAWS = 40  # images per second are stated for this many draws and two conditions
COMPILE_MODES = {"blocks": 40, "default": 90, "reduce-overhead": 90, "max-autotune-no-cudagraphs": 240}  # seconds each
Figures = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What is built and how much of it is run."""

    cells: int  # side of a latent
    unet: dict[str, Any]
    vae_channels: tuple[int, ...]
    text: dict[str, Any]
    matrix: int  # side of the matrices of the product
    scoring_batches: tuple[int, ...]
    finetune_batches: tuple[int, ...]
    dift_images: int
    vae_batches: tuple[int, ...]
    timed_draws: int
    official_draws: int
    repeats: int


FULL = Sizes(
    cells=64,
    unet={"cross_attention_dim": 768, "attention_head_dim": 8},  # the rest are diffusers' defaults
    vae_channels=(128, 256, 512, 512),
    text={
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },  # ViT-L/14
    matrix=8192,
    scoring_batches=(20, 32, 64, 128, 256),
    finetune_batches=(16, 32, 64),
    dift_images=16,
    vae_batches=(4, 16),
    timed_draws=4,
    official_draws=100,
    repeats=3,
)
TINY = Sizes(
    cells=16,
    unet={
        "cross_attention_dim": 32, "attention_head_dim": 4, "block_out_channels": (32, 32, 32, 32),
        "layers_per_block": 1, "norm_num_groups": 8,
    },
    vae_channels=(32, 32, 32, 32),
    text={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    matrix=512,
    scoring_batches=(4, 8),
    finetune_batches=(2,),
    dift_images=2,
    vae_batches=(1,),
    timed_draws=4,
    official_draws=20,
    repeats=1,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- report


@dataclass
class Report:
    """The table so far, and the time left."""

    out: Path
    budget: float  # seconds
    body: Figures
    started: float = field(default_factory=time.perf_counter)

    def left(self) -> float:
        return self.budget - (time.perf_counter() - self.started)

    def measure(self, group: str, name: str, needs: float, work: Callable[[], Figures]) -> Figures | None:
        """Run one measurement that takes about `needs` seconds; its figures, or None where there are none."""
        figures: Figures | None = None
        began = time.perf_counter()
        if self.left() < needs:
            note = f"skipped: {self.left():.0f} s left, about {needs:.0f} s needed"
        else:
            try:
                figures, note = work(), ""
            except RuntimeError as error:  # a failed compilation must not end the run
                message = " ".join(str(error).split())
                note = "out of memory" if out_of_memory(error) else f"{type(error).__name__}: {message[:200]}"
            gc.collect()  # Accelerate ties a model and its forward pass into a ring
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # outside the handler, which keeps the failed pass alive
        row = {"group": group, "name": name, **(figures or {}), "wall_s": time.perf_counter() - began}
        self.body["rows"].append(row | ({"note": note} if note else {}))
        print(line(self.body["rows"][-1]), flush=True)
        self.write()
        return figures

    def write(self) -> None:
        self.body["seconds"] = time.perf_counter() - self.started
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.body, indent=1) + "\n")


COLUMNS = {  # heading -> key and format of a row
    "passes/s": ("passes_per_s", ".1f"), "images/s": ("images_per_s", ".2f"), "TFLOP/s": ("tflops", ".1f"),
    "of rate": ("share", ".0%"), "peak GiB": ("peak_gib", ".1f"), "took s": ("wall_s", ".1f"),
}  # fmt: skip

EXTRAS = ("steps_per_s", "compile_s", "map_error", "window_error")


def heading() -> str:
    return f"{'group':10} {'measurement':40}" + "".join(f"{name:>10}" for name in COLUMNS)


def line(row: Figures) -> str:
    cells = "".join(f"{format(row[key], how) if key in row else '':>10}" for key, how in COLUMNS.values())
    extra = [f"{key} {row[key]:.3g}" for key in EXTRAS if key in row] + [row.get("note", "")]
    return f"{row['group']:10} {row['name']:40}{cells}  {' '.join(extra)}".rstrip()


def machine() -> Figures:
    """Where the figures come from."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        models = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        cpu = models[0].split(":")[1].strip() if models else cpu
    on_gpu = torch.cuda.is_available()
    return {
        "cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "platform": platform.platform(),
        "python": platform.python_version(), "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu", "cuda": torch.version.cuda,
        "device_gib": torch.cuda.get_device_properties(0).total_memory / 2**30 if on_gpu else None,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- models


def build_unet(sizes: Sizes) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(sample_size=sizes.cells, **sizes.unet)


def build_vae(sizes: Sizes) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=sizes.vae_channels, layers_per_block=2, latent_channels=4,
    )  # fmt: skip


def build(sizes: Sizes, device: torch.device) -> Model:
    """A model of random float32 weights without a tokenizer; the UNet waits on the CPU for `converted`."""
    from diffusers.utils import logging
    from transformers import CLIPTextConfig, CLIPTextModel

    logging.set_verbosity_error()
    torch.manual_seed(0)
    with device:
        unet, vae = build_unet(sizes).cpu(), build_vae(sizes)
        share_texts(unet)
        text_encoder = CLIPTextModel(CLIPTextConfig(hidden_act="quick_gelu", **sizes.text))
    for part in (unet, vae, text_encoder):
        freeze(part)
    alpha_bar = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, device=device) ** 2).cumprod(0)
    tokenizer: Any = None
    return Model(vae, unet, text_encoder, tokenizer, alpha_bar, {}, False, device, torch.float32)


def converted(model: Model, dtype: torch.dtype, memory_format: torch.memory_format = torch.contiguous_format) -> Model:
    """The model with a copy of its UNet on the device, in another type or memory layout."""
    unet = copy.deepcopy(model.unet).to(model.device, dtype, memory_format=memory_format)
    return replace(model, unet=unet, dtype=dtype)


@torch.inference_mode()
def text_states(model: Model, count: int) -> Tensor:
    """States of random tokens, [count, 77, D] in the model's type."""
    ids = torch.randint(0, 49_000, (count, 77), generator=torch.Generator().manual_seed(1)).to(model.device)
    return model.text_encoder(ids).last_hidden_state.to(model.dtype)


def latents_of(count: int, cells: int) -> Tensor:
    return torch.randn((count, 4, cells, cells), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def operations(sizes: Sizes) -> tuple[float, float, float]:
    """TFLOP of a UNet pass, of one that ends with up-block 1, and of a VAE encoding; no tensor holds data."""

    def leave(*_: object) -> None:
        raise StopIteration

    with torch.device("meta"):
        unet, vae = build_unet(sizes), build_vae(sizes)
        width, side = unet.config.cross_attention_dim, 8 * sizes.cells
        inputs = torch.empty(1, 4, sizes.cells, sizes.cells), torch.empty(1), torch.empty(1, 77, width)
        with FlopCounterMode(display=False) as whole:
            unet(*inputs)
        with FlopCounterMode(display=False) as encoder:
            vae.encode(torch.empty(1, 3, side, side))
        unet.up_blocks[1].register_forward_hook(leave)
        with FlopCounterMode(display=False) as part, suppress(StopIteration):
            unet(*inputs)
    tflop = [counter.get_total_flops() / 1e12 for counter in (whole, part, encoder)]
    return tflop[0], tflop[1], tflop[2]


# ------------------------------------------------------------------------------------------------------------- timing


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """Median time of `work` after a first run; the time of that first run; peak memory in GiB."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats + 1):
        synchronize()
        began = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    return statistics.median(times[1:]), times[0], peak


@dataclass
class Bench:
    """What every measurement needs."""

    sizes: Sizes
    base: Model
    unet_tflop: float  # per pass
    dift_tflop: float  # per pass
    vae_tflop: float  # per image
    rate: float = 0.0  # TFLOP/s of the matrix product; 0: not measured

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def half(self) -> torch.dtype:
        """Half types are slow on many CPUs."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def figures(self, passes: int, took: float, peak: float, tflop: float, passes_per_image: int) -> Figures:
        tflops = passes * tflop / took
        share = {"share": tflops / self.rate} if self.rate else {}
        return {
            "passes_per_s": passes / took, "images_per_s": passes / took / passes_per_image, "tflops": tflops, **share,
            "peak_gib": peak, "timed_s": took,
        }  # fmt: skip


# ------------------------------------------------------------------------------------------------------- measurements


def matrix_rate(bench: Bench) -> Figures:
    """bfloat16 product of random matrices: the rate all shares refer to."""
    side = bench.sizes.matrix
    a, b = (torch.randn(side, side, device=bench.device, dtype=torch.bfloat16) for _ in range(2))

    def work() -> None:
        for _ in range(20):
            a @ b

    took, _, peak = seconds(work, 5)
    bench.rate = 20 * 2 * side**3 / took / 1e12
    return {"tflops": bench.rate, "peak_gib": peak}


def scorer(bench: Bench, model: Model, n_images: int, batch: int, pad: bool = False) -> Callable[[], Typicality]:
    """Typicality of random latents, each under one of two labels."""
    cells, n = bench.sizes.cells, bench.sizes.timed_draws
    draws = antithetic(0, n, Timesteps.between(0.1, 0.7), (4, cells, cells))
    text, latents = text_states(model, 3), latents_of(n_images, cells)
    windows = torch.from_numpy(centred_matrix(cells, 8 * cells, 64).copy())
    pairs = [(i, i % 2) for i in range(n_images)]
    return lambda: typicality(model, latents, pairs, text[1:], text[0], draws, windows, windows, batch, pad)


def scoring(bench: Bench, model: Model, batch: int, pad: bool = False) -> Figures:
    """All passes are full: half as many images as samples, each under its label and the null."""
    took, first, peak = seconds(scorer(bench, model, batch // 2, batch, pad), bench.sizes.repeats)
    passes = bench.sizes.timed_draws * batch
    return bench.figures(passes, took, peak, bench.unet_tflop, 2 * DRAWS) | {"batch": batch, "first_s": first}


@contextmanager
def cudnn_by_trial() -> Iterator[None]:
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = False


def scoring_by_trial(bench: Bench, model: Model, batch: int) -> Figures:
    with cudnn_by_trial():
        return scoring(bench, model, batch)


def scoring_compiled(bench: Bench, batch: int, mode: str) -> Figures:
    """With the transformer blocks ("blocks") or the whole UNet compiled; the first run holds the compilation.

    `default` is what `typicality.compile` does: each sample has a text of its own, so that shapes never change.
    """
    torch._dynamo.reset()
    model = converted(bench.base, bench.half, torch.channels_last)
    if mode == "blocks":
        model.unet.compile_repeated_blocks(dynamic=False)
    else:
        model = replace(model, unet=torch.compile(model.unet, mode=mode, dynamic=False))
    found = scoring(bench, model, batch, pad=True)
    return found | {"compile_s": found["first_s"] - found["timed_s"]}


@torch.inference_mode()
def official_losses(model: Model, latent: Tensor, text: Tensor, t: Tensor, eps: Tensor) -> np.ndarray:
    """The ECCV 2024 code's losses of one image: 10 draws x 2 conditions a pass, float16 autocast on CUDA, all kept.

    Args:
        latent: float32 [1, C, h, w]; text: [2, L, D], the label's, then the null's; t: [N]; eps: [N, C, h, w].

    Returns:
        float16 [N, 2, C, h, w].
    """
    kept = []
    for noise, times in zip(eps.split(10), t.split(10), strict=True):
        n = len(times)
        both, timesteps = torch.cat([noise, noise]), torch.cat([times, times])
        states = torch.cat([text[c : c + 1].expand(n, -1, -1) for c in range(2)])
        with torch.autocast("cuda", torch.float16, enabled=model.device.type == "cuda"):
            noisy = model.add_noise(latent.expand_as(both), both, timesteps)
            predicted = model.unet(noisy, timesteps, states).sample
            loss = nn.functional.mse_loss(predicted.float(), both, reduction="none")
        kept.append(torch.stack(loss.split(n), dim=1).cpu())
    return torch.cat(kept).half().numpy()


def official(bench: Bench) -> Figures:
    n, cells = bench.sizes.official_draws, bench.sizes.cells
    model = converted(bench.base, torch.float16) if bench.device.type == "cuda" else bench.base
    latent, text = latents_of(1, cells).to(bench.device), text_states(model, 2)
    t, eps = torch.randint(100, 700, (n,), device=bench.device), torch.randn((n, 4, cells, cells), device=bench.device)
    took, _, peak = seconds(partial(official_losses, model, latent, text, t, eps), bench.sizes.repeats)
    return bench.figures(2 * n, took, peak, bench.unet_tflop, 2 * n) | {"batch": 20}


def official_features(bench: Bench) -> Figures:
    """Of one patch: its image is encoded 8 times, and 8 noises pass the UNet, which is left after up-block 1."""
    model, ensemble, cells = converted(bench.base, torch.float32), 8, bench.sizes.cells
    image = torch.rand((1, 3, 8 * cells, 8 * cells), generator=torch.Generator().manual_seed(3)).to(bench.device)
    noise, text = ensemble_noise(0, ensemble, (4, cells, cells)), text_states(model, 1)

    def work() -> None:
        latents = model.encode((image * 2 - 1).expand(ensemble, -1, -1, -1))
        dift(model, latents[:1].float(), text, 161, noise, 1, ensemble)

    took, _, peak = seconds(work, bench.sizes.repeats)
    return bench.figures(ensemble, took, peak, bench.dift_tflop + bench.vae_tflop, ensemble) | {"batch": ensemble}


def features(bench: Bench, batch: int) -> Figures:
    images, cells, ensemble = bench.sizes.dift_images, bench.sizes.cells, 8
    model = converted(bench.base, bench.half, torch.channels_last)
    latents, noise = latents_of(images, cells), ensemble_noise(0, ensemble, (4, cells, cells))
    text = text_states(model, 1).expand(images, -1, -1)
    took, _, peak = seconds(partial(dift, model, latents, text, 161, noise, 1, batch), bench.sizes.repeats)
    return bench.figures(images * ensemble, took, peak, bench.dift_tflop, ensemble) | {"batch": batch}


def encoding(bench: Bench, batch: int) -> Figures:
    model = replace(bench.base, vae=copy.deepcopy(bench.base.vae).to(bench.half))
    side = 8 * bench.sizes.cells
    images = torch.rand((batch, 3, side, side), generator=torch.Generator().manual_seed(3)).to(bench.device) * 2 - 1
    took, _, peak = seconds(partial(model.encode, images), bench.sizes.repeats)
    return bench.figures(batch, took, peak, bench.vae_tflop, 1) | {"batch": batch}


def precision(bench: Bench, dtype: torch.dtype) -> Figures:
    """Relative error of maps and of window means against float32: rms of the difference over rms of the reference."""
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # on by default: the reference would be as coarse as a half type
    reference = scorer(bench, converted(bench.base, torch.float32), 4, 8)().map.double()
    torch.backends.cudnn.allow_tf32 = tf32
    difference = scorer(bench, converted(bench.base, dtype), 4, 8)().map.double() - reference
    cells = bench.sizes.cells
    windows = torch.from_numpy(centred_matrix(cells, 8 * cells, 64).copy())
    return {
        "map_error": float(difference.norm() / reference.norm()),
        "window_error": float((windows @ difference @ windows.T).norm() / (windows @ reference @ windows.T).norm()),
    }


def finetuning(bench: Bench, batch: int, memory_format: torch.memory_format, compiled: bool = False) -> Figures:
    """Steps as the finetuning stage makes them; reading the latents is not in them."""
    model = converted(bench.base, torch.float32, memory_format)
    text = text_states(model, 2).clone()
    wanted = SimpleNamespace(
        batch_size=batch, learning_rate=1e-4, weight_decay=0.01, max_grad_norm=1.0, warmup_steps=0, decay_steps=0,
        t_min=0.0, t_max=1.0, min_snr_gamma=None, label_dropout=0.1, crop=None, ema_decay=0.9999, multi_label="one",
        prompt_columns={}, lora_rank=None, gradient_checkpointing=False, compile=compiled,
    )  # fmt: skip
    spread = accelerator(bfloat16=bench.device.type == "cuda")
    training = Training(model, wanted, 0, 10**6, lambda words: text[int(words is not None)], spread)
    latents = latents_of(batch, bench.sizes.cells).half().numpy()
    share, steps = [(i, LabelledImage(str(i), latent, ["label"])) for i, latent in enumerate(latents)], count()

    def work() -> None:
        step = next(steps)
        training.step(step, training.examples(step, share))  # a run makes the examples meanwhile

    took, _, peak = seconds(work, 2 * bench.sizes.repeats)
    return bench.figures(batch, took, peak, 3 * bench.unet_tflop, 1) | {"batch": batch, "steps_per_s": 1 / took}


def procedure(bench: Bench, batch: int) -> Figures:
    """Steps of diffusers' script with bfloat16 and an average; reading and cropping images is not in them."""
    from diffusers.training_utils import EMAModel

    with bench.device:
        unet = build_unet(bench.sizes).train()
    vae, text_encoder = (copy.deepcopy(part).to(bench.half) for part in (bench.base.vae, bench.base.text_encoder))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, weight_decay=1e-2)
    average, side = EMAModel(unet.parameters(), decay=0.9999), 8 * bench.sizes.cells
    pixels, ids = torch.rand((batch, 3, side, side)) * 2 - 1, torch.randint(0, 49_000, (batch, 77))

    def work() -> None:
        with torch.no_grad():
            latents = vae.encode(pixels.to(bench.device, bench.half)).latent_dist.sample() * 0.18215
            text = text_encoder(ids.to(bench.device))[0]
        eps, t = torch.randn_like(latents), torch.randint(0, 1000, (batch,), device=bench.device)
        noisy = bench.base.add_noise(latents.float(), eps.float(), t)
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.half == torch.bfloat16):
            predicted = unet(noisy, t, text, return_dict=False)[0]
        nn.functional.mse_loss(predicted.float(), eps.float()).backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(unet.parameters())

    took, _, peak = seconds(work, 2 * bench.sizes.repeats)
    return bench.figures(batch, took, peak, 3 * bench.unet_tflop, 1) | {"batch": batch, "steps_per_s": 1 / took}


# -------------------------------------------------------------------------------------------------------- the whole


# What a run on a GPU does, whichever its settings: the other rows tell whether another way would be worth having.
SELECTABLE = {
    "scoring": re.compile(r"channels_last, batch"),
    "compile": re.compile(r"default, "),  # typicality.compile
    "finetune": re.compile(r"channels_last, (compiled, )?batch"),  # finetune.compile
}


def ratios(rows: list[Figures]) -> Figures:
    """What the fastest rows that a run can be like say of the whole, where all of them are there."""

    def seconds_of(*groups: str, name: str = "") -> float:
        """An image, nan where nothing was measured."""
        speeds = [r["images_per_s"] for r in rows if r["group"] in groups and name in r["name"] and selectable(r)]
        return 1 / max(speeds) if speeds else math.nan

    encoding, scoring = seconds_of("vae"), seconds_of("scoring", "compile")
    ours = encoding + scoring + seconds_of("dift")
    fresh = scoring * FRESH_DRAWS / DRAWS
    theirs = encoding + seconds_of("official", name="one image") + seconds_of("official", name="one patch")
    found = {
        "end_to_end": theirs / ours,
        "with_fresh_scores": theirs / (ours + fresh),
        "finetuning": seconds_of("procedure") / seconds_of("finetune"),
    }
    return {name: ratio for name, ratio in found.items() if not math.isnan(ratio)}


def selectable(row: Figures) -> bool:
    """Whether the row has a speed, and a run can be like it."""
    way = SELECTABLE.get(row["group"])
    return "images_per_s" in row and (way is None or way.match(row["name"]) is not None)


def faster_ways(rows: list[Figures]) -> list[str]:
    """Of scoring and of finetuning, the fastest row that no setting chooses, if it is faster than all that one does."""
    found = []
    for groups in (("scoring", "compile"), ("finetune",)):
        timed = [r for r in rows if r["group"] in groups and "images_per_s" in r]
        best = max((r["images_per_s"] for r in timed if selectable(r)), default=0.0)
        other = max((r for r in timed if not selectable(r)), key=lambda r: r["images_per_s"], default=None)
        if other and other["images_per_s"] > best > 0:
            more = other["images_per_s"] / best
            found.append(f"{other['group']}, {other['name']}: {more:.2f} times the images/s, but no setting chooses it")
    return found


def measure_all(report: Report, bench: Bench, only: tuple[str, ...]) -> None:
    """Every group asked for, the most wanted first; expected times are those of a quarter of a large GPU's rate."""
    sizes, gpu = bench.sizes, bench.device.type == "cuda"
    report.measure("rate", f"bfloat16 product, side {sizes.matrix}", 5, partial(matrix_rate, bench))
    best = measure_scoring(report, bench) if "scoring" in only else sizes.scoring_batches[-2]
    if "official" in only:
        needs = (sizes.repeats + 1) * 2 * sizes.official_draws * bench.unet_tflop / 100
        report.measure("official", "one image, 10 draws x 2, float16", needs, partial(official, bench))
        report.measure("official", "features of one patch, float32", 10, partial(official_features, bench))
    if "dift" in only:
        report.measure("dift", f"batch {min(best, 64)}", 5, partial(features, bench, min(best, 64)))
    for batch in sizes.vae_batches if "vae" in only else ():
        report.measure("vae", f"encoder, batch {batch}", 5, partial(encoding, bench, batch))
    for dtype in (torch.bfloat16, torch.float16) if "precision" in only else ():
        name = f"{str(dtype).removeprefix('torch.')} against float32"
        report.measure("precision", name, 8, partial(precision, bench, dtype))
    for batch in sizes.finetune_batches if "finetune" in only else ():
        for layout in ("contiguous_format", "channels_last"):
            needs = (2 * sizes.repeats + 1) * batch * 3 * bench.unet_tflop / 100 + 5
            work = partial(finetuning, bench, batch, getattr(torch, layout))
            report.measure("finetune", f"{layout}, batch {batch}", needs, work)
    for batch in sizes.finetune_batches[-2:] if "procedure" in only else ():
        needs = (2 * sizes.repeats + 1) * batch * 4 * bench.unet_tflop / 100 + 5
        report.measure("procedure", f"batch {batch}", needs, partial(procedure, bench, batch))
    for batch in sizes.finetune_batches[-1:] if "finetune" in only and gpu else ():
        work = partial(finetuning, bench, batch, torch.channels_last, compiled=True)
        report.measure("finetune", f"channels_last, compiled, batch {batch}", 60, work)
    for mode, needs in COMPILE_MODES.items() if "compile" in only and gpu else ():  # minutes on a CPU
        work = partial(scoring_compiled, bench, best, mode)
        report.measure("compile", f"{mode}, batch {best}", needs, work)


def measure_scoring(report: Report, bench: Bench) -> int:
    """The fastest batch size of those that fit."""
    sizes, speeds = bench.sizes, {}
    model = converted(bench.base, bench.half)

    def needs(batch: int) -> float:
        return (sizes.repeats + 1) * sizes.timed_draws * batch * bench.unet_tflop / 200

    for batch in sizes.scoring_batches:
        found = report.measure("scoring", f"eager, batch {batch}", needs(batch), partial(scoring, bench, model, batch))
        speeds[batch] = found["passes_per_s"] if found else 0.0
    best = max(speeds, key=lambda batch: speeds[batch])
    model = converted(bench.base, bench.half, torch.channels_last)
    report.measure("scoring", f"channels_last, batch {best}", needs(best), partial(scoring, bench, model, best))
    work = partial(scoring_by_trial, bench, model, best)
    report.measure("scoring", f"channels_last, cuDNN by trial, batch {best}", needs(best) + 10, work)
    return best


def versions() -> dict[str, str]:
    import diffusers
    import transformers

    import diffmine

    return {m.__name__: str(m.__version__) for m in (diffmine, torch, diffusers, transformers, np)}


def record(out: Path, **figures: Any) -> None:
    """Write what was measured, with the command, the machine and the versions."""
    out.parent.mkdir(parents=True, exist_ok=True)
    body = {"command": " ".join(sys.argv), "machine": machine(), "versions": versions(), **figures}
    out.write_text(json.dumps(body, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small UNet and few draws: checks the code")
    parser.add_argument("--budget", type=float, default=330, help="seconds that measurements may take")
    parser.add_argument("--only", type=lambda s: tuple(s.split(",")), default=GROUPS, help=f"of {','.join(GROUPS)}")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.json"))
    args = parser.parse_args()
    if unknown := set(args.only) - set(GROUPS):
        parser.error(f"--only: got {', '.join(sorted(unknown))}; allowed: {', '.join(GROUPS)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.tiny:
        parser.error("no CUDA device; --tiny checks the code on a CPU")
    sizes = TINY if args.tiny else FULL
    body = {"command": " ".join(sys.argv), "tiny": args.tiny, "machine": machine(), "versions": versions()}
    report = Report(args.out, args.budget, body)
    bench = Bench(sizes, build(sizes, device), *operations(sizes))
    report.body |= {"unet_tflop": bench.unet_tflop, "dift_tflop": bench.dift_tflop, "vae_tflop": bench.vae_tflop}
    report.body |= {"scoring_draws": DRAWS, "official_draws": sizes.official_draws, "rows": []}
    print(heading())
    measure_all(report, bench, args.only)
    report.body |= {"ratios": ratios(report.body["rows"]), "faster_ways": faster_ways(report.body["rows"])}
    report.write()
    print(f"\n{body['machine']['device']}; {bench.unet_tflop:.4g} TFLOP a UNet pass; JSON in {args.out}")
    print(f"images/s: scoring with {DRAWS} draws x 2 conditions, official with {sizes.official_draws} x 2")
    for name, ratio in report.body["ratios"].items():
        print(f"{name.replace('_', ' ')}: {ratio:.2f} times the images/s")
    for way in report.body["faster_ways"]:
        print(way)
    if failed := [row["name"] for row in report.body["rows"] if "Error" in row.get("note", "")]:
        sys.exit(f"failed: {'; '.join(failed)}")  # out of memory, and out of time, are findings


if __name__ == "__main__":
    main()

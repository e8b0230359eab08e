"""A local folder in diffusers' layout -> one object that encodes images, embeds text, predicts noise and samples.

The only module that knows diffusers' and transformers' classes. Both take seconds to import, so this happens where a
model is opened: a process that only handles it, or reads for it, starts at once.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from diffmine.errors import InputError

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

COMPILED_SHAPES = 64  # of a compiled UNet's inputs, at most; further ones run eagerly
_WEIGHTS = re.compile(r"(diffusion_pytorch_)?model(-\d+-of-\d+)?\.safetensors")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COMPONENTS = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "scheduler": None,  # any: only its noise schedule is used
}


@dataclass
class Model:
    """Text-conditional latent diffusion model.

    Shapes: images [B, 3, H, W] in [-1, 1]; latents [B, C, h, w] scaled to about unit variance; text [B, L, D].
    """

    vae: Any  # AutoencoderKL (diffusers' classes hide their attributes from type checkers)
    unet: Any  # UNet2DConditionModel
    text_encoder: "CLIPTextModel"
    tokenizer: "CLIPTokenizer"
    alpha_bar: Tensor  # float32 [1000], cumulative product of the noise schedule
    scheduler_config: dict
    v_prediction: bool
    device: torch.device
    dtype: torch.dtype

    @property
    def cell(self) -> int:
        """Pixels of a latent cell's side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def channels(self) -> int:
        return int(self.unet.config.in_channels)

    def encode(self, images: Tensor) -> Tensor:
        """Posterior means, scaled: float [B, 3, H, W] in [-1, 1] -> float32 [B, C, H/cell, W/cell]."""
        return self.posterior(images)[0]

    @torch.inference_mode()
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of what the VAE says of each cell, scaled alike; shapes as of `encode`."""
        found = self.vae.encode(images.to(self.device, self.vae.dtype)).latent_dist
        shift, scale = self.vae.config.get("shift_factor") or 0.0, self.vae.config.scaling_factor
        return (found.mean.float() - shift) * scale, found.std.float() * scale  # in float32, as a half type rounds

    @torch.inference_mode()
    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Text states: K prompts -> [K, L, D] in the model's dtype."""
        ids = torch.from_numpy(token_ids(self.tokenizer, prompts)).to(self.device)
        return self.text_encoder(ids).last_hidden_state.to(self.dtype)

    def predict_eps(self, noisy: Tensor, t: Tensor, text: Tensor, text_of: Tensor | None = None) -> Tensor:
        """Predicted noise: [B, C, h, w], int [B], [B, L, D] -> float32 [B, C, h, w]; v-prediction is converted.

        With `text_of`, int [B], `text` is [K, L, D]: the distinct texts, whose keys and values are computed once each.
        """
        of = None if text_of is None else {"text_of": text_of}
        predicted = self.unet(noisy.to(self.dtype), t, text, cross_attention_kwargs=of).sample.float()
        if not self.v_prediction:
            return predicted
        a = self.alpha_bar[t].view(-1, 1, 1, 1)
        return a.sqrt() * predicted + (1 - a).sqrt() * noisy.float()

    def add_noise(self, latents: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = sqrt(alpha_bar_t) x + sqrt(1 - alpha_bar_t) eps (Ho et al. 2020, eq. 4)."""
        a = self.alpha_bar[t].view(-1, 1, 1, 1)
        return a.sqrt() * latents + (1 - a).sqrt() * eps

    def training_target(self, latents: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the UNet learns to predict: eps, or v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x."""
        if not self.v_prediction:
            return eps
        a = self.alpha_bar[t].view(-1, 1, 1, 1)
        return a.sqrt() * eps - (1 - a).sqrt() * latents

    def sample(
        self, prompt: str, null_prompt: str, seeds: Sequence[int], height: int, width: int, steps: int = 20
    ) -> np.ndarray:
        """Images from noise, by DDIM with guidance 5: uint8 [len(seeds), height, width, 3]; sizes in pixels."""
        pipe = self._pipeline()
        pipe.set_progress_bar_config(disable=True)
        noise = [torch.Generator().manual_seed(seed) for seed in seeds]
        images = pipe(
            [prompt] * len(seeds), height, width, num_inference_steps=steps, guidance_scale=5.0,
            negative_prompt=[null_prompt] * len(seeds), generator=noise, output_type="np",
        ).images  # fmt: skip
        return np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8)

    def adapt(self, rank: int, seed: int) -> None:
        """Add trainable low-rank adapters to the projections of the UNet's attention; its weights are frozen.

        W x + B A x with A [rank, in] drawn from `seed` and B [out, rank] zero (Hu et al. 2022, LoRA): the function is
        unchanged at first.
        """
        from peft import LoraConfig

        freeze(self.unet)
        with torch.random.fork_rng(devices=[]):  # peft draws from torch's global generator
            torch.manual_seed(seed)
            self.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(_PROJECTIONS)))
        self.unet.to(self.device)

    def merge(self) -> None:
        """Add the adapters to the weights and remove them: an ordinary UNet again."""
        self.unet.fuse_lora()
        self.unet.unload_lora()

    def save(self, folder: Path) -> None:
        """Write a complete pipeline that `StableDiffusionPipeline.from_pretrained` opens; safetensors."""
        for part in (self.vae, self.unet):
            part.register_to_config(_name_or_path="")  # a path of this machine
        self._pipeline().save_pretrained(folder, safe_serialization=True)

    def _pipeline(self) -> Any:
        from diffusers import DDIMScheduler, StableDiffusionPipeline

        return StableDiffusionPipeline(
            vae=self.vae, text_encoder=self.text_encoder, tokenizer=self.tokenizer, unet=self.unet,
            scheduler=DDIMScheduler.from_config(self.scheduler_config, clip_sample=False), safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip


def load(folder: Path, dtype: str = "float32", device: str = "cpu", text_encoder: Path | None = None) -> Model:
    """Open a pipeline folder.

    Args:
        folder: diffusers' layout with `model_index.json`.
        dtype: of the UNet, the VAE and the text encoder. With float32 on a GPU, TF32 is turned off for the process.
        text_encoder: folder with a CLIP text model and tokenizer to use instead of the pipeline's own.

    Raises:
        InputError: a component is missing, is of a class that diffmine cannot run, or has no safetensors weights.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    inspect(folder)
    _quieten()
    torch_dtype = DTYPES[dtype]
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    text_folder = text_encoder or folder / "text_encoder"
    options = {"torch_dtype": torch_dtype, "use_safetensors": True}
    vae = AutoencoderKL.from_pretrained(folder / "vae", **options)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", **options)
    share_texts(unet)
    encoder = CLIPTextModel.from_pretrained(text_folder, dtype=torch_dtype, use_safetensors=True)
    tokenizer = CLIPTokenizer.from_pretrained(text_encoder or folder / "tokenizer")
    if encoder.config.hidden_size != unet.config.cross_attention_dim:
        raise InputError(
            f"text encoder {text_folder}: its states have {encoder.config.hidden_size} numbers, the UNet of {folder} "
            f"takes {unet.config.cross_attention_dim}; choose a text encoder of that width"
        )
    for part in (vae, unet, encoder):
        freeze(part).to(device)
    if device.startswith("cuda"):
        unet.to(memory_format=torch.channels_last)  # what cuDNN's convolutions want
        if dtype == "float32":
            torch.backends.cudnn.allow_tf32 = False  # else its convolutions keep 10 bits of a number
    return Model(
        vae, unet, encoder, tokenizer, _alpha_bar(scheduler).to(device), scheduler,
        scheduler.get("prediction_type", "epsilon") == "v_prediction", torch.device(device), torch_dtype,
    )  # fmt: skip


_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


class _Attention:
    """Fused attention of diffusers' transformer blocks, whose samples may share texts."""

    def __call__(
        self,
        attn: Any,  # diffusers' Attention: the projections
        hidden_states: Tensor,  # [B, N, D]
        encoder_hidden_states: Tensor | None = None,  # [B or K, L, D]; None: self-attention
        attention_mask: None = None,
        text_of: Tensor | None = None,  # int64 [B], index into `encoder_hidden_states`
    ) -> Tensor:
        of_itself = encoder_hidden_states is None
        states = hidden_states if of_itself else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(states), attn.to_v(states)
        if text_of is not None and not of_itself:
            k, v = k[text_of], v[text_of]
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))  # [B, heads, N or L, d]
        mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](mixed))


def share_texts(unet: Any) -> None:
    """Let samples of a diffusers UNet share texts, as `Model.predict_eps` does."""
    unet.set_attn_processor({
        name: _Attention() if ".transformer_blocks." in name else own for name, own in unet.attn_processors.items()
    })  # fmt: skip


def freeze(module: Any) -> Any:
    """The module in evaluation mode, without gradients."""
    return module.eval().requires_grad_(False)


def weight_files(folder: Path, part: str) -> list[Path]:
    """The files that `load` opens for a part of a pipeline: neither variants (fp16, non-EMA) nor pickled ones."""
    return [file for file in (folder / part).iterdir() if _WEIGHTS.fullmatch(file.name)]


def inspect(folder: Path) -> None:
    """Refuse by name, before any work, what `load` could not run. Reads JSON files only.

    Raises:
        InputError
    """
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise InputError(f"model {folder}: no model_index.json; a folder in diffusers' layout is needed")
    index = json.loads(index_file.read_text())
    named = f"model {folder} ({index.get('_class_name')})"
    for name, classes in COMPONENTS.items():
        _, found = index.get(name) or (None, None)
        if found is None or not (folder / name).is_dir():
            raise InputError(f"{named}: component {name!r} is missing")
        if classes and found not in classes:
            raise InputError(f"{named}: {name} is a {found}, diffmine runs {' or '.join(classes)}")
    for extra in ("text_encoder_2", "transformer", "image_encoder", "unet_2"):
        if (index.get(extra) or (None, None))[1] is not None:
            raise InputError(f"{named}: {extra} is not supported; use a Stable Diffusion 1.x or 2.x model")
    for name in ("unet", "vae", "text_encoder"):
        if not weight_files(folder, name):
            raise InputError(
                f"{named}: {name} has no .safetensors weights of the usual name; pickled weights, and variants such as "
                "fp16, are not opened"
            )
    unet = json.loads((folder / "unet" / "config.json").read_text())
    vae = json.loads((folder / "vae" / "config.json").read_text())
    if unet.get("in_channels") != vae.get("latent_channels"):
        raise InputError(
            f"{named}: the UNet takes {unet.get('in_channels')} channels, the VAE makes "
            f"{vae.get('latent_channels')}; inpainting and depth models are not supported"
        )
    for key in ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type"):
        if unet.get(key) is not None:
            raise InputError(
                f"model {folder}: the UNet wants {key}={unet[key]!r} beside the text, which diffmine does not give"
            )
    kind = json.loads((folder / "scheduler" / "scheduler_config.json").read_text()).get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise InputError(f"{named}: prediction_type is {kind!r}; allowed: 'epsilon', 'v_prediction'")


def _quieten() -> None:
    """Progress bars and load reports are noise in a batch job."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    for log in (of_diffusers, of_transformers):
        log.disable_progress_bar()
        log.set_verbosity_error()


def open_tokenizer(folder: Path) -> "CLIPTokenizer":
    """Tokenizer of a pipeline folder, or of a folder with a text encoder."""
    from transformers import CLIPTokenizer

    inner = folder / "tokenizer"
    return CLIPTokenizer.from_pretrained(inner if inner.is_dir() else folder)


def token_ids(tokenizer: "CLIPTokenizer", prompts: Sequence[str]) -> np.ndarray:
    """Padded and cut token ids, int64 [K, L]."""
    encoded = tokenizer(list(prompts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True)
    return np.asarray(encoded["input_ids"], dtype=np.int64)


def prompt_lengths(tokenizer: "CLIPTokenizer", prompts: Sequence[str]) -> list[int]:
    """Number of tokens of each prompt before cutting, start and end included."""
    return [len(ids) for ids in tokenizer(list(prompts), truncation=False, verbose=False)["input_ids"]]


def _alpha_bar(scheduler: dict) -> Tensor:
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_config(scheduler).alphas_cumprod.float()


def cell_size(folder: Path) -> int:
    """Pixels of a latent cell's side, from the VAE's config."""
    return int(2 ** (len(json.loads((folder / "vae" / "config.json").read_text())["block_out_channels"]) - 1))


def unet_stride(folder: Path) -> int:
    """Latent cells to a side of one cell of the UNet's deepest level, from its config."""
    return int(2 ** (len(json.loads((folder / "unet" / "config.json").read_text())["block_out_channels"]) - 1))

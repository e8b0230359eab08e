"""nothing -> diffmine/models/tiny: the small base model that lets a whole run fit on two CPU cores.

    python scripts/make_tiny_base.py            # about 35 minutes on 2 cores

A latent diffusion model in diffusers' layout: AutoencoderKL (8 x down, 8 latent channels), a UNet with cross-attention
below its top resolution, and a CLIP text encoder with its own byte-level tokenizer. It is trained on *unlabelled* plain
street scenes (no typical element in any of them) under prompts that say nothing about the picture, so that finetuning
has something to learn, as with the real thing. The autoencoder also sees collages of random shapes, so that it can
encode pictures that the scenes do not contain. The text encoder keeps random weights:
it only has to tell prompts apart.
"""

import argparse
import json
import os
import pydoc_data.topics
import re
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from PIL import Image, ImageDraw, ImageFilter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffmine.data.toytown import SIZE, plain_scene
from diffmine.randomness import generator

SEED = 20240801
VOCABULARY = 1024
TEXT_WIDTH = 64


def collage(rng: np.random.Generator) -> np.ndarray:
    """Random shapes on a gradient, uint8 [128, 128, 3]."""
    corners = rng.uniform(0, 255, (2, 2, 3)).astype(np.uint8)
    image = Image.fromarray(corners).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(8, 60))):
        x, y = rng.uniform(-10, SIZE, 2)
        w, h = rng.uniform(2, 45, 2)
        fill = tuple(int(v) for v in rng.uniform(0, 255, 3))
        kind = rng.integers(4)
        if kind == 0:
            draw.rectangle([x, y, x + w, y + h], fill=fill)
        elif kind == 1:
            draw.ellipse([x, y, x + w, y + h], fill=fill)
        elif kind == 2:
            draw.polygon([(x + w * a, y + h * b) for a, b in rng.uniform(0, 1, (4, 2))], fill=fill)
        else:
            draw.line([x, y, x + w, y + h * rng.choice([-1, 1])], fill=fill, width=int(rng.integers(1, 5)))
    image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 1.2))))
    pixels = np.asarray(image, dtype=np.float64) + rng.normal(0, rng.uniform(0, 8), (SIZE, SIZE, 3))
    return np.clip(pixels, 0, 255).astype(np.uint8)


def to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """Byte-level BPE with CLIP's special tokens, merges learned from Python's own documentation."""
    tokenizer = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(r" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2 - len(bytes_), initial_alphabet=bytes_, end_of_word_suffix="</w>", show_progress=False
    )
    words = re.findall(r"[a-z]+", " ".join(pydoc_data.topics.topics.values()).lower())
    tokenizer.train_from_iterator([" ".join(words)], trainer)
    learned = json.loads(tokenizer.to_str())["model"]["merges"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in learned]
    vocabulary = [*bytes_, *(b + "</w>" for b in bytes_), *("".join(m) for m in merges)]
    vocabulary = list(dict.fromkeys(vocabulary)) + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Random weights, large enough that every token leaves a trace in the states behind it."""
    torch.manual_seed(SEED)
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=77, projection_dim=TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    for name, parameter in encoder.named_parameters():
        if "token_embedding" in name:
            torch.nn.init.normal_(parameter, std=1.0)
        elif "position_embedding" in name:
            torch.nn.init.normal_(parameter, std=0.3)
        elif parameter.ndim == 2:
            torch.nn.init.orthogonal_(parameter)
    return encoder.eval()


def train_vae(steps: int, log: dict) -> AutoencoderKL:
    torch.manual_seed(SEED)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64), layers_per_block=1, latent_channels=8, norm_num_groups=8, sample_size=SIZE,
        mid_block_add_attention=False,
    )  # fmt: skip
    pool = np.stack(
        [plain_scene(SEED, i) for i in range(3000)] + [collage(generator(SEED, "collage", i)) for i in range(1000)]
    )
    held_out = to_tensor(np.stack([plain_scene(SEED + 1, i) for i in range(64)]))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.05, final_div_factor=100)
    ema = EMAModel(vae.parameters(), decay=0.998)
    rng, start = generator(SEED, "vae"), time.monotonic()
    for step in range(steps):
        picks, corners = rng.integers(len(pool), size=4), rng.integers(0, SIZE - 64 + 1, size=(4, 2))
        crops = [pool[i, y : y + 64, x : x + 64] for i, (y, x) in zip(picks, corners, strict=True)]
        batch = to_tensor(np.stack([c[:, ::-1] if rng.random() < 0.5 else c for c in crops]))
        posterior = vae.encode(batch).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        loss = F.smooth_l1_loss(decoded, batch) + 1e-5 * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.step(vae.parameters())
        if step % 500 == 499:
            with torch.no_grad():
                mse = F.mse_loss(vae.decode(vae.encode(held_out).latent_dist.mean).sample.clamp(-1, 1), held_out)
            log["vae"] = {"step": step + 1, "psnr_db": round(float(10 * torch.log10(4 / mse)), 2)}
            print(
                f"vae {step + 1}/{steps} psnr {log['vae']['psnr_db']} dB {time.monotonic() - start:.0f} s",
                flush=True,
            )
    ema.copy_to(vae.parameters())
    with torch.no_grad():
        means = vae.encode(held_out).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / float(means.std()), 5))
    return vae.eval()


def make_unet() -> UNet2DConditionModel:
    torch.manual_seed(SEED)
    return UNet2DConditionModel(
        sample_size=SIZE // 8, in_channels=8, out_channels=8, layers_per_block=1, block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH, attention_head_dim=4, norm_num_groups=16,
    )  # fmt: skip


@torch.no_grad()
def encode_scenes(vae: AutoencoderKL, count: int) -> Tensor:
    """Scaled latents of plain scenes, [count, 8, 16, 16]."""
    chunks = []
    for start in range(0, count, 50):
        scenes = np.stack([plain_scene(SEED, 10_000 + i) for i in range(start, start + 50)])
        chunks.append(vae.encode(to_tensor(scenes)).latent_dist.mean)
    return torch.cat(chunks) * vae.config.scaling_factor


@torch.no_grad()
def embed_words(encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> Tensor:
    """Text states of prompts that say nothing: "An image.", "", and made-up words, [64, 77, D]."""
    words = ["".join(chr(97 + k) for k in generator(SEED, "word", i).integers(0, 26, 6)) for i in range(62)]
    prompts = ["An image.", "", *(f"An image of {word}." for word in words)]
    ids = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return encoder(ids).last_hidden_state


def train_unet(
    steps: int, vae: AutoencoderKL, encoder: CLIPTextModel, tokenizer: CLIPTokenizer, log: dict
) -> UNet2DConditionModel:
    unet, scheduler = make_unet(), make_scheduler()
    latents = encode_scenes(vae, 4000)
    texts = embed_words(encoder, tokenizer)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.05, final_div_factor=100)
    ema = EMAModel(unet.parameters(), decay=0.998)
    rng, start, recent = torch.Generator().manual_seed(SEED), time.monotonic(), []
    for step in range(steps):
        x = latents[torch.randint(len(latents), (32,), generator=rng)]
        text = texts[
            torch.where(torch.rand(32, generator=rng) < 0.5, 0, torch.randint(len(texts), (32,), generator=rng))
        ]
        t = torch.randint(1000, (32,), generator=rng)
        eps = torch.randn(x.shape, generator=rng)
        loss = F.mse_loss(unet(scheduler.add_noise(x, eps, t), t, text).sample, eps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.step(unet.parameters())
        recent = [*recent[-199:], float(loss.detach())]
        if step % 200 == 199:
            log["unet"] = {"step": step + 1, "loss": round(float(np.mean(recent)), 4)}
            print(f"unet {step + 1}/{steps} loss {log['unet']['loss']} {time.monotonic() - start:.0f} s", flush=True)
    ema.copy_to(unet.parameters())
    return unet.eval()


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.5's schedule."""
    return DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        clip_sample=False, set_alpha_to_one=False, prediction_type="epsilon",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "diffmine" / "models" / "tiny")
    parser.add_argument("--vae", type=Path, help="take the autoencoder from this folder instead of training one")
    parser.add_argument("--vae-steps", type=int, default=5_000)
    parser.add_argument("--unet-steps", type=int, default=3_000)
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    log: dict = {"seed": SEED}
    tokenizer = make_tokenizer(args.out / "tokenizer")
    encoder = make_text_encoder(tokenizer)
    vae = AutoencoderKL.from_pretrained(args.vae) if args.vae else train_vae(args.vae_steps, log)
    vae.save_pretrained(args.out / "vae")
    unet = train_unet(args.unet_steps, vae, encoder, tokenizer, log)
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=encoder, tokenizer=tokenizer, unet=unet, scheduler=make_scheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.to(dtype=torch.float16).save_pretrained(args.out)
    print(json.dumps(log))


if __name__ == "__main__":
    main()

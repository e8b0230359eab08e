"""Images a second of finetuning: this package's loop beside the procedure of diffusers' train_text_to_image.py.

    python benchmarks/finetune.py --run runs/toytown --out benchmarks/results/finetune.json

Both sides train the run's base model on the run's images, with the same batch, precision, threads and length, in one
process, a few steps of one after a few of the other. The run folder is only read.

- *procedure* (diffusers' text-to-image example, plain PyTorch): a DataLoader opens each image, resizes and crops it,
  flips half of them and normalizes; every step runs the VAE (a sample of its posterior times the scaling factor) and
  the text encoder on the batch, adds noise by the scheduler, takes the mean squared error, clips, and steps AdamW as
  torch sets it up, a rate scheduler and the moving average of diffusers.
- *ours*: `diffmine.diffusion.training`, as `diffmine mine` runs it: latents encoded once and kept, text states once per
  label, fused AdamW, the moving average over all tensors at once.

What ours does once, before the first step, is in the table as seconds an image: at the paper's length of training each
image is seen hundreds of times. The third row has the procedure's own steps on our stored latents and texts: what is
left then is the loop. Losses are printed to show that both train; they are not of the same draws.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from gpu import record
from PIL import Image
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPTextModel, CLIPTokenizer

from diffmine.config import Finetune
from diffmine.diffusion.finetune import LabelledImage, windows
from diffmine.diffusion.model import load
from diffmine.diffusion.parallel import accelerator
from diffmine.diffusion.training import Training, text_states
from diffmine.prompts import prompt
from diffmine.run import Run, fetch_model

Step = Callable[[], float]


@dataclass(frozen=True)
class Work:
    """What both sides train on."""

    base: Path
    files: list[str]
    latents: list[np.ndarray]  # float16 [C, h, w], one shape
    labels: list[str]
    side: int  # pixels
    template: str
    null: str
    wanted: Finetune
    bfloat16: bool


def read(args: argparse.Namespace) -> Work:
    """The run's images of the most common shape."""
    run = Run(args.run)
    config = yaml.safe_load(run.read("run.yaml"))
    manifest = {row["image_id"]: row for row in run.table("manifest", ["image_id", "uri", "labels"]).to_pylist()}
    rows = run.table("latents", ["image_id", "h", "w", "latent"]).to_pylist()
    rows = [row for row in rows if (row["h"], row["w"]) == (rows[0]["h"], rows[0]["w"])]
    own = [manifest[row["image_id"]] for row in rows]
    return Work(
        fetch_model(config["model"]["base"]), [row["uri"] for row in own],
        [np.asarray(row["latent"], np.float16).reshape(-1, row["h"], row["w"]) for row in rows],
        [row["labels"][0] for row in own], config["dataset"]["image"]["short_side"],
        config["prompt"]["template"], config["prompt"]["null_prompt"],
        Finetune(**{**config["finetune"], "batch_size": args.batch, "warmup_steps": 0, "decay_steps": 0}),
        torch.cuda.is_available() and not args.float32,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- procedure


class Pixels(Dataset):
    """Image files -> pixels in [-1, 1] and token ids, as the script's transforms make them."""

    def __init__(self, work: Work, tokenizer: CLIPTokenizer) -> None:
        self.work, self.tokenizer = work, tokenizer

    def __len__(self) -> int:
        return len(self.work.files)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        side = self.work.side
        picture = Image.open(self.work.files[i].removeprefix("file://")).convert("RGB")
        scale = side / min(picture.size)
        size = max(side, round(picture.width * scale)), max(side, round(picture.height * scale))
        picture = picture.resize(size, Image.Resampling.BILINEAR)
        x, y = (int(torch.randint(extent - side + 1, ())) for extent in size)
        array = np.asarray(picture.crop((x, y, x + side, y + side)), np.float32)
        pixels = torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1
        if torch.rand(()) < 0.5:
            pixels = pixels.flip(2)
        text = prompt(self.work.labels[i], self.work.template)
        ids = self.tokenizer(
            text, max_length=self.tokenizer.model_max_length, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids[0]
        return {"pixels": pixels, "ids": ids}


def forever(loader: DataLoader) -> Iterator[dict[str, Tensor]]:
    while True:
        yield from loader


def procedure(work: Work, device: torch.device, stored: bool) -> Step:
    """A step of the script; `stored`: with latents and text states that were made before."""
    unet = UNet2DConditionModel.from_pretrained(work.base / "unet").to(device).train()
    vae = AutoencoderKL.from_pretrained(work.base / "vae").to(device).requires_grad_(False)
    text_encoder = CLIPTextModel.from_pretrained(work.base / "text_encoder").to(device).requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(work.base / "tokenizer")
    scheduler = DDPMScheduler.from_pretrained(work.base / "scheduler")
    batch_size = work.wanted.batch_size
    optimizer = torch.optim.AdamW(unet.parameters(), lr=work.wanted.learning_rate, weight_decay=1e-2, eps=1e-8)
    rate = get_scheduler("constant", optimizer)
    average = EMAModel(unet.parameters(), decay=0.9999)
    data = forever(DataLoader(Pixels(work, tokenizer), batch_size, shuffle=True, drop_last=True))
    half = torch.bfloat16 if work.bfloat16 else torch.float32  # of the frozen parts
    vae, text_encoder = vae.to(half), text_encoder.to(half)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=work.bfloat16)
    ids = tokenizer([prompt(label, work.template) for label in sorted(set(work.labels))], padding="max_length",
                    truncation=True, return_tensors="pt").input_ids.to(device)  # fmt: skip
    texts = dict(zip(sorted(set(work.labels)), text_encoder(ids)[0], strict=True))

    def inputs() -> tuple[Tensor, Tensor]:
        if stored:
            chosen = torch.randperm(len(work.latents))[:batch_size].tolist()
            latents = torch.stack([torch.from_numpy(work.latents[i]) for i in chosen]).to(device).float()
            return latents, torch.stack([texts[work.labels[i]] for i in chosen])
        batch = next(data)
        latents = vae.encode(batch["pixels"].to(device, half)).latent_dist.sample() * vae.config.scaling_factor
        return latents, text_encoder(batch["ids"].to(device))[0]

    def step() -> float:
        latents, text = inputs()
        noise = torch.randn_like(latents)
        t = torch.randint(0, scheduler.config.num_train_timesteps, (batch_size,), device=device)
        target = scheduler.get_velocity(latents, noise, t) if _v(scheduler) else noise
        with autocast:
            predicted = unet(scheduler.add_noise(latents, noise, t), t, text, return_dict=False)[0]
        loss = mse_loss(predicted.float(), target.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        average.step(unet.parameters())
        return loss.item()

    return step


def _v(scheduler: DDPMScheduler) -> bool:
    return bool(scheduler.config.prediction_type == "v_prediction")


# --------------------------------------------------------------------------------------------------------------- ours


def ours(work: Work, device: torch.device) -> Step:
    model = load(work.base, "float32", str(device))
    text, spread = text_states(model, work.template, work.null), accelerator(work.bfloat16)
    training = Training(model, work.wanted, 0, 10**6, text, spread)
    images = [
        LabelledImage(f"{i:06d}", latent, [label])
        for i, (latent, label) in enumerate(zip(work.latents, work.labels, strict=True))
    ]
    shapes = np.array([latent.shape[1:] for latent in work.latents])
    every = windows(0, [shapes], work.wanted.batch_size, len(images))
    order = enumerate(batch for window in every for batch in window.batches)

    def step() -> float:
        number, batch = next(order)
        examples = training.examples(number, [(place, images[i]) for place, i in enumerate(batch)])
        return training.step(number, examples).loss

    return step


def encoding_seconds(work: Work, device: torch.device) -> float:
    """Of an image, by the VAE as the latents stage runs it; decoding left out on neither side of the table."""
    model = load(work.base, "float32", str(device))
    pixels = [Pixels(work, model.tokenizer)[i]["pixels"] for i in range(16)]
    start = time.perf_counter()
    for _ in range(2):
        model.encode(torch.stack(pixels))
    return (time.perf_counter() - start) / 32


def measure(steps: dict[str, Step], rounds: int, length: int, batch: int) -> dict[str, Any]:
    """name -> images a second (median round) and the losses of its first and last round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()  # warm
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            found = [step() for _ in range(length)]
            seconds[name].append(time.perf_counter() - start)
            losses[name].append(statistics.mean(found))
    return {
        name: {
            "images_per_s": batch * length / statistics.median(own),
            "fastest_images_per_s": batch * length / min(own),
            "loss_first_round": losses[name][0], "loss_last_round": losses[name][-1],
        }
        for name, own in seconds.items()
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="run folder with latents")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--length", type=int, default=8, help="steps of a round")
    parser.add_argument("--float32", action="store_true", help="no autocast on a GPU")
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work = read(args)
    steps = {
        "procedure": procedure(work, device, stored=False),
        "ours": ours(work, device),
        "procedure, stored latents": procedure(work, device, stored=True),
    }
    found = measure(steps, args.rounds, args.length, args.batch)
    base = found["procedure"]["images_per_s"]
    print(f"{'':<28}{'images/s':>10}{'ratio':>8}{'loss, first and last round':>30}")
    for name, own in found.items():
        own["ratio"] = own["images_per_s"] / base
        told = f"{own['loss_first_round']:.3f}  {own['loss_last_round']:.3f}"
        print(f"{name:<28}{own['images_per_s']:>10.1f}{own['ratio']:>8.2f}{told:>30}")
    once = encoding_seconds(work, device)
    print(f"encoding an image, once: {once * 1000:.1f} ms")
    if args.out:
        record(args.out, batch=args.batch, threads=torch.get_num_threads(), side=work.side, images=len(work.files),
               encoding_s=once, sides=found)  # fmt: skip


if __name__ == "__main__":
    main()

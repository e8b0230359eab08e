"""A finished run -> typicality and patches as the ECCV 2024 code makes them, beside this package's way.

    OMP_NUM_THREADS=1 python benchmarks/typicality.py --run runs/toytown --out benchmarks/results/typicality.json

Both sides score the same latents with the run's finetuned model, prompts, range of t and threads, in one process. The
run folder is only read. `--draws` should be what benchmarks/draws.py finds to be as exact as the paper's 100.

- *official* (Siglidis et al., ECCV 2024; their published code): one image at a time, 100 independent draws, passes of
  10 draws x 2 conditions (float16 autocast on CUDA, plain float32 on a CPU), every loss kept and stored as float16. To
  choose, the file is read, each of 200 maps is upsampled to pixels and pooled over the patch with stride 1, the pooled
  maps are averaged, a tuple per window goes into a pandas table, which is sorted, and windows are taken greedily from
  it; those that touch an earlier one are refused. Left out, although it runs there for every image: a second table for
  random patches.
- *ours*: a pilot, which counts, finds how T spreads over t; then mirrored draws allocated to it, many images in a pass,
  running sums only; a map and its standard errors, stored as a run stores them; then `patch_map` and `choose`.

Encoding images into latents is in neither side. The table gives wall and processor seconds (the latter do not suffer
from neighbours on the machine), UNet passes (samples) and bytes, then how far the patches agree: "a in b" is the share
of a's patches that one of b's in the same image matches with IoU >= 0.5. "Same losses" are the stored official losses,
averaged before `patch_map` instead of after pooling: nearly 1, or choosing would not be compared like with like. The
official procedure under another seed shows how much agreement its own noise allows.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from gpu import official_losses, record
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from diffmine.diffusion.draws import Draws, Timesteps, allocated, antithetic, independent
from diffmine.diffusion.model import Model, load
from diffmine.diffusion.pilot import Pilot, pilot
from diffmine.diffusion.typicality import Typicality, typicality
from diffmine.mining.patches import centred_matrix, choose, patch_map
from diffmine.prompts import prompt
from diffmine.run import Run, fetch_model, rows_to_table, to_parquet

OFFICIAL_DRAWS = 100
SHARD = 32  # images whose maps are stored in one file
PILOT_BANK = 1  # other draws than those that score
Windows = list[tuple[int, int]]  # (y, x) of the chosen ones


@dataclass(frozen=True)
class Images:
    """What both sides score."""

    model: Model
    latents: Tensor  # float32 [B, C, h, w]
    labels: list[str]  # one of each image's own
    texts: dict[str, Tensor]  # label -> [L, D]
    null: Tensor  # [L, D]
    t_range: tuple[float, float]
    size: int  # of a patch
    per_image: int
    batch_size: int

    @property
    def shape(self) -> tuple[int, int, int]:
        c, h, w = self.latents.shape[1:]
        return c, h, w

    @property
    def pixels(self) -> tuple[int, int]:
        return self.shape[1] * self.model.cell, self.shape[2] * self.model.cell

    @property
    def windows(self) -> tuple[Tensor, Tensor]:
        """Weights [h, h] and [w, w] of the mean over a patch centred on each cell."""
        (_, h, w), (height, width) = self.shape, self.pixels
        rows, columns = centred_matrix(h, height, self.size), centred_matrix(w, width, self.size)
        return torch.from_numpy(rows.copy()), torch.from_numpy(columns.copy())


def spaced(length: int, number: int) -> list[int]:
    """Up to `number` indices, evenly spaced."""
    number = min(number, length)
    return [i * length // number for i in range(number)]


def read_images(args: argparse.Namespace, dtype: str | None = None) -> Images:
    """`--our-images` images, evenly spaced over the run's, all of the first one's shape."""
    run = Run(args.run)
    config = yaml.safe_load(run.read("run.yaml"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load(fetch_model(f"{run.uri}/model"), dtype or config["model"]["dtype"], device)
    manifest = run.table("manifest", ["image_id", "labels"]).to_pylist()
    labels = {row["image_id"]: row["labels"][0] for row in manifest}
    rows = run.table("latents", ["image_id", "h", "w", "latent"]).to_pylist()
    rows = sorted((r for r in rows if (r["h"], r["w"]) == (rows[0]["h"], rows[0]["w"])), key=lambda r: r["image_id"])
    rows = [rows[i] for i in spaced(len(rows), args.our_images)]
    latents = [np.asarray(r["latent"], np.float32).reshape(-1, r["h"], r["w"]) for r in rows]
    own = [labels[r["image_id"]] for r in rows]
    template, null = config["prompt"]["template"], config["prompt"]["null_prompt"]
    return Images(
        model, torch.from_numpy(np.stack(latents)), own,
        {label: model.embed([prompt(label, template)])[0] for label in sorted(set(own))}, model.embed([null])[0],
        (config["typicality"]["t_min"], config["typicality"]["t_max"]), args.size, args.per_image, args.batch_size,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- official


def official_score(images: Images, i: int, seed: int, path: Path) -> None:
    """Store all losses of an image; the seed is set anew for each, so all share their draws."""
    device = images.model.device
    chance = torch.Generator().manual_seed(seed)
    eps = torch.randn((OFFICIAL_DRAWS, *images.shape), generator=chance).to(device)
    low, high = (round(1000 * t) for t in images.t_range)
    t = torch.randint(low, high, (OFFICIAL_DRAWS,), generator=chance).to(device)
    latent, text = images.latents[i : i + 1].to(device), torch.stack([images.texts[images.labels[i]], images.null])
    np.save(path, official_losses(images.model, latent, text, t, eps))


def official_windows(path: Path, height: int, width: int, size: int) -> np.ndarray:
    """Stored losses -> typicality of every window, float32 [H', W']: upsampled, pooled, subtracted, averaged."""
    losses = torch.from_numpy(np.load(path)).float().mean(dim=2)  # [N, 2, h, w]
    pixels = interpolate(losses, (height, width), mode="bilinear")  # [N, 2, H, W]
    means = [avg_pool2d(pixels[:, c : c + 1], size, stride=1) for c in range(2)]  # label, null: [N, 1, H', W']
    return (means[1] - means[0]).squeeze(1).mean(dim=0).numpy()


def official_choose(scores: np.ndarray, size: int, count: int) -> Windows:
    """A table of all windows, sorted; the best, then the best of those that do not touch it, and so on."""
    height, width = scores.shape
    rows = [(y, x, y + size, x + size, scores[y, x]) for y in range(height) for x in range(width)]
    table = pd.DataFrame(rows, columns=["top", "left", "bottom", "right", "T"])
    table = table.sort_values(by="T", ascending=False).reset_index(drop=True)
    chosen: Windows = []
    while len(chosen) < count and len(table):
        best = table.iloc[0]
        chosen.append((int(best["top"]), int(best["left"])))
        touching = (
            (table["top"] <= best["bottom"]) & (table["bottom"] >= best["top"])
            & (table["left"] <= best["right"]) & (table["right"] >= best["left"])
        )  # fmt: skip
        table = table[~touching].reset_index(drop=True)
    return chosen


# --------------------------------------------------------------------------------------------------------------- ours


def score(images: Images, which: Sequence[int], draws: Draws, by_stratum: bool = False) -> Typicality:
    labels = [images.labels[i] for i in which]
    conditions = sorted(set(labels))
    pairs = [(i, conditions.index(label)) for i, label in enumerate(labels)]
    return typicality(
        images.model, images.latents[list(which)], pairs, torch.stack([images.texts[c] for c in conditions]),
        images.null, draws, *images.windows, images.batch_size, by_stratum=by_stratum,
    )  # fmt: skip


def find_spread(images: Images, seed: int, n_images: int, n_draws: int) -> Pilot:
    which = spaced(len(images.labels), n_images)
    timesteps = Timesteps.between(*images.t_range)
    draws = antithetic(seed, n_draws, timesteps, images.shape, PILOT_BANK)
    groups = [(score(images, which, draws, by_stratum=True), *images.windows)]
    return pilot(groups, draws, timesteps.first, len(timesteps.spread))


def score_and_store(images: Images, which: Sequence[int], draws: Draws, path: Path) -> np.ndarray:
    """Maps float32 [P, h, w] of a shard, whose rows are stored as a run stores them."""
    found, (_, h, w) = score(images, which, draws), images.shape
    rows = [
        {
            "image_id": str(i), "label": images.labels[i], "h": h, "w": w, "map": found.map[p].numpy().ravel(),
            "mean": float(found.mean[p]), "stderr": float(found.stderr[p]),
            "window_stderr": found.window_stderr[p].float().numpy().ravel(), "draws": len(draws.t),
        }
        for p, i in enumerate(which)
    ]  # fmt: skip
    path.write_bytes(to_parquet(rows_to_table("typicality", rows)))
    return found.map.numpy()


def our_choose(images: Images, cell_map: np.ndarray) -> Windows:
    return choose(patch_map(cell_map, *images.pixels, images.size), images.size, images.size, images.per_image)


# -------------------------------------------------------------------------------------------------------- measurement


@dataclass
class Cost:
    """Of one step for one or more images."""

    images: int
    wall_s: float = 0.0
    cpu_s: float = 0.0
    passes: int = 0  # UNet samples

    def per_image(self) -> dict[str, float]:
        return {key: getattr(self, key) / self.images for key in ("wall_s", "cpu_s", "passes")}


@contextmanager
def measured(images: Images, cost: Cost) -> Iterator[None]:
    """Adds time and UNet samples of the block."""

    def count(_module: object, inputs: tuple[Any, ...]) -> None:
        cost.passes += len(inputs[0])

    hook = images.model.unet.register_forward_pre_hook(count)
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        cost.wall_s += time.perf_counter() - wall
        cost.cpu_s += time.process_time() - cpu
        hook.remove()


def size_on_disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def measure(
    images: Images, shared: Sequence[int], args: argparse.Namespace, folder: Path
) -> tuple[dict[str, Any], dict[str, Any], list[Windows], list[Windows], Timesteps]:
    """Costs per image of both sides, the patches of each of their images, and our allocation, for further draws.

    The sides take turns, as other work on the machine comes and goes.
    """
    everything = list(range(len(images.labels)))
    shards = [everything[first : first + SHARD] for first in range(0, len(everything), SHARD)]
    paths = [folder / "official" / f"{i}.npy" for i in shared]
    theirs, ours = (Cost(len(shared)), Cost(len(shared))), (Cost(len(everything)), Cost(len(everything)))
    with measured(images, ours[0]):
        found = find_spread(images, args.seed, args.pilot_images, args.pilot_draws)
    piloted, timesteps, maps = ours[0].passes, Timesteps(found.first, np.array(found.spread)), []
    draws = allocated(args.seed, args.draws, timesteps, images.shape)
    for number, shard in enumerate(shards):
        begun, ended = (len(shared) * n // len(shards) for n in (number, number + 1))
        with measured(images, theirs[0]):
            for i, path in zip(shared[begun:ended], paths[begun:ended], strict=True):
                official_score(images, i, args.seed, path)
        with measured(images, ours[0]):
            maps.append(score_and_store(images, shard, draws, folder / "ours" / f"part-{number:05d}.parquet"))
    with measured(images, theirs[1]):
        scores = [official_windows(path, *images.pixels, images.size) for path in paths]
        their_patches = [official_choose(s, images.size, images.per_image) for s in scores]
    with measured(images, ours[1]):
        our_patches = [our_choose(images, m) for m in np.concatenate(maps)]
    their_costs = costs(*theirs, size_on_disk(folder / "official")) | {"draws": OFFICIAL_DRAWS}
    our_costs = costs(*ours, size_on_disk(folder / "ours")) | {"draws": args.draws, "pilot_passes": piloted}
    return their_costs, our_costs, their_patches, our_patches, timesteps


def costs(scoring: Cost, choosing: Cost, stored: int) -> dict[str, Any]:
    return {
        "images": scoring.images, "score": scoring.per_image(), "choose": choosing.per_image(),
        "stored_bytes_per_image": stored / scoring.images,
    }  # fmt: skip


def agreement(patches: Sequence[Windows], others: Sequence[Windows], size: int) -> float:
    """Share of patches that one of the other patches of the same image matches with IoU >= 0.5."""

    def match(a: tuple[int, int], b: tuple[int, int]) -> bool:
        shared = max(0, size - abs(a[0] - b[0])) * max(0, size - abs(a[1] - b[1]))
        return shared / (2 * size**2 - shared) >= 0.5

    found = [any(match(a, b) for b in theirs) for own, theirs in zip(patches, others, strict=True) for a in own]
    return float(np.mean(found))


def from_stored(images: Images, path: Path) -> Windows:
    """The official choice from stored losses that are averaged first."""
    losses = np.load(path).astype(np.float64)  # [N, 2, C, h, w]
    mean = losses.mean(axis=(0, 2))
    return official_choose(patch_map(mean[1] - mean[0], *images.pixels, images.size), images.size, images.per_image)


def agreements(
    images: Images,
    which: Sequence[int],
    args: argparse.Namespace,
    folder: Path,
    theirs: list[Windows],
    ours: list[Windows],
    spread: Timesteps,
) -> dict[str, float]:
    """Of the images that both sides scored."""
    size, flat, (height, width) = images.size, Timesteps.between(*images.t_range), images.pixels

    def rescored(draws: Draws, pick: Callable[[np.ndarray], Windows]) -> list[Windows]:
        return [pick(m) for m in score(images, which, draws).map.numpy()]

    def pick_officially(cell_map: np.ndarray) -> Windows:
        return official_choose(patch_map(cell_map, height, width, size), size, images.per_image)

    again = rescored(independent(args.seed + 1, OFFICIAL_DRAWS, flat, images.shape), pick_officially)
    ours_again = rescored(
        allocated(args.seed + 1, args.draws, spread, images.shape), lambda cell_map: our_choose(images, cell_map)
    )
    same = [from_stored(images, folder / f"{i}.npy") for i in which]
    return {
        "official_in_same_losses": agreement(theirs, same, size),
        "official_in_ours": agreement(theirs, ours, size),
        "official_in_official_other_seed": agreement(theirs, again, size),
        "ours_in_ours_other_seed": agreement(ours, ours_again, size),
    }


def table(theirs: dict[str, Any], ours: dict[str, Any], agree: dict[str, float]) -> str:
    def row(name: str, a: float, b: float) -> str:
        return f"{name:34}{a:14.5g}{b:14.5g}{a / b:10.4g}"

    lines = [f"{'per image':34}{'official':>14}{'ours':>14}{'ratio':>10}", row("draws", theirs["draws"], ours["draws"])]
    lines += [
        row(f"{step}: {what}", theirs[step][key], ours[step][key])
        for step in ("score", "choose")
        for key, what in (("wall_s", "seconds"), ("cpu_s", "processor seconds"), ("passes", "UNet passes"))
        if theirs[step][key]
    ]
    lines += [row("stored bytes", theirs["stored_bytes_per_image"], ours["stored_bytes_per_image"]), ""]
    lines += [f"{name.replace('_', ' '):48}{value:10.3f}" for name, value in agree.items()]
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=24, help="images of the official side, which is slow")
    parser.add_argument("--our-images", type=int, default=256, help="images of this package's side")
    parser.add_argument("--draws", type=int, default=40, help="of this package's side")
    add_scoring_arguments(parser, pilot_draws=32)
    parser.add_argument("--threads", type=int, default=1, help="of both sides")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/typicality.json"))
    return parser.parse_args()


def add_scoring_arguments(parser: argparse.ArgumentParser, pilot_draws: int) -> None:
    """What `read_images` and `find_spread` need, beside --our-images."""
    parser.add_argument("--run", required=True, help="folder of a finished run")
    parser.add_argument("--pilot-images", type=int, default=16)
    parser.add_argument("--pilot-draws", type=int, default=pilot_draws)
    parser.add_argument("--size", type=int, default=32, help="side of a patch in pixels")
    parser.add_argument("--per-image", type=int, default=3, help="patches of an image")
    parser.add_argument("--batch-size", type=int, default=64, help="UNet samples a pass, this package's side")
    parser.add_argument("--seed", type=int, default=0)


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    images = read_images(args)
    shared = spaced(len(images.labels), args.images)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for side in ("official", "ours"):
            (folder / side).mkdir()
        score(images, shared[:2], independent(0, 2, Timesteps.between(*images.t_range), images.shape))  # warms up
        theirs, ours, their_patches, our_patches, spread = measure(images, shared, args, folder)
        own = [our_patches[i] for i in shared]
        agree = agreements(images, shared, args, folder / "official", their_patches, own, spread)
    print(table(theirs, ours, agree))
    record(args.out, pandas=pd.__version__, latent_shape=images.shape, official=theirs, ours=ours, agreement=agree)


if __name__ == "__main__":
    main()

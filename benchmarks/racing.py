"""A finished toytown run -> what a race saves where few of very many patches are wanted, and what it loses.

    OMP_NUM_THREADS=1 python benchmarks/racing.py --run runs/toytown --out benchmarks/results/racing.json

New scenes of one label (another seed than the run's, so never trained on) are scored in the rounds of a race, all of
them in every round. The race is then run on these scores, for several confidences: who would have stayed, how many
draws that takes, and how many patches that win with all draws win in the race too ("kept": same image, IoU >= 0.5).
All rounds together are the draws of a run without a race. Where images are few the pilot costs draws, too; it is not
counted, as a run without a race has one.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu import record
from typicality import Images, find_spread, score

from diffmine.configfile import load as load_config
from diffmine.data.toytown import labelled_scene
from diffmine.diffusion.draws import Draws, Timesteps, allocated
from diffmine.diffusion.model import load
from diffmine.mining.patches import at_window, choose, patch_map
from diffmine.mining.racing import rounds, survivors
from diffmine.prompts import prompt
from diffmine.run import Run, fetch_model

AT_ONCE = 32  # images
CELL = 8  # pixels of a cell
CONFIDENCES = (0.55, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95, 0.99)
Patches = list[tuple[float, int, int, int]]  # T, image, y, x


def draw_images(args: argparse.Namespace) -> Images:
    run = Run(args.run)
    config = load_config(run.path("run.yaml"))
    model = load(fetch_model(f"{run.uri}/model"), config.model.dtype)
    latents = []
    for first in range(0, args.images, AT_ONCE):
        last = min(first + AT_ONCE, args.images)
        pixels = np.stack([labelled_scene(args.seed, args.label, i)[0] for i in range(first, last)])
        latents.append(model.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1).half().float())
    text = model.embed([config.prompt.null_prompt, prompt(args.label, config.prompt.template)])
    return Images(
        model, torch.cat(latents), [args.label] * args.images, {args.label: text[1]}, text[0],
        (config.typicality.t_min, config.typicality.t_max), config.patches.size, config.patches.per_image, 64,
    )  # fmt: skip


def best(images: Images, maps: np.ndarray, allowed: np.ndarray, wanted: int) -> Patches:
    """The best patches of the allowed images."""
    found: Patches = []
    for i in np.flatnonzero(allowed):
        means = patch_map(maps[i], *images.pixels, images.size)
        places = choose(means, images.size, images.size, images.per_image)
        found += [(float(means[y, x]), int(i), y, x) for y, x in places]
    return sorted(found, reverse=True)[:wanted]


def kept(reference: Patches, found: Patches, size: int) -> float:
    def same(a: tuple[float, int, int, int], b: tuple[float, int, int, int]) -> bool:
        both = max(0, size - abs(a[2] - b[2])) * max(0, size - abs(a[3] - b[3]))
        return a[1] == b[1] and both / (2 * size**2 - both) >= 0.5

    by_image: dict[int, Patches] = {}
    for patch in found:
        by_image.setdefault(patch[1], []).append(patch)
    return float(np.mean([any(same(a, b) for b in by_image.get(a[1], ())) for a in reference]))


def best_windows(images: Images, maps: np.ndarray, errors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """T and standard error of each image's best window; maps and errors are [n, h, w]."""
    found = []
    for cells, error in zip(maps, errors, strict=True):
        means = patch_map(cells, *images.pixels, images.size)
        y, x = np.unravel_index(int(means.argmax()), means.shape)
        found.append((means[y, x], at_window(error, int(y), int(x), images.size, images.size, CELL)))
    return np.array([f[0] for f in found]), np.array([f[1] for f in found])


def race(
    images: Images, dealt: list[Draws], maps: list[np.ndarray], errors: list[np.ndarray], wanted: int, confidence: float
) -> dict[str, Any]:
    """Play the race on scores that are known."""
    each, n = rounds(sum(len(draws.strata) for draws in dealt)), len(images.labels)
    share, number = np.array([draws.share for draws in dealt]), [len(draws.t) for draws in dealt]
    there, spent, left = np.ones(n, bool), 0, []
    for r in range(len(each)):
        if r:
            weight = share[:r] / share[:r].sum()
            so_far = np.tensordot(weight, np.stack(maps[:r]), 1).astype(np.float32)
            stderr = np.sqrt(np.tensordot(weight**2, np.square(np.stack(errors[:r])), 1)).astype(np.float32)
            top, noise = best_windows(images, so_far[there], stderr[there])
            there[np.flatnonzero(there)] = survivors(top, noise, wanted, confidence, each[r - 1].staying)
        spent += number[r] * int(there.sum())
        left.append(int(there.sum()))
    final = np.tensordot(share, np.stack(maps), 1).astype(np.float32)
    reference = best(images, final, np.ones(n, bool), wanted)
    found = best(images, final, there, wanted)
    return {
        "confidence": confidence, "left": left, "fewer": sum(number) * n / spent,
        "kept": kept(reference, found, images.size),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="folder of a finished toytown run")
    parser.add_argument("--label", default="Ashford")
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--wanted", type=int, default=200)
    parser.add_argument("--draws", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    start = time.monotonic()
    images = draw_images(args)
    pilot = find_spread(images, args.seed, 16, 64)
    timesteps = Timesteps(pilot.first, np.array(pilot.spread))
    draws = allocated(args.seed, args.draws, timesteps, images.shape).divided()
    dealt = [draws.of(one.strata) for one in rounds(len(draws.strata))]
    maps, errors = [], []
    for r, some in enumerate(dealt):
        found = [score(images, group.tolist(), some) for group in torch.arange(args.images).split(AT_ONCE)]
        maps.append(np.concatenate([f.map.numpy() for f in found]))
        errors.append(np.concatenate([f.window_stderr.float().numpy() for f in found]))
        print(f"round {r + 1}: {len(some.t)} draws, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    rows = [race(images, dealt, maps, errors, args.wanted, confidence) for confidence in CONFIDENCES]
    numbers = ", ".join(str(len(some.t)) for some in dealt)
    print(f"{args.images} images of {args.label}, {args.wanted} patches wanted, rounds of {numbers} draws")
    print(f"{'confidence':>10}{'fewer':>8}{'kept':>8}  images in each round")
    for row in rows:
        print(f"{row['confidence']:>10}{row['fewer']:>8.2f}{row['kept']:>8.3f}  {row['left']}")
    if args.out:
        record(args.out, rows=rows)


if __name__ == "__main__":
    main()

"""A finished run -> what half precision does to T, beside what the chance of the draws does.

    OMP_NUM_THREADS=1 python benchmarks/precision.py --run runs/toytown --out benchmarks/results/precision.json

The same draws score the same images with the finetuned UNet in float32, bfloat16 and float16. At each label's best
patches by float32, all as shares of their mean T:

- *error*: root mean square of T - T_float32, what rounding does;
- *bias*: mean of T - T_float32, what no number of draws would average out;
- *recall*: the share of those patches that are chosen then, too (IoU of at least 0.5).

The last row has other draws in float32: its error is over sqrt(2), what the chance of one set of draws does; its bias,
as the patches are the best by the first draws, is what more draws would take away. On a CPU this tells rounding, not
speed.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from draws import best_patches, estimate, listed, recall
from gpu import record
from typicality import add_scoring_arguments, find_spread, read_images

from diffmine.diffusion.draws import Timesteps, allocated


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    exact = read_images(args, "float32")
    low, _ = (round(1000 * t) for t in exact.t_range)
    spread = find_spread(exact, args.seed, args.pilot_images, args.pilot_draws).spread
    draws, others = (
        allocated(seed, args.draws, Timesteps(low, np.array(spread)), exact.shape)
        for seed in (args.seed, args.seed + 1)
    )
    reference = estimate(exact, draws)
    wanted = best_patches(exact, reference, args.share)
    at = tuple(np.array(listed(wanted)).T)
    mean, rows = float(reference.scores[at].mean()), []
    sides = {dtype: (read_images(args, dtype), draws) for dtype in ("bfloat16", "float16")}
    for name, (images, own) in {**sides, "float32, other draws": (exact, others)}.items():
        found = estimate(images, own)
        difference = (found.scores - reference.scores)[at]
        rows.append({
            "name": name, "error": float(np.sqrt(np.square(difference).mean())) / mean,
            "bias": float(difference.mean()) / mean,
            "recall": recall(wanted, best_patches(images, found, args.share), images.size),
        })  # fmt: skip
    rows[-1]["error"] /= np.sqrt(2)  # of one of the two
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--draws", type=int, default=40)
    parser.add_argument("--our-images", type=int, default=84)
    parser.add_argument("--share", type=float, default=1 / 3, help="of a label's candidates that are wanted")
    add_scoring_arguments(parser, pilot_draws=64)
    args = parser.parse_args()
    rows = measure(args)
    print(f"{'':<24}{'error':>9}{'bias':>9}{'recall':>9}")
    for row in rows:
        print(f"{row['name']:<24}{row['error']:>9.2%}{row['bias']:>9.2%}{row['recall']:>9.3f}")
    if args.out:
        record(args.out, draws=args.draws, rows=rows)


if __name__ == "__main__":
    main()

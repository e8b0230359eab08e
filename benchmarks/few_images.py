"""A finished run -> the T of labels, had they fewer images: what a fixed number of patches makes of rare labels.

    python benchmarks/few_images.py --run runs/toytown --out benchmarks/results/few_images.json

Images of each label are drawn at random, `--repeats` times, and the median T of two choices among their windows is
taken, as the run's maps have it: of `patches.per_label` windows, as a run keeps them, and of the same share of them
that this is with all images. The model is that of the run, which has seen all of them.
"""

import argparse
from pathlib import Path

import numpy as np
import yaml
from boxes import candidates
from gpu import record

from diffmine.run import Run

SIZES = (75, 50, 35)


def medians(of_images: np.ndarray, count: int, per_label: int, repeats: int, seed: int) -> tuple[float, float]:
    """T of the windows of images [N, W] -> median of the best `per_label` of `count` images, and of the same share."""
    rng, share, found = np.random.default_rng(seed), per_label / of_images.size, []
    for _ in range(repeats):
        best = np.sort(rng.permutation(of_images)[:count].ravel())[::-1]
        found.append([np.median(best[:per_label]), np.median(best[: max(1, round(share * best.size))])])
    kept, same = np.mean(found, axis=0)
    return float(kept), float(same)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="folder or URI of a finished run whose images have windows alike")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args()
    run = Run(args.run)
    wanted, rows = yaml.safe_load(run.read("run.yaml"))["patches"], []
    for label, windows in sorted(candidates(run).items()):
        of_images = np.array([w["T"] for w in windows]).reshape(-1, wanted["per_image"])
        for count in (len(of_images), *SIZES):
            kept, same = medians(of_images, count, wanted["per_label"], args.repeats, args.seed)
            rows.append({"label": label, "images": count, "kept": kept, "same_share": same})
            print(f"{label:<12}{count:>5} images   best {wanted['per_label']}: {kept:.4f}   same share: {same:.4f}")
    if args.out:
        record(args.out, per_label=wanted["per_label"], rows=rows)


if __name__ == "__main__":
    main()

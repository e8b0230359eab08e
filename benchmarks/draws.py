"""A finished run -> how exact T is, and how well it finds the best patches, for every sampler and number of draws.

    OMP_NUM_THREADS=1 python benchmarks/draws.py --run runs/toytown --out benchmarks/results/draws.json

The pilot's images are not among those that are measured. Reference: T of every image from 2,000 allocated draws of a
bank of their own, with the run's finetuned model. From it come each label's best patches (a third of its candidates:
few enough that choosing means something). For every sampler, number of draws N and repeat (a seed of its own):

- *error*: root mean square of T - T_reference at the reference's best patches, over their mean T;
- *stated*: root mean square of the standard errors there, over the same: it should be the error, and is less noisy, as
  all images share their draws, so that the error has the chance of a few repeats in it;
- *recall*: the share of the reference's best patches that are among as many best candidates of this estimate (IoU of at
  least 0.5 in the same image);
- *passes*: UNet samples per image, 2 N; the pilot's are told apart;
- *covered*: the share of nominal 95 % intervals that hold T_reference: at the reference's best patches (`fixed`), at
  those this estimate chose (`chosen`), and at the latter with another repeat's draws (`fresh`, as a run rescores);
- *fewer*: how many times fewer passes than independent draws reach the same error: the ratio of the squares of the
  errors that are stated, as the variance of all of them falls with 1 / N or faster. That of independent draws is pooled
  over N; *by error* is the same of the errors against the reference, *by recall* of independent draws that have the
  same recall (interpolated in log N; none beyond the N that were tried). The last line of a range says which N of
  `allocated` is as exact as 100 independent draws, and which has their recall.

All rows share the seeds of the repeats, so that what is chance in one is in the others, too. The rows of `independent`
at N = 100 are the official estimator: its recall is how far it agrees with the truth, and `agreement` with itself under
another seed. A neighbour on the machine changes the time this takes, not the figures.
"""

import argparse
import sys
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu import record
from scipy import stats
from typicality import Images, Windows, add_scoring_arguments, find_spread, our_choose, read_images, score, spaced

from diffmine.diffusion.draws import SAMPLERS, Draws, Timesteps
from diffmine.mining.patches import at_window, patch_map

REFERENCE, REFERENCE_BANK, REPEAT_BANK = 2000, 9, 0
Patch = tuple[int, int, int]  # image, y, x
AT_ONCE = 16  # images


@dataclass
class Estimate:
    """Of every image."""

    maps: np.ndarray  # float32 [images, h, w]
    scores: np.ndarray  # float32 [images, H', W'], T of every window
    stderr: np.ndarray  # float64 [images, h, w], of the window centred on a cell
    reach: np.ndarray  # float64 [images, h, w], half of its 95 % interval

    def covers(self, true: np.ndarray, patches: list[Patch], images: Images) -> float:
        """Share of the patches whose interval holds the true T."""
        reach = at_patches(self.reach, patches, images)
        return float(np.mean([abs(self.scores[p] - true[p]) < r for p, r in zip(patches, reach, strict=True)]))


def estimate(images: Images, draws: Draws) -> Estimate:
    found = [score(images, group.tolist(), draws) for group in torch.arange(len(images.labels)).split(AT_ONCE)]
    maps = np.concatenate([f.map.numpy() for f in found])
    stderr = np.concatenate([f.window_stderr.numpy() for f in found])
    quantile = np.concatenate([stats.t.ppf(0.975, f.window_degrees_of_freedom.numpy()) for f in found])
    return Estimate(maps, window_scores(images, maps), stderr, quantile * stderr)


def apart(images: Images, number: int) -> tuple[Images, Images]:
    """So many evenly spaced images, and the others."""

    def only(which: list[int]) -> Images:
        return replace(images, latents=images.latents[which], labels=[images.labels[i] for i in which])

    first = spaced(len(images.labels), number)
    return only(first), only([i for i in range(len(images.labels)) if i not in first])


def at_patches(errors: np.ndarray, patches: list[Patch], images: Images) -> list[float]:
    cell, size = images.model.cell, images.size
    return [float(at_window(errors[i], y, x, size, size, cell)) for i, y, x in patches]


def window_scores(images: Images, found: np.ndarray) -> np.ndarray:
    """Maps -> T of every window, float32 [images, H', W']."""
    return np.stack([patch_map(m, *images.pixels, images.size) for m in found])


def best_patches(images: Images, found: Estimate, share: float) -> dict[str, list[Patch]]:
    """The best `share` of each label's candidates."""
    candidates: dict[str, list[Patch]] = {label: [] for label in images.texts}
    for i, cell_map in enumerate(found.maps):
        places: Windows = our_choose(images, cell_map)
        candidates[images.labels[i]] += [(i, y, x) for y, x in places]
    return {
        label: sorted(all_, key=lambda p: -found.scores[p])[: max(1, round(share * len(all_)))]
        for label, all_ in candidates.items()
    }


def listed(of_labels: dict[str, list[Patch]]) -> list[Patch]:
    return [patch for patches in of_labels.values() for patch in patches]


def recall(wanted: dict[str, list[Patch]], found: dict[str, list[Patch]], size: int) -> float:
    """Share of the wanted patches that one of the found matches."""

    def matches(a: Patch, b: Patch) -> bool:
        both = max(0, size - abs(a[1] - b[1])) * max(0, size - abs(a[2] - b[2]))
        return a[0] == b[0] and both / (2 * size**2 - both) >= 0.5

    return float(np.mean([any(matches(a, b) for b in found[label]) for label in wanted for a in wanted[label]]))


def measure(images: Images, args: argparse.Namespace) -> dict[str, Any]:
    """Figures of one range of t."""
    low, high = (round(1000 * t) for t in images.t_range)
    pilots, images = apart(images, args.pilot_images)
    spread = np.array(find_spread(pilots, args.seed, args.pilot_images, args.pilot_draws).spread)
    piloted, share, started = Timesteps(low, spread), args.share, time.monotonic()
    reference = estimate(images, SAMPLERS["allocated"](args.seed, REFERENCE, piloted, images.shape, REFERENCE_BANK))
    true = reference.scores
    wanted = best_patches(images, reference, share)
    at = tuple(np.array(listed(wanted)).T)
    print(f"t in [{low}, {high}): reference in {time.monotonic() - started:.0f} s", file=sys.stderr)
    rows = []
    for name in args.samplers:
        sampler = SAMPLERS[name]
        for n in args.draws:
            found = [
                estimate(images, sampler(args.seed + 1 + repeat, n, piloted, images.shape, REPEAT_BANK))
                for repeat in range(args.repeats)
            ]
            chosen = [best_patches(images, each, share) for each in found]
            errors = [np.mean(np.square(each.scores[at] - true[at])) for each in found]
            stated = [np.mean(np.square(at_patches(each.stderr, listed(wanted), images))) for each in found]
            others = zip(found[1:] + found[:1], chosen, strict=True)
            covered = {
                "fixed": [each.covers(true, listed(wanted), images) for each in found],
                "chosen": [each.covers(true, listed(own), images) for each, own in zip(found, chosen, strict=True)],
                "fresh": [other.covers(true, listed(own), images) for other, own in others],
            }
            rows.append({
                "sampler": name, "draws": n, "passes": 2 * n,
                "error": float(np.sqrt(np.mean(errors)) / true[at].mean()),
                "stated": float(np.sqrt(np.mean(stated)) / true[at].mean()),
                "recall": float(np.mean([recall(wanted, own, images.size) for own in chosen])),
                "agreement": float(np.mean([recall(a, b, images.size) for a, b in pairwise(chosen)])),
                "covered": {where: float(np.mean(shares)) for where, shares in covered.items()},
            })  # fmt: skip
            print(f"{name} {n}: {rows[-1]['error']:.3f} {rows[-1]['stated']:.3f}", file=sys.stderr)
    for by, name in (("stated", "fewer"), ("error", "fewer_by_error")):
        of_one = float(np.mean([r["draws"] * r[by] ** 2 for r in rows if r["sampler"] == "independent"]))  # variance
        for row in rows:
            row[name] = of_one / row["draws"] / row[by] ** 2
    for row in rows:
        same = of_recall(rows, "independent", row["recall"])
        row["fewer_by_recall"] = None if same is None else same / row["draws"]
    ratio = float(np.exp(np.mean([np.log(r["fewer"]) for r in rows if r["sampler"] == "allocated"])))
    pilot = {"images": args.pilot_images, "draws": args.pilot_draws, "passes": 2 * args.pilot_images * args.pilot_draws}
    return {
        "t": [low, high], "patches": len(at[0]), "rows": rows, "pilot": pilot, "allocated_fewer": ratio,
        "draws_as_exact_as_100_independent": as_exact(rows, 100), "draws_of_their_recall": recall_of(rows, 100),
        "spread": spread[:: max(1, len(spread) // 16)].tolist(),
    }  # fmt: skip


def as_exact(rows: list[dict[str, Any]], draws: int) -> float:
    """How many draws of `allocated` are as exact as so many independent ones."""
    tried, fewer = zip(*sorted((r["draws"], r["fewer"]) for r in rows if r["sampler"] == "allocated"), strict=True)
    number = float(draws)
    for _ in range(20):
        number = draws / float(np.interp(np.log(number), np.log(tried), fewer))
    return number


def of_recall(rows: list[dict[str, Any]], sampler: str, wanted: float) -> float | None:
    """How many draws of a sampler have a recall; None outside of those that were tried."""
    recalls, tried = zip(*sorted((r["recall"], r["draws"]) for r in rows if r["sampler"] == sampler), strict=True)
    inside = recalls[0] <= wanted <= recalls[-1]
    return float(np.exp(np.interp(wanted, recalls, np.log(tried)))) if inside else None


def recall_of(rows: list[dict[str, Any]], draws: int) -> float | None:
    """How many draws of `allocated` have the recall of so many independent ones; None where that was not tried."""
    wanted = [r["recall"] for r in rows if (r["sampler"], r["draws"]) == ("independent", draws)]
    return of_recall(rows, "allocated", wanted[0]) if wanted else None


def table(found: dict[str, Any]) -> str:
    lines = [
        f"t in [{found['t'][0]}, {found['t'][1]}): {found['patches']} best patches",
        f"{'sampler':<14}{'draws':>6}{'passes':>8}{'error':>8}{'stated':>8}{'recall':>8}{'agreement':>11}{'fewer':>7}"
        f"{'by error':>10}{'by recall':>11}"
        f"{'fixed':>8}{'chosen':>8}{'fresh':>7}",
    ]
    for r in found["rows"]:
        by_recall = "" if r["fewer_by_recall"] is None else f"{r['fewer_by_recall']:.2f}"
        lines.append(
            f"{r['sampler']:<14}{r['draws']:>6}{r['passes']:>8}{r['error']:>8.3f}{r['stated']:>8.3f}{r['recall']:>8.3f}"
            f"{r['agreement']:>11.3f}{r['fewer']:>7.2f}{r['fewer_by_error']:>10.2f}{by_recall:>11}"
            f"{r['covered']['fixed']:>8.3f}{r['covered']['chosen']:>8.3f}{r['covered']['fresh']:>7.3f}"
        )
    same = found["draws_of_their_recall"]
    lines.append(
        f"allocated: {found['allocated_fewer']:.2f} times fewer passes (geometric mean over N); "
        f"{found['draws_as_exact_as_100_independent']:.0f} draws are as exact as 100 independent ones"
        + ("" if same is None else f", {same:.0f} have their recall")
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--t-max", type=float, nargs="+", default=[0.7, 0.9])
    parser.add_argument("--draws", type=int, nargs="+", default=[12, 36, 100])
    parser.add_argument("--samplers", nargs="+", default=[*SAMPLERS], help="independent and allocated, and others")
    parser.add_argument("--repeats", type=int, default=6, help="2 or more")
    parser.add_argument("--our-images", type=int, default=28, help="that are measured")
    parser.add_argument("--share", type=float, default=1 / 3, help="of a label's candidates that are wanted")
    add_scoring_arguments(parser, pilot_draws=64)
    args = parser.parse_args()
    args.our_images += args.pilot_images
    images, found = read_images(args), []
    for t_max in args.t_max:
        images = replace(images, t_range=(images.t_range[0], t_max))
        found.append(measure(images, args))
        print(table(found[-1]), end="\n\n")
        if args.out:
            record(args.out, ranges=found)


if __name__ == "__main__":
    main()

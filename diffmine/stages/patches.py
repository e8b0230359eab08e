"""Typicality maps -> patches: the most and the least typical windows of each label, and random ones.

    maps -> each image's candidates (CPU tasks) -> the best of each label (driver) -> their fresh scores (actor pool)

The score of a chosen patch is the best of many noisy ones, so it flatters. What will be looked at is scored again with
draws that had no part in the choice.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from diffmine.config import Config
from diffmine.data.images import Geometry, geometry, to_original
from diffmine.mining.patches import KINDS, at_window, choose, choose_random, patch_map, rank, window_size
from diffmine.randomness import generator
from diffmine.run import SCHEMAS, Run, from_parquet, part_name, rows_to_table, run_here, to_parquet
from diffmine.stages.latents import by_shape, latent_rows
from diffmine.stages.maps import map_rows
from diffmine.stages.session import Context, Result
from diffmine.stages.shards import Part, Payload, each_shard, pack, stream, unpack
from diffmine.stages.typicality import FRESH, Estimator, Pair, Settings, scoring_settings
from diffmine.tables import grouped

Row = dict[str, Any]
_PRUNED_ROWS = 200_000  # candidates that are held beside the best before they are cut back
_SCORES = ["image_id", "label", "own", "h", "w", "map", "window_stderr", "draws"]
_CANDIDATES = SCHEMAS["patches"].append(pa.field("shard", pa.int32())).append(pa.field("order", pa.float64()))


def patches(context: Context) -> Result:
    """Windows of every map -> the best `per_label` of each label and kind, one part per shard of images."""
    run, wanted, progress = context.run, context.config.patches, context.progress
    chosen, whole = _choose(context)
    if whole:
        progress.say(
            f"patches: {whole} images are smaller than patches.size {wanted.size}; there the whole side is the patch"
        )
    error, asked = _relative_error(chosen), context.config.typicality
    if error is not None and asked.draws == "auto":
        progress.say(
            f"patches: the standard error of the most typical is {error:.1%} of T "
            f"(typicality.relative_error: {asked.relative_error:.1%})"
        )
    marker, by_shard = {"rows": len(chosen), "whole_images": whole, "relative_error": error}, _by_shard(chosen)
    if not wanted.fresh_per_label:
        return Result(
            {part_name("patches", s): run.write_part("patches", s, t, over=True) for s, t in by_shard.items()}, marker
        )
    told = {shard: to_parquet(table) for shard, table in by_shard.items()}
    make = partial(_Rescorer, scoring_settings(context), wanted.fresh_per_label, wanted.fresh_draws)
    result = stream(context, "patches", told, _read, make, pc.count_distinct(chosen["image_id"]).as_py())
    return Result(result.files, marker)


def _choose(context: Context) -> tuple[pa.Table, int]:
    """The patches, ranked, with the shard they come from; and how many images are smaller than a patch."""
    run, wanted, image = context.run, context.config.patches, context.config.dataset.image
    shards = run.parts("typicality")
    context.progress.start("patches", len(shards), "shards")
    task = _Candidates(
        run.uri, context.config.seed, wanted.size, wanted.per_image, (run.committed("latents") or {})["cell"],
        image.short_side, image.multiple_of, context.config.typicality.against == "others",
        _race_length(context.config),
    )  # fmt: skip
    held, rows, most, whole = [_CANDIDATES.empty_table()], 0, _PRUNED_ROWS, 0
    for row in each_shard(context, "patches", dict.fromkeys(shards, b""), task):
        whole += row["whole_images"]
        held.append(unpack(row["candidates"]))
        rows += len(held[-1])
        if rows > most:
            held = [_best(pa.concat_tables(held), wanted.per_label)]
            rows, most = len(held[0]), 2 * len(held[0]) + _PRUNED_ROWS
        context.progress.advance(1)
    chosen = _best(pa.concat_tables(held), wanted.per_label)
    names = pa.array([f"{i:08d}" for i in range(len(chosen))], pa.string())
    chosen = chosen.set_column(chosen.column_names.index("patch_id"), "patch_id", names)
    context.progress.finish(f"{len(chosen)} patches of {pc.count_distinct(chosen['label']).as_py()} labels")
    return chosen, whole


def _best(candidates: pa.Table, count: int) -> pa.Table:
    """The first `count` of each label and kind, one after the other, with their ranks."""
    order, images, y, x = (candidates[name].to_numpy() for name in ("order", "image_id", "y", "x"))
    label = pc.rank(candidates["label"], tiebreaker="dense").to_numpy().astype(np.int64)
    kind = pc.index_in(candidates["kind"], pa.array(KINDS)).to_numpy()
    group = label * len(KINDS) + kind
    by_group = np.argsort(group, kind="stable")
    kept = []
    for own in np.split(by_group, np.flatnonzero(np.diff(group[by_group])) + 1):
        kept.append(own[rank(order[own], images[own], y[own], x[own], count)])
    best = candidates.take(pa.array(np.concatenate(kept)))
    ranks = pa.array(np.concatenate([np.arange(len(own)) for own in kept]), pa.int32())
    return best.set_column(best.column_names.index("rank"), "rank", ranks)


def _relative_error(chosen: pa.Table) -> float | None:
    """Standard error over T of the most typical patches, both as root mean squares; None where it is not known."""
    top = chosen.filter(pc.equal(chosen["kind"], "top"))
    error, value = (float(np.square(top[name].to_numpy()).sum()) for name in ("stderr", "typicality"))
    return math.sqrt(error / value) if value > 0 and math.isfinite(error) else None


def _by_shard(chosen: pa.Table) -> dict[int, pa.Table]:
    """Shard -> its rows of the table, in the order of their ids."""
    columns = SCHEMAS["patches"].names
    return {shard: rows.select(columns).combine_chunks() for shard, rows in sorted(grouped(chosen, "shard").items())}


def _race_length(config: Config) -> int:
    """Draws of the images that stayed to the end of a race; 0 without one."""
    wanted = config.typicality
    return wanted.draws if wanted.racing and wanted.draws != "auto" else 0


@dataclass(frozen=True)
class Rivals:
    """The strongest of other labels in every window of an image."""

    typicality: np.ndarray  # float32 [H', W']: the T of each window under its strongest label
    index: np.ndarray  # int32 [H', W']: which of the labels that is
    labels: list[str]


@dataclass(frozen=True)
class _Candidates:
    """Ray task: the windows that each image of a shard puts forward."""

    run_uri: str
    seed: int
    size: int
    per_image: int
    cell: int
    short_side: int
    multiple_of: int
    against_others: bool
    draws_of_the_best: int  # images with fewer have left a race: too little is known of them for a ranking

    def __call__(self, batch: pa.Table) -> pa.Table:
        [shard], run = batch["shard"].to_pylist(), run_here(self.run_uri)
        sizes = {
            row["image_id"]: (row["width"], row["height"])
            for row in run.read_part("latents", shard, ["image_id", "width", "height"]).to_pylist()
        }
        found, whole = run.pieces("typicality", shard, lambda file: self._of_file(file, shard, sizes), most=True)
        packed = pa.array([pack(pa.Table.from_pylist(found, schema=_CANDIDATES))], pa.large_binary())
        return pa.table({"candidates": packed, "whole_images": [whole]})

    def _of_file(self, file: pq.ParquetFile, shard: int, sizes: dict[str, tuple[int, int]]) -> tuple[list[Row], int]:
        """Candidates of the images of a part, which are sorted; and how many images are smaller than a patch."""
        found: list[Row] = []
        whole = 0
        scores = map_rows(file, _SCORES, own=not self.against_others)
        for image_id, maps in groupby(scores, itemgetter("image_id")):  # under its own labels, and others
            rows = [*maps]
            prepared = geometry(*sizes[image_id], self.short_side, self.multiple_of)
            found += [{**c, "shard": shard} for c in self._of_image(rows, prepared)]
            whole += self.size > min(rows[0]["h"], rows[0]["w"]) * self.cell
        return found, whole

    def _of_image(self, rows: list[Row], prepared: Geometry) -> list[Row]:
        """Candidates of one image, of every own label and kind."""
        others = [r for r in rows if not r["own"]] if self.against_others else []
        if self.against_others and not others:  # its own labels are all that were scored: it puts nothing forward
            return []
        rivals = self._rivals(others) if others else None
        return [c for r in rows if r["own"] for c in self._windows(r, rivals, prepared)]

    def _rivals(self, others: list[Row]) -> Rivals:
        """Of an image, the label that each window is most typical of, among those that are not its own."""
        strongest = self._means(others[0])
        index = np.zeros(strongest.shape, np.int32)
        for i, row in enumerate(others[1:], 1):  # one after the other: these are many times larger than the maps
            means = self._means(row)
            index[means > strongest] = i
            np.maximum(strongest, means, out=strongest)
        return Rivals(strongest, index, [row["label"] for row in others])

    def _means(self, row: Row) -> np.ndarray:
        """T of every window, float32 [H', W']."""
        return patch_map(row["map"], row["h"] * self.cell, row["w"] * self.cell, self.size)

    def _windows(self, row: Row, rivals: Rivals | None, prepared: Geometry) -> list[Row]:
        """Candidates of one image and label, of every kind."""
        means, height, width = self._means(row), row["h"] * self.cell, row["w"] * self.cell
        size_y, size_x = window_size(self.size, height), window_size(self.size, width)
        score = means if rivals is None else means - rivals.typicality
        rng = generator(self.seed, "random patches", row["image_id"], row["label"])
        ranked = self.per_image if row["draws"] >= self.draws_of_the_best else 0
        chosen = {
            "top": choose(score, size_y, size_x, ranked),
            "bottom": choose(score, size_y, size_x, 0 if self.draws_of_the_best else ranked, best=False),
            "random": choose_random(means.shape[0], means.shape[1], size_y, size_x, self.per_image, rng),
        }
        candidates = []
        for kind, places in chosen.items():
            for y, x in places:
                value = float(score[y, x])
                image_x, image_y, image_width, image_height = to_original(prepared, x, y, size_x, size_y)
                candidates.append({
                    "image_id": row["image_id"], "label": row["label"], "kind": kind, "x": x, "y": y,
                    "width": size_x, "height": size_y, "image_x": image_x, "image_y": image_y,
                    "image_width": image_width, "image_height": image_height, "typicality": float(means[y, x]),
                    "stderr": float(at_window(row["window_stderr"], y, x, size_y, size_x, self.cell)),
                    "contrast": None if rivals is None else value,
                    "rival": None if rivals is None else rivals.labels[rivals.index[y, x]],
                    "order": {"top": value, "bottom": -value, "random": float(rng.random())}[kind],
                })  # fmt: skip
        return candidates


# ------------------------------------------------------------------------------------------------------- fresh scores

_FRESH = ("fresh_typicality", "fresh_stderr", "fresh_degrees_of_freedom")
_FRESH_CONTRAST = ("fresh_contrast", "fresh_contrast_stderr", "fresh_contrast_degrees_of_freedom")


def _read(run: Run, shard: int, told: bytes) -> Payload:
    """CPU task: the patches of a shard and the latents they lie on."""
    chosen, latents = from_parquet(told), run.read_part("latents", shard)
    return {"patches": chosen, "latents": latents.filter(pc.is_in(latents["image_id"], chosen["image_id"]))}


class _Rescorer:
    """GPU actor: the chosen patches of a shard -> the same with fresh scores of the best and the worst.

    Their contrast is that with the label that was the strongest when they were chosen.
    """

    def __init__(self, settings: Settings, per_label: int, draws: int, device: str = "cpu") -> None:
        self.estimator, self.per_label, self.draws = Estimator(settings, device), per_label, draws

    def __call__(self, payload: Payload) -> Part:
        rows = payload["patches"].to_pylist()
        wanted: dict[str, dict[tuple[str, str | None], list[Row]]] = defaultdict(lambda: defaultdict(list))
        for row in rows:
            if row["kind"] != "random" and row["rank"] < self.per_label:
                for rival in dict.fromkeys((None, row["rival"])):
                    wanted[row["image_id"]][row["label"], rival].append(row)
        latents = [r for r in latent_rows(payload["latents"]) if r["image_id"] in wanted]
        for batch in by_shape(latents, ("h", "w"), max(1, len(latents))):
            pairs = [Pair(i, *which) for i, r in enumerate(batch) for which in wanted[r["image_id"]]]
            sampler, cell = self.estimator.config.typicality.sampler, self.estimator.model.cell
            found, _ = self.estimator.score(batch, pairs, sampler, self.draws, FRESH)
            for p, pair in enumerate(pairs):
                if found.failed_t[p] >= 0:
                    continue
                h, w = found.map[p].shape
                means = patch_map(found.map[p].numpy(), h * cell, w * cell, self.estimator.config.patches.size)
                stderr, freedom = (
                    of_windows[p].numpy() for of_windows in (found.window_stderr, found.window_degrees_of_freedom)
                )
                names = _FRESH if pair.rival is None else _FRESH_CONTRAST
                for row in wanted[batch[pair.image]["image_id"]][pair.label, pair.rival]:
                    y, x, size = row["y"], row["x"], (row["height"], row["width"])
                    values = means[y, x], *(at_window(known, y, x, *size, cell) for known in (stderr, freedom))
                    row |= {name: float(value) for name, value in zip(names, values, strict=True)}
        return Part(rows_to_table("patches", rows), [], self.estimator.batches.notes())

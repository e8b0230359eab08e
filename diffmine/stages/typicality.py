"""Latents, finetuned model -> typicality: a signed map per image and label, with standard errors.

Draws are spread over t by a pilot: the first actor to need it scores a few images, and what it found is put into the
run folder once, for all actors and for a continued run.
"""

import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from diffmine.config import Config
from diffmine.data.labels import label_sizes, labels_to_score
from diffmine.diffusion.draws import SAMPLERS, Draws, Timesteps
from diffmine.diffusion.memory import Batches
from diffmine.diffusion.model import COMPILED_SHAPES, load
from diffmine.diffusion.pilot import Pilot, pilot
from diffmine.diffusion.typicality import Typicality
from diffmine.diffusion.typicality import typicality as compute_typicality
from diffmine.errors import ImageError
from diffmine.mining.patches import centred_matrix
from diffmine.mining.racing import Round, pays
from diffmine.prompts import prompt
from diffmine.randomness import generator
from diffmine.run import SCHEMAS, Run, fetch_model, fetch_text_encoder, from_parquet, to_parquet
from diffmine.stages import metrics
from diffmine.stages.latents import by_shape, latent_rows
from diffmine.stages.manifest import read_shard
from diffmine.stages.race import race, read_round
from diffmine.stages.session import Context, Result
from diffmine.stages.shards import Part, Payload, failure, stream
from diffmine.stages.watch import alive

Row = dict[str, Any]
Strata = tuple[int, ...] | None  # of the divided draws; None: all
PILOT = "typicality/_pilot.json"  # what begins with _ is no part of the table to those who open the folder,
_FORMER_PILOT = "typicality/pilot.json"  # as it was called by earlier copies of 0.1.0, whose runs go on
_BANKS = 8  # of draws, one for each shape of images, that are kept: each is megabytes of noise
_PAIRS = 2048  # images x labels whose maps are held at a time: by count of arrays about 1 GB at 512 x 512
SCORES, PILOTS, FRESH = 0, 1, 2  # banks of draws that have nothing in common


class Pair(NamedTuple):
    """What is scored: T of an image under a label; with a rival, what it has more than under that label."""

    image: int  # index into a batch
    label: str
    rival: str | None = None


@dataclass(frozen=True)
class Settings:
    """What a scoring actor needs of the config."""

    run: str
    model: str
    text_encoder: str | None
    config: Config
    pilot_images: bytes | None  # Parquet: their latents and labels; None for samplers without a pilot


def typicality(context: Context) -> Result:
    """T(x|c) of every image that has a latent, under its own labels and whatever others are asked for."""
    run, config = context.run, context.config
    sizes = label_sizes(run.table("manifest", ["labels"]))
    labels = labels_to_score(config.typicality.labels, list(sizes))
    shards = run.parts("latents")
    images = (run.committed("latents") or {}).get("rows", 0)
    settings = scoring_settings(context)
    if settings.pilot_images is not None and not run.exists(PILOT):
        count = len(from_parquet(settings.pilot_images, ["h"]))
        context.progress.say(f"typicality: a pilot on {count} images comes first")
    worth = any(pays(size, config.patches.per_label) for size in sizes.values())
    if config.typicality.racing and not worth:
        context.progress.say(
            "typicality: no race, as no label has many more images than patches.per_label; all get all draws"
        )
    if config.typicality.racing and worth:
        result = race(context, shards, images, _dealt(config), lambda one: partial(Scorer, settings, labels, one))
    else:
        make = partial(Scorer, settings, labels)
        result = stream(context, "typicality", dict.fromkeys(shards, b""), read_round, make, images)
    if config.typicality.draws != "auto":
        result.marker["draws"] = config.typicality.draws
    elif shards:
        result.marker["draws"] = max(run.read_part("typicality", shards[0], ["draws"])["draws"].to_pylist(), default=0)
    if run.exists(PILOT):
        result.files.update({PILOT: run.digest(PILOT)})
        result.marker["pilot"] = {k: v for k, v in json.loads(run.read(PILOT)).items() if k != "spread"}
    return result


def _dealt(config: Config) -> Draws:
    """How draws are dealt out over the rounds of a race; their t and noise are not those of the run."""
    wanted = config.typicality
    assert wanted.draws != "auto"
    timesteps = Timesteps.between(wanted.t_min, wanted.t_max)
    return SAMPLERS[wanted.sampler](config.seed, wanted.draws, timesteps, (1, 1, 1), SCORES).divided()


def scoring_model(context: Context) -> tuple[str, str | None]:
    """URI of the model that scores, and of its text encoder when that is not the model's own."""
    if context.config.finetune.enabled:
        return f"{context.run.uri}/model", None  # exported with the text encoder it was trained with
    return context.config.model.base, context.config.model.text_encoder


def scoring_settings(context: Context) -> Settings:
    images = None
    if context.config.typicality.sampler == "allocated":
        images = to_parquet(_pilot_images(context.run, context.config.seed, context.config.typicality.pilot_images))
    return Settings(context.run.uri, *scoring_model(context), context.config, images)


def _pilot_images(run: Run, seed: int, count: int) -> pa.Table:
    """Latents and labels of images from all over the dataset."""
    rng = generator(seed, "pilot")
    order = map(int, rng.permutation(run.parts("latents")))
    shards = sorted(islice((s for s in order if run.part_rows("latents", s)), count))  # some may have no usable image
    rows: list[Row] = []
    for i, shard in enumerate(shards):
        labels = {r["image_id"]: r["labels"] for r in read_shard(run, shard).select(["image_id", "labels"]).to_pylist()}
        latents = run.read_part("latents", shard, ["image_id", "h", "w", "latent"])
        number = count // len(shards) + (i < count % len(shards))
        chosen = sorted(rng.permutation(len(latents))[:number])
        rows += [{**row, "labels": labels[row["image_id"]]} for row in latents.take(chosen).to_pylist()]
    return pa.Table.from_pylist(rows)


class Estimator:
    """A loaded model, the texts and the draws: latents -> typicality, whatever the images' shapes."""

    def __init__(self, settings: Settings, device: str) -> None:
        self.settings, self.config = settings, settings.config
        text_encoder = fetch_text_encoder(settings.text_encoder)
        self.model = load(fetch_model(settings.model), self.config.model.dtype, device, text_encoder)
        if self.config.typicality.compile:
            self.model.unet.compile(dynamic=False)
        self.null = self.model.embed([self.config.prompt.null_prompt])[0]
        self._texts: dict[str, torch.Tensor] = {}  # label -> [L, D]
        self._draws = lru_cache(_BANKS)(self._new_draws)
        self.batches = Batches(self.config.typicality.batch_size, device)
        wanted = self.config.typicality
        self.timesteps = Timesteps.between(wanted.t_min, wanted.t_max)
        self.draws = wanted.draws if wanted.draws != "auto" else wanted.max_draws
        if settings.pilot_images is not None:
            found = self._pilot(Run(settings.run), settings.pilot_images)
            self.timesteps = Timesteps(found.first, np.array(found.spread))
            if wanted.draws == "auto":
                self.draws = found.draws_for(wanted.relative_error, wanted.max_draws)

    def score(
        self, latents: list[Row], pairs: list[Pair], sampler: str, n: int, bank: int, only: Strata = None
    ) -> tuple[Typicality, Draws]:
        """Images of one shape, and pairs that hold each of them -> typicality of the pairs, the draws."""
        if self.config.typicality.compile:
            torch._dynamo.config.recompile_limit = COMPILED_SHAPES  # else 8; holds for this thread alone
        samples = {(pair.image, label) for pair in pairs for label in (pair.label, pair.rival)}
        conditions = sorted({label for _, label in samples if label is not None})
        number: dict[str | None, int] = {None: -1, **{label: k for k, label in enumerate(conditions)}}
        own, references = [(pair.image, number[pair.label]) for pair in pairs], [number[pair.rival] for pair in pairs]
        stacked = torch.from_numpy(np.stack([r["latent"] for r in latents])).float()  # [B, C, h, w]
        _, c, h, w = stacked.shape
        draws, batch = self._draws(sampler, n, (c, h, w), bank, only), self.batches.of(h, w)
        texts, weights = torch.stack([self._text(c) for c in conditions]), (self._weights(h), self._weights(w))

        def passes_of(size: int) -> Typicality:
            return compute_typicality(
                self.model, stacked, own, texts, self.null, draws, *weights, size,
                pad=self.config.typicality.compile, by_stratum=bank == PILOTS, beat=alive, references=references,
            )  # fmt: skip

        found = batch(passes_of)
        metrics.count("diffmine_unet_passes", "typicality", len(draws.t) * len(samples))
        return found, draws

    def _weights(self, cells: int) -> torch.Tensor:
        """Weights [cells, cells] of the mean over a patch centred on each cell, along an axis."""
        return torch.from_numpy(centred_matrix(cells, cells * self.model.cell, self.config.patches.size).copy())

    def _pilot(self, run: Run, images: bytes) -> Pilot:
        """What the pilot found: read from the run folder, or found now and put there for all."""
        if run.exists(_FORMER_PILOT):
            run.put_if_absent(PILOT, run.read(_FORMER_PILOT))
        if not run.exists(PILOT):
            wanted, groups = self.config.typicality, []
            for rows in by_shape(latent_rows(from_parquet(images)), ("h", "w"), 10**9):
                pairs = [Pair(i, label) for i, row in enumerate(rows) for label in row["labels"]]
                found, draws = self.score(rows, pairs, "antithetic", wanted.pilot_draws, PILOTS)
                h, w = rows[0]["h"], rows[0]["w"]
                groups.append((found, self._weights(h), self._weights(w)))
            folded = pilot(groups, draws, self.timesteps.first, len(self.timesteps.spread))
            run.put_if_absent(PILOT, json.dumps(asdict(folded)).encode())
        return Pilot(**json.loads(run.read(PILOT)))

    def _text(self, label: str) -> torch.Tensor:
        if label not in self._texts:
            self._texts[label] = self.model.embed([prompt(label, self.config.prompt.template)])[0]
        return self._texts[label]

    def _new_draws(self, sampler: str, n: int, shape: tuple[int, int, int], bank: int, only: Strata) -> Draws:
        draws = SAMPLERS[sampler](self.config.seed, n, self.timesteps, shape, bank)
        return draws if only is None else draws.divided().of(only)


class Scorer:
    """GPU actor: latents -> rows of the table, and the images whose maps are not numbers."""

    def __init__(
        self, settings: Settings, others: tuple[str, ...], race_round: Round | None = None, device: str = "cpu"
    ) -> None:
        self.estimator, self.others = Estimator(settings, device), others
        self.only = race_round.strata if race_round else None
        self.schema = SCHEMAS["rounds" if race_round else "typicality"]

    def __call__(self, payload: Payload) -> Part:
        manifest = {r["image_id"]: r for r in payload["manifest"].to_pylist()}
        rows: list[Row] = []
        failures: list[dict[str, str]] = []
        latents = latent_rows(payload["latents"])
        labels = max((len({*manifest[r["image_id"]]["labels"], *self.others}) for r in latents), default=1)
        for batch in by_shape(latents, ("h", "w"), max(1, _PAIRS // labels)):
            by_image: dict[str, list[Row]] = defaultdict(list)
            for row in self._score(batch, [manifest[r["image_id"]]["labels"] for r in batch]):
                by_image[row["image_id"]].append(row)
            for image_id, own in by_image.items():
                if (t := max(row.pop("failed_t") for row in own)) >= 0:
                    error = ImageError("non_finite", f"its loss is not finite at t = {t}")
                    failures.append(failure(image_id, manifest[image_id]["uri"], error))
                else:
                    rows += own
        rows.sort(key=lambda r: (r["image_id"], r["label"]))
        return Part(pa.Table.from_pylist(rows, schema=self.schema), failures, self.estimator.batches.notes())

    def _score(self, batch: list[Row], own: list[list[str]]) -> list[Row]:
        """Rows of images of one shape."""
        pairs = [Pair(i, label) for i, labels in enumerate(own) for label in sorted({*labels, *self.others})]
        sampler, n = self.estimator.config.typicality.sampler, self.estimator.draws
        found, draws = self.estimator.score(batch, pairs, sampler, n, SCORES, self.only)
        return [
            {
                "image_id": batch[i]["image_id"], "label": label, "own": label in own[i], "h": batch[i]["h"],
                "w": batch[i]["w"], "map": found.map[p].numpy().ravel(), "mean": float(found.mean[p]),
                "stderr": float(found.stderr[p]), "window_stderr": found.window_stderr[p].float().numpy().ravel(),
                "draws": len(draws.t), "degrees_of_freedom": float(found.degrees_of_freedom[p]),
                "failed_t": int(found.failed_t[p]), "share": draws.share,
            }
            for p, (i, label, _) in enumerate(pairs)
        ]  # fmt: skip

"""Latents, finetuned model -> typicality: a signed map per image and label, with standard errors."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from diffmine.diffusion.model import load
from diffmine.diffusion.typicality import SAMPLERS, Draws, Typicality
from diffmine.diffusion.typicality import typicality as compute_typicality
from diffmine.errors import ImageError
from diffmine.mining.patches import centred_matrix
from diffmine.prompts import prompt
from diffmine.run import SCHEMAS, Run, fetch_model
from diffmine.stages.latents import by_shape, device, latent_array
from diffmine.stages.manifest import read_shard
from diffmine.stages.session import Context, Result
from diffmine.stages.shards import Part, Payload, failure, stream

_AUTO_BATCH = {"cpu": 32, "cuda": 64}  # UNet samples per pass


@dataclass(frozen=True)
class Settings:
    """What a scoring actor needs of the config."""

    seed: int
    model: str
    text_encoder: str | None
    dtype: str
    template: str
    null_prompt: str
    draws: int
    t_min: float
    t_max: float
    sampler: str
    batch_size: int | str
    patch_size: int


def typicality(context: Context) -> Result:
    """T(x|c) of every image that has a latent, under its own labels."""
    config = context.config
    settings = Settings(
        config.seed, *scoring_model(context), config.model.dtype, config.prompt.template, config.prompt.null_prompt,
        config.typicality.draws, config.typicality.t_min, config.typicality.t_max, config.typicality.sampler,
        config.typicality.batch_size, config.patches.size,
    )  # fmt: skip
    shards = context.run.parts("latents")
    images = (context.run.committed("latents") or {}).get("rows", 0)
    return stream(context, "typicality", dict.fromkeys(shards, b""), read_latents, partial(Scorer, settings), images)


def scoring_model(context: Context) -> tuple[str, str | None]:
    """URI of the model that scores, and of its text encoder when that is not the model's own."""
    if context.config.finetune.enabled:
        return f"{context.run.uri}/model", None  # exported with the text encoder it was trained with
    return context.config.model.base, context.config.model.text_encoder


def read_latents(run: Run, shard: int, _told: bytes) -> Payload:
    """CPU task: the latents and labels of a shard."""
    return {
        "latents": run.read_part("latents", shard),
        "manifest": read_shard(run, shard).select(["image_id", "uri", "labels"]),
    }


class Scorer:
    """GPU actor: latents -> rows of the table, and the images whose maps are not numbers."""

    def __init__(self, settings: Settings) -> None:
        s = self.settings = settings
        text_encoder = fetch_model(s.text_encoder) if s.text_encoder else None
        self.model = load(fetch_model(s.model), s.dtype, device(), text_encoder)
        self.batch_size = _AUTO_BATCH[device()] if s.batch_size == "auto" else int(s.batch_size)
        self.null = self.model.embed([s.null_prompt])[0]
        self.texts: dict[str, torch.Tensor] = {}  # label -> [L, D]
        self.draws: dict[tuple[int, ...], Draws] = {}  # latent shape -> bank

    def __call__(self, payload: Payload) -> Part:
        manifest = {r["image_id"]: r for r in payload["manifest"].to_pylist()}
        rows: list[dict[str, Any]] = []
        failures: list[dict[str, str]] = []
        latents = payload["latents"].to_pylist()
        for batch in by_shape(latents, ("h", "w"), len(latents)):
            for row in self._score(batch, [manifest[r["image_id"]]["labels"] for r in batch]):
                if np.isfinite(row["map"]).all():
                    rows.append(row)
                elif row["image_id"] not in {f["image_id"] for f in failures}:
                    error = ImageError("non_finite", f"its map under {row['label']!r} is not finite")
                    failures.append(failure(row["image_id"], manifest[row["image_id"]]["uri"], error))
        failed = {f["image_id"] for f in failures}
        rows = sorted((r for r in rows if r["image_id"] not in failed), key=lambda r: (r["image_id"], r["label"]))
        return Part(pa.Table.from_pylist(rows, schema=SCHEMAS["typicality"]), failures)

    def _score(self, batch: list[dict[str, Any]], labels: list[list[str]]) -> list[dict[str, Any]]:
        """Rows of images of one shape."""
        conditions = sorted({label for own in labels for label in own})
        pairs = [(i, conditions.index(label)) for i, own in enumerate(labels) for label in own]
        latents = torch.from_numpy(np.stack([latent_array(r) for r in batch])).float()  # [B, C, h, w]
        _, _, h, w = latents.shape
        size, cell = self.settings.patch_size, self.model.cell
        found = compute_typicality(
            self.model, latents, pairs, torch.stack([self._text(c) for c in conditions]), self.null,
            self._draws(tuple(latents.shape[1:])), torch.from_numpy(centred_matrix(h, h * cell, size).copy()),
            torch.from_numpy(centred_matrix(w, w * cell, size).copy()), self.batch_size,
        )  # fmt: skip
        return [self._row(batch[i]["image_id"], conditions[k], found, p) for p, (i, k) in enumerate(pairs)]

    def _row(self, image_id: str, label: str, found: Typicality, p: int) -> dict[str, Any]:
        h, w = found.map[p].shape
        return {
            "image_id": image_id, "label": label, "h": h, "w": w, "map": found.map[p].numpy().ravel(),
            "mean": float(found.mean[p]), "stderr": float(found.stderr[p]),
            "window_stderr": found.window_stderr[p].float().numpy().ravel(), "draws": self.settings.draws,
        }  # fmt: skip

    def _text(self, label: str) -> torch.Tensor:
        if label not in self.texts:
            self.texts[label] = self.model.embed([prompt(label, self.settings.template)])[0]
        return self.texts[label]

    def _draws(self, shape: tuple[int, ...]) -> Draws:
        if shape not in self.draws:
            s = self.settings
            self.draws[shape] = SAMPLERS[s.sampler](s.seed, s.draws, s.t_min, s.t_max, shape)  # type: ignore[arg-type]
        return self.draws[shape]

"""Top patches, latents, finetuned model -> features: one row per top patch."""

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from diffmine.diffusion.features import dift, ensemble_noise, pool
from diffmine.diffusion.memory import Batches
from diffmine.diffusion.model import load
from diffmine.errors import NonFiniteError
from diffmine.prompts import prompt
from diffmine.run import Run, fetch_model, fetch_text_encoder
from diffmine.stages.latents import by_shape, latent_rows
from diffmine.stages.session import Context, Result
from diffmine.stages.shards import Part, Payload, stream
from diffmine.stages.typicality import scoring_model

_IMAGES_AT_ONCE = 32
_COLUMNS = ["patch_id", "image_id", "label", "x", "y", "width", "height", "kind"]


@dataclass(frozen=True)
class Settings:
    """What a feature actor needs of the config."""

    seed: int
    model: str
    text_encoder: str | None
    dtype: str
    template: str
    timestep: int
    up_block: int
    ensemble: int
    batch_size: int | str


def features(context: Context) -> Result:
    """Diffusion features of the top patches, one computation per image and label."""
    config, run = context.config, context.run
    settings = Settings(
        config.seed, *scoring_model(context), config.model.dtype, config.prompt.template, config.features.timestep,
        config.features.up_block, config.features.ensemble, config.features.batch_size,
    )  # fmt: skip
    patches = {shard: len(_top(part)) for shard, part in run.read_parts("patches", ["kind"]).items()}
    shards = {shard: b"" for shard, found in patches.items() if found}
    return stream(
        context, "features", shards, _read, partial(_Extractor, settings), sum(patches.values()), unit="patches"
    )


def _top(patches: pa.Table) -> pa.Table:
    return patches.filter(pc.equal(patches["kind"], "top"))


def _read(run: Run, shard: int, _told: bytes) -> Payload:
    """CPU task: the top patches of a shard and the latents they lie on."""
    patches, latents = _top(run.read_part("patches", shard, _COLUMNS)), run.read_part("latents", shard)
    return {
        "patches": patches,
        "latents": latents.filter(pc.is_in(latents["image_id"], patches["image_id"].combine_chunks())),
    }


class _Extractor:
    """GPU actor: latents and patches -> features."""

    def __init__(self, settings: Settings, device: str = "cpu") -> None:
        s = self.settings = settings
        text_encoder = fetch_text_encoder(s.text_encoder)
        self.model = load(fetch_model(s.model), s.dtype, device, text_encoder)
        self.batches = Batches(settings.batch_size, device)

    def __call__(self, payload: Payload) -> Part:
        groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)  # (image, label) -> patches
        for patch in payload["patches"].to_pylist():
            groups[patch["image_id"], patch["label"]].append(patch)
        latents = {r["image_id"]: r for r in latent_rows(payload["latents"])}
        jobs = [{"key": key, "h": latents[key[0]]["h"], "w": latents[key[0]]["w"]} for key in sorted(groups)]
        found: list[tuple[str, np.ndarray]] = []
        for batch in by_shape(jobs, ("h", "w"), _IMAGES_AT_ONCE):
            found += self._extract([job["key"] for job in batch], latents, groups)
        found.sort(key=lambda item: item[0])
        matrix = np.stack([feature for _, feature in found])  # [patches, D]
        if not np.isfinite(matrix).all():
            raise NonFiniteError(
                f"features of {found[int(np.flatnonzero(~np.isfinite(matrix).all(1))[0])][0]} are not finite"
            )
        column = pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), matrix.shape[1])
        rows = pa.table({"patch_id": [patch_id for patch_id, _ in found], "feature": column})
        return Part(rows, [], self.batches.notes())

    def _extract(
        self, keys: list[tuple[str, str]], latents: dict[str, Any], groups: dict[Any, Any]
    ) -> list[tuple[str, np.ndarray]]:
        s, cell = self.settings, self.model.cell
        batch = torch.from_numpy(np.stack([latents[image]["latent"] for image, _ in keys])).float()  # [B, C, h, w]
        text = self.model.embed([prompt(label, s.template) for _, label in keys])
        noise = ensemble_noise(s.seed, s.ensemble, tuple(batch.shape[1:]))  # type: ignore[arg-type]
        h, w = batch.shape[2:]
        batched = self.batches.of(h, w)
        maps = batched(lambda n: dift(self.model, batch, text, s.timestep, noise, s.up_block, n))  # [B, D, h', w']
        height, width = h * cell, w * cell
        found = []
        for key, activations in zip(keys, maps, strict=True):
            boxes = np.array([[p["x"], p["y"], p["width"], p["height"]] for p in groups[key]], dtype=np.float64)
            pooled = pool(activations, boxes, height, width)
            found += [(p["patch_id"], feature) for p, feature in zip(groups[key], pooled, strict=True)]
        return found

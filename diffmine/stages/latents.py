"""Manifest -> latents: every image is opened, prepared and encoded once; whatever comes later reads latents.

Images that could not be read can be tried once more, without the model.
"""

from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from diffmine.config import Config
from diffmine.data.images import decode, prepare
from diffmine.data.labels import label_sizes
from diffmine.data.reading import files_ahead, require_folder, require_rights
from diffmine.diffusion.memory import Batches
from diffmine.diffusion.model import cell_size, load
from diffmine.errors import ImageError, StageError
from diffmine.run import SCHEMAS, Run, fetch_model, run_here
from diffmine.stages.manifest import read_shard, shard_count
from diffmine.stages.session import Context, Result
from diffmine.stages.shards import Part, Payload, each_shard, failure, stream
from diffmine.store import is_refusal

_BATCH = 16  # images per pass of the VAE, to begin with
_PREPARED = pa.schema(
    [("image_id", pa.string()), ("uri", pa.string()), ("reason", pa.string()), ("detail", pa.string()),
     ("pixels", pa.binary()), ("prepared_height", pa.int32()), ("prepared_width", pa.int32()),
     ("width", pa.int32()), ("height", pa.int32()), ("scale", pa.float64()), ("crop_x", pa.int32()),
     ("crop_y", pa.int32())]
)  # fmt: skip


def latents(context: Context) -> Result:
    """Encode every image of the manifest; one that cannot be used becomes a row of failures."""
    config, (shards, images) = context.config, shard_count(context.run)
    read = _reader(config)
    with_std = config.finetune.enabled and config.finetune.posterior == "sample"
    make = partial(_Encoder, config.model.base, config.model.dtype, with_std)
    result = stream(context, "latents", dict.fromkeys(range(shards), b""), read, make, images)
    _check_labels(context, result)
    result.marker["cell"] = cell_size(fetch_model(config.model.base))
    return result


def _check_labels(context: Context, result: Result) -> None:
    """Name the labels of which no image was readable; end the run when that is all of them."""
    run = context.run
    if not result.marker["failures"]:
        return
    failed = run.table("failures/latents", ["image_id", "reason"])
    if not result.marker["rows"]:
        listed = ", ".join(f"{r['values']}: {r['counts']}" for r in failed["reason"].value_counts().to_pylist())
        raise StageError(
            f"latents: none of the images could be used ({listed}); diffmine status {run.uri} says more; when the "
            "dataset is mended, mine it with --rerun"
        )
    images = run.table("manifest", ["image_id", "labels"])
    lost = label_sizes(images.filter(pc.is_in(images["image_id"], failed["image_id"].combine_chunks())))
    for label in sorted(label for label, count in label_sizes(images).items() if lost.get(label) == count):
        context.progress.say(f"latents: label {label!r} has no readable image; it is left out")


def readable_now(context: Context) -> dict[int, int]:
    """Shard -> how many of its images that could not be read can be read now, where there are such images.

    Only reads. Of an image whose pixels or latent were not finite nothing can be said without the model: it is left
    out.
    """
    run, progress = context.run, context.progress
    shards = run.parts("failures/latents")
    progress.start("retry-failed", len(shards), "shards")
    found = {}
    for row in each_shard(
        context, "retry-failed", dict.fromkeys(shards, b""), _Trial(run.uri, _reader(context.config))
    ):
        progress.advance(1)
        if row["readable"]:
            found[row["shard"]] = row["readable"]
    return found


def _reader(config: Config) -> "_Reader":
    return _Reader(
        config.dataset.image.short_side,
        config.dataset.image.multiple_of,
        config.compute.max_image_pixels,
        config.compute.max_image_bytes,
    )


@dataclass
class _Trial:
    """CPU task: the failures of a shard -> how many of them can be read now."""

    run_uri: str
    reader: "_Reader"

    def __call__(self, batch: pa.Table) -> pa.Table:
        [shard] = batch["shard"].to_pylist()
        failed = run_here(self.run_uri).read_part("failures/latents", shard)
        tried = failed.filter(pc.not_equal(failed["reason"], "non_finite")).select(["image_id", "uri"]).to_pylist()
        readable = sum("reason" not in row for row in self.reader.rows(tried))
        return pa.table({"shard": [shard], "readable": [readable]})


@dataclass
class _Reader:
    """CPU task: the files of a shard -> prepared pixels, or the reason why not."""

    short_side: int
    multiple_of: int
    max_pixels: int
    max_bytes: int

    def __call__(self, run: Run, shard: int, _told: bytes) -> Payload:
        rows = [*self.rows(read_shard(run, shard).select(["image_id", "uri"]).to_pylist())]
        require_rights(rows)
        return {"images": pa.Table.from_pylist(rows, schema=_PREPARED)}

    def rows(self, images: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Of images with `image_id` and `uri`, in their order."""
        files = files_ahead([image["uri"] for image in images], self.max_bytes)
        return map(self._row, images, files)

    def _row(self, row: dict[str, Any], data: Future[bytes]) -> dict[str, Any]:
        try:
            upright = decode(data.result(), max_pixels=self.max_pixels, max_bytes=self.max_bytes)
            pixels, geometry = prepare(upright, self.short_side, self.multiple_of)
        except ImageError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                require_folder(row["uri"], row["image_id"])
            return row | {"reason": error.reason, "detail": error.detail, "refused": is_refusal(error.__cause__)}
        height, width = upright.shape[:2]
        return row | {
            "pixels": pixels.tobytes(), "prepared_height": pixels.shape[0], "prepared_width": pixels.shape[1],
            "width": width, "height": height, "scale": geometry.scale, "crop_x": geometry.crop_x,
            "crop_y": geometry.crop_y,
        }  # fmt: skip


class _Encoder:
    """GPU actor: prepared pixels -> latents, and the posterior's standard deviations where training samples it."""

    def __init__(self, model: str, dtype: str, with_std: bool, device: str = "cpu") -> None:
        self.model, self.with_std = load(fetch_model(model), dtype, device), with_std
        self.batches = Batches(_BATCH, device)

    def __call__(self, payload: Payload) -> Part:
        images = payload["images"]
        rows = images.drop_columns(["pixels"]).to_pylist()
        for row, pixels in zip(rows, images["pixels"], strict=True):
            row["pixels"] = pixels.as_buffer()  # a view: a copy would take longer than all else that is done here
        failures = [{k: r[k] for k in ("image_id", "uri", "reason", "detail")} for r in rows if r["reason"]]
        usable = [r for r in rows if not r["reason"]]
        encoded: list[dict[str, Any]] = []
        for batch in by_shape(usable, ("prepared_height", "prepared_width"), _BATCH):
            shape = (batch[0]["prepared_height"], batch[0]["prepared_width"], 3)
            pixels = np.stack([np.frombuffer(r["pixels"], np.uint8).reshape(shape) for r in batch])
            means, stds = self.batches.of(*shape[:2])(partial(self._posterior, pixels))
            for row, latent, std in zip(batch, means, stds, strict=True):
                if not np.isfinite(latent).all():
                    error = ImageError("non_finite", "its latent is not finite")
                    failures.append(failure(row["image_id"], row["uri"], error))
                    continue
                _, h, w = latent.shape
                found = {"h": h, "w": w, "latent": latent.ravel(), "latent_std": std.ravel() if self.with_std else None}
                encoded.append({k: row.get(k) for k in SCHEMAS["latents"].names} | found)
        encoded.sort(key=lambda r: r["image_id"])
        return Part(pa.Table.from_pylist(encoded, schema=SCHEMAS["latents"]), failures, self.batches.notes())

    def _posterior(self, pixels: np.ndarray, at_once: int) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [B, H, W, 3] -> means and standard deviations of the posterior, float16 [B, C, h, w] each."""
        found = []
        for start in range(0, len(pixels), at_once):
            shown = torch.from_numpy(pixels[start : start + at_once]).to(self.model.device).permute(0, 3, 1, 2)
            found.append([n.half().cpu() for n in self.model.posterior(shown.float().div_(127.5).sub_(1))])
        means, stds = (torch.cat(each).numpy() for each in zip(*found, strict=True))
        return means, stds


def by_shape(rows: list[dict[str, Any]], keys: tuple[str, str], batch: int) -> Iterator[list[dict[str, Any]]]:
    """Batches of rows that have the same values of `keys`."""
    groups: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row[keys[0]], row[keys[1]]].append(row)
    for shape in sorted(groups):
        for start in range(0, len(groups[shape]), batch):
            yield groups[shape][start : start + batch]


def latent_rows(table: pa.Table) -> list[dict[str, Any]]:
    """Rows of the table, with their latents as arrays, float16 [C, h, w]: no number becomes an object of Python."""
    rows: list[dict[str, Any]] = table.select([n for n in table.column_names if not n.startswith("latent")]).to_pylist()
    for row, latent in zip(rows, table["latent"], strict=True):
        row["latent"] = latent.values.to_numpy().reshape(-1, row["h"], row["w"])
    return rows

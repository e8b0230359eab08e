"""Tables -> report/index.html, and a page per label with its pictures and data.

    the driver chooses what is shown of each label -> a task opens a page's images, draws and writes its files
      -> the driver writes the overview

A few pages are made by the driver itself; many by Ray tasks, side by side.
"""

import hashlib
import json
import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from diffmine.config import Config
from diffmine.curate import KEPT, clusters_of, kept, page_labels
from diffmine.data.manifest import some
from diffmine.data.reading import prepared_images, require_dataset
from diffmine.errors import InputError
from diffmine.report.beside import beside_files
from diffmine.report.curation import Curation
from diffmine.report.finetuning import Finetuning
from diffmine.report.hits import hit_table
from diffmine.report.page import Job, Maps, page_files
from diffmine.report.site import Site
from diffmine.run import Run, run_here
from diffmine.stages.maps import map_rows
from diffmine.stages.session import Context, Result, connected, describe
from diffmine.stages.shards import each_shard
from diffmine.store import at_once

_GEOMETRY = ["image_id", "width", "height", "h", "w", "scale", "crop_x", "crop_y"]
_HITS_TOP = 30  # most typical patches of a label that are compared with its boxes
_FEW = 8  # pages that are made faster than tasks start


def report(context: Context) -> Result:
    """Write the static site."""
    run, progress = context.run, context.progress
    tables = {name: run.table(name) for name in ("manifest", "clusters", "members", "samples")}
    parts = run.read_parts("patches")
    shards = _shards(parts)
    tables["patches"] = pa.concat_tables(parts.values()) if parts else run.table("patches")
    tables["failures"] = run.failures()
    if run.committed("localisation") is not None:
        tables["localisation"] = run.table("localisation")
        located = pc.unique(tables["localisation"]["image_id"])
        shards |= _shards(run.read_parts("latents", ["image_id"]), located)
    marker, scored, words = run.committed("manifest") or {}, run.committed("typicality") or {}, kept(run)
    notes = marker.get("notes", [])
    if "localisation" in tables and not len(located):
        notes = [*notes, "no map was compared with boxes: no scored image has a box of one of its labels"]
    if words is None and run.exists(KEPT):
        progress.say(f"report: {KEPT} is left out, as its words are on clusters that were made anew since")
    settings = {
        "uri": run.uri,
        "config": context.config.model_dump(mode="json"),
        "run": _facts(run, context),
        "notes": notes,
        "skipped": marker.get("skipped_files", {}),
        "hits": hits(run),
        "finetuning": _finetuning(run),
        "draws": scored.get("draws"),
        "draws_spent": scored.get("draws_spent"),
        "passes": _passes(run),
        "fresh_passes": _fresh_passes(tables["patches"], context.config.patches.fresh_draws),
        "cell": (run.committed("latents") or {}).get("cell"),
        "curation": words or Curation(clusters_of=clusters_of(run)),
    }
    other = _other(context)
    if other is not None:
        settings |= {"beside": page_labels(other), "beside_name": context.config.report.beside}
    site = Site(tables, settings)
    for row in tables["manifest"].select(["uri", "image_id"]).slice(0, 1).to_pylist():
        require_dataset(**row)  # a report that is there is better than one without pictures
    progress.start("report", len(site.pages), "pages")
    run.remove("report")
    files: dict[str, str] = {}
    unreadable: dict[str, str] = {}
    for made in _made(context, site.jobs(shards), len(site.pages)):
        files |= made["files"]
        unreadable |= made["unreadable"]
        progress.advance(1)
    if other is not None:
        numbers = {page.label: page.number for page in site.pages}
        files |= _write(run, beside_files(numbers, settings["beside"], lambda name: other.read(f"report/{name}")))
    files |= _write(run, site.overview(unreadable))
    if unreadable:
        told = some([f"{image_id} ({reason})" for image_id, reason in sorted(unreadable.items())])
        progress.say(f"report: images that can no longer be read, whose patches are grey: {told}")
    progress.finish(f"{run.uri}/report/index.html")
    return Result(files, {"rows": len(files), "hits": settings["hits"]})


def _shards(parts: Mapping[int, pa.Table], images: pa.Array | None = None) -> dict[str, int]:
    """image_id -> number of the part that it is in; of some images, or of all."""
    ids = {part: pc.unique(rows["image_id"]) for part, rows in parts.items()}
    if images is not None:
        ids = {part: own.filter(pc.is_in(own, images)) for part, own in ids.items()}
    return {image_id: part for part, own in ids.items() for image_id in own.to_pylist()}


def _other(context: Context) -> Run | None:
    """The run whose clusters are to stand beside this one's.

    Raises:
        InputError: it has no report.
    """
    uri = context.config.report.beside
    if uri is None:
        return None
    other = Run(uri)
    if other.committed("report") is None:
        raise InputError(f"report.beside: {uri} is no run with a report")
    return other


def _made(context: Context, jobs: Iterable[Job], count: int) -> Iterator[dict[str, Any]]:
    """Make the pages; of each the digests of its files, and the images that could not be read with the reason."""
    task = _Page(context.run.uri, context.config)
    if count <= _FEW:
        yield from map(task.make, jobs)
        return
    told = {job.page.number: pickle.dumps(job) for job in jobs}
    with connected(context):
        for row in each_shard(context, "report", told, task):
            yield json.loads(row["made"])


@dataclass(frozen=True)
class _Page:
    """Ray task: a page and its pictures. The only place after `latents` that opens image files."""

    run_uri: str
    config: Config

    def __call__(self, batch: pa.Table) -> pa.Table:
        [told] = batch["told"].to_pylist()
        return pa.table({"made": [json.dumps(self.make(pickle.loads(told)))]})  # noqa: S301  # the driver's own

    def make(self, job: Job) -> dict[str, Any]:
        run, unreadable = run_here(self.run_uri), dict[str, str]()
        opened = prepared_images([job.uris[i] for i in job.page.image_ids()], self.config)
        made = page_files(job, opened, _maps(run, job), unreadable)
        return {"files": _write(run, made), "unreadable": unreadable}


def _maps(run: Run, job: Job) -> Maps:
    """Typicality maps of the images that the page shows, under their own labels."""
    shards = sorted(set(job.shards.values()) & set(run.parts("typicality")))

    def read(file: pq.ParquetFile) -> dict[tuple[str, str], np.ndarray]:
        return {
            (row["image_id"], row["label"]): row["map"].copy()  # a view would keep all that was read with it
            for row in map_rows(file, ["image_id", "label", "own", "h", "w", "map"], own=True, images=job.shards)
            if job.page.label in (None, row["label"])
        }

    found: dict[tuple[str, str], np.ndarray] = {}
    for maps in at_once(lambda shard: run.pieces("typicality", shard, read), shards):
        found |= maps
    return found


def _write(run: Run, files: Iterable[tuple[str, bytes]]) -> dict[str, str]:
    """Put files of the report; their names in the run with their digests. A page that is made again replaces itself."""
    digests = {}
    for name, data in files:
        run.replace(f"report/{name}", data)
        digests[f"report/{name}"] = hashlib.sha256(data).hexdigest()
    return digests


def hits(run: Run) -> list[dict[str, Any]] | None:
    """How often the most typical patches of each label lie on its boxes; None for a dataset without boxes."""
    manifest = run.table("manifest", ["image_id", "labels", "boxes"])
    if manifest["boxes"].null_count == len(manifest):
        return None
    cell = (run.committed("latents") or {})["cell"]
    return hit_table(run.table("patches"), manifest, run.table("latents", _GEOMETRY), cell, _HITS_TOP)


def _facts(run: Run, context: Context) -> dict[str, Any]:
    """Versions and times, of this session and of what earlier ones committed."""
    stages = ("manifest", "latents", "model", "typicality", "patches", "features", "clusters", "localisation")
    seconds = {m["stage"]: m["wall_s"] for s in stages if (m := run.committed(s))}
    return {**describe(context), "seconds": seconds}


def _passes(run: Run) -> int | None:
    """UNet passes of scoring: of each image without a label, and of each with every label that it was scored under."""
    scored, latents = run.committed("typicality"), run.committed("latents")
    if not scored or not latents:
        return None
    return round((latents["rows"] + scored["rows"]) * scored["draws"] * (scored.get("draws_spent") or 1))


def _fresh_passes(patches: pa.Table, draws: int) -> int:
    """UNet passes of scoring patches again: of each of their images without a label, and with each of theirs, and with
    each that is the strongest of the others."""
    again = patches.filter(pc.is_valid(patches["fresh_typicality"]))
    images = pc.count_distinct(again["image_id"]).as_py()
    own, rivals = (again.select(["image_id", name]).rename_columns(["image_id", "text"]) for name in ("label", "rival"))
    texts = pa.concat_tables([own, rivals.drop_null()]).group_by(["image_id", "text"]).aggregate([])
    return int((images + len(texts)) * draws)


def _finetuning(run: Run) -> Finetuning:
    """Losses of steps and of every validation, and the images that were mined but not trained on."""
    marker = run.committed("model") or {"files": {}}
    unseen = set(run.table("held_out", ["image_id"])["image_id"].to_pylist())
    if unseen:  # and some of them still cannot be
        unseen.difference_update(run.table("failures/latents", ["image_id"])["image_id"].to_pylist())
    latents = run.committed("latents")
    metrics, validation = (
        [json.loads(line) for line in run.read(name).splitlines()] if name in marker["files"] else []
        for name in ("model/metrics.jsonl", "model/validation.jsonl")
    )
    return Finetuning(
        loss=[line["loss"] for line in metrics],
        steps=marker.get("steps", 0),
        validation=validation,
        held_out=frozenset(unseen),
        trained=latents["rows"] - len(unseen) if latents else None,
    )

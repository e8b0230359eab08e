"""Tables -> the files of a static site: an overview, and a page per label with its clusters as rows of patches.

The pages need no server, and can be read without their scripts. File names are numbers, never labels; every string from
data is escaped.
"""

import io
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import yaml
from pyarrow import csv, parquet

from diffmine.data.labels import label_sizes
from diffmine.data.manifest import to_convert
from diffmine.report import images
from diffmine.report.charts import svg
from diffmine.report.charts.facets import Facets, where_and_when
from diffmine.report.charts.histogram import histogram_svg
from diffmine.report.charts.maps import map_svg
from diffmine.report.charts.timeline import timeline_svg
from diffmine.report.curation import Curation, to_script
from diffmine.report.finetuning import Finetuning
from diffmine.report.joined import cluster_ranks, flat, patches_with_images
from diffmine.report.localisation import Localisation, localisations, mean_of
from diffmine.report.page import Files, Job, facts
from diffmine.report.pages import KINDS, Page, choose, usable_images
from diffmine.report.rendering import KIND_NAMES, asset, environment, style
from diffmine.tables import grouped

_SCORES = {
    "typicality", "stderr", "fresh_typicality", "fresh_stderr", "contrast", "fresh_contrast", "fresh_contrast_stderr",
    "distance",
}  # fmt: skip


class Site:
    """What the pages show, and all that each is made from.

    Args:
        tables: `manifest`, `patches`, `clusters`, `members`, and where there are any `samples`, `localisation` and
            `failures`; columns as the run writes them.
        settings: `config` (nested dict), `run` (`versions`, `seconds` per stage, `git_revision`), `notes` (sentences),
            `hits` (rows of `hit_table`, or None), `skipped` (file extension -> files), `finetuning` (a Finetuning),
            `passes`, `fresh_passes` (UNet passes of scoring, and of scoring again), `cell` (side of a latent cell in
            pixels, default 8), `curation` (a Curation), `beside` (labels that `beside_files` makes files of) and
            `beside_name`, `uri` of the run's folder (default `config.output`). All but `config` may be missing.
    """

    def __init__(self, tables: Mapping[str, pa.Table], settings: Mapping[str, Any]) -> None:
        self.tables, self.settings, config = tables, settings, settings["config"]
        self.joint = config["clusters"]["scope"] == "dataset"
        self.patches_per_row = min(config["report"]["patches_per_cluster"], images.LONGEST_STRIP)
        self.pages = choose(
            tables, self.joint, config["report"]["clusters_per_label"], self.patches_per_row,
            config["dataset"]["group_column"], tables.get("localisation"),
        )  # fmt: skip
        self.run = settings.get("uri") or config["output"]
        self.finetuning: Finetuning = settings.get("finetuning") or Finetuning()
        self.decimals = _decimals(self.pages)
        self.localisation: list[Localisation] = []
        if "localisation" in tables:
            self.localisation = localisations(
                tables["localisation"], tables["manifest"], config["dataset"]["group_column"]
            )

    def jobs(self, shards: Mapping[str, int] | None = None) -> Iterator[Job]:
        """One for each page.

        Args:
            shards: image_id -> number of its part of the run's tables.
        """
        samples, rows = _samples(self.tables.get("samples")), grouped(patches_with_images(self.tables), "label")
        manifest = _rows_of(self.tables["manifest"], {i for page in self.pages for i in page.image_ids()})
        versions = (self.settings.get("run") or {}).get("versions", {})
        hits = {row["label"]: row for row in self.settings.get("hits") or ()}
        located = {one.label: one for one in self.localisation}
        beside = [None, *((page.number, page.label) for page in self.pages), None]
        clustered = [page.number for page in self.pages if page.clusters]
        # each beside the next one, the last one beside the one before it
        compare = dict(zip(clustered, [*clustered[1:], *clustered[-2:-1]], strict=False))
        held_out = self.finetuning.held_out
        facets, of_label = where_and_when(self.tables["manifest"]), _images_of_labels(self.tables["manifest"])
        for i, page in enumerate(self.pages):
            own = {image_id: manifest[image_id] for image_id in page.image_ids()}
            yield Job(
                page, self.settings["config"], versions, self.decimals, self.settings.get("cell") or 8, self.run,
                uris={image_id: row["uri"] for image_id, row in own.items()},
                facts={name: found for name, row in own.items() if (found := facts(row, name in held_out))},
                validation=self.finetuning.of_label(page.label), hit=hits.get(page.label),
                localisation=located.get(page.label),
                beside=(beside[i], beside[i + 2]), compare=compare.get(page.number),
                samples=samples.get(page.label, []),
                other=self.settings["beside_name"] if page.label in (self.settings.get("beside") or ()) else None,
                downloads={} if page.label is None else _downloads(rows[page.label]),
                charts=_charts(rows[page.label], of_label[page.label], facets) if page.label is not None else {},
                shards={image_id: shards[image_id] for image_id in own} if shards else {},
            )  # fmt: skip

    def overview(self, unreadable: Mapping[str, str]) -> Files:
        """The files that are not of one page.

        Args:
            unreadable: image_id -> why it could not be read for a page.
        """
        found = self.localisation
        facts = {
            **_overview(self.tables, self.settings, self.pages, self.finetuning),
            "localisation": [mean_of(found), *found] if len(found) > 1 else found,
        }
        templates = environment(self.decimals)
        yield "style.css", style(self.patches_per_row)
        if self.pages:
            words = self.settings.get("curation") or Curation(clusters_of="")
            labels, ranks = [page.label for page in self.pages], cluster_ranks(self.tables["clusters"])
            yield "curation.js", to_script(words, labels, ranks)
            yield from (
                (name, asset(name)) for name in ("clusters.js", "explore.js", "curate.js", "figure.js", "overview.js")
            )
        if len(facts["labels"]) > 1:
            yield "find.js", asset("find.js")
        if facts["compared"]:
            yield "compare.js", asset("compare.js")
            yield "compare.html", templates.get_template("compare.html").render(root="", **facts).encode()
        yield (
            "index.html",
            templates.get_template("index.html").render(root="", unreadable=unreadable, **facts).encode(),
        )


def _rows_of(manifest: pa.Table, image_ids: set[str]) -> dict[str, dict[str, Any]]:
    """image_id -> its row of the manifest, without boxes."""
    rows = manifest.filter(pc.is_in(manifest["image_id"], pa.array(sorted(image_ids), pa.string())))
    return {row["image_id"]: row for row in rows.drop_columns(["boxes"]).to_pylist()}


def _images_of_labels(manifest: pa.Table) -> dict[str, pa.ChunkedArray]:
    """label -> image_ids."""
    labels = manifest["labels"].combine_chunks()
    images = manifest["image_id"].take(pc.list_parent_indices(labels))
    found = grouped(pa.table({"label": pc.list_flatten(labels), "image_id": images}), "label")
    return {label: rows["image_id"] for label, rows in found.items()}


def _charts(patches: pa.Table, images: pa.ChunkedArray, facets: Facets) -> dict[str, str]:
    """Of a label: title -> SVG of where and when its images and its most typical patches are, and how T is spread."""
    kinds = {kind: patches.filter(pc.equal(patches["kind"], kind)) for kind in KINDS}
    typical = kinds["top"]["image_id"]
    spread = {KIND_NAMES[kind].lower(): rows["typicality"].to_numpy() for kind, rows in kinds.items()}
    charts = {
        "Where": map_svg(facets, images, typical), "When": timeline_svg(facets, images, typical),
        "T of its patches": histogram_svg(spread),
    }  # fmt: skip
    return {title: svg for title, svg in charts.items() if svg}


def _decimals(pages: Sequence[Page]) -> int:
    """That show three digits of the largest score; eight at most."""
    scores = [abs(page.median_typicality) for page in pages if math.isfinite(page.median_typicality)]
    return min(8, svg.decimals(max(scores, default=0.0)))


def _samples(table: pa.Table | None) -> dict[str | None, list[bytes]]:
    """label -> PNG files sampled from the finetuned model, in order."""
    groups: dict[str | None, list[bytes]] = {}
    for row in table.sort_by([("label", "ascending"), ("index", "ascending")]).to_pylist() if table is not None else ():
        groups.setdefault(row["label"], []).append(row["image"]["bytes"])
    return {label: pngs[: images.LONGEST_STRIP] for label, pngs in groups.items()}


# ------------------------------------------------------------------------------------------------------- to take away


def _downloads(rows: pa.Table) -> dict[str, bytes]:
    """The most typical patches of a label, as files of two kinds; scores in the CSV have six digits."""
    rows = rows.filter(pc.equal(rows["kind"], "top")).sort_by([("rank", "ascending")]).drop_columns(["kind"])
    text, columns = io.BytesIO(), io.BytesIO()
    parquet.write_table(rows, columns, compression="zstd")
    for i, name in enumerate(rows.column_names):
        if name in _SCORES:
            rounded = [None if score is None else float(f"{score:.6g}") for score in rows[name].to_pylist()]
            rows = rows.set_column(i, name, pa.array(rounded, pa.float64()))
    csv.write_csv(flat(rows), text)
    return {"csv": text.getvalue(), "parquet": columns.getvalue()}


# -------------------------------------------------------------------------------------------------------- the overview


def _overview(
    tables: Mapping[str, pa.Table], settings: Mapping[str, Any], pages: Sequence[Page], finetuning: Finetuning
) -> dict[str, Any]:
    """What the templates show of the whole run."""
    mined, usable = {page.label for page in pages}, label_sizes(usable_images(tables))
    unmined = [label for label in label_sizes(tables["manifest"]) if label not in mined]
    ranked = sorted(pages, key=lambda page: (page.label is not None, -_number(page.median_typicality)))
    clustered = [page for page in ranked if page.clusters]
    sizes = [page.usable for page in pages if page.label is not None]
    run = {"versions": {}, "seconds": {}, "git_revision": None, **(settings.get("run") or {})}
    seconds, failures = run["seconds"], tables.get("failures")
    beside, skipped, hits = settings.get("beside") or (), settings.get("skipped") or {}, settings.get("hits") or ()
    notes = [*(settings.get("notes") or ())]
    if settings.get("beside_name") and not mined.intersection(beside):
        notes.append(f"{settings['beside_name']} (report.beside) has none of these labels: nothing stands side by side")
    return {
        "config": settings["config"], "run": run, "notes": notes,
        "skipped": skipped, "to_convert": to_convert(skipped),
        "hits": {row["label"]: row for row in hits},
        "partly_annotated": any(row["annotated"] < row["images"] for row in hits),
        "images": len(tables["manifest"]), "labels": [page for page in pages if page.label is not None],
        "usable": (min(sizes), max(sizes)) if sizes else None,
        "ranked": ranked, "compared": clustered if len(clustered) > 1 or mined.intersection(beside) else [],
        "unusable": [label for label in unmined if label not in usable],
        "uncompared": [label for label in unmined if label in usable],
        "failures": _failures(failures), "failed": len(failures) if failures is not None else 0,
        "seconds": seconds, "total_seconds": sum(seconds.values()),
        "finetuning": finetuning.told(tables["patches"]),
        "steps": finetuning.steps or settings["config"]["finetune"]["steps"],
        "largest": max((_number(page.median_typicality + page.stderr) for page in pages), default=0.0),
        "fresh_count": max((page.fresh.count for page in pages if page.fresh and page.label is not None), default=0),
        "beside": beside, "beside_name": settings.get("beside_name"),
        "draws": settings.get("draws"), "draws_spent": settings.get("draws_spent"),
        "passes": settings.get("passes"), "fresh_passes": settings.get("fresh_passes"),
        "raced": settings["config"]["typicality"]["racing"],
        "settings_text": yaml.safe_dump(settings["config"], sort_keys=False, allow_unicode=True, width=100),
    }  # fmt: skip


def _number(value: float) -> float:
    """For sorting: no patches is less than any."""
    return value if math.isfinite(value) else -math.inf


def _failures(table: pa.Table | None) -> list[tuple[str, int, list[str]]]:
    """Reason, number of images, and the first of them; most frequent first."""
    if table is None or not len(table):
        return []
    counts = Counter(table["reason"].to_pylist())
    found = []
    for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        own = table.filter(pc.equal(table["reason"], reason))
        found.append((reason, count, sorted(own["image_id"].to_pylist())[:3]))
    return found

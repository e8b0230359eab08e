"""A mined run -> its patches in formats that other tools read: CSV, COCO, Hugging Face datasets, FiftyOne.

A patch goes with its label, scores, cluster and boxes, and with all that the manifest says of its image. A new format
is a function, and its name in `FORMATS`.
"""

import io
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image
from pyarrow import csv

from diffmine.config import Config
from diffmine.curate import kept
from diffmine.data.reading import prepared_images
from diffmine.errors import ImageError, InputError
from diffmine.mining.patches import KINDS
from diffmine.report.curation import Curation
from diffmine.report.joined import flat, patches_with_images
from diffmine.run import Run
from diffmine.store import Store
from diffmine.tables import grouped

_ROWS = 2000  # of a Parquet file, about; the crops of so many patches are held in memory
_QUALITY = 95  # of a crop, WebP
Row = dict[str, Any]


@dataclass(frozen=True)
class Mined:
    """What is exported.

    Attributes:
        patches: the table of patches, of the kinds that are wanted, with the image's uri, the cluster, and the
            manifest's own columns (see `patches_with_images`), and `cluster_name` where a curator gave any; by label,
            kind and rank.
        images: image_id, width, height: of the upright image in pixels.
    """

    run: Run
    config: Config
    patches: pa.Table
    images: pa.Table


def export(run: Run, config: Config, to: str, destination: str, kinds: Iterable[str] = ("top",)) -> int:
    """Write the patches of a run to a folder, local or of an object store; how many there are.

    Raises:
        InputError: a format or kind that is not known, a run without clusters, a folder that is not empty.
    """
    if to not in FORMATS:
        raise InputError(f"--to: got {to!r}; allowed: {', '.join(FORMATS)}")
    wanted = list(kinds)
    if unknown := set(wanted) - set(KINDS):
        raise InputError(f"--kinds: got {', '.join(sorted(unknown))}; allowed: {', '.join(KINDS)}")
    if run.committed("clusters") is None:
        raise InputError(f"{run.uri} has no clusters yet; diffmine mine {run.uri}/run.yaml goes on")
    target = Store(destination)
    if target.names(""):
        raise InputError(f"{destination}: is not empty")
    names = ("manifest", "patches", "clusters", "members")
    patches = patches_with_images({name: run.table(name) for name in names})
    patches = _named(patches.filter(pc.is_in(patches["kind"], pa.array(wanted))), kept(run))
    patches = patches.sort_by([("label", "ascending"), ("kind", "descending"), ("rank", "ascending")])
    mined = Mined(run, config, patches, run.table("latents", ["image_id", "width", "height"]))
    FORMATS[to](mined, target)
    return len(patches)


def _named(patches: pa.Table, curation: Curation | None) -> pa.Table:
    """With `cluster_name` where a curator has named clusters."""
    names = {(words.label, words.cluster): words.name for words in curation.clusters} if curation else {}
    if not any(names.values()):
        return patches
    keys = zip(patches["label"].to_pylist(), patches["cluster"].to_pylist(), strict=True)
    found = [names.get((label, cluster)) or names.get((None, cluster)) or None for label, cluster in keys]
    return patches.append_column("cluster_name", pa.array(found, pa.string()))


# ------------------------------------------------------------------------------------------------------------- tables


def _to_csv(mined: Mined, target: Store) -> None:
    """patches.csv, clusters.csv, and images.csv with the reason where one failed."""
    manifest, failures = mined.run.table("manifest"), mined.run.failures()
    reason = failures["reason"].take(pc.index_in(manifest["image_id"], failures["image_id"]))
    labels = pa.array(["|".join(own) for own in manifest["labels"].to_pylist()], pa.string())
    images = manifest.drop_columns(["boxes"]).set_column(manifest.column_names.index("labels"), "labels", labels)
    tables = {
        "patches.csv": mined.patches, "clusters.csv": mined.run.table("clusters"),
        "images.csv": images.append_column("failure", reason),
    }  # fmt: skip
    for name, table in tables.items():
        _put(target, name, lambda file, table=table: csv.write_csv(flat(table), file))  # type: ignore[misc]


def _to_huggingface(mined: Mined, target: Store) -> None:
    """data/*.parquet with each patch cut out as `image`, and a card; `datasets.load_dataset` opens the folder."""
    lost, buffer, part = 0, list[Row](), 0
    table = flat(mined.patches)
    schema = _with_features(pa.schema([("image", _IMAGE), *table.schema]))

    def write(rows: list[Row]) -> None:
        nonlocal part
        out = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), out, compression="zstd")
        target.put(f"data/train-{part:05d}.parquet", out.getvalue())
        part += 1

    for rows in grouped(table, "label").values():
        crops = _crops(rows.to_pylist(), mined.config)
        lost += sum(crop is None for crop in crops.values())
        buffer += [{**row, "image": crops[row["patch_id"]]} for row in rows.to_pylist()]
        if len(buffer) >= _ROWS:
            write(buffer)
            buffer = []
    if buffer or not part:
        write(buffer)
    target.put("README.md", _card(mined).encode())
    if lost:
        print(f"diffmine: {lost:,} patches have no picture, as their images can no longer be read", file=sys.stderr)


_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _crops(rows: list[Row], config: Config) -> dict[str, Row | None]:
    """patch_id -> its picture, cut from the prepared image; None where that can no longer be read."""
    crops: dict[str, Row | None] = {}
    by_image: dict[str, list[Row]] = {}
    for row in rows:
        by_image.setdefault(row["uri"], []).append(row)
    for own, image in zip(by_image.values(), prepared_images(by_image, config), strict=True):
        if isinstance(image, ImageError):
            crops |= {row["patch_id"]: None for row in own}
            continue
        for row in own:
            out = io.BytesIO()
            crop = image[row["y"] : row["y"] + row["height"], row["x"] : row["x"] + row["width"]]
            Image.fromarray(crop).save(out, "WEBP", quality=_QUALITY)
            crops[row["patch_id"]] = {"bytes": out.getvalue(), "path": f"{row['patch_id']}.webp"}
    return crops


def _with_features(schema: pa.Schema) -> pa.Schema:
    """What `datasets` needs to know: that `image` holds pictures."""
    names = {  # whose names Arrow prints in another way
        pa.float16(): "float16", pa.float32(): "float32", pa.float64(): "float64", pa.bool_(): "bool",
        pa.date32(): "date32", pa.date64(): "date64",
    }  # fmt: skip
    features = {field.name: {"dtype": names.get(field.type, str(field.type)), "_type": "Value"} for field in schema} | {
        "image": {"_type": "Image"}
    }
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _card(mined: Mined) -> str:
    """The dataset's README.md."""
    found, config = mined.patches, mined.config
    steps = f"finetuned for {config.finetune.asked}" if config.finetune.enabled else "not finetuned"
    return f"""---
configs:
- config_name: default
  data_files: data/*.parquet
license: other
task_categories:
- image-classification
tags:
- diffusion-typicality
---

# Typical patches of {pc.count_distinct(found["label"]).as_py():,} labels

{len(found):,} patches that a diffusion model finds typical of their labels, mined with diffmine after
“Diffusion Models as Data Mining Tools” (ECCV 2024). The model is `{config.model.base}`, {steps}.

- `typicality`: how much better the model predicts noise in the patch when it is told the label, in squared error, with
  its standard error `stderr`; `fresh_typicality` is from draws that had no part in the choice.
- `cluster_rank`: orders the clusters of a label, the most typical first; `rank` the patches of a label.
- `x, y, width, height`: pixels of the prepared image, from which `image` was cut; `image_x` and so on: of the original.

Typical means correlated with the label: watermarks, scanning noise and the habits of contributors are found as readily
as the subject. The licence of the pictures is that of their sources.
"""


# ------------------------------------------------------------------------------------------------------- annotations


def _to_coco(mined: Mined, target: Store) -> None:
    """annotations.json: a box in original pixels for each patch, its T as `score`, a category for each label."""
    sizes, numbers = _numbered(mined)
    categories = {label: i + 1 for i, label in enumerate(sorted(set(mined.patches["label"].to_pylist())))}
    images = (
        {"id": number, "file_name": uri, "width": sizes[image_id][0], "height": sizes[image_id][1]}
        for image_id, (number, uri) in numbers.items()
    )
    annotations = (
        {
            "id": i + 1, "image_id": numbers[row["image_id"]][0], "category_id": categories[row["label"]],
            "bbox": _original(row), "area": row["image_width"] * row["image_height"], "iscrowd": 0,
            "score": row["typicality"], **{k: row[k] for k in _SAID if row.get(k) is not None},
        }
        for i, row in enumerate(_rows(mined.patches))
    )  # fmt: skip
    parts = {
        "info": {"description": f"typical patches of {mined.run.uri}, mined with diffmine"},
        "categories": [{"id": i, "name": label} for label, i in categories.items()],
        "images": images, "annotations": annotations,
    }  # fmt: skip
    _put(target, "annotations.json", lambda file: _write_json(file, parts))


def _to_fiftyone(mined: Mined, target: Store) -> None:
    """labels.json and data.json, a FiftyOneImageDetectionDataset; boxes are shares of the image's sides.

    `fo.Dataset.from_dir(folder, fo.types.FiftyOneImageDetectionDataset, data_path="data.json")` opens it.
    """
    sizes, numbers = _numbered(mined)
    found: dict[str, list[Row]] = {}
    for row in _rows(mined.patches):
        width, height = sizes[row["image_id"]]
        x, y, w, h = _original(row)
        said = {k: row[k] for k in ("typicality", *_SAID) if row.get(k) is not None}
        box = [x / width, y / height, w / width, h / height]
        key = f"{numbers[row['image_id']][0]:08d}"
        found.setdefault(key, []).append({"label": row["label"], "bounding_box": box, "attributes": said})
    labels = {"classes": sorted(set(mined.patches["label"].to_pylist())), "labels": found}
    files = {f"{number:08d}": uri for number, uri in numbers.values()}
    _put(target, "labels.json", lambda file: _write_json(file, labels))
    _put(target, "data.json", lambda file: _write_json(file, files))


_SAID = (
    *("patch_id", "kind", "rank", "stderr", "fresh_typicality", "fresh_stderr"),
    *("contrast", "rival", "fresh_contrast", "fresh_contrast_stderr"),
    *("cluster", "cluster_rank", "cluster_name", "distance"),
)


def _numbered(mined: Mined) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, str]]]:
    """Of the images that have patches: image_id -> width and height; image_id -> a number from 1, and the URI."""
    pairs = dict(zip(mined.patches["image_id"].to_pylist(), mined.patches["uri"].to_pylist(), strict=True))
    images = mined.images.filter(pc.is_in(mined.images["image_id"], pa.array(list(pairs), pa.string())))
    sizes = {row["image_id"]: (row["width"], row["height"]) for row in images.to_pylist()}
    return sizes, {image_id: (i + 1, pairs[image_id]) for i, image_id in enumerate(sorted(pairs))}


def _original(row: Row) -> list[float]:
    return [row["image_x"], row["image_y"], row["image_width"], row["image_height"]]


def _rows(table: pa.Table) -> Iterator[Row]:
    for batch in table.to_batches(max_chunksize=10_000):
        yield from batch.to_pylist()


# ------------------------------------------------------------------------------------------------------------- files


def _put(target: Store, name: str, write: Callable[[IO[bytes]], None]) -> None:
    """A file that may be larger than memory: written aside, then put."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        with path.open("wb") as file:
            write(file)
        target.put(name, path)


def _write_json(file: IO[bytes], parts: Mapping[str, Any]) -> None:
    """An object; what is an iterator in it becomes a list, one item after the other."""
    for i, (key, value) in enumerate(parts.items()):
        file.write(f"{',' if i else '{'}\n{json.dumps(key)}: ".encode())
        if isinstance(value, Iterator):
            for j, item in enumerate(value):
                file.write(f"{',' if j else '['}\n{json.dumps(item, allow_nan=False)}".encode())
            file.write(b"]")
        else:
            file.write(json.dumps(value, allow_nan=False).encode())
    file.write(b"}\n")


FORMATS: dict[str, Callable[[Mined, Store], None]] = {
    "coco": _to_coco,
    "csv": _to_csv,
    "fiftyone": _to_fiftyone,
    "huggingface": _to_huggingface,
}

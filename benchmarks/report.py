"""Size of the report of a large run, and how fast its pages open: 365 labels x 32 clusters x 30 patches.

    python benchmarks/report.py --images FOLDER --out benchmarks/results/report.json

The tables are made up; the pictures are cut from the photographs of a folder at places drawn at random, patches of 64
pixels in images of 512 as in the paper's settings. Pages open in Debian's chromium by playwright, from the disk; *load*
is how long the browser's load event took, *loaded* what the page and all that it loads by then weigh.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from gpu import record
from PIL import Image
from playwright.sync_api import sync_playwright

from diffmine.config import Config
from diffmine.report.page import Job, page_files
from diffmine.report.site import Site
from diffmine.run import SCHEMAS

SIDE, PATCH, CELL = 512, 64, 8
PER_IMAGE = 5  # patches of one image
PHOTOGRAPHS = 60  # at most: they are held in memory


@dataclass(frozen=True)
class Pictures:
    """Photographs as prepared images, and maps: those of an image_id depend on its name only."""

    files: tuple[str, ...]

    def image(self, image_id: str) -> np.ndarray:
        rng = np.random.default_rng(list(image_id.encode()))
        picture = photograph(self.files[rng.integers(len(self.files))])
        y, x = (rng.integers(extent - SIDE + 1) for extent in picture.shape[:2])
        return picture[y : y + SIDE, x : x + SIDE]

    def map(self, image_id: str) -> np.ndarray:
        rng = np.random.default_rng(list(image_id.encode()))
        return rng.normal(0.002, 0.01, (SIDE // CELL, SIDE // CELL)).astype(np.float32)


@cache
def photograph(file: str) -> np.ndarray:
    """Uint8 [H, W, 3], a fifth larger than a prepared image."""
    picture = Image.open(file).convert("RGB")
    scale = 1.2 * SIDE / min(picture.size)
    size = round(picture.width * scale), round(picture.height * scale)
    return np.asarray(picture.resize(size, Image.Resampling.BICUBIC))


def tables(labels: int, images: int, k: int, per_cluster: int) -> dict[str, pa.Table]:
    """A run's tables: every label with its images, k clusters of so many patches, and as many of the other kinds."""
    rng, names = np.random.default_rng(0), [f"label {i:03d}" for i in range(labels)]
    ids = [[f"{name}/{i:06d}_photograph.jpg" for i in range(images)] for name in names]
    flat = [image_id for own in ids for image_id in own]
    manifest = pa.table(
        {
            "image_id": flat, "uri": [f"s3://bucket/some/dataset/{image_id}" for image_id in flat],
            "labels": [[name] for name in names for _ in range(images)], "boxes": pa.nulls(len(flat)),
            "year": rng.integers(1900, 2020, len(flat)),
        }
    )  # fmt: skip
    count = k * per_cluster
    rows: dict[str, list[Any]] = {name: [] for name in SCHEMAS["patches"].names}
    for name, own in zip(names, ids, strict=True):
        for kind in ("top", "bottom", "random"):
            score = np.sort(rng.gamma(2, 0.005, count))[::-1] * (-1 if kind == "bottom" else 1)
            place = rng.integers(0, SIDE - PATCH, (2, count))
            columns = {
                "patch_id": [f"{len(rows['patch_id']) + i:08d}" for i in range(count)],
                "image_id": [own[i // PER_IMAGE % images] for i in rng.permutation(count)],
                "label": [name] * count, "kind": [kind] * count, "rank": range(count), "x": place[0], "y": place[1],
                "width": [PATCH] * count, "height": [PATCH] * count,
                "image_x": place[0] * 2.0, "image_y": place[1] * 2.0,
                "image_width": [128.0] * count, "image_height": [128.0] * count, "typicality": score,
                "stderr": rng.uniform(3e-4, 6e-4, count), "fresh_typicality": score * 0.9,
                "fresh_stderr": rng.uniform(3e-4, 6e-4, count), "fresh_degrees_of_freedom": [20.0] * count,
                "contrast": [None] * count,
            }  # fmt: skip
            for column, values in columns.items():
                rows[column] += list(values)
    patches = pa.table(rows, schema=SCHEMAS["patches"])
    top = patches.filter(pa.compute.equal(patches["kind"], "top"))
    cluster = np.tile(np.arange(k), len(top) // k).astype(np.int32)
    members = pa.table(
        {
            "patch_id": top["patch_id"],
            "label": top["label"],
            "cluster": cluster,
            "distance": rng.uniform(0, 1, len(top)),
        }
    )
    clusters = [
        {"label": name, "cluster": i, "rank": i, "size": per_cluster, "images": per_cluster, "inertia": 1.0,
         "median_typicality": 0.02 - i / 4000}
        for name in names for i in range(k)
    ]  # fmt: skip
    return {
        "manifest": manifest, "patches": patches, "members": members,
        "clusters": pa.Table.from_pylist(clusters, schema=SCHEMAS["clusters"]),
    }  # fmt: skip


def write(job: Job, pictures: Pictures, folder: str) -> float:
    """Make a page; the seconds that it took."""
    start = time.monotonic()
    maps = {(p.image_id, p.label): pictures.map(p.image_id) for p in job.page.shown()}
    put(page_files(job, map(pictures.image, job.page.image_ids()), maps, {}), folder)
    return time.monotonic() - start


def put(files: Iterator[tuple[str, bytes]], folder: str) -> None:
    for name, data in files:
        (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
        (Path(folder) / name).write_bytes(data)


def opened(folder: str, name: str, times: int = 5) -> dict[str, float]:
    """Seconds until a page is loaded, and MB that were loaded; medians of new browsers' first visits."""
    seconds, sizes = [], []
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        for _ in range(times):
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            tab, loaded = browser.new_page(viewport={"width": 1280, "height": 900}), set()
            tab.on("requestfinished", lambda request, loaded=loaded: loaded.add(request.url))
            start = time.monotonic()
            tab.goto(f"file://{folder}/{name}", wait_until="load")
            seconds.append(time.monotonic() - start)
            sizes.append(
                sum(Path(url.removeprefix("file://")).stat().st_size for url in loaded if "file:" in url) / 1e6
            )
            browser.close()
    return {"load_s": statistics.median(seconds), "loaded_mb": statistics.median(sizes)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--labels", type=int, default=365)
    parser.add_argument("--images-per-label", type=int, default=500)
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args()
    found = [p for p in sorted(args.images.rglob("*")) if p.suffix.lower() in (".jpg", ".jpeg", ".png")]
    pictures = Pictures(tuple(map(str, found[:: max(1, len(found) // PHOTOGRAPHS)])))
    config = Config.model_validate({
        "output": "s3://bucket/run", "dataset": {"source": "s3://bucket/some/dataset", "layout": "folder"},
        "report": {"patches_per_cluster": 30},
    }).model_dump(mode="json")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        site = Site(tables(args.labels, args.images_per_label, 32, 30), {"config": config})
        start = time.monotonic()
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            each = list(pool.map(write, site.jobs(), [pictures] * args.labels, [folder] * args.labels))
        put(site.overview({}), folder)
        files = [p for p in Path(folder).rglob("*") if p.is_file()]
        kinds: dict[str, float] = {}
        for file in files:
            kind = file.name.lstrip("0123456789").lstrip("-.") if file.parent.name == "labels" else file.suffix
            kinds[kind] = kinds.get(kind, 0) + file.stat().st_size / 1e6
        of_a_label = sum(p.name.startswith("0001") or p.parent.name == "0001" for p in files)
        result = {
            "labels": args.labels, "patches": args.labels * 32 * 30, "mb": sum(kinds.values()), "mb_by_kind": kinds,
            "files_per_label": of_a_label, "seconds": time.monotonic() - start, "page_s": statistics.median(each),
            "overview": opened(folder, "index.html"), "label_page": opened(folder, "labels/0001.html"),
        }  # fmt: skip
    print(result)
    if args.out:
        record(args.out, **result)


if __name__ == "__main__":
    main()

"""Latents a second that training gets from its shards, with a model that does nothing.

    python benchmarks/ingest.py --out benchmarks/results/ingest.json

Writes a run of random latents to the temporary folder, and reads it as `diffmine.stages.ingest` does for one worker:
windows of shards, shuffled, the next one read while this one is used. Asked: 10,000 of 32 x 32 x 4 a second on 2 cores.
"""

import argparse
import resource
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
from gpu import record

from diffmine.config import Dataset, Finetune
from diffmine.run import SCHEMAS, Run
from diffmine.stages.ingest import Ingest

SHARD = 512  # images


def write(run: Run, images: int, channels: int, side: int) -> None:
    """A manifest, and random latents in shards."""
    rng, values = np.random.default_rng(0), channels * side * side
    ids = [f"label {i * 100 // images:02d}/{i:08d}.jpg" for i in range(images)]
    labels = [[name[:8]] for name in ids]
    manifest = pa.table({"image_id": ids, "uri": ids, "labels": labels, "boxes": pa.nulls(images)})
    run.write_part("manifest", 0, manifest)
    for part, first in enumerate(range(0, images, SHARD)):
        own = ids[first : first + SHARD]
        cells, n = pa.array(np.full(len(own), side, np.int32)), len(own)
        flat = pa.array(rng.standard_normal(n * values, np.float32).astype(np.float16))
        latents = pa.ListArray.from_arrays(np.arange(n + 1, dtype=np.int32) * values, flat)
        columns = {
            "image_id": own, "width": cells, "height": cells, "h": cells, "w": cells, "latent": latents,
            "latent_std": pa.nulls(n, latents.type),
            "scale": np.ones(n), "crop_x": cells, "crop_y": cells,
        }  # fmt: skip
        run.write_part("latents", part, pa.table(columns, schema=SCHEMAS["latents"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=131072)
    parser.add_argument("--side", type=int, default=32, help="of a latent, in cells")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Run(f"{folder}/run")
        write(run, args.images, 4, args.side)
        start = time.perf_counter()
        ingest = Ingest(run, 0, Dataset(source="random latents"), Finetune(batch_size=args.batch))
        indexed = time.perf_counter()
        seen = sum(len(batch) for _, batch in islice(ingest.batches(0), args.images // args.batch))
        seconds = time.perf_counter() - indexed
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{seen / seconds:,.0f} latents/s; index of {args.images:,} images in {indexed - start:.2f} s; {peak:.0f} MiB"
    )
    if args.out:
        record(args.out, images=args.images, side=args.side, latents_per_s=seen / seconds,
               index_s=indexed - start, peak_mib=peak)  # fmt: skip


if __name__ == "__main__":
    main()

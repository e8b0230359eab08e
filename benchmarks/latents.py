"""JPEG files -> images a second and core that the latents stage reads, decodes, prepares and hands to an encoder.

    python benchmarks/latents.py --images ../shared/data/facades --out benchmarks/results/latents.json

Photographs are first resized to a short side of 512 pixels and saved again as JPEG (quality 90). Then the stage's own
reader and encoder go over them in one process and thread: reading, checks, decoding, resizing, cropping, batches of
pixels, rows of the table. Only the VAE is a stand-in that answers at once, on torch's device "meta", which stands for a
GPU: what is sent there costs this process nothing more.

An object store takes some 50 ms to begin an answer, and so does every read in the last lines: images a second by the
clock, when each file is asked for after the one before, and when the next ones are on their way, as the stage does.
"""

import argparse
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

from gpu import record
from PIL import Image

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from diffmine.data import reading
from diffmine.data.images import EXTENSIONS
from diffmine.run import Run, part_name, rows_to_table, to_parquet
from diffmine.stages import latents
from diffmine.stages.latents import _Encoder, _Reader

SIDE, SHARD, CELL = 512, 64, 8


def photographs(source: Path, folder: Path) -> list[Path]:
    """Copies with a short side of 512 pixels."""
    files = []
    for i, file in enumerate(sorted(f for f in source.rglob("*") if f.suffix.lower() in EXTENSIONS)):
        with Image.open(file) as picture:
            scale = SIDE / min(picture.size)
            size = max(SIDE, round(picture.width * scale)), max(SIDE, round(picture.height * scale))
            files.append(folder / f"{i:05d}.jpg")
            picture.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(files[-1], quality=90)
    return files


def stand_in(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of the right shape, at once."""
    n, _, height, width = images.shape
    zeros = torch.zeros(n, 4, height // CELL, width // CELL)
    return zeros, zeros


def answering(seconds: float) -> Callable[[str, int], bytes]:
    """`read_file` of a store that begins its answers late."""

    def read_file(uri: str, _: int) -> bytes:
        time.sleep(seconds)
        return Path(uri).read_bytes()

    return read_file


def one_by_one(uris: Iterable[str], most: int) -> Iterator[Future[bytes]]:
    """`files_ahead` with nothing ahead."""
    for uri in uris:
        future: Future[bytes] = Future()
        future.set_result(reading.read_file(uri, most))
        yield future


def from_a_store(read: _Reader, files: list[Path], seconds: float) -> dict[str, float]:
    """Images a second by the clock."""
    images, found = [{"image_id": file.name, "uri": str(file)} for file in files], {}
    reading.read_file = answering(seconds)
    for name, ahead in (("one by one", one_by_one), ("read ahead", reading.files_ahead)):
        latents.files_ahead = ahead
        start = time.perf_counter()
        count = sum(1 for _ in read.rows(images))
        found[name] = count / (time.perf_counter() - start)
        print(f"{name:<20}{found[name]:>8.0f} images a second, of a store that answers after {seconds * 1000:.0f} ms")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--answer-ms", type=float, default=50, help="until a store begins its answer")
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    latents.load = lambda *_: SimpleNamespace(posterior=stand_in, device=torch.device("meta"))  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as scratch:
        files, run = photographs(args.images, Path(scratch)), Run(f"{scratch}/run")
        rows = [{"image_id": file.name, "uri": str(file), "labels": ["a"], "boxes": None} for file in files]
        run.put(part_name("manifest", 0), to_parquet(rows_to_table("manifest", rows), row_group_size=SHARD))
        read, encode = _Reader(SIDE, CELL, 10**8, 10**8), _Encoder("tiny", "float32", False)
        spent: Counter[str] = Counter()
        for _ in range(args.rounds):
            for shard in range(-(-len(files) // SHARD)):
                start = time.process_time()
                payload = read(run, shard, b"")
                prepared = time.process_time()
                part = encode(payload)
                spent["read and prepare"] += prepared - start
                spent["batch and store"] += time.process_time() - prepared
                spent["images"] += len(part.rows)
        with Image.open(files[0]) as picture:
            size = picture.size
        store = from_a_store(read, files, args.answer_ms / 1000)
    images, seconds = spent.pop("images"), sum(spent.values())
    for name, own in spent.items():
        print(f"{name:<20}{own / images * 1000:>8.2f} ms an image")
    print(f"{images / seconds:.0f} images a second and core ({len(files)} JPEGs of {size[0]} x {size[1]} and the like)")
    if args.out:
        record(args.out, images=len(files), size=size, images_per_s_and_core=images / seconds,
               ms_an_image={name: own / images * 1000 for name, own in spent.items()}, answer_ms=args.answer_ms,
               images_per_s_from_a_store=store)  # fmt: skip


if __name__ == "__main__":
    main()

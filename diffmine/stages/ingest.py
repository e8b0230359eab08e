"""Stored latents -> the images of every training step: a window of shards in memory, the next one read meanwhile.

The order is a function of (seed, epoch), and not of the workers: each reads the same windows and takes its share of
every batch, so a step sees the same images whoever is there and wherever training begins. (Shuffles of Ray Data neither
repeat nor begin in the middle.) What grows with the dataset is an index of some 100 bytes an image.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from diffmine.diffusion.finetune import Window, windows
from diffmine.diffusion.training import LabelledImage
from diffmine.run import Run, part_name

_WINDOW = 16384  # images that are shuffled together: half a GiB at the latents of 512 pixels
_READERS = 8  # of the index: small reads, most of which is waiting for the store


class Ingest:
    """Every image that has a latent, with its labels.

    Args:
        crop: side of the crops that training takes, in cells.
        window: images that are shuffled together, and in memory twice.
    """

    def __init__(self, run: Run, seed: int, batch_size: int, crop: int | None, window: int = _WINDOW) -> None:
        self.run, self.seed, self.batch_size, self.window = run, seed, batch_size, window
        self.parts = run.parts("latents")
        with ThreadPoolExecutor(_READERS) as pool:
            index = list(pool.map(self._index, self.parts))
        self.sizes = [np.stack([part["h"].to_numpy(), part["w"].to_numpy()], 1) for part in index]
        self.seen = self.sizes if crop is None else [np.minimum(size, crop) for size in self.sizes]
        manifest = run.table("manifest", ["image_id", "labels"])
        there = pa.chunked_array([chunk for part in index for chunk in part["image_id"].chunks], pa.string())
        self.labels = manifest.filter(pc.is_in(manifest["image_id"], there)).combine_chunks()

    def _index(self, part: int) -> pa.Table:
        columns = ["image_id", "h", "w"]
        return self.run.stream(part_name("latents", part), lambda file: pq.ParquetFile(file).read(columns))

    @property
    def images(self) -> int:
        return len(self.labels)

    def label_counts(self) -> dict[str, int]:
        """label -> images, sorted by label."""
        counts = pc.value_counts(pc.list_flatten(self.labels["labels"]))
        return dict(sorted((row["values"], row["counts"]) for row in counts.to_pylist()))

    def common_shape(self) -> tuple[int, int]:
        """h, w in cells of most latents."""
        counts = Counter(map(tuple, np.concatenate(self.sizes).tolist()))
        h, w = counts.most_common(1)[0][0]
        return h, w

    def batches(self, start: int) -> Iterator[list[LabelledImage]]:
        """The images of step `start` and of all later ones."""
        with ThreadPoolExecutor(1) as reader:
            coming = self._windows(start)
            window = next(coming)
            images: Future[list[LabelledImage]] = reader.submit(self.read, window.shards)
            while True:
                now, held = window, images.result()
                window = next(coming)
                if window.shards != now.shards:  # the one window of a small dataset stays
                    images = reader.submit(self.read, window.shards)
                yield from ([held[i] for i in batch] for batch in now.batches)

    def _windows(self, start: int) -> Iterator[Window]:
        """Windows from that of step `start` on, whose earlier batches are left out."""
        for window in windows(self.seed, self.seen, self.batch_size, self.window):
            if start < len(window.batches):
                yield Window(window.shards, window.batches[start:])
            start = max(0, start - len(window.batches))

    def read(self, shards: Sequence[int]) -> list[LabelledImage]:
        """The images of some shards, in their order."""
        columns = ["image_id", "h", "w", "latent"]
        rows = pa.concat_tables([self.run.read_part("latents", self.parts[i], columns) for i in shards])
        labels = self.labels["labels"].take(pc.index_in(rows["image_id"], self.labels["image_id"]))
        latents = [latent for chunk in rows["latent"].chunks for latent in _arrays(chunk)]
        sizes = zip(rows["h"].to_pylist(), rows["w"].to_pylist(), strict=True)
        return [
            LabelledImage(image_id, latent.reshape(-1, h, w), own)
            for image_id, latent, (h, w), own in zip(
                rows["image_id"].to_pylist(), latents, sizes, labels.to_pylist(), strict=True
            )
        ]


def _arrays(lists: pa.ListArray) -> list[np.ndarray]:
    """Views of the values of each list."""
    values, ends = lists.values.to_numpy(zero_copy_only=True), lists.offsets.to_numpy()
    return [values[first:end] for first, end in pairwise(ends)]

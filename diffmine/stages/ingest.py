"""Stored latents -> the images of every training step: a window of shards in memory, the next one read meanwhile.

The order is a function of (seed, epoch), and not of the workers: each takes its share of every batch, and reads about
that share of the shards. So a step sees the same images whoever is there and wherever training begins. (Shuffles of Ray
Data neither repeat nor begin in the middle.) What grows with the dataset is an index of some 100 bytes an image.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice, pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diffmine.config import Dataset, Finetune
from diffmine.data.labels import label_sizes
from diffmine.data.split import held_out
from diffmine.diffusion.finetune import LabelledImage, Shape, Window, windows
from diffmine.randomness import generator
from diffmine.run import Run
from diffmine.store import at_once

_WINDOW = 16384  # images that are shuffled together: half a GiB at the latents of 512 pixels
_LOOKED_AHEAD = 64  # windows, for the largest shape: a million images, or as many epochs of a small dataset
Share = list[tuple[int, LabelledImage]]  # of a batch: places in it, with their images


class Ingest:
    """Every image that has a latent, with its labels; some may be held out.

    Args:
        window: images that are shuffled together, and in memory twice.
    """

    def __init__(self, run: Run, seed: int, dataset: Dataset, finetune: Finetune, window: int = _WINDOW) -> None:
        self.run, self.seed, self.wanted, self.window = run, seed, finetune, window
        self.sampled = finetune.posterior == "sample"
        group = dataset.group_column
        found = run.read_parts("latents", ["image_id", "h", "w"])
        self.parts, index = [*found], [*found.values()]
        ids = pa.chunked_array([chunk for part in index for chunk in part["image_id"].chunks], pa.string())
        columns = dict.fromkeys(["image_id", "labels", *finetune.prompt_columns, *filter(None, [group])])
        manifest = run.table("manifest", list(columns))
        read = pc.is_in(manifest["image_id"], ids)
        self.unread = manifest["image_id"].filter(pc.invert(read)).to_pylist()
        self.known = manifest.filter(read).combine_chunks()
        assert self.known["image_id"].equals(ids), "shards and the manifest are sorted alike"
        self.firsts = np.cumsum([0, *map(len, index)])  # row of `known` that each shard begins with, and the end
        self.sizes = np.stack([np.concatenate([part[side].to_numpy() for part in index]) for side in "hw"], 1)
        self.held = np.zeros(len(ids), bool)
        if dataset.finetune_split:
            self.held = held_out(self._labels(), self.known[group] if group else None, dataset.finetune_split, seed)
        self.small = self.images <= window  # one window, which stays in memory

    def _labels(self) -> pa.ListArray:
        return self.known["labels"].combine_chunks()

    def _rows(self, shard: int, held: bool) -> np.ndarray:
        """Places within a shard of its images that are held out, or that are not."""
        return np.flatnonzero(self.held[self.firsts[shard] : self.firsts[shard + 1]] == held)

    @property
    def images(self) -> int:
        """Images trained on."""
        return int((~self.held).sum())

    def untrained_ids(self) -> list[str]:
        """Images that are held out, and those without a latent, which may come to have one."""
        return sorted([*self.held_out_ids(), *self.unread])

    def held_out_ids(self) -> list[str]:
        return self.known["image_id"].filter(pa.array(self.held)).to_pylist()

    def label_counts(self) -> dict[str, int]:
        """label -> images trained on, sorted by label."""
        return label_sizes(self.known.filter(pa.array(~self.held)))

    def common_shape(self) -> Shape:
        """Of most latents."""
        counts = Counter(map(tuple, self.sizes.tolist()))
        h, w = counts.most_common(1)[0][0]
        return h, w

    def largest_shape(self, start: int, end: int) -> Shape:
        """Of the batches from step `start` to `end`, or of the first of very many; rare shapes are cropped in them."""
        found: set[Shape] = set()
        for window in islice(self._windows(start), _LOOKED_AHEAD):
            found.update(window.shapes[: end - start])
            start += len(window.batches)
            if start >= end:
                break
        return max(found, key=math.prod)

    def _seen(self, sizes: np.ndarray) -> np.ndarray:
        return sizes if self.wanted.crop is None else np.minimum(sizes, self.wanted.crop)

    # ------------------------------------------------------------------------------------------------------ training

    def batches(self, start: int, rank: int = 0, world: int = 1) -> Iterator[tuple[Shape, Share]]:
        """The shape that images have in step `start` and all later ones, and which of them process `rank` of `world`
        sees."""
        with ThreadPoolExecutor(1) as reader:
            coming = self._windows(start)
            window = next(coming)
            images: Future[dict[int, LabelledImage]] = reader.submit(self.read, window, rank, world)
            while True:
                now, held = window, images.result()
                window = next(coming)
                if not self.small:  # else the one window stays
                    images = reader.submit(self.read, window, rank, world)
                for batch, shape in zip(now.batches, now.shapes, strict=True):
                    yield shape, [(place, held[batch[place]]) for place in range(rank, len(batch), world)]

    def _windows(self, start: int) -> Iterator[Window]:
        """Windows from that of step `start` on, whose earlier batches are left out."""
        rows = [self.firsts[i] + self._rows(i, held=False) for i in range(len(self.parts))]
        seen = [self._seen(self.sizes[own]) for own in rows]
        weights = None
        if self.wanted.balance_labels:
            found = balance(self._labels(), ~self.held)
            weights = [found[own] for own in rows]
        for window in windows(self.seed, seen, self.wanted.batch_size, self.window, weights):
            if start < len(window.batches):
                yield Window(window.shards, window.batches[start:], window.shapes[start:])
            start = max(0, start - len(window.batches))

    def read(self, window: Window, rank: int, world: int) -> dict[int, LabelledImage]:
        """Place in the window -> image, of those that a process sees; all of them where there is one window only."""
        rows = [self._rows(shard, held=False) for shard in window.shards]
        ends = np.cumsum([len(own) for own in rows])
        wanted = np.arange(ends[-1]) if self.small else np.unique([batch[rank::world] for batch in window.batches])
        found: dict[int, LabelledImage] = {}
        for shard, own, end in zip(window.shards, rows, ends.tolist(), strict=True):
            places = wanted[(wanted >= end - len(own)) & (wanted < end)]
            if len(places):
                found |= zip(places.tolist(), self._images(shard, own[places - (end - len(own))]), strict=True)
        return found

    def _images(self, shard: int, rows: np.ndarray) -> list[LabelledImage]:
        """The images at some places of a shard."""
        columns = ["image_id", "h", "w", "latent", *(["latent_std"] if self.sampled else [])]
        stored = self.run.read_part("latents", self.parts[shard], columns).take(rows)  # a view would keep all others
        known = self.known.take(self.firsts[shard] + rows)
        sizes = self.sizes[self.firsts[shard] + rows]
        latents = _arrays(stored["latent"])
        spreads = _arrays(stored["latent_std"]) if self.sampled else None
        asked = {name: known[name].cast(pa.string()).to_pylist() for name in self.wanted.prompt_columns}
        known = known.select(["image_id", "labels"])
        found = []
        for i, ((h, w), own) in enumerate(zip(sizes.tolist(), known.to_pylist(), strict=True)):
            spread = None if spreads is None else spreads[i].reshape(-1, h, w)
            more = {name: values[i] for name, values in asked.items() if values[i]}
            found.append(LabelledImage(own["image_id"], latents[i].reshape(-1, h, w), own["labels"], spread, more))
        return found

    # ---------------------------------------------------------------------------------------------------- validation

    def validation(self, most: int) -> list[tuple[str, LabelledImage]]:
        """Of every label that has some, up to `most` of its held-out images: (label, image), from few shards."""
        counts: Counter[str] = Counter()
        chosen: dict[int, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))  # shard -> row -> labels
        for shard in generator(self.seed, "validation").permutation(len(self.parts)).tolist():
            for row in self._rows(shard, held=True).tolist():
                for label in self.known["labels"][self.firsts[shard] + row].as_py():
                    if counts[label] < most:
                        counts[label] += 1
                        chosen[shard][row].append(label)
        read = at_once(lambda shard: self._images(shard, np.array([*chosen[shard]])), chosen)
        found = [
            (label, image)
            for rows, images in zip(chosen.values(), read, strict=True)
            for labels, image in zip(rows.values(), images, strict=True)
            for label in labels
        ]
        return sorted(found, key=lambda item: (item[0], item[1].image_id))


def balance(labels: pa.ListArray, wanted: np.ndarray) -> np.ndarray:
    """How often an epoch visits an image so that all labels come equally often: float [N], 1 on average over `wanted`.

    An image counts for the mean of its labels, as one of them is drawn at a time. Exact where images have one label.
    """
    image = pc.list_parent_indices(labels).to_numpy()
    label = pc.list_flatten(labels).dictionary_encode().indices.to_numpy()
    counts = np.bincount(label[wanted[image]], minlength=label.max() + 1)
    own = np.bincount(image, minlength=len(labels))  # labels of each image
    rarity = np.bincount(image, 1 / np.maximum(counts, 1)[label], len(labels)) / own
    return rarity / rarity[wanted].mean()


def _arrays(lists: pa.ChunkedArray) -> list[np.ndarray]:
    """Views of the values of each list."""
    found = []
    for chunk in lists.chunks:
        values, ends = chunk.values.to_numpy(zero_copy_only=True), chunk.offsets.to_numpy()
        found += [values[first:end] for first, end in pairwise(ends)]
    return found

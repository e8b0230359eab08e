"""Parts of `typicality` and of a race's rounds -> rows whose maps are arrays, a few at a time.

A part can hold a map of every image and label: gigabytes, and eight times as much in Python's own numbers.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from diffmine.run import batches

_MAPS = ("map", "window_stderr")
_AT_ONCE = 64  # rows that are decoded


def map_rows(
    file: pq.ParquetFile, columns: Sequence[str] | None = None, own: bool = False, images: Collection[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Rows of the file in their order, `map` and `window_stderr` as float32 [h, w], where they are among the columns.

    Args:
        own: only those of images under their own labels; no other is kept in memory.
        images: only those of these images; little more is read.
    """
    groups, wanted = None if images is None else _groups(file, sorted(images)), pa.array(images or (), pa.string())
    for batch in batches(file, _AT_ONCE, columns, groups):
        kept = batch.filter(batch["own"]) if own else batch
        yield from _rows(kept if images is None else kept.filter(pc.is_in(kept["image_id"], wanted)))


def _groups(file: pq.ParquetFile, images: list[str]) -> list[int]:
    """Row groups that may hold some of the images, which are sorted as the rows are; `image_id` is the first column."""
    found = []
    for i in range(file.num_row_groups):
        ids = file.metadata.row_group(i).column(0).statistics
        if ids is None or not ids.has_min_max or bisect_left(images, ids.min) < bisect_right(images, ids.max):
            found.append(i)
    return found


def _rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = batch.select([n for n in batch.schema.names if n not in _MAPS]).to_pylist()
    for name in set(_MAPS).intersection(batch.schema.names):
        for row, cells in zip(rows, batch[name], strict=True):
            row[name] = cells.values.to_numpy().reshape(row["h"], row["w"])  # a view
    return rows

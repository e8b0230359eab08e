"""Parts of `typicality` and of a race's rounds -> rows whose maps are arrays, a few at a time.

A part can hold a map of every image and label: gigabytes, and eight times as much in Python's own numbers.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_MAPS = ("map", "window_stderr")
_AT_ONCE = 64  # rows that are decoded


def map_rows(file: pq.ParquetFile, columns: Sequence[str] | None = None, own: bool = False) -> Iterator[dict[str, Any]]:
    """Rows of the file in their order, `map` and `window_stderr` as float32 [h, w], where they are among the columns.

    Args:
        own: only those of images under their own labels; no other is kept in memory.
    """
    for batch in file.iter_batches(_AT_ONCE, columns=columns, use_threads=False):
        yield from _rows(batch.filter(batch["own"]) if own else batch)


def _rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = batch.select([n for n in batch.schema.names if n not in _MAPS]).to_pylist()
    for name in set(_MAPS).intersection(batch.schema.names):
        for row, cells in zip(rows, batch[name], strict=True):
            row[name] = cells.values.to_numpy().reshape(row["h"], row["w"])  # a view
    return rows

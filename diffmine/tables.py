"""What several parts of the package do with Arrow tables."""

from typing import Any

import numpy as np
import pyarrow as pa


def grouped(table: pa.Table, column: str) -> dict[Any, pa.Table]:
    """value -> its rows, in their order; one sort for all values."""
    if not len(table):
        return {}
    coded = table[column].combine_chunks().dictionary_encode(null_encoding="encode")
    codes = coded.indices.to_numpy()
    table = table.take(pa.array(np.argsort(codes, kind="stable")))
    starts = np.searchsorted(np.sort(codes), np.arange(len(coded.dictionary) + 1))
    return {
        value: table.slice(start, end - start)
        for value, start, end in zip(
            coded.dictionary.to_pylist(), starts[:-1].tolist(), starts[1:].tolist(), strict=True
        )
    }

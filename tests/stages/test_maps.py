"""Maps of a part are read a few at a time, and those of some images without most of the others."""

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffmine.run import rows_to_table
from diffmine.stages.maps import _groups, map_rows
from diffmine.stages.shards import Part, part_file


def stored(images: str, labels: int) -> pq.ParquetFile:
    """A part with a map of every image, named by a letter, and label; the label number 0 is the image's own."""
    rows = [
        {"image_id": image, "label": f"{i:03d}", "own": i == 0, "h": 1, "w": 2, "map": [float(ord(image)), float(i)],
         "window_stderr": [0.0, 0.0]}
        for image in images
        for i in range(labels)
    ]  # fmt: skip
    return pq.ParquetFile(pa.BufferReader(part_file(Part(rows_to_table("typicality", rows), []))))


def told(row: dict[str, Any]) -> tuple[str, str, list[float]]:
    return row["image_id"], row["label"], row["map"].ravel().tolist()


def test_rows_of_some_images() -> None:
    file = stored("bcdefg", 300)
    every = [told(row) for row in map_rows(file)]
    assert [(image, label) for image, label, _ in every] == [(i, f"{n:03d}") for i in "bcdefg" for n in range(300)]
    for images in ({"c"}, {"b", "f"}, {"a", "bb", "z"}, set("bcdefg")):
        assert [told(row) for row in map_rows(file, images=images)] == [row for row in every if row[0] in images]
    own = [told(row) for row in map_rows(file, own=True, images={"a", "e"})]
    assert own == [("e", "000", [float(ord("e")), 0.0])]


def test_only_what_may_hold_them_is_read() -> None:
    file = stored("bcdefg", 300)
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [512, 512, 512, 264]
    assert _groups(file, ["c"]) == [0, 1]
    assert _groups(file, ["a", "bb", "g"]) == [0, 2, 3]
    assert _groups(file, ["a", "h"]) == []
    assert _groups(stored("", 300), ["c"]) in ([], [0])
    assert not [*map_rows(stored("", 300), images={"c"})]

"""Hit rates on cases small enough to count by hand."""

from typing import Any

import pyarrow as pa
import pytest

from diffmine.report.hits import hit_table
from diffmine.run import SCHEMAS, rows_to_table

Row = dict[str, Any]
LATENT_COLUMNS = [name for name in SCHEMAS["latents"].names if name != "latent"]


def manifest(*rows: tuple[str, list[str], list[tuple[str, float, float, float, float]] | None]) -> pa.Table:
    names = ("label", "x", "y", "width", "height")
    return rows_to_table(
        "manifest",
        [
            {"image_id": image, "uri": f"/{image}", "labels": labels,
             "boxes": None if boxes is None else [dict(zip(names, box, strict=True)) for box in boxes]}
            for image, labels, boxes in rows
        ],
    )  # fmt: skip


def latents(*images: str, **place: Any) -> pa.Table:
    standard = {"width": 32, "height": 16, "h": 2, "w": 4, "scale": 1.0, "crop_x": 0, "crop_y": 0}
    rows = [{"image_id": image, **standard, **place} for image in images]
    return rows_to_table("latents", rows).select(LATENT_COLUMNS)


def patches(*rows: tuple[str, str, str, int, int, int]) -> pa.Table:
    """image, label, kind, rank, x, y of patches of 8 pixels."""
    names = ("image_id", "label", "kind", "rank", "x", "y")
    size = {"width": 8, "height": 8}
    return rows_to_table("patches", [{**dict(zip(names, row, strict=True)), **size} for row in rows])


def test_hits_and_chance_by_hand() -> None:
    """Two annotated images of 32 x 16 pixels, one with a box of 8 x 8 in its corner; nothing is known of a third."""
    found = hit_table(
        patches(
            ("a", "arch", "top", 0, 0, 0),  # on the box
            ("a", "arch", "top", 1, 0, 4),  # half of it
            ("a", "arch", "top", 2, 0, 5),  # less than half
            ("b", "arch", "top", 3, 0, 0),  # an image without boxes
            ("c", "arch", "top", 4, 0, 0),  # an image that is not annotated
            ("a", "arch", "top", 5, 0, 0),  # the fifth in those that are
            ("a", "arch", "top", 6, 0, 0),  # not among the five most typical
            ("c", "arch", "random", 1, 0, 0),
            ("a", "arch", "random", 0, 24, 8),
            ("a", "arch", "random", 9, 0, 0),  # all random ones count
            ("a", "arch", "bottom", 0, 24, 8),
            ("a", "door", "top", 0, 0, 0),  # the box is not a door's
        ),
        manifest(("a", ["arch", "door"], [("arch", 0, 0, 8, 8)]), ("b", ["arch"], []), ("c", ["arch"], None)),
        latents("a", "b", "c"),
        cell=8,
        top=5,
    )
    # Windows of image a at (x, y) that share 32 pixels or more with the box: (8 - x) (8 - y) >= 32.
    on = sum((8 - x) * (8 - y) >= 32 for x in range(8) for y in range(8))
    assert found == [
        {
            "label": "arch", "top": (3, 5), "random": (1, 2), "bottom": (0, 1),
            "chance": pytest.approx(on / (2 * 25 * 9)), "annotated": 2, "images": 3,
        }
    ]  # fmt: skip


def test_boxes_are_moved_to_prepared_pixels() -> None:
    """x 2, then 8 pixels cut off the left: the box at original (8, 2) lies at prepared (8, 4)."""
    images, place = manifest(("a", ["arch"], [("arch", 8, 2, 4, 4)])), latents("a", scale=2.0, crop_x=8)
    assert hit_table(patches(("a", "arch", "top", 0, 8, 4)), images, place, cell=8)[0]["top"] == (1, 1)
    assert hit_table(patches(("a", "arch", "top", 0, 16, 8)), images, place, cell=8)[0]["top"] == (0, 1)


def test_the_rate_does_not_depend_on_how_many_images_are_annotated() -> None:
    """Each patch lies on the box of its image; one image in ten is annotated."""
    ids = [f"{i:03d}" for i in range(100)]
    found = patches(*((image, "arch", "top", rank, 0, 0) for rank, image in enumerate(ids)))
    box = [("arch", 0.0, 0.0, 8.0, 8.0)]
    all_known, few_known = (
        manifest(*((image, ["arch"], box if i % every == 0 else None) for i, image in enumerate(ids)))
        for every in (1, 10)
    )
    [all_of], [few_of] = (hit_table(found, known, latents(*ids), cell=8) for known in (all_known, few_known))
    assert (all_of["top"], few_of["top"]) == ((30, 30), (10, 10))
    assert few_of["chance"] == pytest.approx(all_of["chance"])
    assert (few_of["annotated"], few_of["images"]) == (10, 100)
    nothing_seen = patches(("001", "arch", "top", 0, 0, 0))
    assert hit_table(nothing_seen, few_known, latents(*ids), cell=8) == []


def test_labels_without_boxes_patches_or_images_are_left_out() -> None:
    boxes = [("arch", 0.0, 0.0, 8.0, 8.0)]
    images = manifest(("a", ["arch"], boxes), ("b", ["door"], None), ("c", ["roof"], [("roof", 0, 0, 8, 8)]))
    found = patches(("b", "door", "top", 0, 0, 0), ("a", "arch", "random", 0, 0, 0))
    assert hit_table(found, images, latents("a", "b"), cell=8) == []


def test_a_large_patch_is_clipped_to_a_small_image() -> None:
    """One window of the whole image, which holds the box: chance is 1."""
    found = patches(("a", "arch", "top", 0, 0, 0))
    found = found.set_column(
        found.schema.get_field_index("width"), SCHEMAS["patches"].field("width"), pa.array([64], pa.int32())
    )
    found = found.set_column(
        found.schema.get_field_index("height"), SCHEMAS["patches"].field("height"), pa.array([64], pa.int32())
    )
    images = manifest(("a", ["arch"], [("arch", 4, 4, 4, 4)]))
    assert hit_table(found, images, latents("a"), cell=8)[0]["chance"] == 1.0

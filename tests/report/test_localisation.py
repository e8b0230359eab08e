"""How well maps find boxes, as the report counts and shows it."""

import io
import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from fake_run import build, image, settings, tables
from PIL import Image

from diffmine.report.localisation import localisations, mean_of, shown
from diffmine.run import rows_to_table

LABELS = ("arch", "door")
BOX = {"x": 16.0, "y": 8.0, "width": 40.0, "height": 24.0}


def measured(images: int = 16, contrast: bool = False) -> pa.Table:
    """Image i of a label is found with a precision of i per cent, and of i + 50 by contrast; single pixels never."""
    rows = []
    for number, label in enumerate(LABELS):
        for i in range(images):
            row = {
                "image_id": f"{number}/{i:03d}.png", "label": label, "boxes": [BOX], "prevalence": 0.05,
                "average_precision": 0.0, "pointing_hit": False, "iou": 0.0, "paper_auc_pr": 0.125 * number,
                "patch_average_precision": i / 100, "patch_pointing_hit": i % 4 == 0, "patch_iou": 0.25,
            }  # fmt: skip
            more = {"contrast_average_precision": (i + 50) / 100, "contrast_pointing_hit": True, "contrast_iou": 0.5}
            rows.append({**row, **(more if contrast and i else {})})
    return rows_to_table("localisation", rows)


def test_numbers_of_a_label_are_means_over_its_images() -> None:
    arch, door = localisations(measured(), tables(LABELS, images=16)["manifest"], None)
    assert (arch.label, arch.images, arch.paper_auc_pr, door.paper_auc_pr) == ("arch", 16, 0.0, 0.125)
    found, pixels = arch.maps
    assert (found.by, pixels.by, pixels.average_precision) == ("patches", "pixels", 0)
    assert [found.average_precision, found.pointing_hit, found.iou] == pytest.approx([0.075, 0.25, 0.25])
    assert found.interval is not None
    assert found.interval[0] < 0.075 < found.interval[1]
    mean = mean_of([arch, replace(door, maps=[replace(found, average_precision=0.175), pixels])])
    assert (mean.images, mean.paper_auc_pr, mean.maps[0].interval) == (32, 0.0625, None)
    assert mean.maps[0].average_precision == pytest.approx(0.125)


def test_intervals_are_wider_where_a_person_has_several_images() -> None:
    manifest = tables(LABELS, images=16)["manifest"]
    person = [
        str(int(name[2:5]) // 8) for name in manifest["image_id"].to_pylist()
    ]  # of the first eight, and the others
    manifest = manifest.append_column("person", pa.array(person))
    manifest = manifest.take(pa.array(np.random.default_rng(0).permutation(len(manifest))))  # a table of another order

    def width(column: str | None) -> float:
        low, high = localisations(measured(), manifest, column)[0].maps[0].interval or (0, 0)
        return high - low

    assert width("person") > 1.3 * width(None)
    assert width("no such column") == width(None)


def test_contrast_counts_the_images_that_have_one() -> None:
    [arch, _] = localisations(measured(contrast=True), tables(LABELS, images=16)["manifest"], None)
    assert [found.by for found in arch.maps] == ["patches", "contrast", "pixels"]
    assert arch.maps[1].average_precision == pytest.approx(np.mean([(i + 50) / 100 for i in range(1, 16)]))
    assert [found.images for found in arch.maps] == [16, 15, 16]


@pytest.mark.parametrize("order", [1, -1])
def test_the_mean_is_of_kinds_of_map_that_all_labels_have(order: int) -> None:
    """Images of `door` alone have all labels that were scored, so no contrast."""
    manifest = tables(LABELS, images=16)["manifest"]
    both = [localisations(measured(contrast=c), manifest, None)[i] for i, c in enumerate((True, False))]
    assert [[found.by for found in one.maps] for one in both] == [
        ["patches", "contrast", "pixels"],
        ["patches", "pixels"],
    ]
    mean = mean_of(both[::order])
    assert [(found.by, found.average_precision) for found in mean.maps] == [
        ("patches", pytest.approx(0.075)),
        ("pixels", 0),
    ]


def test_the_least_the_middle_and_the_best_images_are_shown() -> None:
    rows = measured().filter(pa.compute.equal(measured()["label"], "arch"))
    assert [int(one.image_id[2:5]) for one in shown(rows)] == [0, 1, 2, 3, 6, 7, 8, 9, 12, 13, 14, 15]
    assert [int(one.image_id[2:5]) for one in shown(rows[::-1][:5])] == [11, 12, 13, 14, 15]


def test_pages_show_boxes_on_maps() -> None:
    found, about = {**tables(LABELS, images=16), "localisation": measured(contrast=True)}, settings()
    up = np.zeros((12, 16))
    up[1:4, 2:7] = 0.01  # the box, in cells
    files = dict(build(found, about, map_of=lambda *_: up))
    page = files["labels/0000.html"].decode()
    pictures = re.findall(r'<svg class="whole" viewBox="([^"]*)"[^>]*aria-label="([^"]*boxes of arch)">', page)
    assert len(pictures) == 12
    assert len(re.findall(r"average precision [\d.]+\s%, chance 5.0", page)) == 12
    outlined = re.findall(
        r'boxes of arch"><image [^>]*><rect x="(.*?)" y="(.*?)" width="(.*?)" height="(.*?)"/></svg>', page
    )
    scale = 320 / image("0/000.png").shape[1]  # of pictures, a column of which begins at each 320 pixels
    assert [float(box[0]) for box in outlined[:3]] == [BOX["x"] * scale + 320 * i for i in range(3)]
    assert {tuple(map(float, box[2:])) for box in outlined} == {(BOX["width"] * scale, BOX["height"] * scale)}
    assert len(outlined) == 12
    sheet = Image.open(io.BytesIO(files["images/0000/located.webp"])).convert("RGB")
    left, top, width, height = (float(number) for number in pictures[0][0].split())
    one = np.asarray(sheet.crop((round(left), round(top), round(left + width), round(top + height)))).astype(int)
    scale = one.shape[1] / image("0/000.png").shape[1]
    inside = one[round(14 * scale) : round(26 * scale), round(24 * scale) : round(48 * scale)]
    assert (inside[..., 0] - inside[..., 2]).mean() > 100  # orange,
    outside = one[round(60 * scale) :]
    assert np.abs(outside[..., 0] - outside[..., 2]).mean() < 10  # and grey
    overview = files["index.html"].decode()
    assert overview.count("by contrast") == 3  # of each label and of their mean
    assert overview.count("single pixels") == 5
    assert "mean of 2 labels" in overview
    text = re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", overview))
    assert "arch 16 7.5 % 5.2 % to 9.8 % 5.0 % 25 % 25 %" in text
    assert "by contrast 15 58 %" in text

"""Every map that has boxes of its label, measured again by scikit-learn on maps that PyTorch upsampled."""

import csv
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch.nn.functional import interpolate

from diffmine.configfile import load
from diffmine.progress import Progress
from diffmine.run import Run
from diffmine.stages.localisation import localisation
from diffmine.stages.session import Context

pytestmark = pytest.mark.usefixtures("ray_session")
Boxes = dict[tuple[str, str], list[list[float]]]  # image and label -> x, y, width, height in prepared pixels


def in_the_file(images: Path) -> Boxes:
    """Boxes as written; scenes of 128 pixels are prepared at 64."""
    found: Boxes = defaultdict(list)
    for row in csv.DictReader((images / "boxes.csv").read_text().splitlines()):
        if row["x"]:
            found[row["image"], row["label"]].append([float(row[name]) / 2 for name in "xywh"])
    return found


def check(measured: dict[str, Any], values: np.ndarray, boxes: list[list[float]], prefix: str = "") -> None:
    y, x = np.mgrid[:64, :64] + 0.5
    truth = np.any([(x >= a) & (x < a + w) & (y >= b) & (y < b + h) for a, b, w, h in boxes], axis=0)
    pixels = upsampled(values).astype(np.float32)
    assert measured["prevalence"] == pytest.approx(truth.mean(), abs=1e-6)
    precision = average_precision_score(truth.ravel(), pixels.ravel())
    assert measured[f"{prefix}average_precision"] == pytest.approx(precision, abs=2e-4)
    assert measured[f"{prefix}pointing_hit"] == truth.ravel()[pixels.argmax()]
    assert 0 <= measured[f"{prefix}iou"] <= 1


def upsampled(values: np.ndarray) -> np.ndarray:
    cells = torch.from_numpy(values.astype(np.float64))[None, None]
    return interpolate(cells, (64, 64), mode="bilinear")[0, 0].numpy()


def over_patches(values: np.ndarray) -> np.ndarray:
    """Mean over the 16 pixels around each cell of 8, or those at the edge."""
    pixels = upsampled(values)
    starts = [min(max(8 * i - 4, 0), 48) for i in range(8)]
    return np.array([[pixels[y : y + 16, x : x + 16].mean() for x in starts] for y in starts])


def maps(run: Run) -> dict[tuple[str, str], tuple[bool, np.ndarray]]:
    return {
        (row["image_id"], row["label"]): (row["own"], np.array(row["map"], np.float32).reshape(row["h"], row["w"]))
        for row in run.table("typicality").to_pylist()
    }


def test_every_map_with_boxes_of_its_label_is_measured(first: Run, images: Path) -> None:
    boxes = {pair: own for pair, own in in_the_file(images).items() if pair[0].split("/")[0] == pair[1]}
    rows, scored = first.table("localisation").to_pylist(), maps(first)
    assert [(r["image_id"], r["label"]) for r in rows] == sorted(boxes.keys() & scored.keys())
    assert len(rows) > 10
    for row in rows:
        pair = row["image_id"], row["label"]
        assert np.allclose(sorted(list(box.values()) for box in row["boxes"]), sorted(boxes[pair]), atol=1e-4)
        check(row, scored[pair][1], boxes[pair])
        check(row, over_patches(scored[pair][1]), boxes[pair], "patch_")
        assert row["contrast_iou"] is None


def test_contrast_is_with_the_labels_that_the_image_does_not_have(compared: Run, images: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        f"{{output: {compared.root}, dataset: {{source: {images}, boxes: {images / 'boxes.csv'}}}}}"
    )
    result = localisation(Context(compared, load(str(tmp_path / "run.yaml"), ["--patches.size=16"]), Progress()))
    rows, scored = compared.table("localisation").to_pylist(), maps(compared)
    assert result.marker == {"rows": len(rows)}
    for row in rows:
        others = [
            over_patches(values) for (image, _), (own, values) in scored.items() if image == row["image_id"] and not own
        ]
        contrast = over_patches(scored[row["image_id"], row["label"]][1]) - np.max(others, axis=0)
        check(row, contrast, [list(box.values()) for box in row["boxes"]], "contrast_")
    [(image, labels)] = [
        (r["image_id"], r["labels"]) for r in compared.table("manifest").to_pylist() if r["labels"][1:]
    ]
    assert labels == ["Ashford", "Brookvale"]
    assert image in {row["image_id"] for row in rows}  # against five labels, not six

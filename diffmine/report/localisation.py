"""The table `localisation` -> how well the maps of each label find its boxes, and which images show that."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diffmine.data.split import group_numbers
from diffmine.mining.localisation import interval
from diffmine.tables import grouped

KINDS = {"patches": "patch_", "contrast": "contrast_", "pixels": ""}  # of maps; how their columns begin
_SHOWN = 4  # of the least, the middle and the best found images


@dataclass(frozen=True)
class Found:
    """How well one kind of map finds the boxes of a label; means over images."""

    by: str  # one of `KINDS`
    images: int  # that have such a map; there is no contrast where an image has every label that was scored
    prevalence: float  # share of their pixels in boxes: the average precision of chance
    average_precision: float
    interval: tuple[float, float] | None  # of it, 95 %; not known of one group of images, nor of the mean of labels
    pointing_hit: float
    iou: float


@dataclass(frozen=True)
class Localisation:
    """Of a label, or the mean of labels."""

    label: str | None
    images: int  # compared with boxes
    paper_auc_pr: float
    maps: list[Found]


@dataclass(frozen=True)
class Located:
    """An image whose map, over patches, is shown with the boxes of its label."""

    image_id: str
    average_precision: float
    prevalence: float
    boxes: list[dict[str, float]]  # x, y, width, height in prepared pixels


def localisations(rows: pa.Table, manifest: pa.Table, group_column: str | None) -> list[Localisation]:
    """One for each label of the table, sorted by label.

    Args:
        group_column: of the manifest, where it has it: images of equal values count together for the interval.
    """
    groups = np.arange(len(manifest))
    if group_column and group_column in manifest.column_names:
        groups = group_numbers(manifest[group_column])
    image = pc.index_in(rows["image_id"], manifest["image_id"].combine_chunks()).to_numpy()
    rows = rows.append_column("group", pa.array(groups[image]))
    return [_of_label(label, own) for label, own in sorted(grouped(rows, "label").items())]


def _of_label(label: str, rows: pa.Table) -> Localisation:
    having = {by: rows.filter(pc.is_valid(rows[f"{prefix}iou"])) for by, prefix in KINDS.items()}
    maps = [_found(by, own) for by, own in having.items() if len(own)]
    return Localisation(label, len(rows), _mean(rows["paper_auc_pr"]), maps)


def _found(by: str, rows: pa.Table) -> Found:
    precision, hit, iou = (rows[KINDS[by] + name] for name in ("average_precision", "pointing_hit", "iou"))
    ends = interval(precision.to_numpy().astype(np.float64), rows["group"].to_numpy())
    return Found(
        by, len(rows), _mean(rows["prevalence"]), _mean(precision), ends, _mean(hit.cast(pa.float64())), _mean(iou)
    )


def mean_of(labels: Sequence[Localisation]) -> Localisation:
    """Every label counts as much, as in the paper; of kinds of map that all of them have."""
    kinds = {by: [found for one in labels for found in one.maps if found.by == by] for by in KINDS}
    maps = [_mean_found(by, of) for by, of in kinds.items() if len(of) == len(labels)]
    images = sum(one.images for one in labels)
    return Localisation(None, images, float(np.mean([one.paper_auc_pr for one in labels])), maps)


def _mean_found(by: str, labels: Sequence[Found]) -> Found:
    numbers = [[one.prevalence, one.average_precision, one.pointing_hit, one.iou] for one in labels]
    prevalence, precision, hit, iou = np.mean(numbers, axis=0).tolist()
    return Found(by, sum(one.images for one in labels), prevalence, precision, None, hit, iou)


def _mean(values: pa.ChunkedArray) -> float:
    return float(np.mean(values.to_numpy(), dtype=np.float64))


def shown(rows: pa.Table) -> list[Located]:
    """Images of a label: those whose boxes are found least, those in the middle and those found best, in that order."""
    rows = rows.sort_by([("patch_average_precision", "ascending"), ("image_id", "ascending")])
    middle = (len(rows) - _SHOWN) // 2
    chosen = [*range(len(rows))]
    if len(rows) > 3 * _SHOWN:
        chosen = chosen[:_SHOWN] + chosen[middle : middle + _SHOWN] + chosen[-_SHOWN:]
    rows = rows.select(["image_id", "patch_average_precision", "prevalence", "boxes"])
    return [Located(*row.values()) for row in rows.take(pa.array(chosen, pa.int64())).to_pylist()]

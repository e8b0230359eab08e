"""The table `localisation` -> how well the maps of each label find its boxes, and which images show that."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diffmine.data.split import group_numbers
from diffmine.mining.localisation import interval
from diffmine.randomness import generator
from diffmine.tables import grouped

KINDS = {"patches": "patch_", "contrast": "contrast_", "pixels": ""}  # of maps; how their columns begin
_SHOWN = 4  # of the least, the middle and the best found images


@dataclass(frozen=True)
class Found:
    """How well one kind of map finds the boxes of a label; means over images."""

    by: str  # one of `KINDS`
    average_precision: float
    interval: tuple[float, float] | None  # of it, 95 %; not known of the mean of labels
    pointing_hit: float
    iou: float


@dataclass(frozen=True)
class Localisation:
    """Of a label, or the mean of labels."""

    label: str | None
    images: int  # compared with boxes
    prevalence: float  # share of their pixels in boxes: the average precision of chance
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
        group_column: of the manifest, where it has it: images of equal values are resampled together for the interval.
    """
    groups = np.arange(len(manifest))
    if group_column and group_column in manifest.column_names:
        groups = group_numbers(manifest[group_column])
    image = pc.index_in(rows["image_id"], manifest["image_id"].combine_chunks()).to_numpy()
    rows = rows.append_column("group", pa.array(groups[image]))
    return [_of_label(label, own) for label, own in sorted(grouped(rows, "label").items())]


def _of_label(label: str, rows: pa.Table) -> Localisation:
    maps = [
        _found(by, prefix, label, own)
        for by, prefix in KINDS.items()  # there is no contrast where an image has every label that was scored
        if len(own := rows.filter(pc.is_valid(rows[f"{prefix}iou"])))
    ]
    return Localisation(label, len(rows), _mean(rows["prevalence"]), _mean(rows["paper_auc_pr"]), maps)


def _found(by: str, prefix: str, label: str, rows: pa.Table) -> Found:
    precision = rows[f"{prefix}average_precision"].to_numpy().astype(np.float64)
    ends = interval(precision, rows["group"].to_numpy(), generator(0, "localisation", label, by))
    hit, iou = rows[f"{prefix}pointing_hit"].cast(pa.float64()), rows[f"{prefix}iou"]
    return Found(by, float(precision.mean()), ends, _mean(hit), _mean(iou))


def mean_of(labels: Sequence[Localisation]) -> Localisation:
    """Every label counts as much, as in the paper."""

    def mean(values: Iterable[float]) -> float:
        return float(np.mean([*values]))

    maps = []
    for kind in zip(*(one.maps for one in labels), strict=False):
        of = [[m.average_precision, m.pointing_hit, m.iou] for m in kind]
        precision, hit, iou = np.mean(of, axis=0).tolist()
        maps.append(Found(kind[0].by, precision, None, hit, iou))
    images = sum(one.images for one in labels)
    return Localisation(
        None, images, mean(one.prevalence for one in labels), mean(one.paper_auc_pr for one in labels), maps
    )


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

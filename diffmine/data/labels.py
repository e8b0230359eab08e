"""What a manifest says of its labels."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diffmine.errors import InputError


def label_sizes(manifest: pa.Table) -> dict[str, int]:
    """label -> its images in a manifest, sorted by label."""
    counts = pc.value_counts(pc.list_flatten(manifest["labels"].combine_chunks()))
    return dict(sorted((c["values"], c["counts"]) for c in counts.to_pylist()))


def labels_to_score(wanted: str | Sequence[str], labels: Sequence[str]) -> tuple[str, ...]:
    """Labels that every image is scored under, beside its own.

    Args:
        wanted: `typicality.labels`.
        labels: those of the dataset.

    Raises:
        InputError: a label is wanted that the dataset lacks.
    """
    if isinstance(wanted, str):
        return tuple(labels) if wanted == "all" else ()
    if missing := sorted(set(wanted) - set(labels)):
        raise InputError(
            f"typicality.labels: the dataset has no label {', '.join(map(repr, missing))}; it has {', '.join(labels)}"
        )
    return tuple(sorted(set(wanted)))


def labels_without_others(manifest: pa.Table, scored: Sequence[str]) -> list[str]:
    """Labels all of whose images have every label of `scored`: there is no other to compare them with; sorted."""
    lists = manifest["labels"].combine_chunks()
    labels, image = pc.list_flatten(lists), pc.list_parent_indices(lists).to_numpy()
    has = np.bincount(image[np.asarray(pc.is_in(labels, pa.array(scored, pa.string())))], minlength=len(manifest))
    compared = labels.filter(has[image] < len(scored))
    return sorted({*pc.unique(labels).to_pylist()} - {*pc.unique(compared).to_pylist()})

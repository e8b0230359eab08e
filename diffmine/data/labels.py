"""What a manifest says of its labels."""

from collections.abc import Sequence

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

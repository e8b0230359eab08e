"""Tables -> a few lines for the terminal: what was found, and where to look."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

_MOST_LABELS = 20


def summary(
    clusters: pa.Table, failures: pa.Table, hits: Sequence[Mapping[str, Any]] | None, report: str | None
) -> Iterator[str]:
    """One line per label: its best cluster, and how often its best patches lie on its boxes, against chance."""
    best = [row for row in clusters.to_pylist() if row["rank"] == 0]
    best.sort(key=lambda row: -row["median_typicality"])
    by_label = {row["label"]: row for row in hits or ()}
    width = max((len(row["label"] or "all labels") for row in best[:_MOST_LABELS]), default=0)
    if best:
        yield "most typical cluster of each label (T in squared eps error):"
    for row in best[:_MOST_LABELS]:
        name = (row["label"] or "all labels").ljust(width)
        hit = _hit(by_label.get(row["label"]))
        yield f"  {name}  median T {row['median_typicality']:+.4f}  {row['size']} patches{hit}"
    if len(best) > _MOST_LABELS:
        yield f"  ... and {len(best) - _MOST_LABELS} more labels"
    if len(failures):
        yield f"{len(failures)} images could not be used; the table failures says why"
    if report:
        yield f"report: {report}"


def _hit(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    return f"  {found['hits']} of the {found['best']} best patches on its boxes (chance {found['chance']:.0%})"

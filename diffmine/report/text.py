"""Tables -> a few lines for the terminal: what was found, and where to look."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from diffmine.report.pages import is_small
from diffmine.report.rendering import short

_MOST_LABELS = 20
_LONGEST = 40  # characters of a label


def summary(clusters: pa.Table, hits: Sequence[Mapping[str, Any]] | None, report: str | None) -> Iterator[str]:
    """One line per label: its leading cluster, and its most typical patches that lie on its boxes, against chance."""
    best = leading(clusters)
    by_label = {row["label"]: row for row in hits or ()}
    names = [short(row["label"] or "all labels", _LONGEST) for row in best[:_MOST_LABELS]]
    width = max(map(len, names), default=0)
    if best:
        yield "most typical cluster of each label (T in squared eps error):"
    for row, name in zip(best, names, strict=False):
        hit = _hit(by_label.get(row["label"]))
        yield f"  {name.ljust(width)}  median T {row['median_typicality']:+.4f}  {row['size']} patches{hit}"
    if len(best) > _MOST_LABELS:
        yield f"  ... and {len(best) - _MOST_LABELS} more labels"
    if report:
        yield f"report: {report}"


def leading(clusters: pa.Table) -> list[Mapping[str, Any]]:
    """Of each label the first cluster that is not small, else its first; most typical first."""
    own: dict[str | None, list[Mapping[str, Any]]] = {}
    for row in sorted(clusters.to_pylist(), key=lambda row: row["rank"]):
        own.setdefault(row["label"], []).append(row)
    best = []
    for rows in own.values():
        patches = sum(row["size"] for row in rows)
        best.append(next((row for row in rows if not is_small(row, patches)), rows[0]))
    return sorted(best, key=lambda row: -row["median_typicality"])


def _hit(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    on, of = found["top"]
    some = f" of {found['annotated']:,} annotated images" if found["annotated"] < found["images"] else ""
    return f"  {on} of the {of} most typical patches{some} on its boxes (chance {found['chance']:.0%})"

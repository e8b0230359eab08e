"""A curator's words on clusters: read from what the report's pages export, kept with the run, built into its report."""

from collections.abc import Mapping, Sequence

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffmine.errors import InputError
from diffmine.report.page import script

_LONGEST = 10_000  # characters of a note


class Words(BaseModel):
    """What a curator says of a cluster."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    label: str | None  # None where clusters hold patches of all labels
    cluster: int = Field(ge=0)
    name: str = Field(default="", max_length=_LONGEST)
    note: str = Field(default="", max_length=_LONGEST)
    star: bool = False
    hide: bool = False


class Curation(BaseModel):
    """Words on some clusters of a run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    clusters_of: str  # names the clusters that are spoken of
    clusters: list[Words] = []

    def over(self, older: "Curation | None") -> "Curation":
        """These words and, of clusters that they do not speak of, the older ones; sorted."""
        words = {(one.label, one.cluster): one for c in (older, self) if c for one in c.clusters}
        return Curation(clusters_of=self.clusters_of, clusters=[words[k] for k in sorted(words, key=str)])

    def dump(self) -> bytes:
        return self.model_dump_json(indent=1).encode()


def parse(data: bytes, where: str) -> Curation:
    """
    Raises:
        InputError: it is not a curation; every mistake is named.
    """
    try:
        return Curation.model_validate_json(data)
    except ValidationError as error:
        mistakes = [f"  {'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()]
        raise InputError("\n".join([f"{where} is not a curation that a report exported:", *mistakes[:20]])) from error


def check(curation: Curation, clusters: pa.Table, clusters_of: str, where: str) -> None:
    """
    Args:
        clusters: of the run, and
        clusters_of: what names them.

    Raises:
        InputError: the words are on clusters of another run, or on some that are not there.
    """
    if curation.clusters_of != clusters_of:
        raise InputError(f"{where} was made with another run, or before its clusters were made again")
    there = set(zip(clusters["label"].to_pylist(), clusters["cluster"].to_pylist(), strict=True))
    unknown = [f"{w.label}: {w.cluster}" for w in curation.clusters if (w.label, w.cluster) not in there]
    if unknown:
        raise InputError(f"{where} speaks of clusters that the run does not have: {', '.join(unknown[:10])}")


def to_script(curation: Curation, labels: Sequence[str | None], ranks: Mapping[tuple[str | None, int], int]) -> bytes:
    """What the pages load.

    Args:
        labels: of the pages, in their order.
        ranks: label and cluster -> the cluster's rank.
    """
    pages = {label: f"{number:04d}" for number, label in enumerate(labels)}
    words = [
        {**one.model_dump(), "page": pages.get(one.label), "rank": ranks.get((one.label, one.cluster))}
        for one in curation.clusters
    ]
    return script("curation", {"clusters_of": curation.clusters_of, "clusters": words})

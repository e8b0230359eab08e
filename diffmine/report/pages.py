"""Tables -> what each page shows: which clusters, and which of their patches.

Tables stay Arrow until the few rows that are shown are known, so that hundreds of labels fit in memory.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import zip_longest
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diffmine.data.labels import label_sizes
from diffmine.data.split import group_numbers
from diffmine.report.localisation import Located, shown
from diffmine.tables import grouped

CONTEXT_IMAGES = 4  # whole images at the head of a label's page
OVERVIEW_PATCHES = 8  # shown of a label on the overview
ROW_PATCHES = 24  # patches shown of each kind: two rows of a wide page
_SMALL = 0.01  # of the patches: clusters with fewer are folded and do not lead,
_FEW = 3  # nor do those from fewer images
KINDS = ("top", "random", "bottom")  # as they stand below each other


@dataclass(frozen=True)
class Patch:
    """A patch that is shown; columns of the table `patches`."""

    patch_id: str
    image_id: str
    label: str
    kind: str
    rank: int
    x: int
    y: int
    width: int
    height: int
    typicality: float
    stderr: float
    fresh_typicality: float | None = None  # from draws that had no part in the choice
    fresh_stderr: float | None = None
    contrast: float | None = None  # T less that under its rival
    rival: str | None = None
    fresh_contrast: float | None = None
    fresh_contrast_stderr: float | None = None

    @property
    def box(self) -> tuple[int, int, int, int]:
        return self.x, self.y, self.width, self.height


@dataclass(frozen=True)
class Cluster:
    """A cluster with the members that are shown, nearest to the centroid first."""

    cluster: int  # its number in the tables
    rank: int
    size: int
    images: int
    median_typicality: float
    stderr: float  # median of its patches'
    patches: list[Patch]
    labels: list[tuple[str, int]]  # how many patches of which label, most first
    small: bool
    typicality: np.ndarray  # float [size], of all of its patches
    contrast: float | None = None  # median of its patches'
    groups: int | None = None  # that its images come from, where that is known


@dataclass(frozen=True)
class Fresh:
    """The most typical patches of a page that were scored again, with draws that had no part in their choice."""

    count: int
    chosen: float  # mean T by which they were chosen,
    typicality: float  # and with fresh draws
    stderr: float  # mean of theirs
    contrast: tuple[float, float, float] | None = None  # the same three of it, where it chose the patches


@dataclass(frozen=True)
class Page:
    """What is shown of a label; of all labels together where `label` is None."""

    number: int  # names the page's files
    label: str | None
    images: int  # in the manifest,
    usable: int  # and of them without those that failed
    patches: int  # most typical ones kept
    median_typicality: float  # of the leading cluster; of its most typical patches where clusters hold several labels
    stderr: float  # median of these patches'
    clusters: list[Cluster]
    hidden: int  # clusters that are not shown
    kinds: dict[str, list[Patch]] = field(default_factory=dict)
    fresh: "Fresh | None" = None
    random: tuple[float, float] | None = None  # mean T of random patches, and mean standard error
    context: list[tuple[str, list[Patch]]] = field(default_factory=list)  # image, and its most typical patches
    located: list[Located] = field(default_factory=list)  # images with boxes of the label

    @property
    def best(self) -> int:
        """Place of the leading cluster: the first that is not small; 0 where all are."""
        return next((i for i, cluster in enumerate(self.clusters) if not cluster.small), 0)

    @property
    def coverage(self) -> float:
        """Share of the usable images that have a patch in the leading cluster."""
        return self.clusters[self.best].images / self.usable if self.clusters and self.usable else 0.0

    def shown(self) -> list[Patch]:
        """The patches that its strips hold, in the order of the page."""
        return [p for group in (*(c.patches for c in self.clusters), *self.kinds.values()) for p in group]

    def image_ids(self) -> list[str]:
        """The images that must be opened, once each."""
        beside = [image_id for image_id, _ in self.context] + [image.image_id for image in self.located]
        return sorted({p.image_id for p in self.shown()}.union(beside))

    @property
    def leading(self) -> list[Patch]:
        """The patches that stand for the page on the overview."""
        shown = self.clusters[self.best].patches if self.clusters else self.kinds.get("top", [])
        return shown[:OVERVIEW_PATCHES]

    def doubt(self, beside_random: bool = True) -> str | None:
        """What the T of its most typical patches is not told apart from: it lies within twice its standard error.

        Patches share their draws, so their errors need not cancel out: the mean is taken to be as uncertain as a patch.
        Fresh scores decide where there are any, as the others flatter.

        Args:
            beside_random: random patches have as many draws as the others.
        """
        if not self.patches:
            return None
        value, error = (
            (self.fresh.typicality, self.fresh.stderr) if self.fresh else (self.median_typicality, self.stderr)
        )
        if value < 2 * error:
            return "zero"
        if beside_random and self.random and value - self.random[0] < 2 * math.hypot(error, self.random[1]):
            return "random patches"
        if self.fresh and self.fresh.contrast and self.fresh.contrast[1] < 2 * self.fresh.contrast[2]:
            return "the other labels"
        return None

    def wholes(self, most: int) -> list[str]:
        """The images that are shown whole, those seen first: of the context, of the overview, then in turn the next of
        each row, folded ones last."""
        turns = zip_longest(*(c.patches for c in self.clusters if not c.small), *self.kinds.values())
        folded = zip_longest(*(c.patches for c in self.clusters if c.small))
        rest = [p.image_id for turn in (*turns, *folded) for p in turn if p is not None]
        first = [*(image_id for image_id, _ in self.context), *(p.image_id for p in self.leading)]
        return list(dict.fromkeys([*first, *rest]))[:most]


def choose(
    tables: Mapping[str, pa.Table],
    joint: bool,
    most_clusters: int,
    most_patches: int,
    group_column: str | None = None,
    localisation: pa.Table | None = None,
) -> list[Page]:
    """Pages of the labels that were mined, sorted by label; first that of the joint clusters, where there are any.

    Args:
        tables: manifest, patches, clusters, members, and failures where there are any.
        joint: clusters hold patches of all labels (`clusters.scope: dataset`).
        most_clusters, most_patches: shown of a label and of a cluster.
        group_column: of the manifest, where it has it; images of equal values belong together.
        localisation: table of the images that may be shown with their boxes.
    """
    images, usable = label_sizes(tables["manifest"]), usable_images(tables)
    sizes = label_sizes(usable)
    every = tables["patches"]
    if group_column and group_column in tables["manifest"].column_names:
        every = every.append_column("group", _groups(tables["manifest"], group_column, every["image_id"]))
    patches = grouped(every, "label")
    clusters = grouped(tables["clusters"], "label")
    members = {None: tables["members"]} if joint else grouped(tables["members"], "label")
    located = grouped(localisation, "label") if localisation is not None else {}
    labels: list[str | None] = [*([None] if joint else []), *sorted(patches)]
    pages: list[Page] = []
    for label in labels:
        own = every if label is None else patches[label]
        found = clusters.get(label, tables["clusters"].schema.empty_table())
        rows = _clusters(found, members.get(label), own, most_clusters, most_patches)
        count = len(tables["manifest"]) if label is None else images.get(label, 0)
        of = len(usable) if label is None else sizes.get(label, 0)
        page = _page(len(pages), label, (count, of), own, rows, len(found) - len(rows))
        pages.append(replace(page, located=shown(located[label])) if label in located else page)
    return pages


def _groups(manifest: pa.Table, column: str, image_id: pa.ChunkedArray) -> pa.ChunkedArray:
    """Number of the group of each image; one without is on its own, as when images are held out."""
    groups = pa.chunked_array([group_numbers(manifest[column])])
    return groups.take(pc.index_in(image_id, manifest["image_id"].combine_chunks()))


def usable_images(tables: Mapping[str, pa.Table]) -> pa.Table:
    """Rows of the manifest without those of images that failed."""
    manifest, failures = tables["manifest"], tables.get("failures")
    if failures is None or not len(failures):
        return manifest
    return manifest.filter(pc.invert(pc.is_in(manifest["image_id"], failures["image_id"].combine_chunks())))


def is_small(cluster: Mapping[str, Any], patches: int) -> bool:
    """Whether a cluster (a row of the table) says little about its label, of so many patches in all clusters."""
    return bool(cluster["images"] < _FEW or cluster["size"] < _SMALL * patches)


def _page(
    number: int, label: str | None, images: tuple[int, int], own: pa.Table, clusters: list[Cluster], hidden: int
) -> Page:
    """The rest of a page: its rows of patches and its images.

    Args:
        images: in the manifest, and of them usable.
    """
    top, drawn = _ranked(own, "top"), own.filter(pc.equal(own["kind"], "random"))
    median, stderr = _median(top["typicality"]), _median(top["stderr"])
    random = (_mean(drawn["typicality"]), _mean(drawn["stderr"])) if len(drawn) else None
    if label is None:
        return Page(number, label, *images, len(top), median, stderr, clusters, hidden, {}, _fresh(top), random)
    if clusters:
        leading = next((c for c in clusters if not c.small), clusters[0])
        median, stderr = leading.median_typicality, leading.stderr
    kinds = {kind: _patches(_ranked(own, kind)[:ROW_PATCHES]) for kind in KINDS}
    kinds = {kind: patches for kind, patches in kinds.items() if patches}
    return Page(
        number, label, *images, len(top), median, stderr, clusters, hidden, kinds, _fresh(top), random,
        _context(_patches(top)),
    )  # fmt: skip


def _fresh(top: pa.Table) -> Fresh | None:
    again = top.filter(pc.is_valid(top["fresh_typicality"]))
    if not len(again):
        return None
    chosen, fresh, stderr = (_mean(again[name]) for name in ("typicality", "fresh_typicality", "fresh_stderr"))
    if again["fresh_contrast"].null_count:
        return Fresh(len(again), chosen, fresh, stderr)
    of_contrast = (_mean(again[name]) for name in ("contrast", "fresh_contrast", "fresh_contrast_stderr"))
    return Fresh(len(again), chosen, fresh, stderr, (next(of_contrast), next(of_contrast), next(of_contrast)))


def _mean(values: pa.ChunkedArray) -> float:
    return float(np.mean(values.to_numpy()))


def _median(values: pa.ChunkedArray) -> float:
    return float(np.median(values.to_numpy())) if len(values) else math.nan


def _ranked(patches: pa.Table, kind: str) -> pa.Table:
    return patches.filter(pc.equal(patches["kind"], kind)).sort_by([("rank", "ascending")])


def _context(top: list[Patch]) -> list[tuple[str, list[Patch]]]:
    """The images of the most typical patches, each with all that it has of them, the most typical first."""
    first = list(dict.fromkeys(p.image_id for p in top))[:CONTEXT_IMAGES]
    return [(image_id, [p for p in top if p.image_id == image_id]) for image_id in first]


def _clusters(
    clusters: pa.Table, members: pa.Table | None, patches: pa.Table, most_clusters: int, most_patches: int
) -> list[Cluster]:
    """The first clusters of a page with their members nearest to the centroid."""
    if members is None or not len(clusters):
        return []
    shown = clusters.sort_by([("rank", "ascending")])[:most_clusters].to_pylist()
    members = members.filter(pc.is_in(members["cluster"], pa.array([c["cluster"] for c in shown], pa.int32())))
    members = members.sort_by([("cluster", "ascending"), ("distance", "ascending"), ("patch_id", "ascending")])
    groups = grouped(members, "cluster")
    nearest = {number: group["patch_id"][:most_patches].to_pylist() for number, group in groups.items()}
    wanted = pa.array([patch_id for ids in nearest.values() for patch_id in ids], pa.string())
    by_id = {p.patch_id: p for p in _patches(patches.filter(pc.is_in(patches["patch_id"], wanted)))}
    of_patch = pc.index_in(members["patch_id"], patches["patch_id"])
    groups_known = "group" in patches.column_names
    for name in ("typicality", "stderr", "contrast", *(["group"] if groups_known else [])):
        members = members.append_column(name, patches[name].take(of_patch))
    scores = grouped(members, "cluster")
    patches_of_all = pc.sum(clusters["size"]).as_py()
    return [
        Cluster(
            c["cluster"], c["rank"], c["size"], c["images"], c["median_typicality"],
            _median(scores[c["cluster"]]["stderr"]), [by_id[patch_id] for patch_id in nearest.get(c["cluster"], ())],
            _shares(groups.get(c["cluster"])), is_small(c, patches_of_all),
            scores[c["cluster"]]["typicality"].to_numpy(),
            None if scores[c["cluster"]]["contrast"].null_count else _median(scores[c["cluster"]]["contrast"]),
            pc.count_distinct(scores[c["cluster"]]["group"]).as_py() if groups_known else None,
        )
        for c in shown
    ]  # fmt: skip


def _shares(members: pa.Table | None) -> list[tuple[str, int]]:
    counts = Counter(members["label"].to_pylist() if members is not None else ())
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _patches(table: pa.Table) -> list[Patch]:
    return [Patch(**row) for row in table.select([f.name for f in fields(Patch)]).to_pylist()]

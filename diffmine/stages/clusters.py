"""Features and scores of the top patches -> clusters, ranked by the median of what chose them, and their members.

That is T; with `typicality.against: others` the contrast, so that what all labels share leads none.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from diffmine.mining.clusters import kmeans, summarise
from diffmine.randomness import generator
from diffmine.run import SCHEMAS, Run, part_name, rows_to_table
from diffmine.stages.room import Room
from diffmine.stages.session import Context, Result
from diffmine.stages.watch import kept_alive, unless_stalled
from diffmine.store import at_once

Rows = list[dict[str, Any]]
_AT_ONCE = 128  # k-means that are submitted; their features lie in Ray's object store


def clusters(context: Context) -> Result:
    """k-means per label, or over the dataset; one Ray task per k-means."""
    run, wanted, progress = context.run, context.config.clusters, context.progress
    patches, features = _patches(run)
    names, label = np.unique(patches["label"].to_numpy(), return_inverse=True)
    groups: dict[str | None, np.ndarray] = {str(name): np.flatnonzero(label == i) for i, name in enumerate(names)}
    if wanted.scope == "dataset":
        groups = {None: np.arange(len(patches))}

    def found() -> Iterator[tuple[Rows, pa.Table]]:
        """In the order of the labels."""
        waiting: deque[Any] = deque()
        for name, own in groups.items():
            seed = int(generator(context.config.seed, "k-means", name or "").integers(2**31))
            vectors = features if len(own) == len(features) else features[own]
            waiting.append(_cluster.remote(name, patches.take(own), vectors, wanted.k, wanted.restarts, seed))
            if len(waiting) == _AT_ONCE:
                yield ray.get(waiting.popleft())
        yield from map(ray.get, waiting)

    progress.start("clusters", len(groups), "k-means")
    cluster_rows: Rows = []
    member_tables = [SCHEMAS["members"].empty_table()]
    for one, members in unless_stalled(
        context, "clusters", found(), lambda done: f"{len(groups) - done} k-means", Room(1)
    ):
        cluster_rows += one
        member_tables.append(members)
        progress.advance(1)
    progress.finish(f"{len(cluster_rows)} clusters of {len(patches)} patches")
    members = pa.concat_tables(member_tables).combine_chunks().sort_by("patch_id")
    files = {
        part_name(name, 0): run.write_part(name, 0, table, over=True)
        for name, table in (("clusters", rows_to_table("clusters", cluster_rows)), ("members", members))
    }
    return Result(files, {"rows": len(cluster_rows)})


def _patches(run: Run) -> tuple[pa.Table, np.ndarray]:
    """The top patches, sorted by patch_id, and their features, float32 [N, D].

    The features are what is large, so they are held once: each part is put in its place as it is read.
    """
    patches = run.table("patches", ["patch_id", "image_id", "label", "typicality", "contrast", "kind"])
    patches = patches.filter(pc.equal(patches["kind"], "top")).drop_columns("kind").sort_by("patch_id")
    ids, parts = patches["patch_id"].to_numpy().astype(str), run.parts("features")
    width = _matrix(run.read_part("features", parts[0])).shape[1] if parts else 0
    features = np.empty((len(ids), width), np.float32)

    def place(number: int) -> int:
        part = run.read_part("features", number)
        rows = np.searchsorted(ids, part["patch_id"].to_numpy().astype(str))
        features[rows] = _matrix(part)
        return len(rows)

    placed = sum(at_once(place, parts))
    assert placed == len(ids), f"{placed} features of {len(ids)} patches"
    return patches, features


def _matrix(part: pa.Table) -> np.ndarray:
    """The column of features, float32 [rows, D]; a view where the part is in one piece."""
    pieces = [piece.flatten().to_numpy() for piece in part["feature"].chunks]
    return (pieces[0] if len(pieces) == 1 else np.concatenate(pieces)).reshape(len(part), -1)


@ray.remote(num_cpus=1)
def _cluster(
    label: str | None, patches: pa.Table, features: np.ndarray, k: int, restarts: int, seed: int
) -> tuple[Rows, pa.Table]:
    """Ray task: one k-means; rows of `clusters`, and `members`."""
    with kept_alive():
        found = kmeans(features, k, seed, restarts)
    ranked = summarise(
        found.assignment,
        found.distance,
        patches["typicality"].to_numpy(),
        patches["image_id"].to_numpy(zero_copy_only=False),
        patches["contrast"].to_numpy() if patches["contrast"].null_count == 0 else None,
    )
    rows = [
        {
            "label": label, "cluster": i, "rank": i, "size": int(ranked.size[i]), "images": int(ranked.images[i]),
            "median_typicality": float(ranked.median_typicality[i]), "inertia": float(ranked.inertia[i]),
        }
        for i in range(len(ranked.size))
    ]  # fmt: skip
    own = [patches["patch_id"], patches["label"], pa.array(ranked.assignment), pa.array(found.distance)]
    return rows, pa.table(own, schema=SCHEMAS["members"])

"""Features and scores of the top patches -> clusters, ranked by median typicality, and their members."""

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from diffmine.mining.clusters import kmeans, summarise
from diffmine.randomness import generator
from diffmine.run import Run, part_name, rows_to_table
from diffmine.stages.room import Room
from diffmine.stages.session import Context, Result
from diffmine.stages.watch import kept_alive, unless_stalled

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

    def found() -> Iterator[tuple[Rows, Rows]]:
        """In the order of the labels."""
        waiting: deque[Any] = deque()
        for name, own in groups.items():
            seed = int(generator(context.config.seed, "k-means", name or "").integers(2**31))
            task = _cluster.remote(name, patches.take(own), features[own], wanted.k, wanted.restarts, seed)
            waiting.append(task)
            if len(waiting) == _AT_ONCE:
                yield ray.get(waiting.popleft())
        yield from map(ray.get, waiting)

    progress.start("clusters", len(groups), "k-means")
    cluster_rows: Rows = []
    member_rows: Rows = []
    for one, members in unless_stalled(
        context, "clusters", found(), lambda done: f"{len(groups) - done} k-means", Room(1)
    ):
        cluster_rows += one
        member_rows += members
        progress.advance(1)
    progress.finish(f"{len(cluster_rows)} clusters of {len(member_rows)} patches")
    member_rows.sort(key=lambda r: r["patch_id"])
    files = {
        part_name(name, 0): run.write_part(name, 0, rows_to_table(name, rows), over=True)
        for name, rows in (("clusters", cluster_rows), ("members", member_rows))
    }
    return Result(files, {"rows": len(cluster_rows)})


def _patches(run: Run) -> tuple[pa.Table, np.ndarray]:
    """The top patches, sorted by patch_id, and their features, float32 [N, D]."""
    parts = [*run.read_parts("features").values()]
    ids = pa.chunked_array([chunk for part in parts for chunk in part["patch_id"].chunks], pa.string())
    features = np.concatenate([_matrix(part) for part in parts] or [np.empty((0, 0), np.float32)])
    del parts
    rows = pa.table({"patch_id": ids, "row": np.arange(len(ids))})
    patches = run.table("patches", ["patch_id", "image_id", "label", "typicality"])
    patches = patches.join(rows, "patch_id", join_type="inner").sort_by("patch_id")
    return patches, features[patches["row"].to_numpy()]


def _matrix(part: pa.Table) -> np.ndarray:
    """The column of features, float32 [rows, D]."""
    return part["feature"].combine_chunks().flatten().to_numpy().reshape(len(part), -1)


@ray.remote(num_cpus=1)
def _cluster(
    label: str | None, patches: pa.Table, features: np.ndarray, k: int, restarts: int, seed: int
) -> tuple[Rows, Rows]:
    """Ray task: one k-means; rows of `clusters` and of `members`."""
    with kept_alive():
        found = kmeans(features, k, seed, restarts)
    ranked = summarise(
        found.assignment,
        found.distance,
        patches["typicality"].to_numpy(),
        patches["image_id"].to_numpy(zero_copy_only=False),
    )
    rows = [
        {
            "label": label, "cluster": i, "rank": i, "size": int(ranked.size[i]), "images": int(ranked.images[i]),
            "median_typicality": float(ranked.median_typicality[i]), "inertia": float(ranked.inertia[i]),
        }
        for i in range(len(ranked.size))
    ]  # fmt: skip
    members = [
        {"patch_id": patch_id, "label": own, "cluster": int(cluster), "distance": float(distance)}
        for patch_id, own, cluster, distance in zip(
            patches["patch_id"].to_pylist(),
            patches["label"].to_pylist(),
            ranked.assignment,
            found.distance,
            strict=True,
        )
    ]
    return rows, members

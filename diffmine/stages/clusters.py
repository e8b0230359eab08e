"""Features and scores of the top patches -> clusters, ranked by median typicality, and their members."""

from typing import Any

import numpy as np
import pyarrow as pa
import ray

from diffmine.mining.clusters import kmeans, summarise
from diffmine.randomness import generator
from diffmine.run import Run, part_name, rows_to_table
from diffmine.stages.room import Room
from diffmine.stages.session import Context, Result
from diffmine.stages.watch import unless_stalled

Rows = list[dict[str, Any]]


def clusters(context: Context) -> Result:
    """k-means per label, or over the dataset; one Ray task per k-means."""
    run, wanted, progress = context.run, context.config.clusters, context.progress
    groups = _groups(run, wanted.scope)
    progress.start("clusters", len(groups), "k-means")
    waiting = [
        _cluster.remote(
            label,
            rows,
            wanted.k,
            wanted.restarts,
            int(generator(context.config.seed, "k-means", label or "").integers(2**31)),
        )
        for label, rows in groups.items()
    ]
    cluster_rows: Rows = []
    member_rows: Rows = []
    for found, members in unless_stalled(  # in the order of the labels
        context, "clusters", map(ray.get, waiting), lambda done: f"{len(waiting) - done} k-means", Room(1)
    ):
        cluster_rows += found
        member_rows += members
        progress.advance(1)
    progress.finish(f"{len(cluster_rows)} clusters of {len(member_rows)} patches")
    member_rows.sort(key=lambda r: r["patch_id"])
    files = {
        part_name(name, 0): run.write_part(name, 0, rows_to_table(name, rows))
        for name, rows in (("clusters", cluster_rows), ("members", member_rows))
    }
    return Result(files, {"rows": len(cluster_rows)})


def _groups(run: Run, scope: str) -> dict[str | None, pa.Table]:
    """Label (None: the whole dataset) -> its top patches with features, sorted by patch_id."""
    features = run.table("features")
    patches = run.table("patches", ["patch_id", "image_id", "label", "typicality"])
    joined = features.append_column("row", pa.array(range(len(features)))).select(["patch_id", "row"])
    joined = patches.join(joined, "patch_id", join_type="inner").sort_by("patch_id")
    joined = joined.append_column("feature", features["feature"].combine_chunks().take(joined["row"].combine_chunks()))
    if scope == "dataset":
        return {None: joined}
    labels = sorted(set(joined["label"].to_pylist()))
    return {label: joined.filter(pa.compute.equal(joined["label"], label)) for label in labels}


@ray.remote(num_cpus=1)
def _cluster(label: str | None, patches: pa.Table, k: int, restarts: int, seed: int) -> tuple[Rows, Rows]:
    """Ray task: one k-means; rows of `clusters` and of `members`."""
    matrix = np.asarray(patches["feature"].combine_chunks().flatten(), dtype=np.float32).reshape(len(patches), -1)
    found = kmeans(matrix, k, seed, restarts)
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

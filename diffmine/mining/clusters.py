"""Features of patches -> k-means clusters -> clusters ranked by median typicality, or contrast.

k-means is FAISS's Lloyd iterations from greedy k-means++ starts. Its last steps are done in float64, so that the result
is a true fixed point: every feature belongs to its nearest centroid and every centroid is the mean of its features.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffmine.errors import InputError, NonFiniteError

FloatArray = NDArray[np.floating]
Float32Array = NDArray[np.float32]
Int32Array = NDArray[np.int32]

_GRAM_ROWS = 4096  # up to this many features all dot products are kept (64 MiB): every start then costs next to nothing
_BLOCK_ROWS = 8192  # features that are widened to float64 at a time
_POLISH = 10  # float64 iterations at most; one or two are enough after FAISS has converged
_TRIAL_STOP = 1e-3  # a restart is judged once an iteration lowers its inertia by less than this share
_FINALISTS = 3  # best restarts that are run to convergence


class KMeans(NamedTuple):
    """A k-means result with k' non-empty clusters, k' <= k."""

    centroids: Float32Array  # [k', D]
    assignment: Int32Array  # [N], values 0..k'-1
    distance: Float32Array  # [N], L2 to the own centroid
    inertia: float  # sum of squared distances, summed in float64


class Clusters(NamedTuple):
    """Clusters in order of rank: row i is cluster i of `assignment`, and its rank is i."""

    assignment: Int32Array  # [N]: the cluster of each patch, renumbered by rank
    size: Int32Array  # [k']: patches
    images: Int32Array  # [k']: distinct images
    median_typicality: NDArray[np.float64]  # [k'], descending unless another score ranked them
    inertia: NDArray[np.float64]  # [k']: sum of squared distances to the centroid


def kmeans(
    features: Float32Array, k: int, seed: int | np.random.Generator, restarts: int = 10, iterations: int = 300
) -> KMeans:
    """Features float32 [N, D], L2-normalised or of a like scale -> the best of `restarts` k-means of up to k clusters.

    Where there are k distinct features or fewer, each is a cluster of its own. Every feature is used and no cluster is
    empty. The result is a function of `seed`, as far as float32 matrix products are the same on any number of threads.
    Raises InputError (k < 1, restarts < 1) and NonFiniteError.
    """
    if k < 1 or restarts < 1:
        raise InputError(f"k-means with k={k} and restarts={restarts}: both must be 1 or more")
    features = np.ascontiguousarray(features, dtype=np.float32)
    if not np.isfinite(features).all():
        bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
        raise NonFiniteError(f"{len(bad)} of {len(features)} features hold NaN or infinity, the first in row {bad[0]}")
    assignment = _distinct(features, k)
    if assignment is None:
        assignment = _polished(features, _lloyd(features, k, np.random.default_rng(seed), restarts, iterations))
    centroids = _means(features, assignment)
    squared = _squared_distances(features, centroids, assignment)
    return KMeans(
        centroids.astype(np.float32), assignment, np.sqrt(squared).astype(np.float32), float(squared.sum(dtype=float))
    )


def _distinct(features: Float32Array, k: int) -> Int32Array | None:
    """Cluster [N] of each feature if there are k distinct ones or fewer: equal features together; None otherwise."""
    clusters: dict[bytes, int] = {}
    assignment = np.empty(len(features), dtype=np.int32)
    for i, feature in enumerate(features):
        assignment[i] = clusters.setdefault(feature.tobytes(), len(clusters))
        if len(clusters) > k:
            return None
    return assignment


def _lloyd(features: Float32Array, k: int, rng: np.random.Generator, restarts: int, iterations: int) -> Float32Array:
    """Features [N, D], N > k -> the centroids [k, D] of the best of `restarts` runs.

    Short runs rank the starts; only the best of them are run to convergence.
    """
    norms = np.einsum("nd,nd->n", features, features, dtype=np.float64)
    gram = features @ features.T if len(features) <= _GRAM_ROWS else None  # [N, N]
    starts = [features[_plus_plus(features, norms, gram, k, rng)] for _ in range(restarts)]
    trials = [_faiss_run(features, start, iterations, _TRIAL_STOP) for start in starts]
    finals = [
        _faiss_run(features, centroids, iterations, 0.0) for _, centroids in sorted(trials, key=_inertia)[:_FINALISTS]
    ]
    return min(finals, key=_inertia)[1]


def _inertia(run: tuple[float, Float32Array]) -> float:
    return run[0]


def _plus_plus(
    features: Float32Array, norms: NDArray[np.float64], gram: Float32Array | None, k: int, rng: np.random.Generator
) -> list[int]:
    """Rows of up to k starts: greedy k-means++ (Arthur & Vassilvitskii 2007, section 4).

    Each is the best of 2 + log(k) candidates drawn in proportion to their squared distance from the starts so far.
    """
    chosen = [int(rng.integers(len(features)))]
    closest = _squared_to(features, norms, gram, np.array(chosen))[0]  # [N]
    for _ in range(1, k):
        potential = np.cumsum(closest)
        if potential[-1] <= 0:  # the features left differ by less than float32 products can tell
            break
        drawn = np.searchsorted(potential, rng.random(2 + int(math.log(k))) * potential[-1], side="right")
        drawn = np.minimum(drawn, len(features) - 1)
        after = np.minimum(_squared_to(features, norms, gram, drawn), closest)  # [candidates, N]
        best = int(after.sum(axis=1).argmin())
        chosen.append(int(drawn[best]))
        closest = after[best]
    return chosen


def _squared_to(
    features: Float32Array, norms: NDArray[np.float64], gram: Float32Array | None, rows: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Squared distances [rows, N] from some of the features to all of them; 0 to themselves."""
    products = features[rows] @ features.T if gram is None else gram[rows]
    squared = np.maximum(norms[rows, None] + norms - 2.0 * products.astype(np.float64), 0)
    squared[np.arange(len(rows)), rows] = 0
    return squared


def _faiss_run(features: Float32Array, start: Float32Array, iterations: int, stop: float) -> tuple[float, Float32Array]:
    """Lloyd iterations from `start` [k, D] until the inertia falls by no more than the share `stop`.

    Returns (inertia in float32 sums, centroids [k, D]). FAISS itself stops when nothing changes (`stop` = 0).
    """
    import faiss  # here, as the rest of the method runs where it is not installed

    run: Any = faiss.Kmeans(  # whose results are typed as perhaps not there
        features.shape[1],
        len(start),
        niter=iterations,
        early_stop_threshold=stop,
        # All features are used, and no warning is printed, however many or few there are for each centroid.
        max_points_per_centroid=len(features),
        min_points_per_centroid=1,
    )
    run.train(features, init_centroids=np.ascontiguousarray(start))
    return float(run.obj[-1]), run.centroids


def _polished(features: Float32Array, centroids: FloatArray) -> Int32Array:
    """Centroids near convergence -> assignment [N] after float64 iterations until it no longer changes."""
    assignment = _nearest(features, centroids)
    for _ in range(_POLISH):
        moved = _nearest(features, _means(features, assignment))
        if np.array_equal(moved, assignment):
            break
        assignment = moved
    return np.unique(assignment, return_inverse=True)[1].astype(np.int32)


def _blocks(rows: int) -> Iterator[slice]:
    return (slice(first, first + _BLOCK_ROWS) for first in range(0, rows, _BLOCK_ROWS))


def _nearest(features: Float32Array, centroids: FloatArray) -> Int32Array:
    """Cluster [N] of the nearest centroid in float64; the lowest on ties."""
    wide = centroids.astype(np.float64)
    offset = np.einsum("kd,kd->k", wide, wide)
    blocks = [
        (offset - 2 * (features[rows].astype(np.float64) @ wide.T)).argmin(axis=1) for rows in _blocks(len(features))
    ]
    return np.concatenate(blocks).astype(np.int32)


def _means(features: Float32Array, assignment: Int32Array) -> NDArray[np.float64]:
    """Mean feature [k', D] of each non-empty cluster, in order of their numbers."""
    order = np.argsort(assignment, kind="stable")
    starts = np.flatnonzero(np.diff(assignment[order], prepend=-1))
    means = [features[rows].mean(axis=0, dtype=np.float64) for rows in np.split(order, starts)[1:]]
    return np.stack(means) if means else np.empty((0, features.shape[1]))


def _squared_distances(
    features: Float32Array, centroids: NDArray[np.float64], assignment: Int32Array
) -> NDArray[np.float64]:
    """Squared distance [N] of each feature to its own centroid, from the differences (no cancellation)."""
    squared = np.empty(len(features))
    for rows in _blocks(len(features)):
        difference = features[rows] - centroids[assignment[rows]]
        squared[rows] = np.einsum("nd,nd->n", difference, difference)
    return squared


def summarise(
    assignment: ArrayLike,
    distance: ArrayLike,
    typicality: ArrayLike,
    image_ids: ArrayLike,
    score: ArrayLike | None = None,
) -> Clusters:
    """Cluster number, distance, typicality and image of each patch [N] -> its clusters, ranked and renumbered.

    Rank 0 has the highest median typicality, or score where one is given [N]; ties go to the cluster of the earlier
    first patch. Clusters are renumbered by rank: the same groups get the same numbers however k-means numbered them.
    """
    groups, first, assigned, size = np.unique(
        np.asarray(assignment), return_index=True, return_inverse=True, return_counts=True
    )
    order = np.argsort(assigned, kind="stable")

    def medians(values: ArrayLike) -> NDArray[np.float64]:
        of_groups = np.split(np.asarray(values, dtype=np.float64)[order], np.cumsum(size)[:-1])
        return np.array([np.median(own) for own in of_groups if len(own)], dtype=np.float64)

    median = medians(typicality)
    squared = np.square(np.asarray(distance, dtype=np.float64))
    inertia = np.bincount(assigned, squared, len(groups)).astype(np.float64)
    images = np.unique(np.asarray(image_ids), return_inverse=True)[1]
    pairs = np.unique(np.stack([assigned, images]), axis=1)
    ranked = np.lexsort((first, -(median if score is None else medians(score))))
    return Clusters(
        assignment=np.argsort(ranked)[assigned].astype(np.int32),
        size=size[ranked].astype(np.int32),
        images=np.bincount(pairs[0], minlength=len(groups))[ranked].astype(np.int32),
        median_typicality=median[ranked],
        inertia=inertia[ranked],
    )

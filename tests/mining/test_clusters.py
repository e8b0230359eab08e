"""k-means against scikit-learn and its own fixed-point conditions; the summary by hand."""

import numpy as np
import pytest
from sklearn.cluster import KMeans as ScikitKMeans

from diffmine.errors import InputError, NonFiniteError
from diffmine.mining import clusters
from diffmine.mining.clusters import KMeans, kmeans, summarise

pytestmark = pytest.mark.filterwarnings("ignore:builtin type:DeprecationWarning")  # FAISS's bindings


def mixture(rows: int, width: int, spread: float = 0.4, seed: int = 0) -> np.ndarray:
    """L2-normalised features around 60 centres whose distances are `spread` times the noise; 0: no structure."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(60, width)) * spread
    features = centres[rng.integers(60, size=rows)] + rng.normal(size=(rows, width))
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)


def check(features: np.ndarray, found: KMeans) -> None:
    """What holds of any converged k-means: means of members, nearest centroids, true distances, no empty cluster."""
    wide = features.astype(np.float64)
    numbers = range(len(found.centroids))
    assert sorted(set(found.assignment.tolist())) == list(numbers)
    means = np.stack([wide[found.assignment == number].mean(axis=0) for number in numbers])
    np.testing.assert_allclose(found.centroids, means, atol=1e-6)
    squared = np.square(wide[:, None] - means).sum(axis=2)
    np.testing.assert_array_equal(found.assignment, squared.argmin(axis=1))
    np.testing.assert_allclose(found.distance, np.sqrt(squared.min(axis=1)), atol=1e-6)
    assert found.inertia == pytest.approx(squared.min(axis=1).sum(), rel=1e-9)
    assert (found.centroids.dtype, found.assignment.dtype, found.distance.dtype) == (np.float32, np.int32, np.float32)


def scikit_inertia(features: np.ndarray) -> float:
    return float(
        np.median([ScikitKMeans(32, n_init=10, random_state=seed).fit(features).inertia_ for seed in range(5)])
    )


@pytest.mark.parametrize("spread", [0.4, 0.0])
def test_inertia_is_that_of_scikit_learn(spread: float) -> None:
    features = mixture(1000, 256, spread)
    reference = scikit_inertia(features)
    for seed in range(3):
        found = kmeans(features, 32, seed)
        check(features, found)
        assert len(found.centroids) == 32
        assert found.inertia <= 1.01 * reference


def test_inertia_of_clear_groups_needs_good_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    features = mixture(1000, 256, 2.0)
    reference = scikit_inertia(features)
    assert kmeans(features, 32, 0).inertia <= 1.01 * reference
    # Negative control: the same restarts from random features miss the mark.
    monkeypatch.setattr(clusters, "_plus_plus", lambda *args: args[-1].choice(1000, 32, replace=False))
    assert kmeans(features, 32, 0).inertia > 1.01 * reference


def test_separate_groups_are_found() -> None:
    groups = np.arange(300) % 20
    features = np.eye(64, dtype=np.float32)[groups] + np.random.default_rng(0).normal(size=(300, 64)) * 0.01
    found = kmeans(features.astype(np.float32), 20, 0, restarts=2)
    assert len({*zip(groups.tolist(), found.assignment.tolist(), strict=True)}) == 20


def test_one_start_without_stored_products_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    features = mixture(500, 32)
    stored = kmeans(features, 8, 0, restarts=1)
    monkeypatch.setattr(clusters, "_GRAM_ROWS", 0)
    monkeypatch.setattr(clusters, "_BLOCK_ROWS", 64)
    np.testing.assert_array_equal(kmeans(features, 8, 0, restarts=1).assignment, stored.assignment)


def test_the_result_is_a_fixed_point_however_early_faiss_stops() -> None:
    for seed in range(5):
        features = mixture(60, 16, seed=seed)
        check(features, kmeans(features, 6, seed, restarts=1, iterations=1))


def test_result_is_a_function_of_the_seed() -> None:
    import faiss

    features = mixture(600, 32)
    first = kmeans(features, 16, 5, restarts=2)
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(2)
    try:
        again = kmeans(features, 16, np.random.default_rng(5), restarts=2)
    finally:
        faiss.omp_set_num_threads(threads)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(first.assignment, kmeans(features, 16, 6, restarts=2).assignment)


@pytest.mark.parametrize("rows", [1, 2, 31, 32])
def test_no_more_features_than_clusters(rows: int) -> None:
    features = mixture(rows, 16)
    found = kmeans(features, 32, 0)
    check(features, found)
    assert found.assignment.tolist() == list(range(rows))
    assert found.inertia == 0
    assert found.distance.max() == 0


def test_one_more_feature_than_clusters(capfd: pytest.CaptureFixture[str]) -> None:
    features = mixture(33, 16)
    found = kmeans(features, 32, 0)
    check(features, found)
    assert len(found.centroids) == 32
    assert capfd.readouterr() == ("", "")  # FAISS would warn of too few features


def test_no_features() -> None:
    found = kmeans(np.empty((0, 16), np.float32), 32, 0)
    assert [values.shape for values in found[:3]] == [(0, 16), (0,), (0,)]
    assert found.inertia == 0
    assert [len(values) for values in summarise(found.assignment, found.distance, [], [])] == [0] * 5


@pytest.mark.parametrize("distinct", [1, 5, 8])
def test_fewer_distinct_features_than_clusters(distinct: int) -> None:
    features = mixture(distinct, 16)[np.arange(200) % distinct]
    found = kmeans(features, 8, 0)
    check(features, found)
    assert found.assignment.tolist() == [i % distinct for i in range(200)]
    # (the mean of 25 equal float32 rows in float64 is exact)
    assert found.inertia == pytest.approx(0, abs=1e-12)


def test_barely_more_distinct_features_than_clusters() -> None:
    features = mixture(9, 16)[np.arange(900) % 9]
    found = kmeans(features, 8, 0)
    check(features, found)
    assert len(found.centroids) == 8


def test_features_that_differ_by_rounding_only() -> None:
    features = np.full((300, 16), 0.25, dtype=np.float32)
    features[np.arange(300), np.arange(300) % 16] += np.float32(3e-8)
    found = kmeans(features, 8, 0)
    assert 1 <= len(found.centroids) <= 8
    assert found.inertia < 1e-10


def test_one_cluster() -> None:
    features = mixture(100, 16)
    found = kmeans(features, 1, 0)
    check(features, found)
    assert found.inertia == pytest.approx(np.square(features - features.mean(axis=0, dtype=float)).sum(dtype=float))


@pytest.mark.parametrize(("k", "restarts"), [(0, 1), (3, 0)])
def test_settings_without_meaning(k: int, restarts: int) -> None:
    with pytest.raises(InputError, match="must be 1 or more"):
        kmeans(mixture(10, 4), k, 0, restarts)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_no_numbers(value: float) -> None:
    features = mixture(10, 4)
    features[3, 2] = value
    with pytest.raises(NonFiniteError, match=r"1 of 10 features .* row 3"):
        kmeans(features, 2, 0)


ASSIGNMENT = [2, 0, 0, 2, 5, 2, 0]
DISTANCE = [1.0, 2.0, 3.0, 1.0, 0.5, 2.0, 0.0]
TYPICALITY = [0.1, 0.5, 0.3, 0.2, 0.9, 0.4, 0.1]
IMAGES = ["a", "b", "b", "a", "c", "b", "a"]


def test_summary_by_hand() -> None:
    found = summarise(ASSIGNMENT, DISTANCE, TYPICALITY, IMAGES)
    assert found.assignment.tolist() == [2, 1, 1, 2, 0, 2, 1]  # medians: cluster 5 has 0.9, 0 has 0.3, 2 has 0.2
    assert found.size.tolist() == [1, 3, 3]
    assert found.images.tolist() == [1, 2, 2]
    assert found.median_typicality.tolist() == [0.9, 0.3, 0.2]
    assert found.inertia.tolist() == [0.25, 13.0, 6.0]


def test_another_score_may_rank() -> None:
    contrast = [0.5, 0.1, 0.2, 0.4, 0.3, 0.6, 0.0]  # medians: cluster 5 has 0.3, 0 has 0.1, 2 has 0.5
    found = summarise(ASSIGNMENT, DISTANCE, TYPICALITY, IMAGES, contrast)
    assert found.assignment.tolist() == [0, 2, 2, 0, 1, 0, 2]
    assert found.median_typicality.tolist() == [0.2, 0.9, 0.3]


def test_summary_does_not_depend_on_the_numbering() -> None:
    rng = np.random.default_rng(0)
    assignment, distance = rng.integers(12, size=400), rng.random(400)
    typicality = rng.integers(3, size=400)  # medians tie
    images = rng.integers(50, size=400)
    expected = summarise(assignment, distance, typicality, images)
    renumbered = summarise(rng.permutation(12)[assignment], distance, typicality, images)
    for one, other in zip(expected, renumbered, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)
    assert (np.diff(expected.median_typicality) <= 0).all()
    assert (np.diff(expected.median_typicality) == 0).any()

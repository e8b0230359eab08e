"""What a manifest says of its labels, against sets of Python."""

import numpy as np
import pyarrow as pa
import pytest

from diffmine.data.labels import label_sizes, labels_to_score, labels_without_others
from diffmine.errors import InputError
from diffmine.run import SCHEMAS, rows_to_table


def manifest(*labels: list[str]) -> pa.Table:
    return rows_to_table("manifest", [{"image_id": f"{i}", "labels": own} for i, own in enumerate(labels)])


def test_images_of_a_label_are_counted_by_name() -> None:
    parts = [manifest(["b"], ["c", "a"]), manifest(["b", "a"], ["b"])]
    assert [*label_sizes(pa.concat_tables(parts)).items()] == [("a", 2), ("b", 3), ("c", 1)]
    assert label_sizes(SCHEMAS["manifest"].empty_table()) == {}


def test_labels_are_scored_that_are_wanted_and_known() -> None:
    assert labels_to_score("own", ["b", "a"]) == ()
    assert labels_to_score("all", ["b", "a"]) == ("b", "a")
    assert labels_to_score(["c", "a", "c"], ["a", "b", "c"]) == ("a", "c")
    with pytest.raises(InputError, match="has no label 'x', 'y'; it has a, b"):
        labels_to_score(["y", "a", "x"], ["a", "b"])


def test_a_label_has_no_others_where_all_its_images_have_all_that_are_scored() -> None:
    rng, found_some = np.random.default_rng(0), 0
    for _ in range(60):
        images = [rng.permutation(list("abcd"))[: rng.integers(1, 5)].tolist() for _ in range(5)]
        scored = sorted(rng.permutation(list("abcd"))[: rng.integers(1, 4)].tolist())
        expected = [
            label
            for label in sorted({label for own in images for label in own})
            if all({*scored} <= {*own} for own in images if label in own)
        ]
        assert labels_without_others(manifest(*images), scored) == expected
        found_some += bool(expected)
    assert 10 < found_some < 50

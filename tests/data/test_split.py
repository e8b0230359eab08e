"""Held-out images: a share of each label, whole groups, and never the last image of a label."""

import numpy as np
import pyarrow as pa
import pytest

from diffmine.data.split import held_out

LABELS = pa.array([["common"]] * 200 + [["rare"]] * 10 + [["alone"]] + [["common", "rare"]] * 5)


def test_every_label_loses_its_share_and_keeps_an_image() -> None:
    held = held_out(LABELS, None, 0.2, 0)
    own = {label: np.array([label in labels for labels in LABELS.to_pylist()]) for label in ("common", "rare", "alone")}
    assert held[own["common"]].sum() == 41  # 20 % of 205
    assert held[own["rare"]].sum() == 3
    assert held[own["alone"]].sum() == 0
    assert held_out(pa.array([["a"]] * 3), None, 0.99, 0).sum() == 2
    assert [held_out(pa.array([["a"]] * 10), None, share, 0).sum() for share in (0.24, 0.25)] == [2, 3]


def test_groups_are_held_out_whole() -> None:
    groups = pa.chunked_array([[*(i // 4 for i in range(200)), *([None] * 16)]])
    held = held_out(LABELS, groups, 0.25, 0)
    assert {tuple(held[i : i + 4]) for i in range(0, 200, 4)} == {(True,) * 4, (False,) * 4}
    assert held.mean() == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("blank", [None, "", "  "])
def test_images_without_a_group_are_no_group(blank: str | None) -> None:
    """As one group they would never be held out."""
    groups = pa.chunked_array([[f"P{i // 2}" for i in range(40)], pa.array([blank] * 60, pa.string())])
    held = held_out(pa.array([["a"]] * 100), groups, 0.2, 0)
    assert held.sum() == 20
    assert 0 < held[40:].sum() < 20


def test_a_group_larger_than_the_share_is_trained_on() -> None:
    held = held_out(pa.array([["a"]] * 10), pa.chunked_array([["x"] * 9 + ["y"]]), 0.2, 0)
    assert held.tolist() == [False] * 9 + [True]


def test_the_choice_depends_on_the_seed() -> None:
    first, again, other = (held_out(LABELS, None, 0.2, seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)

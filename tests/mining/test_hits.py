"""The box rule on cases worked by hand; chance against every window of an image."""

import numpy as np
import pytest

from diffmine.mining.hits import chance, on_box


@pytest.mark.parametrize(
    ("patch", "box", "expected"),
    [
        ((0, 0, 10, 10), (5, 0, 10, 10), True),  # exactly half
        ((0, 0, 10, 10), (6, 0, 10, 10), False),
        ((0, 0, 10, 10), (2, 2, 4, 4), True),  # a small box inside
        ((0, 0, 10, 10), (8, 2, 4, 4), True),  # half of a small box
        ((0, 0, 10, 10), (9, 2, 4, 4), False),
        ((30, 30, 10, 10), (0, 0, 100, 100), True),  # inside a large box
        ((0, 0, 10, 10), (10, 0, 10, 10), False),  # touching
        ((0, 0, 10, 10), (3, 3, 0, 5), False),  # a box without area
        ((0, 0, 10, 2), (0, 0, 2, 10), False),  # x and width go together: a cross shares 4 of 20 pixels
        ((0, 0, 10, 2), (1, 0, 8, 2), True),
    ],
)
def test_rule(patch: tuple, box: tuple, expected: bool) -> None:
    assert on_box([patch], [box]).tolist() == [[expected]]
    assert on_box([box], [patch]).tolist() == [[expected]]


def test_every_patch_meets_every_box() -> None:
    patches, boxes = [(0, 0, 4, 4), (8, 0, 4, 4), (0, 8, 4, 4)], [(0, 0, 4, 4), (9, 0, 4, 4)]
    assert on_box(patches, boxes).tolist() == [[True, False], [False, True], [False, False]]
    assert on_box(patches, []).shape == (3, 0)
    assert on_box([], boxes).shape == (0, 2)


def test_chance_is_the_share_of_all_windows() -> None:
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(40):
        height, width, size_y, size_x = (int(n) for n in rng.integers(3, 30, size=4))
        boxes = rng.uniform((-3, -3, 0, 0), (width, height, width, height), size=(int(rng.integers(4)), 4))
        if rng.random() < 0.5:
            boxes = np.round(boxes)
        down, across = min(size_y, height), min(size_x, width)
        windows = [(x, y, across, down) for y in range(height - down + 1) for x in range(width - across + 1)]
        expected = on_box(windows, boxes).any(axis=1).mean()
        assert chance(height, width, size_y, size_x, boxes) == pytest.approx(expected, abs=1e-12)
        shares.append(expected)
    assert 0 in shares
    assert any(0 < share < 1 for share in shares)


def test_chance_by_hand() -> None:
    # Windows of 4 x 4 on a row of 4 x 10 pixels start at 0..6; those that start at 1..5 share 8 pixels or more with it.
    assert chance(4, 10, 4, 4, [(3, 0, 4, 4)]) == 5 / 7
    assert chance(4, 10, 4, 4, []) == 0
    assert chance(10, 10, 99, 99, [(2, 2, 3, 3)]) == 1

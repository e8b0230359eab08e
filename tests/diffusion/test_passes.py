"""Rows of passes, grouped anew."""

import pytest
import torch

from diffmine.diffusion.passes import groups


@pytest.mark.parametrize("per_pass", [1, 2, 3, 5, 12])
def test_rows_keep_their_order_whatever_the_passes_hold(per_pass: int) -> None:
    rows = torch.arange(24.0).view(12, 2)
    found = list(groups(rows.split(per_pass), 3))
    assert [each.tolist() for each in found] == [each.tolist() for each in rows.split(3)]

"""The encoder's rows: the posterior's mean, and its standard deviation where training samples it."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from diffmine.diffusion.model import load
from diffmine.run import TINY
from diffmine.stages.latents import _PREPARED, _Encoder

PIXELS = np.random.default_rng(0).integers(256, size=(64, 96, 3), dtype=np.uint8)
GIVEN = {"prepared_height": 64, "prepared_width": 96, "width": 96, "height": 64, "scale": 1.0, "crop_x": 0, "crop_y": 0}


@pytest.mark.parametrize("with_std", [False, True])
def test_a_row_holds_the_posterior(with_std: bool) -> None:
    """Against diffusers' own distribution; a file that could not be read stays a failure beside it."""
    rows = [
        {"image_id": "a.png", "uri": "a.png", "pixels": PIXELS.tobytes(), **GIVEN},
        {"image_id": "b.png", "uri": "b.png", "reason": "truncated", "detail": "half a file"},
    ]
    part = _Encoder("tiny", "float32", with_std)({"images": pa.Table.from_pylist(rows, schema=_PREPARED)})
    assert [failed["reason"] for failed in part.failures] == ["truncated"]
    [row] = part.rows.to_pylist()
    vae = load(TINY).vae
    with torch.no_grad():
        found = vae.encode(torch.from_numpy(PIXELS).permute(2, 0, 1)[None].float() / 127.5 - 1).latent_dist
    scale = vae.config.scaling_factor
    assert np.allclose(row["latent"], (found.mean * scale).ravel(), atol=2e-3)
    if with_std:
        assert np.allclose(row["latent_std"], (found.std * scale).ravel(), atol=2e-3)
        assert min(row["latent_std"]) > 0
    else:
        assert row["latent_std"] is None

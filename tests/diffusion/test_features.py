"""Features against a forward hook on diffusers' own UNet, and pooling against a dense integral."""

import numpy as np
import pytest
import torch

from diffmine.diffusion.features import dift, ensemble_noise, pool
from diffmine.diffusion.model import Model, load
from diffmine.run import TINY


@pytest.fixture(scope="module")
def tiny() -> Model:
    return load(TINY)


def test_noises_of_an_ensemble_and_of_seeds_have_nothing_in_common() -> None:
    noise = torch.cat([ensemble_noise(seed, 3, (8, 16, 16)) for seed in (0, 1)])
    assert torch.allclose(torch.cov(noise.flatten(1)), torch.eye(6), atol=0.15)
    assert torch.equal(ensemble_noise(0, 2, (8, 16, 16)), noise[:2])


@pytest.mark.parametrize("up_block", [0, 1, 2])
def test_dift_is_what_a_hook_on_the_unet_sees(tiny: Model, up_block: int) -> None:
    latents, noise = torch.randn(2, 8, 16, 16), ensemble_noise(0, 3, (8, 16, 16))
    text = tiny.embed(["An image of a.", "An image of b."])
    found = dift(tiny, latents, text, 161, noise, up_block, batch_size=4)
    seen: list[torch.Tensor] = []
    handle = tiny.unet.up_blocks[up_block].register_forward_hook(lambda _m, _i, output: seen.append(output))
    a = tiny.alpha_bar[161]
    with torch.no_grad():
        for i in range(2):
            for eps in noise:
                noisy = a.sqrt() * latents[i] + (1 - a).sqrt() * eps
                tiny.unet(noisy[None], 161, text[i][None])
    handle.remove()
    expected = torch.stack([torch.cat(seen[:3]).mean(0), torch.cat(seen[3:]).mean(0)])
    assert torch.allclose(found, expected, atol=1e-5)


def test_unet_is_left_after_the_block(tiny: Model) -> None:
    ran: list[int] = []
    handles = [
        b.register_forward_hook(lambda _m, _i, _o, n=n: ran.append(n)) for n, b in enumerate(tiny.unet.up_blocks)
    ]
    dift(tiny, torch.randn(1, 8, 8, 8), tiny.embed(["x"]), 161, ensemble_noise(0, 1, (8, 8, 8)), 0, 1)
    for handle in handles:
        handle.remove()
    assert ran == [0]
    tiny.unet(torch.randn(1, 8, 8, 8), 161, tiny.embed(["x"]))  # and the UNet is whole again


def test_pool_is_the_area_mean_under_the_box() -> None:
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.normal(size=(5, 4, 6)).astype(np.float32))  # 4 x 6 cells of 16 x 20 px
    boxes = np.array([[0, 0, 120, 64], [20, 16, 20, 16], [5, 9, 33, 27], [114, 1, 6, 7]], dtype=np.float64)
    dense = np.kron(features.numpy(), np.ones((1, 16, 20)))  # every pixel has its cell's value
    for (x, y, w, h), found in zip(boxes.astype(int), pool(features, boxes, 64, 120), strict=True):
        expected = dense[:, y : y + h, x : x + w].mean(axis=(1, 2))
        assert np.allclose(found, expected / np.linalg.norm(expected), atol=1e-6)
    assert not pool(torch.zeros_like(features), boxes, 64, 120).any()


def test_features_do_not_depend_on_batch_size(tiny: Model) -> None:
    latents, noise = torch.randn(3, 8, 8, 8), ensemble_noise(0, 4, (8, 8, 8))
    text = tiny.embed(["a", "b", "c"])
    assert torch.allclose(
        dift(tiny, latents, text, 161, noise, 1, 1), dift(tiny, latents, text, 161, noise, 1, 12), atol=1e-5
    )

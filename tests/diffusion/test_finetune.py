"""The randomness of a training step: complete, repeatable, and the same however many workers share it."""

from collections.abc import Iterator
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from diffmine.diffusion.finetune import denoising_loss, example, learning_rate, windows
from diffmine.diffusion.model import load
from diffmine.run import TINY

SHARDS = [np.array([(16, 16)] * 5 + [(16, 12)] * 2), np.array([(16, 16)] * 5), np.array([(16, 12)] * 5)]
SHAPES = np.concatenate(SHARDS)


def batches(seed: int, most: int = 100) -> Iterator[np.ndarray]:
    """Places among all images, batch after batch of 4."""
    firsts = np.cumsum([0, *map(len, SHARDS)])
    for window in windows(seed, SHARDS, 4, most):
        places = np.concatenate([np.arange(len(SHARDS[i])) + firsts[i] for i in window.shards])
        yield from (places[batch] for batch in window.batches)


@pytest.mark.parametrize(("most", "count"), [(100, 5), (4, 7)])  # ceil(10 / 4) + ceil(7 / 4); 2 + 1, 2, 2 by shard
def test_an_epoch_visits_every_image_and_never_mixes_shapes(most: int, count: int) -> None:
    epoch = list(islice(batches(0, most), count))
    assert sorted(set(np.concatenate(epoch).tolist())) == list(range(17))
    assert all(len(np.unique(SHAPES[batch], axis=0)) == 1 and len(batch) == 4 for batch in epoch)


@pytest.mark.parametrize("most", [100, 4])
def test_the_order_depends_on_the_seed_and_changes_between_epochs(most: int) -> None:
    first, again, other = (list(islice(batches(s, most), 14)) for s in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first[:7], first[7:])


def test_a_window_holds_few_images() -> None:
    shards = [np.array([(8, 8)] * 10)] * 50
    epoch, another = (list(islice(windows(0, shards, 5, 40), 13 * i, 13 * i + 13)) for i in range(2))
    assert sorted(i for window in epoch for i in window.shards) == list(range(50))
    assert max(len(window.shards) for window in epoch) == 4
    assert [window.shards for window in epoch] != [window.shards for window in another]


def test_an_example_depends_on_seed_step_and_image_only() -> None:
    latent = np.random.default_rng(0).normal(size=(8, 16, 12)).astype(np.float16)
    a, b = (example(0, 3, 0, "x/1.png", latent, ["p", "q"], 0.5, None) for _ in range(2))
    assert torch.equal(a.eps, b.eps)
    assert (a.t, a.label) == (b.t, b.label)
    assert not torch.equal(a.eps, example(0, 4, 0, "x/1.png", latent, ["p", "q"], 0.5, None).eps)


def test_labels_are_dropped_and_drawn_at_their_rates() -> None:
    latent = np.zeros((8, 4, 4), np.float16)
    labels = [example(0, s, 0, "i", latent, ["p", "q"], 0.2, None).label for s in range(4000)]
    assert abs(labels.count(None) / 4000 - 0.2) < 0.025
    assert abs(labels.count("p") / 4000 - 0.4) < 0.03


def test_timesteps_are_uniform_in_their_range() -> None:
    latent = np.zeros((8, 4, 4), np.float16)
    found = [example(0, s, 0, "i", latent, ["p"], 0.0, None, (50, 54)).t for s in range(2000)]
    assert np.bincount(found, minlength=54)[50:] == pytest.approx([500] * 4, abs=100)


def test_crops_lie_on_cells_within_the_latent() -> None:
    latent = np.arange(8 * 6 * 9).reshape(8, 6, 9).astype(np.float16)
    found = {tuple(example(0, s, 0, "i", latent, ["p"], 0.0, 4).latent[0, 0, :1].int().tolist()) for s in range(300)}
    assert all(example(0, s, 0, "i", latent, ["p"], 0.0, 4).latent.shape == (8, 4, 4) for s in range(5))
    assert found == {(y * 9 + x,) for y in range(3) for x in range(6)}


def test_the_target_of_v_prediction_is_v() -> None:
    """With the UNet that answers 0 the loss is the mean square of the target."""
    model = load(TINY)
    latents, eps, t = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4), torch.tensor([100, 900])
    model.v_prediction = True
    v = model.training_target(latents, eps, t)
    a = model.alpha_bar[t].view(-1, 1, 1, 1)
    noisy = model.add_noise(latents, eps, t)
    assert torch.allclose(a.sqrt() * v + (1 - a).sqrt() * noisy, eps, atol=1e-5)  # what predict_eps undoes
    assert torch.allclose(a.sqrt() * noisy - (1 - a).sqrt() * v, latents, atol=1e-5)


def test_loss_is_the_mean_squared_error_of_eps() -> None:
    model = load(TINY)
    rng = np.random.default_rng(0)
    examples = [
        example(0, 0, i, f"{i}", rng.normal(size=(8, 8, 8)).astype(np.float16), ["a"], 0.0, None) for i in range(3)
    ]
    text = model.embed(["An image of a."] * 3)
    loss = denoising_loss(model, model.unet, examples, text)
    by_hand = []
    for e in examples:
        a = model.alpha_bar[e.t]
        predicted = model.unet((a.sqrt() * e.latent + (1 - a).sqrt() * e.eps)[None], e.t, text[:1]).sample[0]
        by_hand.append((predicted - e.eps).square().mean())
    assert torch.allclose(loss, torch.stack(by_hand).mean(), atol=1e-6)


@pytest.mark.parametrize("v_prediction", [False, True])
def test_min_snr_weighs_timesteps_as_published(v_prediction: bool) -> None:
    """Against the weights of diffusers' own training scripts: the clipped SNR over the SNR, plus 1 for v."""
    model = load(TINY)
    model.v_prediction = v_prediction
    scheduler = DDPMScheduler.from_config(model.scheduler_config)
    latent = np.random.default_rng(0).normal(size=(8, 8, 8)).astype(np.float16)
    text = model.embed(["An image of a."])
    for step in range(12):
        one = [example(0, step, 0, "i", latent, ["a"], 0.0, None)]
        snr = compute_snr(scheduler, torch.tensor([one[0].t]))
        weight = float(snr.clamp(max=5) / (snr + 1 if v_prediction else snr))
        plain, weighed = (float(denoising_loss(model, model.unet, one, text, gamma)) for gamma in (None, 5.0))
        assert weighed == pytest.approx(weight * plain, rel=1e-4)


def test_learning_rate_rises_stays_and_falls_to_zero() -> None:
    rates = [learning_rate(s, 100, 2.0, 10, 40) for s in range(100)]
    assert np.allclose(rates[:10], np.arange(1, 11) / 5)
    assert set(rates[10:61]) == {2.0}
    assert rates[80] == pytest.approx(1.0)
    assert 0 < rates[99] < 0.01
    assert all(a >= b for a, b in pairwise(rates[60:]))
    assert {learning_rate(s, 5, 2.0, 0, 0) for s in range(5)} == {2.0}

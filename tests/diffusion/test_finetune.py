"""The randomness of a training step: complete, repeatable, and the same however many workers share it."""

from collections.abc import Iterator
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from diffmine.diffusion.finetune import (
    LabelledImage,
    _batches,
    denoising_loss,
    example,
    learning_rate,
    windows,
)
from diffmine.diffusion.model import load
from diffmine.run import TINY

SHARDS = [np.array([(16, 16)] * 5 + [(16, 12)] * 2), np.array([(16, 16)] * 5), np.array([(16, 12)] * 5)]
SHAPES = np.concatenate(SHARDS)


def batches(seed: int, most: int = 100) -> Iterator[np.ndarray]:
    """Places among all images, batch after batch of 4."""
    firsts = np.cumsum([0, *map(len, SHARDS)])
    for window in windows(seed, SHARDS, 4, most):
        places = np.concatenate([np.arange(len(SHARDS[i])) + firsts[i] for i in window.shards])
        for batch, shape in zip(window.batches, window.shapes, strict=True):
            assert shape == tuple(SHAPES[places[batch]].min(axis=0))
            yield places[batch]


@pytest.mark.parametrize(("most", "count", "mixed"), [(100, 5, 0), (4, 6, 1)])  # of 17 images; of 7, 5 and 5
def test_an_epoch_visits_every_image_and_mixes_few_shapes(most: int, count: int, mixed: int) -> None:
    epoch = list(islice(batches(0, most), count))
    assert sorted(set(np.concatenate(epoch).tolist())) == list(range(17))
    assert all(len(set(batch.tolist())) >= 3 for batch in epoch)
    assert sum(len(np.unique(SHAPES[batch], axis=0)) > 1 for batch in epoch) == mixed


def grouped(sides: np.ndarray, batch_size: int, parts: int = 1) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Of shuffled images: their shapes, the batches of an epoch, and how often each image is in one."""
    rng = np.random.default_rng(0)
    sides = rng.permutation(sides)
    found = _batches(rng, np.arange(len(sides)), sides, batch_size, parts)
    return sides, found, np.bincount(np.concatenate(found), minlength=len(sides))


@pytest.mark.parametrize("parts", [1, 4])
def test_rare_shapes_are_not_seen_more_often(parts: int) -> None:
    """Of 300 images 40 have a shape of their own: they share batches with those of the nearest aspect ratios."""
    rare = [(8, 9 + i) if i % 2 else (9 + i, 8) for i in range(40)]
    sides, found, visits = grouped(np.array([(8, 8)] * 260 + rare), 16, parts)
    assert visits.min() == 1
    assert visits[(sides == 8).all(axis=1)].mean() < 1.1
    assert visits[(sides != 8).any(axis=1)].mean() < 1.6
    seen = np.concatenate([sides[batch].min(axis=0).prod() / sides[batch].prod(axis=1) for batch in found])
    assert seen.mean() > 0.9  # what crops leave of an image


def test_two_shapes_that_differ_much_do_not_share_a_batch() -> None:
    """50 portraits nearly fill a batch of 64, and some come twice; 40 do not, and are cropped to squares."""
    sides, found, visits = grouped(np.array([(96, 64)] * 50 + [(64, 96)] * 160), 64)
    assert all(len(np.unique(sides[batch], axis=0)) == 1 for batch in found)
    assert sorted(visits[sides[:, 0] == 96].tolist()) == [1] * 36 + [2] * 14
    assert visits[sides[:, 0] == 64].sum() == 192
    sides, found, visits = grouped(np.array([(96, 64)] * 40 + [(64, 96)] * 160), 64)
    assert set(visits[sides[:, 0] == 96].tolist()) == {1}
    assert sum(len(np.unique(sides[batch], axis=0)) for batch in found) == len(found) + 1


def test_an_image_of_a_shape_of_its_own_is_seen_once_and_cropped() -> None:
    sides, found, visits = grouped(np.array([(8, 8)] * 100 + [(8, 60)]), 16)
    [own] = np.flatnonzero(sides[:, 1] == 60)
    assert visits[own] == 1
    assert visits.max() == 2
    assert len(found) == 7


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


def image(latent: np.ndarray, *labels: str, image_id: str = "i", **more: object) -> LabelledImage:
    return LabelledImage(image_id, latent.astype(np.float16), labels, **more)


def test_an_example_depends_on_seed_step_place_and_image_only() -> None:
    latent = np.random.default_rng(0).normal(size=(8, 16, 12))
    one, other = image(latent, "p", "q"), image(latent, "p", "q", image_id="j")
    a, b = (example(0, 3, 0, one, dropout=0.5) for _ in range(2))
    assert torch.equal(a.eps, b.eps)
    assert (a.t, a.words) == (b.t, b.words)
    for seed, step, place, seen in ((1, 3, 0, one), (0, 4, 0, one), (0, 3, 1, one), (0, 3, 0, other)):
        assert not torch.equal(a.eps, example(seed, step, place, seen, dropout=0.5).eps)


def test_labels_are_dropped_and_drawn_at_their_rates() -> None:
    one = image(np.zeros((8, 4, 4)), "p", "q")
    words = [example(0, s, 0, one, dropout=0.2).words for s in range(4000)]
    assert abs(words.count(None) / 4000 - 0.2) < 0.025
    assert abs(words.count(("p",)) / 4000 - 0.4) < 0.03


def test_labels_are_joined_and_columns_added_at_their_rates() -> None:
    one = image(np.zeros((8, 4, 4)), "p", "q", columns={"region": "Bretagne"})
    columns = {"region": 0.3, "angle": 1.0}  # of the second nothing is known here
    words = [example(0, s, 0, one, dropout=0.2, joined=True, columns=columns).words for s in range(4000)]
    assert set(words) == {None, ("p", "q"), ("p", "q", "Bretagne")}
    assert abs(words.count(("p", "q", "Bretagne")) / 4000 - 0.8 * 0.3) < 0.025


def test_timesteps_are_uniform_in_their_range() -> None:
    found = [example(0, s, 0, image(np.zeros((8, 4, 4)), "p"), dropout=0.0, timesteps=(50, 54)).t for s in range(2000)]
    assert np.bincount(found, minlength=54)[50:] == pytest.approx([500] * 4, abs=100)


def test_crops_lie_on_cells_within_the_latent() -> None:
    one = image(np.arange(8 * 6 * 9).reshape(8, 6, 9), "p")
    found = [example(0, s, 0, one, dropout=0.0, shape=(4, 4)).latent for s in range(300)]
    assert all(latent.shape == (8, 4, 4) for latent in found)
    assert {int(latent[0, 0, 0]) for latent in found} == {y * 9 + x for y in range(3) for x in range(6)}


def test_the_posterior_is_sampled_with_its_mean_and_spread() -> None:
    mean, spread = np.full((1, 4, 4), 2.0), np.full((1, 4, 4), 0.5, np.float16)
    spread[0, 0, 0] = 0
    one = image(mean, "p", spread=spread)
    found = torch.stack([example(0, s, 0, one, dropout=0.0).latent for s in range(2000)])
    assert torch.all(found[:, 0, 0, 0] == 2)
    assert torch.allclose(found.mean(0), torch.full((1, 4, 4), 2.0), atol=0.05)
    assert torch.allclose(found.std(0)[0, 1:], torch.full((3, 4), 0.5), atol=0.05)


def test_weighted_images_come_as_often_as_their_weights_say() -> None:
    """Single visits are whole numbers next to the weight; over epochs their mean is the weight."""
    weights = np.array([0.2] * 10 + [1.6] * 5)
    epochs = 400
    shards, own = [np.array([(8, 8)] * 10), np.array([(8, 8)] * 5)], [weights[:10], weights[10:]]
    counts = np.zeros(15)
    for window in islice(windows(0, shards, 1, 100, own), epochs):  # batches of one: nothing is filled up
        visits = np.bincount(np.concatenate(window.batches), minlength=15)
        assert set(visits[:10]) <= {0, 1}
        assert set(visits[10:]) <= {1, 2}
        assert visits.sum() == 10
        counts += visits
    assert counts / epochs == pytest.approx(weights, abs=0.1)


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
        example(0, 0, i, image(rng.normal(size=(8, 8, 8)), "a", image_id=f"{i}"), dropout=0.0) for i in range(3)
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
    seen = image(np.random.default_rng(0).normal(size=(8, 8, 8)), "a")
    text = model.embed(["An image of a."])
    for step in range(12):  # from the beginning, where the SNR is clipped, to the end
        one = [example(0, step, 0, seen, dropout=0.0, timesteps=(80 * step, 80 * step + 80))]
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

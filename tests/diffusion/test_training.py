"""A UNet in training: parts of a batch add up, a state is taken over whole, a bad loss changes nothing."""

import numpy as np
import pytest
import torch

from diffmine.config import Finetune
from diffmine.diffusion.model import load
from diffmine.diffusion.training import LabelledImage, Training
from diffmine.errors import NonFiniteError
from diffmine.run import TINY

RNG = np.random.default_rng(0)
BATCH = [(i, LabelledImage(f"{i}", RNG.normal(size=(8, 8, 8)).astype(np.float16), ["a"])) for i in range(4)]


def training(**more: int) -> Training:
    model = load(TINY)
    texts = model.embed(["An image.", "An image of a."]).clone()
    wanted = Finetune(steps=10, batch_size=4, learning_rate=1e-3, ema_decay=0.9)
    return Training(model, wanted, 0, {None: texts[0], "a": texts[1]}, **more)


def test_a_batch_in_parts_gives_the_step_of_the_whole() -> None:
    whole, parts = training(), training(at_once=1)
    for step in range(2):
        one, other = whole.step(step, BATCH), parts.step(step, BATCH)
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)


def test_a_state_is_taken_over_whole() -> None:
    first = training()
    first.step(0, BATCH)
    state = {name: tensor.clone() for name, tensor in first.tensors().items()}
    again = training()
    assert again.restore(state, 1)
    assert again.step(1, BATCH) == first.step(1, BATCH)
    assert all(torch.equal(tensor, first.tensors()[name]) for name, tensor in again.tensors().items())
    assert not again.restore({name: tensor for name, tensor in state.items() if "conv_in" not in name}, 1)


def test_a_loss_that_is_not_finite_leaves_the_weights() -> None:
    one = training()
    one.step(0, BATCH)
    before = {name: tensor.clone() for name, tensor in one.tensors().items()}
    bad = (0, LabelledImage("bad", np.full((8, 8, 8), np.inf, np.float16), ["a"]))
    with pytest.raises(NonFiniteError, match="the loss of step 1 is nan"):
        one.step(1, [bad, *BATCH[1:]])
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.tensors().items())

"""A UNet in training: parts of a batch add up, a state is taken over whole, a bad loss changes nothing."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from diffusers import StableDiffusionPipeline
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import mse_loss

from diffmine.config import Finetune
from diffmine.diffusion import parallel
from diffmine.diffusion import training as training_module
from diffmine.diffusion.finetune import Example, LabelledImage, denoising_loss, example
from diffmine.diffusion.model import Model, load
from diffmine.diffusion.parallel import accelerator
from diffmine.diffusion.training import Outcome, Training, put_weights, text_states
from diffmine.diffusion.validation import validate
from diffmine.errors import NonFiniteError
from diffmine.run import TINY

RNG = np.random.default_rng(0)
IMAGES = [LabelledImage(f"{i}", RNG.normal(size=(8, 8, 8)).astype(np.float16), ["a"]) for i in range(5)]
BATCH = list(enumerate(IMAGES))


def step(one: Training, number: int, images: Sequence[tuple[int, LabelledImage]] = BATCH) -> Outcome:
    return one.step(number, one.examples(number, images))


def training(at_once: int | None = None, **more: object) -> Training:
    model = load(TINY)
    wanted = Finetune(steps=10, batch_size=5, learning_rate=1e-3, ema_decay=0.9, **more)
    text = text_states(model, "An image of {label}.", "An image.")
    return Training(model, wanted, 0, 10, text, accelerator(), at_once)


def test_a_batch_in_parts_gives_the_step_of_the_whole() -> None:
    whole, parts, plain = training(), training(at_once=2), load(TINY)
    examples = whole.examples(0, BATCH)
    text = torch.stack([whole.text(e.words) for e in examples])
    loss = denoising_loss(plain, plain.unet.requires_grad_(True), examples, text)
    gradients = torch.autograd.grad(loss, [*plain.unet.parameters()])
    for number in range(2):
        one, other = step(whole, number), step(parts, number)
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
        if number == 0:
            assert one.loss == pytest.approx(float(loss.detach()), rel=1e-5)
            assert one.grad_norm == pytest.approx(float(torch.cat([g.flatten() for g in gradients]).norm()), rel=1e-4)


def test_a_step_sees_what_the_settings_say() -> None:
    known = {"region": "Bretagne"}
    several = [LabelledImage(f"{i}", IMAGES[i].latent, ["a", "b"], columns=known) for i in range(5)]
    one = training(t_min=0.05, t_max=0.053, label_dropout=0.5, multi_label="joined", prompt_columns={"region": 0.5})
    seen = [e for step in range(40) for e in one.examples(step, [*enumerate(several)])]
    assert {e.t for e in seen} == {50, 51, 52}
    assert {e.words for e in seen} == {None, ("a", "b"), ("a", "b", "Bretagne")}
    again = example(0, 39, 4, several[4], dropout=0.5, timesteps=(50, 53), joined=True, columns={"region": 0.5})
    assert torch.equal(seen[-1].eps, again.eps)


def test_a_pass_that_does_not_fit_is_made_of_fewer_images(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, small, loss = training(), training(), training_module.denoising_loss
    tried: list[int] = []

    def fits_two(model: Model, unet: torch.nn.Module, examples: Sequence[Example], *more: Any) -> torch.Tensor:
        tried.append(len(examples))
        if len(examples) > 2:
            raise torch.OutOfMemoryError("too much")
        return loss(model, unet, examples, *more)

    monkeypatch.setattr(training_module, "denoising_loss", fits_two)
    assert small.fit((8, 8)) == ["the device is out of memory; passes now hold 2 samples"]
    assert tried == [5, 2]
    outcome = step(small, 0)
    assert tried[2:] == [2, 2, 1]
    monkeypatch.undo()
    assert outcome.loss == pytest.approx(step(whole, 0).loss, rel=1e-5)


def test_no_gradient_is_kept_beside_what_comes_between_steps() -> None:
    one = training()
    step(one, 0)
    assert all(parameter.grad is None for parameter in one.model.unet.parameters())


def test_a_state_is_taken_over_whole() -> None:
    first = training()
    step(first, 0)
    state = {name: tensor.clone() for name, tensor in first.tensors().items()}
    again = training()
    assert again.takes(state)
    again.restore(state, 1)
    assert step(again, 1) == step(first, 1)
    whole = first.tensors()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in again.tensors().items())
    assert not again.takes({name: tensor for name, tensor in state.items() if "conv_in" not in name})


def test_moments_are_taken_over_in_the_layout_of_their_weights() -> None:
    """As fused AdamW on a GPU wants them: there the UNet is channels_last, and files hold contiguous tensors."""
    first, again = training(), training()
    step(first, 0)
    again.model.unet.to(memory_format=torch.channels_last)
    again.restore(first.tensors(), 1)
    for parameter in again.model.unet.parameters():
        state = again.optimizer.state[parameter]
        assert state["exp_avg"].stride() == state["exp_avg_sq"].stride() == parameter.stride()


def test_a_gradient_that_is_not_finite_leaves_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    one = training()
    step(one, 0)
    before = {name: tensor.clone() for name, tensor in one.tensors().items()}
    monkeypatch.setattr(one.spread, "clip_grad_norm_", lambda *_: torch.tensor(float("inf")))
    with pytest.raises(NonFiniteError, match="its gradient's norm is inf"):
        step(one, 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.tensors().items())


def test_a_loss_that_is_not_finite_leaves_the_weights() -> None:
    one = training()
    step(one, 0)
    before = {name: tensor.clone() for name, tensor in one.tensors().items()}
    bad = (0, LabelledImage("bad", np.full((8, 8, 8), np.inf, np.float16), ["a"]))
    with pytest.raises(NonFiniteError, match="the loss of step 1 is nan"):
        step(one, 1, [bad, *BATCH[1:]])
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.tensors().items())


def test_the_average_takes_the_place_of_the_weights_for_a_while() -> None:
    one = training()
    for number in range(3):
        step(one, number)
    before, average = one.tensors(), one.averages()
    with one.averaged() as model:
        assert all(torch.equal(p, average[name]) for name, p in model.unet.named_parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.tensors().items())
    assert not torch.equal(before["weight/conv_in.weight"], average["conv_in.weight"])


def test_memory_is_saved_without_another_result() -> None:
    plain, saving = training(), training(gradient_checkpointing=True)
    assert [one.model.unet.is_gradient_checkpointing for one in (plain, saving)] == [False, True]
    for number in range(2):
        assert step(saving, number).loss == pytest.approx(step(plain, number).loss, rel=1e-5)


def test_a_compiled_unet_is_compiled_for_the_shapes_of_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for those of a validation or of a try, which would also turn sizes into unknowns."""
    counter, plain, compile_of = CompileCounterWithBackend("eager"), training(), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compile_of(self, backend=counter, **how))
    one = training(compile=True)
    with one.averaged() as model:
        validate(model, [("a", IMAGES[0])], one.text, 0, 4, (100, 500), one.spread, 8)
    one.fit((8, 8))
    assert counter.frame_count == 0
    for number in range(2):
        assert step(one, number).loss == pytest.approx(step(plain, number).loss, rel=1e-5)
        with one.averaged() as model:
            validate(model, [("a", IMAGES[0])], one.text, 0, 4, (100, 500), one.spread, 8)
    assert counter.frame_count == 1
    one.passes = 2  # of 3 and of 2 images
    step(one, 2)
    assert counter.frame_count == 3
    nodes = [node for graph in counter.graphs for node in graph.graph.find_nodes(op="placeholder")]
    assert not any(isinstance(size, torch.SymInt) for node in nodes for size in node.meta["example_value"].shape)


def test_adapters_are_trained_alone_and_merged_to_the_same_function(tmp_path: Path) -> None:
    one, base = training(lora_rank=2), load(TINY)
    losses = [step(one, number).loss for number in range(4)]
    assert losses[0] == step(training(), 0).loss  # adapters begin as nothing
    assert all("lora" in name for name in one.averages())
    latents, t, text = torch.randn(2, 8, 8, 8), torch.tensor([100, 600]), base.embed(["An image of a."] * 2)
    with one.averaged() as model, torch.no_grad():
        adapted = model.unet(latents, t, text).sample
    merged = load(TINY)
    merged.adapt(2, 0)
    put_weights(merged, one.averages())
    merged.merge()
    merged.save(tmp_path)
    opened = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None).unet
    assert set(opened.state_dict()) == set(base.unet.state_dict())
    with torch.no_grad():
        assert torch.allclose(opened(latents, t, text).sample, adapted, atol=1e-5)
        assert not torch.allclose(base.unet(latents, t, text).sample, adapted, atol=1e-3)


def test_validation_is_the_loss_of_fixed_draws() -> None:
    """The mean over draws of the plain squared error, with the label's text and with the null's; t fills its range."""
    one, seen, passes = training(), [], []
    model, text, predict = one.model, one.text, one.model.unet.forward

    def spy(noisy: torch.Tensor, t: torch.Tensor, states: torch.Tensor, **more: object) -> object:
        found = predict(noisy, t, states, **more)
        passes.append(noisy)
        seen.extend(zip(*(half.chunk(2) for half in (noisy, t, states, found.sample)), strict=True))
        return found

    model.unet.forward = spy
    items = [("a", IMAGES[0]), ("a", IMAGES[1]), ("b", IMAGES[2])]
    beats: list[int] = []
    found = validate(model, items, text, 0, 4, (100, 500), one.spread, 8, lambda: beats.append(1))
    assert len(beats) == 3
    assert found == validate(model, items, text, 0, 4, (100, 500), one.spread, 8)
    in_parts = validate(model, items, text, 0, 4, (100, 500), one.spread, 3)
    assert in_parts["a"].loss == pytest.approx(found["a"].loss, rel=1e-5)
    assert [len(noisy) for noisy in passes[-3:]] == [3, 3, 2]
    assert {label: own.images for label, own in found.items()} == {"a": 2, "b": 1}
    errors = []
    for i, (noisy, t, states, predicted) in enumerate(seen[:6]):
        assert torch.equal(states[0], text(None) if i % 2 else text((items[i // 2][0],)))
        assert [int(v) // 100 for v in t] == [1, 2, 3, 4]
        a = model.alpha_bar[t].view(-1, 1, 1, 1)
        eps = (noisy - a.sqrt() * torch.from_numpy(items[i // 2][1].latent).float()) / (1 - a).sqrt()
        errors.append(float(mse_loss(predicted, eps)))
    assert found["a"].loss == pytest.approx((errors[0] + errors[2]) / 2, rel=1e-4)
    assert found["a"].null_loss == pytest.approx((errors[1] + errors[3]) / 2, rel=1e-4)
    assert found["b"].loss == pytest.approx(errors[4], rel=1e-4)
    assert found["b"].typicality == pytest.approx(errors[5] - errors[4], rel=1e-3)


def test_what_a_label_tells_is_in_eps_error_for_v_prediction_too() -> None:
    """Of one draw, by the model's own conversion to eps."""
    one = training()
    model, text, seen = one.model, one.text, []
    model.v_prediction = True
    predict, eps_of = model.unet.forward, model.predict_eps

    def spy(noisy: torch.Tensor, t: torch.Tensor, *more: object, **options: object) -> object:
        seen.append((noisy, t))
        return predict(noisy, t, *more, **options)

    model.unet.forward = spy
    found = validate(model, [("a", IMAGES[0])], text, 0, 1, (100, 500), one.spread, 8)["a"]
    [(noisy, t)] = seen
    a = model.alpha_bar[t].view(-1, 1, 1, 1)
    eps = (noisy - a.sqrt() * torch.from_numpy(IMAGES[0].latent).float()) / (1 - a).sqrt()
    with torch.no_grad():
        errors = (eps_of(noisy, t, torch.stack([text(("a",)), text(None)])) - eps).square().mean(dim=(1, 2, 3))
    assert found.typicality == pytest.approx(float(errors[1] - errors[0]), rel=1e-3)
    assert found.typicality != pytest.approx(found.null_loss - found.loss, rel=1e-2)


def test_ddp_is_told_the_device_that_is_a_process_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray numbers the GPUs 9 and 10 of a node as the texts "10" and "9"."""
    state = SimpleNamespace(local_process_index=0)
    device = torch.device("cuda", 1)
    found = SimpleNamespace(num_processes=2, device=device, state=state, distributed_type=DistributedType.MULTI_GPU)
    monkeypatch.setattr(parallel, "Accelerator", lambda **_: found)
    assert accelerator().state.local_process_index == 1

"""Models of the Stable Diffusion family: the structure of 1.x and 2.x with narrow layers and random weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from diffmine.diffusion.draws import Timesteps, antithetic
from diffmine.diffusion.features import dift, ensemble_noise
from diffmine.diffusion.model import inspect, load, open_tokenizer, weight_files
from diffmine.diffusion.typicality import typicality
from diffmine.errors import InputError
from diffmine.mining.patches import centred_matrix
from diffmine.run import TINY

FAMILY: dict[str, dict[str, Any]] = {
    "1.x": {"unet": {"attention_head_dim": 4}, "prediction_type": "epsilon"},
    "2.x": {
        "unet": {"attention_head_dim": [2, 4, 4, 4], "use_linear_projection": True},
        "prediction_type": "v_prediction",
    },
}


def text_model(width: int, seed: int = 1) -> CLIPTextModel:
    torch.manual_seed(seed)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(open_tokenizer(TINY)), hidden_size=width, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=4, max_position_embeddings=77, projection_dim=width,
        )
    )  # fmt: skip


@pytest.fixture(scope="module", params=FAMILY)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline on disk: four levels, attention at all but the deepest, 4 latent channels, 8 pixels a cell."""
    torch.manual_seed(0)
    kind = FAMILY[request.param]
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 32, 64, 64), layers_per_block=2,
        down_block_types=(*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"), norm_num_groups=8, cross_attention_dim=32,
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3), **kind["unet"],
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
        prediction_type=kind["prediction_type"],
    )
    out = tmp_path_factory.mktemp(f"sd-{request.param}")
    StableDiffusionPipeline(
        vae=vae, text_encoder=text_model(32), tokenizer=open_tokenizer(TINY), unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(out)  # fmt: skip
    return out


def test_scores_and_features_of_every_kind(folder: Path) -> None:
    inspect(folder)
    model = load(folder)
    assert model.v_prediction == ("2.x" in folder.name)
    assert (model.cell, model.channels) == (8, 4)
    latents = model.encode(torch.rand(2, 3, 64, 96) * 2 - 1)
    assert latents.shape == (2, 4, 8, 12)
    text = model.embed(["", "An image of a.", "An image of b."])
    weights = [torch.from_numpy(centred_matrix(n, 8 * n, 16).copy()) for n in (8, 12)]
    draws = antithetic(0, 4, Timesteps.between(0.1, 0.7), (4, 8, 12))
    found = typicality(model, latents, [(0, 0), (0, 1), (1, 1)], text[1:], text[0], draws, *weights, 5)
    assert found.map.shape == (3, 8, 12)
    assert found.map.isfinite().all()
    assert found.map.abs().max() > 0
    maps = dift(model, latents, text[1:], 161, ensemble_noise(0, 2, (4, 8, 12)), 1, 4)
    assert maps.shape == (2, 64, 4, 6)  # up-block 1 of Stable Diffusion has a stride of two cells


def test_predicted_noise_is_that_of_the_scheduler(folder: Path) -> None:
    """eps_hat gives the same clean latent as diffusers' own step back from x_t."""
    model = load(folder)
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler", clip_sample=False)
    scheduler.set_timesteps(1000)
    x, eps, t = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), torch.tensor([400])
    text = model.embed(["An image of a."])
    noisy = model.add_noise(x, eps, t)
    assert torch.allclose(noisy, scheduler.add_noise(x, eps, t), atol=1e-6)
    with torch.no_grad():
        eps_hat, raw = model.predict_eps(noisy, t, text), model.unet(noisy, t, text).sample
    a = model.alpha_bar[400]
    clean = (noisy - (1 - a).sqrt() * eps_hat) / a.sqrt()
    assert torch.allclose(clean, scheduler.step(raw, 400, noisy).pred_original_sample, atol=1e-4)


def test_texts_are_projected_once_each_and_the_answer_is_that_of_diffusers(folder: Path) -> None:
    model, plain = load(folder), UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    noisy, t, texts = torch.randn(5, 4, 8, 12), torch.tensor([100, 900, 400, 400, 20]), torch.randn(2, 77, 32)
    text_of, projected = torch.tensor([1, 0, 0, 1, 1]), []
    for name, module in model.unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            module.register_forward_hook(lambda _module, _inputs, output: projected.append(len(output)))
    with torch.no_grad():
        shared, given = model.predict_eps(noisy, t, texts, text_of), model.predict_eps(noisy, t, texts[text_of])
        expected = plain(noisy, t, texts[text_of]).sample
    assert set(projected[: len(projected) // 2]) == {2}
    assert set(projected[len(projected) // 2 :]) == {5}
    if model.v_prediction:
        a = model.alpha_bar[t].view(-1, 1, 1, 1)
        expected = a.sqrt() * expected + (1 - a).sqrt() * noisy
    assert (shared - expected).abs().max() < 1e-5
    assert (given - expected).abs().max() < 1e-5


def test_a_saved_model_opens_again_as_it_was(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    model.save(tmp_path)
    again = load(tmp_path)
    assert again.v_prediction == model.v_prediction
    for name, parameter in model.unet.state_dict().items():
        assert torch.equal(parameter, again.unet.state_dict()[name])


def test_text_encoder_can_be_swapped_for_one_of_the_same_width(folder: Path, tmp_path: Path) -> None:
    """The paper's faces and streets are read by other text encoders than Stable Diffusion's."""
    for width in (32, 48):
        text_model(width, seed=2).save_pretrained(tmp_path / str(width))
        open_tokenizer(TINY).save_pretrained(tmp_path / str(width))
    swapped = load(folder, text_encoder=tmp_path / "32")
    assert not np.allclose(swapped.embed(["a"]).numpy(), load(folder).embed(["a"]).numpy())
    with pytest.raises(InputError, match=r"have 48 numbers, the UNet of .* takes 32"):
        load(folder, text_encoder=tmp_path / "48")


def test_only_weights_that_are_opened_count(tmp_path: Path) -> None:
    """As in a clone of a whole repository of the hub."""
    stem, unet = "diffusion_pytorch_model", tmp_path / "unet"
    opened = [f"{stem}-00001-of-00002.safetensors", f"{stem}-00002-of-00002.safetensors"]
    unet.mkdir()
    for name in [*opened, f"{stem}.fp16.safetensors", f"{stem}.non_ema.safetensors", f"{stem}.bin"]:
        (unet / name).touch()
    assert sorted(file.name for file in weight_files(tmp_path, "unet")) == opened
    for part in ("unet", "vae", "text_encoder"):
        assert len(weight_files(TINY, part)) == 1

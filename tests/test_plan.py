"""The plan: sums that can be done by hand, and the UNet's work against measurement and PyTorch's own counter."""

import dataclasses
import json

import pytest

from diffmine.config import Config, Dataset, Features, Finetune, ImageSize, Model, Patches, Typicality
from diffmine.configfile import load
from diffmine.errors import InputError
from diffmine.plan import SD15, Counts, Work, count, plan, render, unet_flop


def config(**sections) -> Config:
    return Config(output="o", dataset=Dataset(source="s", image=ImageSize(short_side=512)), **sections)


COUNTS = Counts(images=1000, pairs=1500, labels=3)


# ----------------------------------------------------------------------------------------------------------- UNet pass


@pytest.mark.parametrize(("side", "tflop"), [(32, 0.180), (64, 0.803), (96, 2.15)])
def test_stable_diffusion_as_measured(side, tflop):
    assert unet_flop(SD15, side, side) / 1e12 == pytest.approx(tflop, rel=2e-3)


def test_leaving_after_an_up_block_as_measured():
    assert unet_flop(SD15, 64, 64, up_block=1) / unet_flop(SD15, 64, 64) == pytest.approx(0.546, abs=5e-4)


def test_against_pytorchs_counter():
    torch = pytest.importorskip("torch")
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor
    from torch.utils.flop_counter import FlopCounterMode

    shape = {
        "in_channels": 8,
        "block_out_channels": [16, 24, 32],
        "layers_per_block": 1,
        "cross_attention_dim": 20,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    }
    unet = UNet2DConditionModel(**shape, out_channels=8, attention_head_dim=4, norm_num_groups=4)
    unet.set_attn_processor(AttnProcessor())  # plain matrix products, which the counter sees
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(torch.zeros(1, 8, 16, 24), 5, torch.zeros(1, 77, 20))
    # the counter also has the two layers of the time embedding, 4 widths wide
    embedding = 2 * (16 * 64 + 64 * 64)
    assert unet_flop(shape, 16, 24) == counter.get_total_flops() - embedding


# ---------------------------------------------------------------------------------------------------------------- sums


def test_passes():
    planned = plan(config(), COUNTS, aspect=1.0)
    one = unet_flop(SD15, 64, 64)
    share = unet_flop(SD15, 64, 64, up_block=1) / one
    assert planned.cells == (64, 64)
    scored = 40 * (1000 + 1500) + 2 * 16 * 64  # and the pilot
    again = 2 * 30 * 2 * 3 * 250  # the best and the worst of three labels, under null and label
    assert planned.work == {
        "finetune": Work(3 * 10_000 * 64, 3 * 10_000 * 64 * one),
        "typicality": Work(scored, scored * one),
        "patches": Work(again, again * one),
        "features": Work(1000 * 8 * share, 1000 * 8 * share * one),
    }


@pytest.mark.parametrize(
    ("typicality", "passes"),
    [
        ({"draws": 100}, 100 * 2500 + 2048),
        ({"draws": 100, "sampler": "antithetic"}, 100 * 2500),  # no pilot
        ({"draws": "auto", "max_draws": 60}, 60 * 2500 + 2048),
        ({"draws": 100, "labels": "all"}, 100 * (1000 + 3 * 1000) + 2048),
        ({"draws": 100, "labels": ["a", "b"]}, 100 * (1000 + 1500 + 2 * 1000) + 2048),
        ({"draws": 100, "pilot_images": 5000, "pilot_draws": 8}, 100 * 2500 + 2 * 1000 * 8),  # more than there are
    ],
    ids=str,
)
def test_passes_of_scoring(typicality, passes):
    assert plan(config(typicality=Typicality(**typicality)), COUNTS, 1.0).work["typicality"].passes == passes


@pytest.mark.parametrize(
    ("patches", "passes"),
    [
        ({"fresh_per_label": 10, "fresh_draws": 8}, 2 * 8 * 2 * 3 * 10),
        ({"fresh_per_label": 400, "fresh_draws": 8}, 2 * 8 * 1500),  # once per image and label at the most
        ({"fresh_per_label": 0}, 0),
    ],
    ids=str,
)
def test_passes_of_fresh_scores(patches, passes):
    for labels in ("own", "all"):  # what is chosen comes from an image's own labels
        planned = plan(config(patches=Patches(**patches), typicality=Typicality(labels=labels)), COUNTS, 1.0)
        assert planned.work["patches"].passes == passes
    beside = plan(
        config(patches=Patches(**patches), typicality=Typicality(labels="all", against="others")), COUNTS, 1.0
    )
    shown = min(2 * 3 * patches["fresh_per_label"], 1500 * 2)  # patches, and (image, label, other label) at the most
    assert beside.work["patches"].passes == passes + shown * patches.get("fresh_draws", 0)


def test_passes_of_a_length_in_epochs():
    planned = plan(config(finetune=Finetune(epochs=2, batch_size=7)), COUNTS, 1.0)
    assert planned.work["finetune"].passes == 3 * 286 * 7  # 2000 images, the last step filled up


def test_passes_of_validations():
    held = Dataset(source="s", image=ImageSize(short_side=512), finetune_split=0.1)
    wanted = Finetune(steps=2500, validate_every=1000, validation_images=3, validation_draws=2)
    planned = plan(Config(output="o", dataset=held, finetune=wanted), COUNTS, 1.0)
    looks = 4  # at steps 0, 1000, 2000 and 2500
    assert planned.work["finetune"].passes == 3 * 2500 * 64 + looks * 3 * 3 * 2 * 2  # labels, images, draws, prompts


def test_bytes():
    planned = plan(config(patches=Patches(per_label=200)), COUNTS, aspect=1.5)
    assert planned.cells == (64, 96)
    assert planned.written == {
        "latents": 1000 * 4 * 64 * 96 * 2,
        "typicality": 1500 * 64 * 96 * 8,
        "features": 3 * 200 * 1280 * 4,
    }
    every = plan(config(typicality=Typicality(labels="all")), COUNTS, aspect=1.5)
    assert every.written["typicality"] == 3000 * 64 * 96 * 8


def test_few_images_have_few_top_patches():
    assert plan(config(), COUNTS, 1.0).written["features"] == 3 * 1000 * 1280 * 4
    assert plan(config(), Counts(10, 10, 3), 1.0).written["features"] == 10 * 5 * 1280 * 4
    work = plan(config(patches=Patches(per_label=100), features=Features(ensemble=1)), COUNTS, 1.0).work["features"]
    assert work.passes == pytest.approx(300 * 0.546, rel=1e-3)


def test_no_finetuning():
    assert plan(config(finetune=Finetune(enabled=False)), COUNTS, 1.0).work["finetune"] == Work(0, 0)


def test_crops_make_finetuning_cheaper():
    work = plan(config(finetune=Finetune(crop=32)), COUNTS, 1.0).work["finetune"]
    assert work.flop == work.passes * unet_flop(SD15, 32, 32)


def test_sides_are_cropped_to_multiples():
    assert plan(config(), COUNTS, 756 / 512).cells == (64, 94)


def test_a_model_at_hand_is_read(tmp_path):
    (tmp_path / "unet").mkdir()
    shape = {**SD15, "in_channels": 8, "block_out_channels": [32, 64, 96, 128]}
    (tmp_path / "unet" / "config.json").write_text(json.dumps(shape))
    model = Model(base=str(tmp_path))
    planned = plan(config(model=model), COUNTS, 1.0)
    assert planned.work["typicality"].flop == (40 * 2500 + 2048) * unet_flop(shape, 64, 64)
    assert planned.written["latents"] == 1000 * 8 * 64 * 64 * 2
    assert planned.written["features"] == 3000 * 96 * 4
    with pytest.raises(InputError, match=r"features\.up_block: got 4; the model's up-blocks are 0 to 3"):
        plan(config(model=model, features=Features(up_block=4)), COUNTS, 1.0)


# ---------------------------------------------------------------------------------------------------------------- text


def test_hours_and_cost():
    flop = 3600 * 300e12  # one hour at 300 TFLOP/s
    planned = dataclasses.replace(plan(config(), COUNTS, 1.0), work={"a": Work(7, flop), "b": Work(8, 3 * flop)})
    rows = {line.split()[0]: line.split()[1:] for line in render(planned, tflops=300, price=2.5).splitlines() if line}
    assert rows["a"] == ["7", "1,080,000.0", "1.00", "2.50"]
    assert rows["all"] == ["15", "4,320,000.0", "4.00", "10.00"]
    assert "hours" not in render(planned).split("Assumed")[0]
    assert "cost" not in render(planned, tflops=300).split("Assumed")[0]


def test_assumptions_are_stated():
    text = render(plan(config(), COUNTS, 1.0), tflops=300)
    for words in ("Stable Diffusion 1.5", "3 passes", "1 : 1 (--aspect)", "300 TFLOP/s", "not counted"):
        assert words in text


def test_what_mine_would_refuse_is_refused(tmp_path):
    for label in ("Hat", "hat"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "1.png").touch()
    folder = Dataset(source=str(tmp_path), layout="folder")
    with pytest.raises(InputError, match="their prompts give the same tokens"):
        count(Config(output="o", dataset=folder, model=Model(base="tiny")))
    (tmp_path / "t.csv").write_text("uri,label,artist\nHat/1.png,a,x\nhat/1.png,b,y\n")
    typo = Dataset(source=str(tmp_path / "t.csv"), layout="table", group_column="artst", finetune_split=0.1)
    with pytest.raises(InputError, match=r"dataset.group_column: 'artst' is no column"):
        count(Config(output="o", dataset=typo, model=Model(base="owner/name")))


def test_labels_that_nothing_can_be_compared_with_are_noted(tmp_path):
    """Of four labels, `none` and `both` are on images that have every label which is scored."""
    (tmp_path / "t.csv").write_text("uri,labels\na.png,sick\nb.png,none\nc.png,none|both\nd.png,sick|free\n")
    table = Dataset(source=str(tmp_path / "t.csv"), layout="table")

    def noted(**typicality):
        made = Config(output="o", dataset=table, model=Model(base="tiny"), typicality=Typicality(**typicality))
        return [note for note in count(made).notes if "against others" in note]

    [note] = noted(against="others", labels=["none"])
    assert "they will have no patch: both, none (" in note
    assert noted(against="others", labels="all") == []
    assert noted(labels=["none"]) == []


def test_a_folder_is_counted(tmp_path):
    from diffmine.plan import count

    for name in ("a/1.png", "a/2.png", "b/1.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not opened")
    (tmp_path / "c.yaml").write_text(
        f"output: o\ndataset: {{source: {tmp_path / 'images'}}}\npatches: {{per_label: 4}}"
    )
    assert count(load(tmp_path / "c.yaml")) == Counts(images=3, pairs=3, labels=2)
    assert count(load(tmp_path / "c.yaml", ["--typicality.labels", "[b]"])).labels == 2
    with pytest.raises(InputError, match=r"typicality\.labels: the dataset has no label 'c'; it has a, b"):
        count(load(tmp_path / "c.yaml", ["--typicality.labels", "[c]"]))
    with pytest.raises(InputError, match="no label 'c'; it has Ashford"):
        count(load(tmp_path / "c.yaml", ["--typicality.labels", "[c]", "--dataset.layout", "toytown"]))
    [note] = count(load(tmp_path / "c.yaml", ["--patches.per_label", "5"])).notes
    assert note.startswith("1 label has no more candidates (images x patches.per_image 5) than patches.per_label 5, so")
    assert note.endswith("give --patches.per_label 1 or so (b)")
    for name in ("1.heic", "2.txt", "3.txt"):
        (tmp_path / "images" / name).write_bytes(b"")
    [note] = count(load(tmp_path / "c.yaml")).notes
    assert note == "3 other files skipped: 2 .txt, 1 .heic; images of kind .heic must be converted first"
    for name in ("1.heic", "2.txt", "3.txt"):
        (tmp_path / "images" / name).unlink()
    (tmp_path / "images" / "loose.png").write_bytes(b"")
    [note] = count(load(tmp_path / "c.yaml")).notes
    assert note == f"1 image lies directly in {tmp_path / 'images'}/, not in a label's folder; it is left out"
    assert f"\nnote: {note}\n" in render(plan(config(), Counts(3, 3, 2, (note,)), 1.0))


@pytest.mark.parametrize(
    ("finetune", "images", "noted"),
    [
        (Finetune(steps=10_000, batch_size=64), 39, "every image 16,410 times"),
        (Finetune(steps=10_000, batch_size=64), 2000, "every image 320 times"),
        (Finetune(steps=10_000, batch_size=64), 2200, None),
        (Finetune(epochs=30), 39, None),
        (Finetune(enabled=False), 39, None),
    ],
)
def test_a_training_that_sees_images_too_often_is_noted(finetune, images, noted):
    notes = plan(config(finetune=finetune), Counts(images, images, 2), 1.0).notes
    assert [noted in note for note in notes] == ([True] if noted else [])


def test_auto_draws_are_explained_where_they_are_asked_for():
    assert "auto" not in render(plan(config(), COUNTS, 1.0))
    assert "draws: auto counts as max_draws" in render(plan(config(typicality=Typicality(draws="auto")), COUNTS, 1.0))

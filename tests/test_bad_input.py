"""What cannot work is refused in words, before Ray starts and before anything is written: exit 2."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from diffmine.cli import main
from diffmine.errors import InputError, StoreError
from diffmine.preflight import reachable
from diffmine.run import TINY


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for label in ("Ash", "Elm"):
        (tmp_path / "images" / label).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(tmp_path / "images" / label / "1.png")
    return tmp_path / "images"


def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Message of a `mine` that must end with 2 and write nothing."""
    (tmp_path / "c.yaml").write_text("{model: {base: tiny}, compute: {workers: 1}}\n")
    assert main(["mine", str(tmp_path / "c.yaml"), f"--output={tmp_path / 'run'}", *arguments]) == 2
    assert not (tmp_path / "run").exists()
    return capsys.readouterr().err


def test_absent_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert str(tmp_path / "absent") in refused(tmp_path, capsys, f"--dataset.source={tmp_path / 'absent'}")


def test_a_source_is_looked_for_before_a_model_is_fetched(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unasked(name: str, _files: object) -> Path:
        raise InputError(f"{name} was fetched")

    monkeypatch.setattr("diffmine.run._fetch_from_hub", unasked)
    told = refused(tmp_path, capsys, f"--dataset.source={tmp_path / 'absent'}", "--model.base=owner/name")
    assert f"{tmp_path / 'absent'} does not exist" in told
    told = refused(tmp_path, capsys, f"--dataset.source={images}", "--model.base=owner/name")
    assert "manifest: model owner/name is fetched, unless it is in the cache\n" in told
    assert "owner/name was fetched" in told


def test_what_does_not_fit_a_model_that_was_fetched(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffmine.run._fetch_from_hub", lambda _name, _files: TINY)
    told = refused(tmp_path, capsys, f"--dataset.source={images}", "--model.base=owner/name", "--features.up_block=4")
    assert "features.up_block: got 4; the model's up-blocks are 0 to " in told


def test_gpus_that_are_not_there(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    message = refused(tmp_path, capsys, f"--dataset.source={images}", "--compute.device=gpu")
    assert "compute.device is gpu, and PyTorch finds no GPU on this machine" in message


def test_output_that_cannot_be_asked(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waiting cannot mend is bad input; a store that does not answer is not."""
    message = refused(tmp_path, capsys, f"--dataset.source={images}", "--output=s4://bucket/run")
    assert "output: got s4://bucket/run; allowed: a local path, file://, s3:// or gs://\n" in message
    with pytest.raises(InputError, match=r"^output: got az://c/run; allowed: a local path"):
        reachable("az://c/run")
    error: OSError = PermissionError("no credentials")

    def exists(_self: object, _path: str) -> bool:
        raise error

    monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.exists", exists)
    with pytest.raises(InputError, match=rf"^output: {tmp_path}/run/: cannot be looked for \(no credentials\)"):
        reachable(f"{tmp_path}/run")
    error = TimeoutError("busy")
    with pytest.raises(StoreError, match="busy"):
        reachable(f"{tmp_path}/run")


def test_source_without_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images" / "Ash").mkdir(parents=True)
    assert "holds no labelled image" in refused(tmp_path, capsys, f"--dataset.source={tmp_path / 'images'}")


def test_table_without_a_label_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.csv").write_text("uri,country\na.png,France\n")
    message = refused(tmp_path, capsys, f"--dataset.source={tmp_path / 't.csv'}", "--dataset.layout=table")
    assert "label" in message
    assert "country" in message


def test_labels_that_the_tokenizer_cannot_tell_apart(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "Ash").rename(images / "ELM")
    message = refused(tmp_path, capsys, f"--dataset.source={images}")
    assert "'Elm' and 'ELM'" in message


def test_label_that_equals_the_null_prompt(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(
        tmp_path, capsys, f"--dataset.source={images}", "--prompt.template={label}", "--prompt.null_prompt=ash"
    )
    assert "'Ash' and the null prompt" in message


def test_prompt_that_is_cut_off(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "Ash").rename(images / ("xyzzy " * 20).strip())
    assert "tokens, the text encoder reads 77" in refused(tmp_path, capsys, f"--dataset.source={images}")


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_model_that_lacks_a_component(
    component: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(TINY, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / component)
    message = refused(tmp_path, capsys, f"--dataset.source={images}", f"--model.base={tmp_path / 'model'}")
    assert f"component '{component}' is missing" in message


def model_with(tmp_path: Path, file: str, **changes: object) -> Path:
    shutil.copytree(TINY, tmp_path / "model")
    path = tmp_path / "model" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("model_index.json", {"unet": ["diffusers", "FluxTransformer2DModel"]}, "unet is a FluxTransformer2DModel"),
        (
            "model_index.json",
            {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]},
            "text_encoder_2 is not",
        ),
        ("unet/config.json", {"in_channels": 9}, "the UNet takes 9 channels"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type is 'sample'"),
    ],
)
def test_model_of_another_kind(
    file: str, changes: dict, said: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_with(tmp_path, file, **changes)
    assert said in refused(tmp_path, capsys, f"--dataset.source={images}", f"--model.base={model}")


@pytest.mark.parametrize("suffix", [".bin", ".fp16.safetensors", ".non_ema.safetensors"])
def test_pickled_weights_and_variants(
    suffix: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(TINY, tmp_path / "model")
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(suffix))
    message = refused(tmp_path, capsys, f"--dataset.source={images}", f"--model.base={tmp_path / 'model'}")
    assert "unet has no .safetensors weights" in message


def test_absent_model(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such folder" in refused(tmp_path, capsys, f"--dataset.source={images}", "--model.base=/absent/model")


def test_size_that_is_no_whole_number_of_cells(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(tmp_path, capsys, f"--dataset.source={images}", "--dataset.image.multiple_of=4")
    assert "multiple_of" in message


@pytest.fixture
def table(images: Path, tmp_path: Path) -> str:
    rows = [f"images/{label}/1.png,{label},{2.5},{'a long name ' * 20}" for label in ("Ash", "Elm")]
    (tmp_path / "t.csv").write_text("uri,label,height,region\n" + "\n".join(rows) + "\n")
    return f"--dataset.source={tmp_path / 't.csv'}"


def test_columns_that_cannot_join_a_prompt(table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = "--dataset.layout=table"
    message = refused(tmp_path, capsys, table, layout, "--finetune.prompt_columns={county: 0.5}")
    assert "finetune.prompt_columns: 'county' is no column" in message
    assert "uri, labels, boxes, height, region" in message
    message = refused(tmp_path, capsys, table, layout, "--dataset.group_column=height", "--dataset.finetune_split=0.5")
    assert "dataset.group_column: 'height' is no column of text or whole numbers" in message
    message = refused(tmp_path, capsys, table, layout, "--finetune.prompt_columns={region: 0.5}")
    assert "2 prompts of finetuning have more, as 'An image of Ash, a long name a long name" in message


def test_a_share_that_holds_nothing_out(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(tmp_path, capsys, f"--dataset.source={images}", "--dataset.finetune_split=0.1")
    assert "dataset.finetune_split: 0.1 of no label's images is a whole image" in message


def test_a_schedule_that_its_images_have_no_steps_for(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    length = ("--finetune.images=20", "--finetune.batch_size=10", "--finetune.warmup_steps=3")
    message = refused(tmp_path, capsys, f"--dataset.source={images}", *length)
    assert "images are 2 steps, fewer than the 3 of finetune.warmup_steps" in message


def test_a_tracker_that_is_not_installed(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = refused(tmp_path, capsys, f"--dataset.source={images}", "--finetune.trackers=[wandb, mlflow]")
    assert "finetune.trackers: wandb, mlflow is not installed; pip install wandb mlflow" in message


def test_what_does_not_fit_the_model_and_a_run_that_is_not_there(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text('{"hidden_size": 768}')
    message = refused(
        tmp_path, capsys, f"--dataset.source={images}", "--features.up_block=4",
        f"--report.beside={tmp_path / 'other'}", f"--model.text_encoder={tmp_path / 'clip'}",
    )  # fmt: skip
    assert "features.up_block: got 4; the model's up-blocks are 0 to " in message
    assert "model.text_encoder: its states have 768 numbers, the UNet of model.base takes " in message
    assert f"report.beside: {tmp_path / 'other'} is no run with a report" in message

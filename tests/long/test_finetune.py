"""Finetuning on Ray Train: workers share a batch, a cut-off training goes on, a bad loss stops it."""

import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from diffmine import pipeline
from diffmine.configfile import load
from diffmine.errors import NonFiniteError
from diffmine.progress import Progress
from diffmine.run import Run
from diffmine.stages import finetune, session

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("ray_session")]


def prepared(folder: Path, **finetune_settings: object) -> session.Context:
    """A run whose latents are committed."""
    settings = {
        "output": folder, "dataset.limit_per_label": 4, "finetune.steps": 12, "finetune.batch_size": 8,
        "finetune.samples_per_label": 0, "finetune.warmup_steps": 2, "finetune.decay_steps": 4, "finetune.workers": 1,
        "compute.workers": 1,
    } | {f"finetune.{k}": v for k, v in finetune_settings.items()}  # fmt: skip
    config = load(Path(__file__).parents[2] / "configs" / "toytown.yaml", [f"--{k}={v}" for k, v in settings.items()])
    context = session.Context(Run(config.output), config, Progress())
    for stage in pipeline.STAGES[:2]:
        if context.run.committed(stage.name) is None:
            pipeline._run_stage(context, stage)
    return context


def losses(run: Run) -> list[float]:
    return [json.loads(line)["loss"] for line in run.read("model/metrics.jsonl").splitlines()]


def weights(run: Run) -> bytes:
    return run.read("model/unet/diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def one_worker(tmp_path_factory: pytest.TempPathFactory) -> Run:
    context = prepared(tmp_path_factory.mktemp("one") / "run")
    finetune.finetune(context)
    return context.run


def test_two_workers_have_the_losses_of_one(one_worker: Run, tmp_path: Path) -> None:
    context = prepared(tmp_path / "run", workers=2)
    finetune.finetune(context)
    assert np.allclose(losses(context.run), losses(one_worker), rtol=1e-5)


def test_a_training_that_was_cut_off_ends_the_same(
    one_worker: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off after step 5 of 12, with newer checkpoints that are damaged and of another model beside the whole one."""
    context = prepared(tmp_path / "run", checkpoint_every=5)
    monkeypatch.setattr(Run, "remove", lambda self, name: None)  # the driver "dies" before it clears the checkpoints
    finetune.finetune(context)
    monkeypatch.undo()
    run = context.run
    assert run.names("checkpoints") == ["step-00000005", "step-00000010"]
    run.replace("checkpoints/step-00000010/state.safetensors", b"half a file")
    another = save({"weight/conv_in.weight": torch.zeros(3)})
    run.replace("checkpoints/step-00000008/state.safetensors", another)
    done = json.loads(run.read("checkpoints/step-00000005/done.json"))
    assert done["step"] == 5
    done |= {"step": 8, "sha256": hashlib.sha256(another).hexdigest()}
    run.replace("checkpoints/step-00000008/done.json", json.dumps(done).encode())
    said = io.StringIO()
    finetune.finetune(replace(context, progress=Progress(said)))
    assert said.getvalue().count("passed over") == 1
    assert (
        "passed over checkpoints/step-00000010, whose bytes have changed, checkpoints/step-00000008, which is of "
        "another model; begins at step 5"
    ) in said.getvalue()
    assert losses(run) == losses(one_worker)
    assert weights(run) == weights(one_worker)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path: Path) -> None:
    context = prepared(tmp_path / "run", learning_rate=1e30)
    with pytest.raises(NonFiniteError, match=r"the loss of step \d+ is (nan|inf)"):
        finetune.finetune(context)
    assert not context.run.exists("model/model_index.json")

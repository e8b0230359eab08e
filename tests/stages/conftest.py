"""A small run through every stage, on Ray, and what tests of single stages take from it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from diffmine.cli import main
from diffmine.configfile import load
from diffmine.data import toytown
from diffmine.diffusion.draws import SAMPLERS, Timesteps
from diffmine.diffusion.model import load as load_model
from diffmine.diffusion.typicality import Typicality, typicality
from diffmine.mining.patches import centred_matrix
from diffmine.progress import Progress
from diffmine.run import TINY, Run, part_name, rows_to_table, to_parquet
from diffmine.stages.patches import patches
from diffmine.stages.session import Context
from diffmine.stages.typicality import PILOT
from diffmine.stages.typicality import typicality as score

SETTINGS = {
    "dataset.image.short_side": 64, "prompt.null_prompt": "An image.",
    "model.base": "tiny", "model.dtype": "float32",
    "finetune.enabled": "false", "typicality.draws": 8, "typicality.pilot_images": 6, "typicality.pilot_draws": 16,
    "patches.size": 16, "patches.per_image": 2, "patches.per_label": 4, "patches.fresh_per_label": 2,
    "patches.fresh_draws": 8,
    "features.ensemble": 2, "clusters.k": 2, "compute.shard_images": 8, "compute.workers": 1, "report.enabled": "false",
}  # fmt: skip


def arguments(folder: Path, changes: dict[str, object]) -> tuple[str, list[str]]:
    """A config file and the flags beside it: all settings are on the command line, with `__` for the dots."""
    (folder / "empty.yaml").write_text("{}\n")
    settings = SETTINGS | {key.replace("__", "."): value for key, value in changes.items()}
    return str(folder / "empty.yaml"), [f"--{key}={value}" for key, value in settings.items()]


@pytest.fixture(scope="session")
def mine() -> Callable[..., tuple[int, Run]]:
    """Exit code and run of `diffmine mine`."""

    def mine(folder: Path, **changes: object) -> tuple[int, Run]:
        file, flags = arguments(folder, changes)
        return main(["mine", file, *flags]), Run(str(changes["output"]))

    return mine


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scenes of each label, a truncated one and a text file among them."""
    folder = tmp_path_factory.mktemp("scenes")
    for name, data in toytown.files(1, 3):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    whole = (folder / "Ashford" / "0000.png").read_bytes()
    (folder / "Ashford" / "zz.png").write_bytes(whole[: len(whole) // 2])
    (folder / "Ashford" / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture(scope="session")
def first(
    ray_session: None, mine: Callable[..., tuple[int, Run]], images: Path, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """The run that others are compared with; nobody changes it."""
    folder = tmp_path_factory.mktemp("first")
    code, run = mine(
        folder, output=folder / "run", dataset__source=images, dataset__boxes=images / "boxes.csv",
        compute__workers=2, typicality__batch_size=16, features__batch_size=16, report__enabled="true",
    )  # fmt: skip
    assert code == 0
    return run


@pytest.fixture(scope="session")
def unscored(first: Run, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Context]:
    """New runs with the first one's manifest and latents (and its pilot, unless another is wanted), to be scored."""

    def unscored(piloted: bool = True, **changes: object) -> Context:
        tmp_path = tmp_path_factory.mktemp("unscored")
        run = Run(str(tmp_path / "run"))
        for folder in ("manifest", "latents"):
            shutil.copytree(first.path(folder), run.path(folder))
        if piloted:
            run.put(PILOT, first.read(PILOT))
        changes = {"output": run.root, "dataset__source": images, "typicality__batch_size": 16, **changes}
        return Context(run, load(*arguments(tmp_path, changes)), Progress())

    return unscored


@pytest.fixture(scope="session")
def by_hand() -> Callable[..., Typicality]:
    """T of one image and label from the pure functions, with draws spread as the run's pilot says."""

    def by_hand(run: Run, image_id: str, label: str, draws: int, bank: int) -> Typicality:
        [row] = [r for r in run.table("latents").to_pylist() if r["image_id"] == image_id]
        shape = (-1, row["h"], row["w"])
        latent = torch.from_numpy(np.array(row["latent"], np.float16).reshape(shape)).float()  # [C, h, w]
        pilot = json.loads(run.read(PILOT))
        piloted = Timesteps(pilot["first"], np.array(pilot["spread"]))
        found = SAMPLERS["allocated"](0, draws, piloted, (len(latent), row["h"], row["w"]), bank)
        model = load_model(TINY)
        null, own = model.embed([str(SETTINGS["prompt.null_prompt"]), f"An image of {label}."])
        size = int(str(SETTINGS["patches.size"]))
        windows = [torch.from_numpy(centred_matrix(n, n * model.cell, size).copy()) for n in (row["h"], row["w"])]
        return typicality(model, latent[None], [(0, 0)], own[None], null, found, windows[0], windows[1], 4)

    return by_hand


@pytest.fixture(scope="session")
def compared(unscored: Callable[..., Context]) -> Run:
    """Every image scored under every label, and patches chosen against the other labels; one image has two of its own.

    Maps are those of the first run otherwise: the draws are the same.
    """
    context = unscored(typicality__labels="all", typicality__against="others")
    run = context.run
    rows = run.table("manifest").to_pylist()
    rows[0]["labels"] = ["Ashford", "Brookvale"]
    run.replace(part_name("manifest", 0), to_parquet(rows_to_table("manifest", rows), row_group_size=8))
    score(context)
    patches(context)
    return run

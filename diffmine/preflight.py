"""config -> what would stop a run after hours of work, found before the first minute of it."""

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffmine.config import Config, unknown_store
from diffmine.errors import InputError, StoreError
from diffmine.run import TINY, Run
from diffmine.store import may_pass

_TRACKERS = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}  # Ray brings tensorboardX


def preflight(run: Run, config: Config, stages: frozenset[str]) -> None:
    """Look at what is installed, at the models' shapes and at the store, for the stages that are still to be done.

    Raises:
        InputError: lists all that is wrong.
        StoreError: the store does not answer.
    """
    model = config.model  # what is not in a local folder is opened by `check_model`, once it is fetched
    base, encoder = TINY if model.base == "tiny" else Path(model.base), model.text_encoder
    unfit = misfits(config, base, Path(encoder) if encoder else None)
    if wrong := [*_not_installed(config, stages), *unfit, *_not_there(config, stages)]:
        raise InputError("\n".join(wrong))
    _require_writable(run)


def reachable(uri: str) -> Run:
    """The run folder of a URI, whether there is something or not.

    Raises:
        InputError: runs do not lie in such a store, or it refuses, as without credentials.
        StoreError: it does not answer.
    """
    if why := unknown_store(uri):
        raise InputError(f"output: {why}")
    try:
        run = Run(uri)
    except (ImportError, ValueError) as error:
        raise InputError(f"output: {uri}: {error}") from error
    with _refused_as_input():
        run.exists("")
    return run


def _not_installed(config: Config, stages: frozenset[str]) -> Iterator[str]:
    missing = [name for name in config.finetune.trackers if importlib.util.find_spec(_TRACKERS[name]) is None]
    if missing and "finetune" in stages:
        packages = " ".join(_TRACKERS[name] for name in missing)
        yield f"finetune.trackers: {', '.join(missing)} is not installed; pip install {packages}"


def misfits(config: Config, base: Path, text_encoder: Path | None) -> Iterator[str]:
    """What does not fit a model and its text encoder, as far as their folders tell; nothing where there are none."""
    unet = _described(base / "unet")
    blocks, width = len(unet.get("up_block_types", ())), unet.get("cross_attention_dim")
    if blocks and config.features.up_block >= blocks:
        yield f"features.up_block: got {config.features.up_block}; the model's up-blocks are 0 to {blocks - 1}"
    own = _described(text_encoder) if text_encoder else {}
    states = own.get("hidden_size") or own.get("text_config", {}).get("hidden_size")
    if width and states and states != width:
        yield f"model.text_encoder: its states have {states} numbers, the UNet of model.base takes {width}"


def _described(part: Path) -> dict[str, Any]:
    """The config.json of a model's part; empty where there is none."""
    file = part / "config.json"
    found: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return found


def _not_there(config: Config, stages: frozenset[str]) -> Iterator[str]:
    beside = config.report.beside
    if beside is not None and "report" in stages and Run(beside).committed("report") is None:
        yield f"report.beside: {beside} is no run with a report"


def _require_writable(run: Run) -> None:
    """Find out whether the object store takes what will be written.

    Raises:
        InputError: it refuses; no such bucket.
        StoreError: it does not answer.
    """
    if "://" not in run.uri:
        return
    with _refused_as_input():
        run.replace("writable", b"")
        run.remove("writable")


@contextmanager
def _refused_as_input() -> Iterator[None]:
    """What cannot get better by waiting is the fault of the setting."""
    try:
        yield
    except StoreError as error:
        if error.__cause__ is None or may_pass(error.__cause__):
            raise
        raise InputError(f"output: {error}") from error

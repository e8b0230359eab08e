"""The stage that scores: which labels, how many draws and from where, and images whose maps are not numbers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from diffmine.diffusion.draws import SAMPLERS, Timesteps
from diffmine.diffusion.typicality import Typicality
from diffmine.errors import InputError
from diffmine.run import Run, part_name, rows_to_table, to_parquet
from diffmine.stages import typicality as stage
from diffmine.stages.race import read_round
from diffmine.stages.session import Context, Result
from diffmine.stages.typicality import PILOT, SCORES, Scorer, scoring_settings, typicality

Unscored = Callable[..., Context]
Row = dict[str, Any]


def score(context: Context, others: tuple[str, ...] = ()) -> list[Row]:
    """What an actor makes of the first shard."""
    part = Scorer(scoring_settings(context), others)(read_round(context.run, 0, b""))
    assert part.failures == []
    return part.rows.to_pylist()


def test_rows_are_those_of_the_pure_functions(first: Run, by_hand: Callable[..., Typicality]) -> None:
    row = first.read_part("typicality", 1).to_pylist()[3]
    found = by_hand(first, row["image_id"], row["label"], 8, SCORES)
    assert np.allclose(row["map"], found.map[0].ravel(), rtol=0, atol=1e-6)
    assert np.allclose(row["window_stderr"], found.window_stderr[0].ravel(), rtol=1e-3, atol=1e-6)
    assert (row["draws"], row["own"]) == (8, True)


def test_maps_that_would_be_too_many_are_made_in_turns(first: Run, unscored: Unscored, monkeypatch: Any) -> None:
    """Two images at a time instead of eight."""
    calls: list[int] = []
    real = stage.compute_typicality

    def counted(model: object, latents: torch.Tensor, *more: Any, **options: Any) -> Typicality:
        calls.append(len(latents))
        return real(model, latents, *more, **options)

    monkeypatch.setattr(stage, "compute_typicality", counted)
    monkeypatch.setattr(stage, "_PAIRS", 2)
    rows = score(unscored())
    assert set(calls) == {1, 2}
    for row, other in zip(rows, first.read_part("typicality", 0).to_pylist(), strict=True):
        assert (row["image_id"], row["label"]) == (other["image_id"], other["label"])
        assert np.allclose(row["map"], other["map"], rtol=0, atol=1e-6)


def test_a_label_that_the_dataset_lacks_is_named_and_nothing_is_scored(
    unscored: Unscored, mine: Callable[..., tuple[int, Run]], images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    context = unscored(piloted=False, typicality__labels="[Ashford, Nowhere]")
    with pytest.raises(InputError, match=r"the dataset has no label 'Nowhere'; it has Ashford, Brookvale, "):
        typicality(context)
    assert not context.run.exists("typicality")
    code, run = mine(
        Path(context.run.root).parent, output=f"{context.run.root}-new", dataset__source=images,
        typicality__labels="[Ashford, Nowhere]",
    )  # fmt: skip
    assert code == 2
    assert "no label 'Nowhere'" in capsys.readouterr().err
    assert not run.exists("")


def test_all_labels_are_scored_and_own_ones_told_apart(first: Run, compared: Run) -> None:
    own = {row["image_id"]: row["labels"] for row in compared.table("manifest").to_pylist()}
    labels = sorted({label for found in own.values() for label in found})
    images = first.table("latents")["image_id"].to_pylist()
    rows = compared.table("typicality").to_pylist()
    assert [(r["image_id"], r["label"]) for r in rows] == [(i, label) for i in images for label in labels]
    assert all(r["own"] == (r["label"] in own[r["image_id"]]) for r in rows)
    assert sum(r["own"] for r in rows) == len(images) + 1  # one image has two


def test_maps_of_own_labels_do_not_depend_on_the_others(first: Run, compared: Run) -> None:
    found = {(r["image_id"], r["label"]): r for r in compared.table("typicality").to_pylist()}
    for row in first.table("typicality").to_pylist():
        assert np.allclose(row["map"], found[row["image_id"], row["label"]]["map"], rtol=0, atol=1e-6)
    maps = np.array([r["map"] for r in found.values()]).reshape(-1, 7, 64)
    assert np.ptp(maps, axis=1).max() > 1e-3  # labels do make a difference


def test_some_labels_are_scored_beside_an_images_own(unscored: Unscored) -> None:
    rows = score(unscored(), others=("Cedarton",))
    assert [(r["label"], r["own"]) for r in rows if r["image_id"] == "Ashford/0000.png"] == [
        ("Ashford", True),
        ("Cedarton", False),
    ]
    assert [(r["label"], r["own"]) for r in rows if r["image_id"] == "Cedarton/0000.png"] == [("Cedarton", True)]


# --------------------------------------------------------------------------------------------------------------- pilot


def test_the_pilot_is_made_once_and_reused(unscored: Unscored, by_hand: Callable[..., Typicality]) -> None:
    context = unscored(piloted=False)
    before = score(context)
    path = Path(context.run.path(PILOT))
    found, written = json.loads(path.read_bytes()), path.stat().st_mtime_ns
    assert len(found["spread"]) == 600
    score(context)
    assert path.stat().st_mtime_ns == written
    altered = {**found, "spread": [1.0] * 500 + [50.0] * 100}  # most draws go to high t
    context.run.replace(PILOT, json.dumps(altered).encode())
    after = score(context)
    assert json.loads(path.read_bytes()) == altered
    expected = by_hand(context.run, after[0]["image_id"], after[0]["label"], 8, SCORES).map[0].ravel()
    assert np.allclose(after[0]["map"], expected, rtol=0, atol=1e-6)
    assert not np.allclose(before[0]["map"], expected, rtol=0, atol=1e-4)


def test_a_pilot_that_lies_under_its_former_name_is_used(unscored: Unscored) -> None:
    context = unscored()
    altered = context.run.read(PILOT) + b"\n"
    context.run.remove(PILOT)
    context.run.put("typicality/pilot.json", altered)
    score(context)
    assert context.run.read(PILOT) == altered


def test_a_pilot_that_is_to_come_is_said(
    unscored: Unscored, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stage, "stream", lambda *_: Result({}, {}, 0))
    typicality(unscored(piloted=False))
    assert capsys.readouterr().err == "typicality: a pilot on 6 images comes first\n"
    for context in (unscored(), unscored(piloted=False, typicality__sampler="antithetic")):
        typicality(context)
        assert capsys.readouterr().err == ""


def test_a_pilot_takes_its_images_from_shards_that_have_some(unscored: Unscored) -> None:
    """Every seed finds them where only one of the shards has a usable image."""
    context = unscored(piloted=False)
    empty, (shard, *others) = rows_to_table("latents", []), context.run.parts("latents")
    for other in others:
        context.run.replace(part_name("latents", other), to_parquet(empty))
    there = set(context.run.read_part("latents", shard, ["image_id"])["image_id"].to_pylist())
    for seed in range(8):
        found = stage._pilot_images(context.run, seed, 2)["image_id"].to_pylist()
        assert len(found) == 2
        assert set(found) <= there


def test_a_table_opens_without_this_package(first: Run) -> None:
    """As docs/tables.md has it: what else lies in its folder is passed over."""
    for name in ("manifest", "latents", "typicality", "patches", "features", "clusters", "members"):
        assert len(pq.read_table(first.path(name))) == len(first.table(name)) > 0, name


def test_the_marker_names_the_pilot_and_the_draws(first: Run) -> None:
    marker = first.committed("typicality") or {}
    assert marker["files"][PILOT] == first.digest(PILOT)
    assert marker["draws"] == 8
    assert marker["pilot"]["best"] == json.loads(first.read(PILOT))["best"] > 0


def test_draws_are_chosen_by_the_error_that_is_asked_for(first: Run, unscored: Unscored) -> None:
    pilot = json.loads(first.read(PILOT))
    pairs_at_1 = (pilot["error"] / pilot["best"]) ** 2  # pairs for a relative error of 1
    found = []
    for pairs in (0.1, 3.5, 7.2, 500):
        asked = (pairs_at_1 / pairs) ** 0.5
        context = unscored(typicality__draws="auto", typicality__relative_error=asked, typicality__max_draws=24)
        [draws] = {row["draws"] for row in score(context)}
        found.append(draws)
    assert found == [4, 8, 16, 24]


# ------------------------------------------------------------------------------------------------------------ failures


def test_an_image_whose_loss_is_not_finite_is_a_failure_and_the_others_are_scored(
    first: Run, unscored: Unscored
) -> None:
    context = unscored()
    payload = dict(read_round(context.run, 0, b""))
    rows = payload["latents"].to_pylist()
    rows[2]["latent"][0] = float("nan")
    payload["latents"] = rows_to_table("latents", rows)
    part = Scorer(scoring_settings(context), ())(payload)
    pilot = json.loads(first.read(PILOT))
    piloted = Timesteps(pilot["first"], np.array(pilot["spread"]))
    t = int(SAMPLERS["allocated"](0, 8, piloted, (8, 8, 8), SCORES).t[0])
    [uri] = [r["uri"] for r in payload["manifest"].to_pylist() if r["image_id"] == rows[2]["image_id"]]
    assert part.failures == [
        {
            "image_id": rows[2]["image_id"], "uri": uri, "reason": "non_finite",
            "detail": f"its loss is not finite at t = {t}",
        }
    ]  # fmt: skip
    whole = {r["image_id"]: r["map"] for r in first.read_part("typicality", 0).to_pylist()}
    scored = part.rows.to_pylist()
    assert {r["image_id"] for r in scored} == whole.keys() - {rows[2]["image_id"]}
    assert all(np.allclose(r["map"], whole[r["image_id"]], rtol=0, atol=1e-6) for r in scored)

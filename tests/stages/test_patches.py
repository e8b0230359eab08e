"""The stage that chooses: by contrast with other labels where that is asked for, and what fresh draws say of it."""

import itertools
import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from diffmine.data.images import geometry
from diffmine.diffusion.typicality import Typicality
from diffmine.mining.patches import KINDS, patch_map
from diffmine.run import Run
from diffmine.stages.patches import _CANDIDATES, _best, _by_shard, _Candidates, patches
from diffmine.stages.session import Context
from diffmine.stages.typicality import FRESH

Row = dict[str, Any]


def windows(row: Row) -> np.ndarray:
    """T of every window of 16 pixels, float32 [49, 49]."""
    return patch_map(np.array(row["map"], np.float32).reshape(row["h"], row["w"]), 64, 64, 16)


def by_kind(run: Run) -> dict[tuple[str, str], list[Row]]:
    """(label, kind) -> patches by rank."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in run.table("patches").sort_by("rank").to_pylist():
        groups[row["label"], row["kind"]].append(row)
    return groups


# ------------------------------------------------------------------------------------------------------------ contrast


@pytest.fixture(scope="module")
def contrasts(compared: Run) -> dict[tuple[str, str], np.ndarray]:
    """(image, own label) -> T of every window less the largest of the labels that are not the image's own."""
    maps: dict[str, list[Row]] = defaultdict(list)
    for row in compared.table("typicality").to_pylist():
        maps[row["image_id"]].append(row)
    found = {}
    for image_id, rows in maps.items():
        strongest = np.max([windows(r) for r in rows if not r["own"]], axis=0)
        found.update({(image_id, r["label"]): windows(r) - strongest for r in rows if r["own"]})
    return found


def test_patches_come_from_an_images_own_labels(compared: Run) -> None:
    own = {row["image_id"]: row["labels"] for row in compared.table("manifest").to_pylist()}
    patches = compared.table("patches").to_pylist()
    assert all(p["label"] in own[p["image_id"]] for p in patches)
    assert {len(group) for group in by_kind(compared).values()} == {4}


def test_patches_are_chosen_by_contrast_with_the_strongest_other_label(
    compared: Run, contrasts: dict[tuple[str, str], np.ndarray]
) -> None:
    maps = {(r["image_id"], r["label"]): windows(r) for r in compared.table("typicality").to_pylist()}
    reordered = 0
    for (label, kind), group in by_kind(compared).items():
        found = np.array([p["contrast"] for p in group])
        expected = [contrasts[p["image_id"], label][p["y"], p["x"]] for p in group]
        assert np.allclose(found, expected, rtol=0, atol=1e-6)
        typicality = [maps[p["image_id"], label][p["y"], p["x"]] for p in group]
        assert np.allclose([p["typicality"] for p in group], typicality, rtol=0, atol=1e-6)
        of_label = [c for (_, own), c in contrasts.items() if own == label]
        if kind == "top":
            assert list(found) == sorted(found, reverse=True)
            assert found[0] == pytest.approx(max(c.max() for c in of_label), abs=1e-6)
            reordered += typicality != sorted(typicality, reverse=True)
        if kind == "bottom":
            assert list(found) == sorted(found)
            assert found[0] == pytest.approx(min(c.min() for c in of_label), abs=1e-6)
    assert reordered  # T alone would have ranked them otherwise


def test_the_contrast_is_scored_again_with_the_label_that_was_strongest(
    compared: Run, by_hand: Callable[..., Typicality]
) -> None:
    maps = {(r["image_id"], r["label"]): r for r in compared.table("typicality").to_pylist()}
    for (_, kind), group in by_kind(compared).items():
        again = [p["fresh_contrast"] is not None for p in group]
        assert again == [p["fresh_contrast_stderr"] is not None for p in group]
        assert again == ([False] * 4 if kind == "random" else [True, True, False, False])
        for p in group:
            of_rival = windows(maps[p["image_id"], p["rival"]])[p["y"], p["x"]]
            assert p["contrast"] == pytest.approx(p["typicality"] - of_rival, abs=1e-6)
    patch = by_kind(compared)["Cedarton", "top"][1]
    own, rival = (
        patch_map(by_hand(compared, patch["image_id"], label, 8, FRESH).map[0].numpy(), 64, 64, 16)
        for label in (patch["label"], patch["rival"])
    )
    assert patch["fresh_contrast"] == pytest.approx(float((own - rival)[patch["y"], patch["x"]]), abs=1e-6)
    assert patch["fresh_contrast"] != patch["contrast"]


def test_an_image_without_other_labels_has_no_contrast_and_puts_nothing_forward() -> None:
    """Its T would lead a list of differences."""
    rng, rows = np.random.default_rng(0), []
    for label, own in (("a", True), ("b", True), ("c", False)):
        row = {"image_id": "1", "label": label, "own": own, "h": 8, "w": 8, "draws": 8}
        rows.append(row | {name: rng.normal(size=(8, 8)) for name in ("map", "window_stderr")})
    task = _Candidates("", 0, 16, 2, 8, 64, 8, True, 0)
    place = geometry(64, 64, 64, 8)
    assert {c["label"] for c in task._of_image(rows, place)} == {"a", "b"}
    assert task._of_image(rows[:2], place) == []
    plain = replace(task, against_others=False)
    assert {(c["contrast"], c["rival"]) for c in plain._of_image(rows[:2], place)} == {(None, None)}


def test_random_patches_do_not_look_at_scores(first: Run, compared: Run) -> None:
    """The same images have the same random patches, however the others are chosen."""
    first_random, random = (
        {
            (p["image_id"], label, p["x"], p["y"])
            for (label, kind), group in by_kind(run).items()
            for p in group
            if kind == "random" and label != "Brookvale"  # of which the second run has one image more
        }
        for run in (first, compared)
    )
    assert random == first_random
    assert len(random) == 6 * 4


def test_the_error_that_draws_auto_reached_is_told(
    first: Run, unscored: Callable[..., Context], capsys: pytest.CaptureFixture[str]
) -> None:
    context = unscored(typicality__draws="auto", typicality__relative_error=0.25, patches__fresh_per_label=0)
    shutil.copytree(first.path("typicality"), context.run.path("typicality"), dirs_exist_ok=True)
    error = patches(context).marker["relative_error"]
    top = [p for (_, kind), group in by_kind(first).items() for p in group if kind == "top"]
    ratio = np.linalg.norm([p["stderr"] for p in top]) / np.linalg.norm([p["typicality"] for p in top])
    assert error == pytest.approx(ratio, rel=1e-6)
    said = f"the standard error of the most typical is {error:.1%} of T (typicality.relative_error: 25.0%)"
    assert said in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- fresh scores


def test_the_best_and_the_worst_have_fresh_scores_and_no_others(first: Run) -> None:
    for (_, kind), group in by_kind(first).items():
        again = [p["fresh_typicality"] is not None for p in group]
        assert again == ([False] * 4 if kind == "random" else [True, True, False, False])
        for p in group:
            assert (p["fresh_stderr"] is None) == (p["fresh_typicality"] is None)
            assert (p["fresh_degrees_of_freedom"] is None) == (p["fresh_typicality"] is None)
            assert p["contrast"] is None
            assert p["fresh_typicality"] != p["typicality"]


def test_a_fresh_score_is_that_of_draws_of_another_bank(first: Run, by_hand: Callable[..., Typicality]) -> None:
    patch = by_kind(first)["Cedarton", "top"][1]
    found = by_hand(first, patch["image_id"], patch["label"], 8, FRESH)
    means = patch_map(found.map[0].numpy(), 64, 64, 16)
    assert patch["fresh_typicality"] == pytest.approx(float(means[patch["y"], patch["x"]]), abs=1e-6)


def test_chosen_scores_flatter(first: Run) -> None:
    """The best of many noisy scores are too high, the worst too low; fresh draws say by how much."""
    for kind, sign in (("top", 1), ("bottom", -1)):
        again = [p for (_, k), group in by_kind(first).items() if k == kind for p in group[:2]]
        chosen, fresh = (np.mean([p[column] for p in again]) for column in ("typicality", "fresh_typicality"))
        assert sign * fresh < sign * chosen


# -------------------------------------------------------------------------------------------------------------- choice


def test_the_best_of_each_label_and_kind_whatever_was_cut_back_meanwhile() -> None:
    """Against a sort of all; many candidates are equally good."""
    random = np.random.default_rng(0)
    table = pa.table({
        "label": random.choice(["b", "a", "c"], 3000), "kind": random.choice(KINDS, 3000),
        "image_id": random.choice([f"{i}.png" for i in range(300)], 3000),
        **{name: random.integers(9, size=3000) for name in ("y", "x", "shard")},
        "order": random.integers(20, size=3000).astype(float),
    })  # fmt: skip
    table = pa.Table.from_pylist(table.to_pylist(), schema=_CANDIDATES)
    wanted = []
    for label, kind in itertools.product("abc", KINDS):
        own = [row for row in table.to_pylist() if (row["label"], row["kind"]) == (label, kind)]
        own.sort(key=lambda row: (-row["order"], row["image_id"], row["y"], row["x"]))
        wanted += [{**row, "rank": i} for i, row in enumerate(own[:30])]
    cut_back = pa.concat_tables([_best(table.slice(0, 2000), 30), table.slice(2000)])
    for found in (_best(table, 30), _best(cut_back, 30)):
        assert [{**row, "shard": 0} for row in found.to_pylist()] == [{**row, "shard": 0} for row in wanted]
    best = _best(table, 30)
    for shard, part in _by_shard(best).items():
        own = best.filter(pa.compute.equal(best["shard"], shard))
        assert part.to_pylist() == own.select(part.column_names).to_pylist()
    assert set(_by_shard(best)) == set(best["shard"].to_pylist())
    assert len(_best(table.slice(0, 0), 30)) == 0

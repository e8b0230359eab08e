"""A race on Ray: images leave after a few draws, the others have the scores of a run without a race."""

from collections.abc import Callable

import numpy as np
import pytest

from diffmine.diffusion.typicality import Typicality
from diffmine.mining.patches import KINDS
from diffmine.mining.racing import rounds
from diffmine.run import Run, part_name, rows_to_table, to_parquet
from diffmine.stages.patches import patches
from diffmine.stages.session import Context
from diffmine.stages.typicality import SCORES, typicality

pytestmark = pytest.mark.usefixtures("ray_session")
DRAWS, WANTED = 20, 2
NUMBERS = [4 * len(one.strata) for one in rounds(DRAWS // 4)]  # draws of each round: two mirrored pairs a stratum


@pytest.fixture(scope="module")
def raced(unscored: Callable[..., Context]) -> Context:
    """All images under one label, two patches wanted of it."""
    context = unscored(
        typicality__racing="true", typicality__draws=DRAWS, patches__per_label=WANTED, patches__fresh_per_label=0
    )
    rows = [{**row, "labels": ["Ashford"]} for row in context.run.table("manifest").to_pylist()]
    context.run.replace(part_name("manifest", 0), to_parquet(rows_to_table("manifest", rows), row_group_size=8))
    result = typicality(context)
    context.run.commit("typicality", result.marker, result.files)
    return context


def scored(run: Run) -> dict[str, int]:
    table = run.table("typicality", ["image_id", "draws"])
    return dict(zip(table["image_id"].to_pylist(), table["draws"].to_pylist(), strict=True))


def test_images_leave_round_after_round_and_what_was_spent_is_counted(raced: Context) -> None:
    draws, steps = scored(raced.run), np.cumsum(NUMBERS).tolist()
    assert sorted(draws) == raced.run.table("latents", ["image_id"])["image_id"].to_pylist()
    reached = [sum(n >= step for n in draws.values()) for step in steps]
    assert set(draws.values()) <= set(steps)
    assert reached[0] == len(draws) == 21
    assert reached == sorted(reached, reverse=True)
    assert 2 * WANTED <= reached[-1] < reached[0]
    spent = sum(draws.values()) / (len(draws) * DRAWS)
    assert (raced.run.committed("typicality") or {})["draws_spent"] == pytest.approx(spent, abs=1e-4)


def test_who_stays_has_the_scores_of_a_run_without_a_race(raced: Context, by_hand: Callable[..., Typicality]) -> None:
    rows = [row for row in raced.run.table("typicality").to_pylist() if row["draws"] == DRAWS]
    for row in rows[:2]:
        whole = by_hand(raced.run, row["image_id"], "Ashford", DRAWS, SCORES)
        assert np.allclose(row["map"], whole.map[0].ravel(), atol=1e-6)
        assert np.allclose(row["window_stderr"], whole.window_stderr[0].ravel(), rtol=1e-3)
        assert row["mean"] == pytest.approx(float(whole.mean), abs=1e-6)
        assert row["stderr"] == pytest.approx(float(whole.stderr), rel=1e-3)
        assert row["degrees_of_freedom"] == pytest.approx(float(whole.degrees_of_freedom), rel=1e-3)


def test_the_best_patches_come_from_the_last_round(raced: Context) -> None:
    run, draws = raced.run, scored(raced.run)
    patches(raced)
    chosen = run.table("patches").to_pylist()
    assert {draws[p["image_id"]] for p in chosen if p["kind"] == "top"} == {DRAWS}
    assert {kind: sum(p["kind"] == kind for p in chosen) for kind in KINDS} == {
        "top": WANTED, "random": WANTED, "bottom": 0
    }, "of images that left too little is known to call any patch the least typical"  # fmt: skip


def test_a_race_that_was_cut_off_goes_on(raced: Context) -> None:
    run = raced.run
    before = run.digests(["rounds", "typicality"])
    for name in ("typicality/_commit.json", part_name("typicality", 1), part_name("rounds/1", 0)):
        run.remove(name)
    result = typicality(raced)
    run.commit("typicality", result.marker, result.files)
    assert run.digests(["rounds", "typicality"]) == before


def test_a_race_that_does_not_pay_is_not_run(
    unscored: Callable[..., Context], capsys: pytest.CaptureFixture[str]
) -> None:
    context = unscored(typicality__racing="true", typicality__draws=DRAWS)
    typicality(context)
    assert "no race, as no label has many more images than patches.per_label" in capsys.readouterr().err
    assert set(scored(context.run).values()) == {DRAWS}
    assert not context.run.exists("rounds")

"""Death at every step of a commit, and two writers at once: a reader finds whole files or none."""

import io
import json
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from commits import FAILURES, KILLED, MARKER, PARTS, ROWS, Clean, Forks, Job, Reader, Tree, asides, look, tree

from diffmine.run import Run, rows_to_table
from diffmine.stages.shards import Part, commit_part

ROUNDS = 10
NAP_S = 0.0005  # before each step, so that the reader and the other writer come between


@pytest.fixture(scope="module")
def golden(clean: Clean) -> Tree:
    return clean[0]


@dataclass
class Deaths:
    """What was seen of a sequence that died at each of its steps in turn."""

    deaths: int
    found: list[str]  # wrong after a death
    bad: list[str]  # wrong at some time, by the reader
    reads: int


def die_everywhere(forks: Forks, folder: Path, golden: Tree, sequence: str) -> Deaths:
    """Die at the first step, at the second, ... until the sequence comes to its end; each time it is run again."""
    found = []
    with Reader(golden) as reader:
        for step in range(1000):
            place = folder / f"{step:03d}"
            reader.look_at(place)
            [died] = forks.run(Job(str(place), sequence, die_at=step, nap=NAP_S))
            assert died.status in (0, KILLED), f"step {step}: exit status {died.status}"
            found += [f"died at step {step}: {problem}" for problem in look(place, golden)[1]]
            assert Run(str(place)).files("") == sorted(tree(place))  # no reader of diffmine sees what was left aside
            reader.finish_pass()
            [again] = forks.run(Job(str(place), sequence))
            if (again.status, again.error) != (0, "") or tree(place) != golden:
                found.append(f"died at step {step}: other files when it ran again to the end")
            assert len(asides(place)) <= 1
            if died.status == 0:
                return Deaths(step, found, reader.bad, reader.reads)
    raise AssertionError("the sequence has no end")


def test_the_sequence_leaves_the_files_of_a_stage(clean: Clean) -> None:
    golden, steps = clean
    assert sorted(golden) == sorted([*PARTS, FAILURES, MARKER])
    assert [pq.read_metadata(io.BytesIO(golden[name])).num_rows for name in PARTS] == ROWS
    assert pq.read_table(io.BytesIO(golden[FAILURES]))["image_id"].to_pylist() == ["1-7", "1-8"]
    assert sorted(json.loads(golden[MARKER])["files"]) == sorted([*PARTS, FAILURES])
    assert {step.split()[0] for step in steps} == {"mkdir", "open", "write", "fsync", "link", "remove", "rename"}
    assert len([step for step in steps if step.startswith(f"write {PARTS[1]}.")]) > 2  # a part can be half written


def test_names_are_given_to_what_is_on_disk(clean: Clean) -> None:
    """No test here cuts the power: what must not be lost then is synced, the data before its name."""
    golden, steps = clean
    named = {step.split()[1]: n for n, step in enumerate(steps) if step.startswith(("link ", "rename "))}
    assert sorted(named) == sorted(golden)
    for name, n in named.items():
        assert steps[n - 1].startswith(f"fsync {name}.")
        assert steps[n + 1] == f"fsync {name.rpartition('/')[0]}"


def test_death_at_every_step(forks: Forks, clean: Clean, tmp_path: Path) -> None:
    golden, steps = clean
    seen = die_everywhere(forks, tmp_path, golden, "real")
    print(f"{seen.deaths} deaths, {seen.reads} reads, {len(seen.bad)} bad reads")
    assert seen.found == []
    assert seen.bad == []
    assert seen.deaths == len(steps)
    assert seen.reads > 100


@pytest.mark.parametrize(
    ("sequence", "problem"),
    [
        ("marker first", "which is not there"),
        ("plain", "bytes, not the"),
    ],
)
def test_a_wrong_sequence_is_found_out(forks: Forks, golden: Tree, tmp_path: Path, sequence: str, problem: str) -> None:
    seen = die_everywhere(forks, tmp_path, golden, sequence)
    print(f"{seen.deaths} deaths, {len(seen.found)} found, {seen.reads} reads, {len(seen.bad)} bad reads")
    assert any(problem in found for found in seen.found)
    assert any(problem in bad for bad in seen.bad)


def test_failures_that_nobody_writes_again_are_missed(forks: Forks, golden: Tree, tmp_path: Path) -> None:
    seen = die_everywhere(forks, tmp_path, golden, "failures once")
    assert any("other files when it ran again" in found for found in seen.found)


def test_two_writers_of_the_same_rows(forks: Forks, golden: Tree, tmp_path: Path) -> None:
    at_once = 0
    with Reader(golden) as reader:
        for turn in range(ROUNDS):
            place = tmp_path / str(turn)
            reader.look_at(place)
            first, second = forks.run(Job(str(place), nap=NAP_S), Job(str(place), nap=NAP_S))
            assert [(o.status, o.error) for o in (first, second)] == [(0, ""), (0, "")]
            assert tree(place) == golden
            assert asides(place) == []
            at_once += first.start < second.end and second.start < first.end
        reader.finish_pass()
    print(f"{at_once} of {ROUNDS} rounds at once, {reader.reads} reads, {len(reader.bad)} bad reads")
    assert at_once > ROUNDS // 2
    assert reader.bad == []
    assert reader.reads > 100


@pytest.fixture(scope="module")
def goldens(forks: Forks, golden: Tree, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tree, Tree]:
    """Trees of the two writers whose rows of shard 2 differ, each alone."""
    place = tmp_path_factory.mktemp("changed") / "run"
    [outcome] = forks.run(Job(str(place), changed=True))
    assert (outcome.status, outcome.error) == (0, "")
    changed = tree(place)
    assert {name for name in golden if golden[name] != changed[name]} == {PARTS[2], MARKER}
    return golden, changed


def rivals(forks: Forks, place: Path, goldens: tuple[Tree, Tree], sequence: str) -> list[str]:
    """What is wrong after two writers with other rows in one shard wrote at once."""
    outcomes = forks.run(*[Job(str(place), sequence, changed, nap=NAP_S) for changed in (False, True)])
    found = [outcome.error for outcome in outcomes if outcome.error]
    if outcomes[0].marked != outcomes[1].marked:
        found.append("the writers do not agree on what is there")
    if tree(place) not in goldens:
        found.append("the tree is that of neither writer")
    return found + [f"{name} was left" for name in asides(place)]


def test_of_two_writers_of_different_rows_the_first_counts(
    forks: Forks, goldens: tuple[Tree, Tree], tmp_path: Path
) -> None:
    """A shard that is scored twice, on devices that differ in the last bits."""
    for turn in range(ROUNDS):
        assert rivals(forks, tmp_path / str(turn), goldens, "real") == []


def test_writers_that_write_over_each_other_are_found_out(
    forks: Forks, goldens: tuple[Tree, Tree], tmp_path: Path
) -> None:
    assert "the writers do not agree on what is there" in rivals(forks, tmp_path, goldens, "plain")


def test_what_failed_for_the_first_to_finish_has_failed(tmp_path: Path) -> None:
    """Attempts that overlap, on devices or at times that differ: of each image there is one result or one failure."""
    failed = {"image_id": "b", "uri": "b.jpg", "reason": "non_finite", "detail": "on that device"}
    table = rows_to_table("latents", [{"image_id": name, "h": 1, "w": 1} for name in ("a", "b")])
    for number, (first, second) in enumerate([([failed], []), ([], [failed])]):
        run = Run(str(tmp_path / str(number)))
        parts = [Part(table.slice(0, 2 - len(failures)), failures) for failures in (first, second)]
        receipt, late = (commit_part(run, "latents", 0, part) for part in parts)
        assert late == receipt
        assert run.failures().to_pylist() == first
        assert run.table("latents")["image_id"].to_pylist() == ["a", "b"][: 2 - len(first)]
        assert sorted(receipt["files"]) == run.files("")

"""No space, a read-only folder, a limit on file sizes: an error that says so, no half file, a later run succeeds."""

import errno
import os
import re
from pathlib import Path

import pytest
from commits import FAILURES, MARKER, PARTS, Clean, Forks, Job, Outcome, asides, look, tree

POSITIONS = 10


def problems(place: Path, outcome: Outcome, golden: dict[str, bytes], reason: int) -> list[str]:
    """What is wrong after a fault, temporary files apart."""
    assert outcome.status == 0, f"exit status {outcome.status}"
    named = re.match(rf"{re.escape(str(place))}/(\S+): cannot be written \(.*{os.strerror(reason)}", outcome.error)
    found = look(place, golden)[1]
    if not named or named[1] not in golden:
        found.append(f"the error is '{outcome.error}'")
    return found


def then_succeeds(forks: Forks, place: Path, golden: dict[str, bytes]) -> None:
    """The same sequence, without the fault."""
    [again] = forks.run(Job(str(place)))
    assert (again.status, again.error) == (0, "")
    assert tree(place) == golden


def spread(steps: list[str]) -> list[int]:
    """Ten positions, from the first step to the last; removals do not need space, the rename has a test of its own."""
    can_fail = [n for n, step in enumerate(steps) if step.split()[0] not in ("remove", "rename")]
    return [can_fail[i * (len(can_fail) - 1) // (POSITIONS - 1)] for i in range(POSITIONS)]


@pytest.mark.parametrize("position", range(POSITIONS))
@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EROFS], ids=["full", "read-only"])
def test_a_fault_from_one_step_on(forks: Forks, clean: Clean, tmp_path: Path, reason: int, position: int) -> None:
    golden, steps = clean
    step = spread(steps)[position]
    [outcome] = forks.run(Job(str(tmp_path), fail_at=step, errno=reason))
    assert problems(tmp_path, outcome, golden, reason) == [], f"step {step}: {steps[step]}"
    assert asides(tmp_path) == []
    then_succeeds(forks, tmp_path, golden)


@pytest.mark.parametrize("position", range(POSITIONS))
def test_nothing_can_be_removed_either(forks: Forks, clean: Clean, tmp_path: Path, position: int) -> None:
    """A filesystem that became read-only: one temporary file stays."""
    golden, steps = clean
    step = spread(steps)[position]
    [outcome] = forks.run(Job(str(tmp_path), fail_at=step, errno=errno.EROFS, removal_fails=True))
    assert problems(tmp_path, outcome, golden, errno.EROFS) == [], f"step {step}: {steps[step]}"
    assert len(asides(tmp_path)) <= 1
    then_succeeds(forks, tmp_path, golden)


def test_a_marker_that_cannot_be_renamed(forks: Forks, clean: Clean, tmp_path: Path) -> None:
    golden, steps = clean
    *_, step = (n for n, step in enumerate(steps) if step.startswith(f"rename {MARKER}"))
    [outcome] = forks.run(Job(str(tmp_path), fail_at=step, errno=errno.EROFS))
    assert problems(tmp_path, outcome, golden, errno.EROFS) == []
    assert sorted(tree(tmp_path)) == sorted([*PARTS, FAILURES])
    assert asides(tmp_path) == []
    then_succeeds(forks, tmp_path, golden)


def test_a_limit_of_the_system(forks: Forks, clean: Clean, tmp_path: Path) -> None:
    """Not simulated: the kernel refuses to write more than the limit, in the middle of the largest part."""
    golden, _ = clean
    limit = len(golden[PARTS[1]]) - 100
    assert len(golden[PARTS[0]]) < limit
    [outcome] = forks.run(Job(str(tmp_path), largest_file=limit))
    assert problems(tmp_path, outcome, golden, errno.EFBIG) == []
    assert f"{tmp_path}/{PARTS[1]}:" in outcome.error
    assert [*tree(tmp_path)] == [PARTS[0]]
    assert asides(tmp_path) == []
    then_succeeds(forks, tmp_path, golden)


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EFBIG], ids=["full", "limit"])
def test_a_half_file_is_found_out(forks: Forks, clean: Clean, tmp_path: Path, reason: int) -> None:
    """Files written straight to their names."""
    golden, _ = clean
    [whole] = forks.run(Job(str(tmp_path / "whole"), "plain"))
    second_piece = 1 + whole.steps.index(f"write {PARTS[1]}")
    fault = {"fail_at": second_piece} if reason == errno.ENOSPC else {"largest_file": len(golden[PARTS[1]]) - 100}
    [outcome] = forks.run(Job(str(tmp_path / "half"), "plain", **fault))
    [found] = problems(tmp_path / "half", outcome, golden, reason)
    assert found.startswith(f"{PARTS[1]}: ")


@pytest.mark.parametrize("file", range(4))
def test_a_marker_without_its_data_is_found_out(forks: Forks, clean: Clean, tmp_path: Path, file: int) -> None:
    """The marker is written before the parts."""
    golden, _ = clean
    [whole] = forks.run(Job(str(tmp_path / "whole"), "marker first"))
    opened = [n for n, step in enumerate(whole.steps) if step.startswith("open ") and MARKER not in step]
    [outcome] = forks.run(Job(str(tmp_path / "run"), "marker first", fail_at=opened[file]))
    assert any("which is not there" in found for found in problems(tmp_path / "run", outcome, golden, errno.ENOSPC))

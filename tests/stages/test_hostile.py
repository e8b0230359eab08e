"""Labels and file names that look like paths, markup or devices, and a label without a readable image."""

import csv
import io
import re
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path

import pytest

from diffmine.run import Run

pytestmark = pytest.mark.usefixtures("ray_session")
LABELS = ["../../x", "<script>alert(1)</script>", "CON", "🏛️ apse", "\u202eمئذنة", "a/b\\c", "{{ 7 * 7 }}"]
NAMES = ["..%2e%2ex.png", "CON.png", "<b>.png", "x'y\".png", "🏛️.png", "مئذنة.png", "a b.png"]


@dataclass
class Mined:
    """A run, what it said, and what it left beside its folder."""

    run: Run
    said: str
    outside: set[str]


@pytest.fixture(scope="module")
def mined(images: Path, mine: Callable[..., tuple[int, Run]], tmp_path_factory: pytest.TempPathFactory) -> Mined:
    folder = tmp_path_factory.mktemp("hostile")
    scenes = [scene.read_bytes() for scene in sorted(images.rglob("0000.png"))]
    source = folder / "source"
    source.mkdir()
    with (source / "table.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["uri", "label"])
        for name, label, data in zip([*NAMES, "none.jpg"], [*LABELS, "bad"], [*scenes, b""], strict=True):
            (source / name).write_bytes(data)
            rows.writerow([name, label])
    before, said = set(folder.rglob("*")), io.StringIO()
    with redirect_stderr(said):
        code, run = mine(
            folder, output=folder / "a" / "b" / "run", dataset__source=source / "table.csv", dataset__layout="table",
            patches__fresh_per_label=0, report__enabled="true",
        )  # fmt: skip
    assert code == 0
    outside = {p for p in folder.rglob("*") if not p.is_relative_to(run.root)} - before
    return Mined(run, said.getvalue(), {p.relative_to(folder).as_posix() for p in outside})


def test_labels_and_names_are_only_text(mined: Mined) -> None:
    """They stay text, and nothing leaves the run folder."""
    assert sorted(set(mined.run.table("typicality")["label"].to_pylist())) == sorted(LABELS)
    assert mined.outside == {"a", "a/b", "empty.yaml"}
    names = [p.relative_to(mined.run.root).as_posix() for p in Path(mined.run.root).rglob("*")]
    assert all(re.fullmatch(r"[\w./-]+", name) for name in names)
    for page in Path(mined.run.root, "report").rglob("*.html"):
        text = page.read_text()
        assert "alert(1)</script>" not in text
        assert "49" not in re.findall(r"<bdi>(.*?)</bdi>", text)


def test_a_label_without_readable_image_is_named_and_left_out(mined: Mined) -> None:
    assert "label 'bad' has no readable image" in mined.said
    patches = mined.run.table("patches")
    assert set(patches["label"].to_pylist()) == set(LABELS)
    assert patches["fresh_typicality"].null_count == len(patches)  # none were asked for

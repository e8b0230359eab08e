"""Labels and file names that look like paths, markup or devices: they stay text, and nothing leaves the run folder."""

import csv
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from diffmine.run import Run

pytestmark = pytest.mark.usefixtures("ray_session")
LABELS = ["../../x", "<script>alert(1)</script>", "CON", "🏛️ apse", "\u202eمئذنة", "a/b\\c", "{{ 7 * 7 }}"]
NAMES = ["..%2e%2ex.png", "CON.png", "<b>.png", "x'y\".png", "🏛️.png", "مئذنة.png", "a b.png"]


def test_labels_and_names_are_only_text(images: Path, mine: Callable[..., tuple[int, Run]], tmp_path: Path) -> None:
    scenes = sorted(images.rglob("0000.png"))
    source = tmp_path / "source"
    source.mkdir()
    with (source / "table.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["uri", "label"])
        for name, label, scene in zip(NAMES, LABELS, scenes, strict=True):
            (source / name).write_bytes(scene.read_bytes())
            rows.writerow([name, label])
    before = set(tmp_path.rglob("*"))
    code, run = mine(
        tmp_path, output=tmp_path / "a" / "b" / "run", dataset__source=source / "table.csv", dataset__layout="table",
        report__enabled="true",
    )  # fmt: skip
    assert code == 0
    assert sorted(set(run.table("typicality")["label"].to_pylist())) == sorted(LABELS)
    outside = {p for p in tmp_path.rglob("*") if not p.is_relative_to(run.root)} - before
    assert {p.relative_to(tmp_path).as_posix() for p in outside} == {"a", "a/b", "empty.yaml"}
    names = [p.relative_to(run.root).as_posix() for p in Path(run.root).rglob("*")]
    assert all(re.fullmatch(r"[\w./-]+", name) for name in names)
    for page in Path(run.root, "report").rglob("*.html"):
        text = page.read_text()
        assert "alert(1)</script>" not in text
        assert "49" not in re.findall(r"<bdi>(.*?)</bdi>", text)

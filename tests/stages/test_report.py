"""The report of a small finished run: made side by side, made again, and a curator's words taken into it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from diffmine.audit import open_run, verify
from diffmine.cli import main
from diffmine.curate import clusters_of, page_labels
from diffmine.errors import InputError, StoreError
from diffmine.progress import Progress
from diffmine.report.finetuning import Finetuning
from diffmine.run import Run, part_name, rows_to_table, to_parquet
from diffmine.stages import report as stage
from diffmine.stages.session import Context


@pytest.fixture
def copy(first: Run, tmp_path: Path) -> Run:
    shutil.copytree(first.root, tmp_path / "run")
    return Run(str(tmp_path / "run"))


def files(run: Run) -> dict[str, bytes]:
    """All of the run but the marker of the report, which has times."""
    folder = Path(run.root)
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {name: data for name, data in found.items() if name != "report/_commit.json"}


def test_pages_are_the_same_made_by_tasks(copy: Run, ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {}
    for few in (0, 100):
        monkeypatch.setattr(stage, "_FEW", few)
        result = stage.report(Context(*open_run(copy.root), Progress()))
        made[few] = files(copy)
        assert set(result.files) == {name for name in made[few] if name.startswith("report/")}
    assert made[0] == made[100]


def test_a_disk_that_is_not_mounted_costs_no_report(copy: Run) -> None:
    rows = copy.table("manifest").to_pylist()
    moved = [row | {"uri": f"/not/mounted/{row['image_id']}"} for row in rows]
    copy.replace(part_name("manifest", 0), to_parquet(rows_to_table("manifest", moved)))
    before = files(copy)
    with pytest.raises(StoreError, match="/not/mounted is absent or empty on "):
        stage.report(Context(*open_run(copy.root), Progress()))
    assert files(copy) == before


def test_pages_have_the_maps_of_the_run(first: Run) -> None:
    page = json.loads(first.read("report/labels/0000.js").decode().partition("=")[2].partition("=")[2].rstrip(";\n"))
    assert all(page["patches"]["map"])
    assert any(page["maps"])


def test_another_run_stands_beside(copy: Run, first: Run) -> None:
    run, config = open_run(copy.root)
    config = config.model_copy(update={"report": config.report.model_copy(update={"beside": first.root})})
    made = stage.report(Context(run, config, Progress())).files
    for number, label in enumerate(page_labels(first)):
        assert f"report/beside/{number:04d}.js" in made, label
        assert f"report/beside/{number:04d}-000.webp" in made
    config = config.model_copy(
        update={"report": config.report.model_copy(update={"beside": str(Path(copy.root) / "x")})}
    )
    with pytest.raises(InputError, match="is no run with a report"):
        stage.report(Context(run, config, Progress()))


def test_losses_and_held_out_images_are_read(copy: Run) -> None:
    assert not stage._finetuning(copy).loss
    held_out = copy.table("manifest", ["image_id"])[:2]
    both = {"loss": 0.2, "null_loss": 0.3, "typicality": 0.1}
    checked = {"step": 0, **both, "exported": True, "labels": {"Ashford": {**both, "images": 2}}}
    failed = copy.table("failures/latents", ["image_id"])  # neither trained on nor mined
    assert len(failed)
    copy.write_part("held_out", 0, pa.concat_tables([held_out, failed]))
    steps = [{"step": i, "loss": 1 / (i + 1), "grad_norm": 1, "learning_rate": 1} for i in (0, 2, 4)]
    copy.replace("model/metrics.jsonl", "".join(json.dumps(line) + "\n" for line in steps).encode())
    copy.replace("model/validation.jsonl", json.dumps(checked).encode() + b"\n")
    marker = {"stage": "finetune", "steps": 6, "wall_s": 1.0}  # every second step is recorded, and it ended early
    copy.commit("model", marker, copy.digests(["model", "held_out"]))
    names = frozenset(held_out["image_id"].to_pylist())
    checked |= {**both, "labels": {"Ashford": {**both, "images": 2}}}
    assert stage._finetuning(copy) == Finetuning([1, 1 / 3, 1 / 5], 6, [checked], names, 19)
    stage.report(Context(*open_run(copy.root), Progress()))
    assert "2 images (9.5 %) were held out" in " ".join(copy.read("report/index.html").decode().split())


def words(run: Run, cluster: int, **more: Any) -> str:
    """A file as the pages export it, with words on a cluster of the first label."""
    label = sorted({row["label"] for row in run.table("clusters").to_pylist()})[0]
    clusters = clusters_of(run)
    one = {"label": label, "cluster": cluster, "name": "", "note": "", "star": False, "hide": False, **more}
    path = Path(run.root).parent / "curation.json"
    path.write_text(json.dumps({"clusters_of": clusters, "clusters": [one]}))
    return str(path)


def test_words_of_a_curator_come_into_the_report_and_stay(copy: Run) -> None:
    before = files(copy)
    assert main(["report", copy.root, "--curation", words(copy, 0, name="Lions </script>")]) == 0
    assert main(["report", copy.root, f"--curation={words(copy, 1, star=True)}"]) == 0
    after = files(copy)
    assert {name for name in after if after[name] != before.get(name)} == {"curation.json", "report/curation.js"}
    assert verify(copy) == []
    kept = json.loads(after["curation.json"])["clusters"]
    assert [(one["cluster"], one["name"], one["star"]) for one in kept] == [
        (0, "Lions </script>", False),
        (1, "", True),
    ]
    assert main(["report", copy.root]) == 0
    assert files(copy)["report/curation.js"] == after["report/curation.js"]
    assert verify(copy) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"clusters_of": "x"}, "made with another run"),
        ({"clusters": [{"label": "nowhere", "cluster": 0}]}, "clusters that the run does not have: nowhere: 0"),
        ({"clusters": [{"label": 3, "cluster": -1, "loud": 1}]}, "clusters.0.loud"),
        ({"more": 1}, "is not a curation"),
    ],
)
def test_words_that_do_not_fit_are_refused(
    copy: Run, change: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(words(copy, 0))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    before = files(copy)
    assert main(["report", copy.root, "--curation", str(path)]) == 2
    assert said in capsys.readouterr().err
    assert files(copy) == before


def test_a_run_without_clusters_has_no_report(copy: Run, capsys: pytest.CaptureFixture[str]) -> None:
    path = words(copy, 0)
    assert main(["report", copy.root, "--curation", f"{path}.none"]) == 2
    copy.remove("clusters/_commit.json")
    assert main(["report", copy.root]) == 2
    assert main(["report", copy.root, "--curation", path]) == 2
    assert "has no clusters yet" in capsys.readouterr().err


def test_passes_of_scoring_again_are_counted() -> None:
    """Of an image without a label, which its labels share, with each of them, and with the strongest others of its
    patches; not of patches left alone."""
    rows = [("axz", 0.1), ("axw", 0.2), ("ayz", 0.1), ("bxz", 0.1), ("cxw", None)]
    patches = rows_to_table(
        "patches", [{"image_id": i, "label": c, "rival": r, "fresh_typicality": t} for (i, c, r), t in rows]
    )
    assert stage._fresh_passes(patches, 10) == (2 + 3 + 3) * 10

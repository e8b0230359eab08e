"""Exports of a hand-made run, read back by the libraries that they are for."""

import datetime
import io
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fake_run import image, settings, tables
from PIL import Image
from pyarrow import csv

from diffmine.cli import main
from diffmine.config import Config
from diffmine.configfile import to_yaml
from diffmine.curate import KEPT, clusters_of
from diffmine.report.curation import Curation, Words
from diffmine.report.joined import flat, patches_with_images
from diffmine.run import Run, rows_to_table

LABELS = ["arch", "../../x", "<script>\"'\n🏛️</script>", "a|b"]
IMAGES = 4  # of a label
LINES = csv.ParseOptions(newlines_in_values=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Images that were prepared at their own size, with a year each; every patch in a cluster of its label."""
    folder = tmp_path_factory.mktemp("mined")
    found = tables(LABELS, images=IMAGES, base=str(folder / "images"))
    manifest = found["manifest"].to_pylist()
    for row in manifest:
        Path(row["uri"]).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image(row["image_id"])).save(row["uri"])
    found["manifest"] = found["manifest"].append_column("year", pa.array([1900 + i for i in range(len(manifest))]))
    patches = found["patches"].to_pylist()
    for row in patches:
        row |= {f"image_{name}": row[name] for name in ("x", "y", "width", "height")} | {"y": row["y"] % 60}
        row["image_y"] = row["y"]
    found["patches"] = rows_to_table("patches", patches)
    latents = [{"image_id": row["image_id"], "width": 128, "height": 96} for row in manifest]
    run = Run(str(folder / "run"))
    for name in ("manifest", "patches", "clusters", "members"):
        run.write_part(name, 0, found[name])
    run.write_part("latents", 0, rows_to_table("latents", latents))
    tree = settings()["config"]
    tree["dataset"]["image"]["short_side"] = 96
    run.replace("run.yaml", to_yaml(Config.model_validate(tree)).encode())
    run.commit("clusters", {"fingerprint": "x"}, run.digests(["clusters", "members"]))
    return run


def exported(run: Run, to: str, folder: Path, *flags: str) -> Path:
    assert main(["export", run.uri, "--to", to, *flags, str(folder / "out")]) == 0
    return folder / "out"


def top(run: Run) -> list[dict[str, Any]]:
    return [row for row in run.table("patches").to_pylist() if row["kind"] == "top"]


def test_names_that_a_curator_gave_are_exported(run: Run, tmp_path: Path) -> None:
    words = Curation(
        clusters_of=clusters_of(run),
        clusters=[Words(label="arch", cluster=1, name="gates"), Words(label="a|b", cluster=0)],
    )
    run.replace(KEPT, words.dump())
    rows = csv.read_csv(exported(run, "csv", tmp_path / "a") / "patches.csv", parse_options=LINES).to_pylist()
    boxes = json.loads((exported(run, "coco", tmp_path / "b") / "annotations.json").read_text())["annotations"]
    run.remove(KEPT)
    named = {row["patch_id"] for row in rows if row["cluster_name"]}
    assert named == {row["patch_id"] for row in rows if (row["label"], row["cluster"]) == ("arch", 1)} != set()
    assert {box["patch_id"] for box in boxes if box.get("cluster_name") == "gates"} == named


@pytest.mark.parametrize("joint", [False, True])
def test_patches_have_what_other_tables_say_of_them(joint: bool) -> None:
    """In whatever order these are; a column of the manifest does not take the place of one of the patches."""
    found = tables(LABELS, images=IMAGES, joint=joint)
    ranks = pa.array([100 + i for i in range(len(found["manifest"]))])
    found["manifest"] = found["manifest"].append_column("rank", ranks)
    rows = patches_with_images(found | {name: found[name][::-1] for name in ("manifest", "clusters", "members")})
    added = ["uri", "cluster", "cluster_rank", "distance", "manifest_rank"]
    assert rows.column_names == [*found["patches"].column_names, *added]
    images = {row["image_id"]: row for row in found["manifest"].to_pylist()}
    members = {row["patch_id"]: row for row in found["members"].to_pylist()}
    clusters = {(row["label"], row["cluster"]): row for row in found["clusters"].to_pylist()}
    for row, patch in zip(rows.to_pylist(), found["patches"].to_pylist(), strict=True):
        of_image, member = images[row["image_id"]], members.get(row["patch_id"], {})
        own = clusters.get((None if joint else row["label"], member.get("cluster")), {})
        known = of_image["uri"], member.get("cluster"), own.get("rank"), member.get("distance"), of_image["rank"]
        assert row == patch | dict(zip(added, known, strict=True))
    assert flat(pa.table({"place": [[1.5], None]}))["place"].to_pylist() == ["[1.5]", None]


def test_csv(run: Run, tmp_path: Path) -> None:
    folder = exported(run, "csv", tmp_path, "--kinds=top,bottom")
    rows = csv.read_csv(folder / "patches.csv", parse_options=LINES).to_pylist()
    assert sorted(row["patch_id"] for row in rows) == sorted(
        row["patch_id"] for row in run.table("patches").to_pylist() if row["kind"] != "random"
    )
    assert {row["label"] for row in rows} == set(LABELS)
    ranks = {(c["label"], c["cluster"]): c["rank"] for c in run.table("clusters").to_pylist()}
    assert all(row["cluster_rank"] == ranks.get((row["label"], row["cluster"])) for row in rows)
    assert all((row["cluster"] is None) == (row["kind"] == "bottom") for row in rows)
    years = {row["image_id"]: row["year"] for row in run.table("manifest").to_pylist()}
    assert all(row["year"] == years[row["image_id"]] for row in rows)
    images = csv.read_csv(folder / "images.csv", parse_options=LINES).to_pylist()
    assert len(images) == len(LABELS) * IMAGES
    assert len(csv.read_csv(folder / "clusters.csv", parse_options=LINES)) == len(ranks)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # pycocotools leaves its file open
def test_coco(run: Run, tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco").COCO(str(exported(run, "coco", tmp_path) / "annotations.json"))
    assert {c["name"] for c in coco.loadCats(coco.getCatIds())} == set(LABELS)
    patches = {row["patch_id"]: row for row in top(run)}
    found = coco.loadAnns(coco.getAnnIds())
    assert {one["patch_id"] for one in found} == set(patches)
    for one in found:
        patch, [picture] = patches[one["patch_id"]], coco.loadImgs(one["image_id"])
        assert one["bbox"] == [patch[f"image_{name}"] for name in ("x", "y", "width", "height")]
        assert picture["file_name"].endswith(patch["image_id"])
        assert Image.open(picture["file_name"]).size == (picture["width"], picture["height"])
        assert coco.loadCats(one["category_id"])[0]["name"] == patch["label"]
        assert one["score"] == pytest.approx(patch["typicality"])


def test_huggingface(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    folder = exported(run, "huggingface", tmp_path)
    found = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"), split="train")
    assert isinstance(found.features["image"], datasets.Image)
    patches = {row["patch_id"]: row for row in top(run)}
    assert sorted(found["patch_id"]) == sorted(patches)
    for row in found:
        patch = patches[row["patch_id"]]
        assert row["label"] == patch["label"]
        x, y, width, height = (patch[name] for name in ("x", "y", "width", "height"))
        want = image(patch["image_id"])[y : y + height, x : x + width].astype(float)
        assert np.abs(np.asarray(row["image"].convert("RGB"), float) - want).mean() < 12  # WebP halves colours
    assert f"{len(patches)} patches" in (folder / "README.md").read_text()


def test_huggingface_opens_columns_of_any_type(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    day, moment = datetime.date(2012, 3, 4), datetime.datetime(2012, 3, 4, 5, 6)
    given = {
        "day": (day, pa.date32()), "day64": (day, pa.date64()), "moment": (moment, pa.timestamp("s")),
        "hour": (datetime.time(5, 6), pa.time32("s")), "half": (1.5, pa.float16()), "nothing": (None, pa.null()),
        "breed": ("x", pa.dictionary(pa.int32(), pa.string())), "age": (7, pa.dictionary(pa.int8(), pa.int64())),
        "price": (Decimal("1.50"), pa.decimal128(5, 2)), "whole": (True, pa.bool_()),
    }  # fmt: skip
    manifest = run.table("manifest")
    for name, (value, kind) in given.items():
        manifest = manifest.append_column(name, pa.array([value] * len(manifest), kind))
    table = run.table
    monkeypatch.setattr(Run, "table", lambda self, name, *more: manifest if name == "manifest" else table(name, *more))
    folder = exported(run, "huggingface", tmp_path)
    found = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"), split="train")
    expected = {name: value for name, (value, _) in given.items() if name != "day64"}
    assert {name: found[0][name] for name in expected} == expected
    assert str(found[0]["day64"]).startswith("2012-03-04")


def test_an_image_that_is_gone_leaves_its_row(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(run.table("manifest")["uri"][0].as_py())
    data = path.read_bytes()
    path.unlink()
    try:
        folder = exported(run, "huggingface", tmp_path)
    finally:
        path.write_bytes(data)
    rows = pa.parquet.read_table(folder / "data").to_pylist()
    assert len(rows) == len(top(run))
    assert sum(row["image"] is None for row in rows) == 3
    assert "3 patches have no picture" in capsys.readouterr().err
    assert all(Image.open(io.BytesIO(row["image"]["bytes"])).size == (32, 32) for row in rows if row["image"])


def test_fiftyone(run: Run, tmp_path: Path) -> None:
    """As its documentation describes the format."""
    folder = exported(run, "fiftyone", tmp_path)
    labels, files = (json.loads((folder / name).read_text()) for name in ("labels.json", "data.json"))
    assert labels["classes"] == sorted(LABELS)
    assert set(labels["labels"]) == set(files)
    assert all(Path(path).exists() for path in files.values())
    boxes = [one for found in labels["labels"].values() for one in found]
    assert len(boxes) == len(top(run))
    for one in boxes:
        x, y, width, height = one["bounding_box"]
        assert 0 <= x < x + width <= 1
        assert 0 <= y < y + height <= 1
        assert one["attributes"]["cluster_rank"] >= 0


def test_fiftyone_reads_it(run: Run, tmp_path: Path) -> None:
    data = pytest.importorskip("fiftyone.utils.data", reason="no fiftyone, which brings a database")
    folder = exported(run, "fiftyone", tmp_path)
    importer = data.FiftyOneImageDetectionDatasetImporter(dataset_dir=str(folder), data_path="data.json")
    with importer:
        assert sum(len(found.detections) for _, _, found in importer) == len(top(run))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--to", "excel", "{new}"], "got 'excel'; allowed: coco, csv, fiftyone, huggingface"),
        (["--to", "csv", "--kinds", "best", "{new}"], "got best; allowed: top, bottom, random"),
        (["--to", "csv"], "a format and one destination are needed"),
        (["{new}"], "a format and one destination are needed"),
        (["--to", "csv", "{new}", "--more"], "a format and one destination are needed"),
        (["--to", "csv", "{full}"], "is not empty"),
    ],
)
def test_bad_arguments(
    run: Run, tmp_path: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    places = {"new": tmp_path / "new", "full": tmp_path / "full"}
    assert main(["export", run.uri, *(one.format(**places) for one in arguments)]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_run_that_is_not_mined_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(str(tmp_path / "run"))
    assert main(["export", run.uri, "--to", "csv", str(tmp_path / "new")]) == 2
    run.replace("run.yaml", to_yaml(Config.model_validate(settings()["config"])).encode())
    assert main(["export", run.uri, "--to", "csv", str(tmp_path / "new")]) == 2
    assert "has no clusters yet" in capsys.readouterr().err

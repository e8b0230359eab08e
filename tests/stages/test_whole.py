"""A small run through every stage: its tables, and what must not change them."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from diffmine.run import SCHEMAS, Run

pytestmark = pytest.mark.usefixtures("ray_session")

Mine = Callable[..., tuple[int, Run]]


def test_tables_have_the_columns_of_the_contract(first: Run) -> None:
    for name in (
        "manifest",
        "latents",
        "typicality",
        "patches",
        "clusters",
        "members",
        "localisation",
        "failures/latents",
    ):
        table = first.table(name)
        assert set(SCHEMAS[name.split("/")[0]].names) <= set(table.column_names), name
        assert len(table), name
    assert pa.types.is_fixed_size_list(first.table("features").schema.field("feature").type)


def test_every_image_is_a_result_or_a_failure_with_a_reason(first: Run) -> None:
    manifest, latents = first.table("manifest"), first.table("latents")
    failures = first.table("failures/latents").to_pylist()
    assert [(f["image_id"], f["reason"]) for f in failures] == [("Ashford/zz.png", "truncated")]
    assert sorted(latents["image_id"].to_pylist() + ["Ashford/zz.png"]) == manifest["image_id"].to_pylist()
    assert (first.committed("manifest") or {})["skipped_files"] == {".txt": 1}


def test_patches_are_ranked_disjoint_and_inside(first: Run) -> None:
    patches = first.table("patches").sort_by("patch_id").to_pandas()
    assert patches["patch_id"].is_unique
    for (_, kind), group in patches.groupby(["label", "kind"]):
        assert group["rank"].tolist() == list(range(len(group)))
        assert len(group) == 4
        if kind != "random":
            assert group["typicality"].is_monotonic_decreasing or group["typicality"].is_monotonic_increasing
        for _, own in group.groupby("image_id"):
            boxes = own[["x", "y"]].to_numpy()
            assert all(np.abs(a - b).max() >= 16 for i, a in enumerate(boxes) for b in boxes[:i])
    assert patches["x"].between(0, 64 - 16).all()
    assert np.allclose(patches["image_width"], 32)  # 128 px scenes prepared at 64


def test_patches_lie_in_the_part_of_their_images_shard(first: Run) -> None:
    assert first.parts("patches") == first.parts("latents") == [0, 1, 2]
    for shard in first.parts("patches"):
        own = first.read_part("patches", shard)
        assert set(own["image_id"].to_pylist()) <= set(first.read_part("latents", shard)["image_id"].to_pylist())
        top = own.filter(pa.compute.equal(own["kind"], "top"))
        assert first.read_part("features", shard)["patch_id"].equals(top["patch_id"])


def test_the_same_command_does_nothing_again(first: Run, mine: Mine, images: Path, tmp_path: Path) -> None:
    before = first.digests(
        ["latents", "typicality", "patches", "features", "clusters", "members", "localisation", "report"]
    )
    code, _ = mine(
        tmp_path, output=first.root, dataset__source=images, dataset__boxes=images / "boxes.csv", report__enabled="true"
    )
    assert code == 0
    assert (
        first.digests(["latents", "typicality", "patches", "features", "clusters", "members", "localisation", "report"])
        == before
    )


def test_another_config_is_refused(
    first: Run, mine: Mine, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = mine(
        tmp_path, output=first.root, dataset__source=images, dataset__boxes=images / "boxes.csv", clusters__k=3
    )
    assert code == 2
    assert "clusters.k: was 2, is 3" in capsys.readouterr().err


def test_tables_do_not_depend_on_workers_batches_or_order(first: Run, mine: Mine, images: Path, tmp_path: Path) -> None:
    """One worker, batches of one, and the source listed in another order by a table beside the images."""
    rows = [(p.relative_to(images).as_posix(), p.parent.name) for p in images.rglob("*.png")]
    np.random.default_rng(0).shuffle(rows)
    with (images / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("uri", "label"), *rows])
    code, other = mine(
        tmp_path, output=tmp_path / "run", dataset__source=images / "list.csv", dataset__layout="table",
        dataset__boxes=images / "boxes.csv", compute__workers=1, typicality__batch_size=1, features__batch_size=1,
    )  # fmt: skip
    assert code == 0
    for name in ("manifest", "latents"):
        assert other.table(name).equals(first.table(name)), name
    ours, theirs = first.table("typicality").to_pandas(), other.table("typicality").to_pandas()
    assert (ours["image_id"] == theirs["image_id"]).all()
    difference = np.stack(ours["map"]) - np.stack(theirs["map"])  # float32's, of losses near 1
    assert np.sqrt(np.mean(difference**2)) < 5e-7
    assert np.abs(difference).max() < 1e-5
    place = ["image_id", "label", "kind", "rank", "x", "y", "image_x", "image_y"]
    assert first.table("patches").select(place).equals(other.table("patches").select(place))
    a, b = (r.table("patches")["fresh_typicality"].to_numpy() for r in (first, other))
    assert np.allclose(a, b, atol=1e-6, equal_nan=True)
    a, b = (np.stack(r.table("features").sort_by("patch_id")["feature"].to_pylist()) for r in (first, other))
    assert np.abs(a - b).max() < 1e-5


def test_a_patch_larger_than_the_image_is_the_image(
    mine: Mine, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, run = mine(
        tmp_path, output=tmp_path / "run", dataset__source=images, dataset__image__short_side=70, patches__size=70,
        clusters__k=50,
    )  # fmt: skip
    assert code == 0
    patches = run.table("patches")
    assert set(patches["width"].to_pylist()) == set(patches["height"].to_pylist()) == {64}
    assert patches["fresh_typicality"].null_count == 7 * (1 + 1 + 3)  # of three images two are best and two are worst
    assert "images are smaller than patches.size 70" in capsys.readouterr().err
    assert len(run.table("clusters")) == 7 * 3  # k larger than the 3 patches of a label


def test_all_images_failing_is_exit_1(mine: Mine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images" / "bad").mkdir(parents=True)
    (tmp_path / "images" / "bad" / "a.jpg").write_bytes(b"no image at all")
    code, run = mine(tmp_path, output=tmp_path / "run", dataset__source=tmp_path / "images")
    assert code == 1
    assert "none of the images could be used (format: 1)" in capsys.readouterr().err
    assert run.committed("latents") is None

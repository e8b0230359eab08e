"""Status, verify and retry-failed, on a small finished run."""

import json
import os
import random
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

import diffmine
from diffmine.audit import open_run, status, verify
from diffmine.cli import main
from diffmine.curate import KEPT, clusters_of
from diffmine.curate import kept as kept_words
from diffmine.errors import InputError, StoreError
from diffmine.pipeline import STAGES, _say_what_was_found
from diffmine.progress import Progress
from diffmine.reopen import finish_reopening, reopen
from diffmine.report.curation import Curation
from diffmine.run import MARKER, Run, part_name, rows_to_table, to_parquet
from diffmine.stages.session import Context

FLIPS = 100  # files damaged, at least


@pytest.fixture
def copy(first: Run, tmp_path: Path) -> Run:
    shutil.copytree(first.root, tmp_path / "run")
    return Run(str(tmp_path / "run"))


def committed(run: Run) -> list[str]:
    markers = [run.committed(stage.folders[0]) for stage in STAGES]
    return sorted(name for marker in markers if marker for name in marker["files"])


def lines(run: Run, price: float | None = None) -> str:
    return "\n".join(status(*open_run(run.root), price))


def test_one_flipped_byte_in_any_committed_file_is_found(copy: Run) -> None:
    assert verify(copy) == []
    rng, flipped, seed = random.Random(0), 0, 0
    names = [name for name in committed(copy) if Path(copy.path(name)).stat().st_size]
    whole = {name: copy.read(name) for name in names}
    while flipped < FLIPS:
        for name in names:
            path, data = Path(copy.path(name)), bytearray(whole[name])
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
        found = verify(copy)
        assert len(found) == len(names), f"round {seed}"
        assert all(any(name in problem for problem in found) for name in names)
        flipped, seed = flipped + len(names), seed + 1


def test_a_damaged_part_is_not_read(copy: Run) -> None:
    path = Path(copy.path(part_name("typicality", 0)))
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"typicality/part-00000\.parquet: is damaged"):
        copy.read_part("typicality", 0)


def test_a_damaged_page_of_small_columns_is_not_read(copy: Run) -> None:
    """These are fetched without the rest of their file."""
    path = Path(copy.path(part_name("latents", 0)))
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"latents/part-00000\.parquet: .*checksum"):
        copy.read_part("latents", 0, ["image_id", "h"])


def test_lost_and_doubled_images_are_found(copy: Run) -> None:
    """Markers that agree with the files, and files that do not hold every image once."""
    marker = copy.committed("latents") or {}
    failed = copy.read("failures/latents/part-00000.parquet")
    lost, name = copy.read_part("latents", 1)["image_id"].to_pylist(), part_name("latents", 1)
    copy.remove(name)
    rows = marker["rows"] - len(lost)
    copy.commit("latents", {**marker, "rows": rows}, {k: v for k, v in marker["files"].items() if k != name})
    [problem, *_] = verify(copy)
    assert problem == f"latents: {len(lost)} images are neither a result nor a failure, such as {min(lost)}"
    copy.replace("failures/typicality/part-00000.parquet", failed)
    result = copy.table("typicality", ["image_id"])["image_id"].to_pylist()
    ours = copy.table("failures/latents").slice(0, 1).set_column(0, "image_id", [[result[0]]])
    copy.remove("failures/typicality/part-00000.parquet")
    copy.write_part("failures/typicality", 0, ours)
    assert f"typicality: 1 images are a result and a failure, such as {result[0]}" in verify(copy)


def test_status_of_a_run_that_was_cut_off(copy: Run) -> None:
    text = lines(copy, price=3.6)
    assert "not done" not in text
    [failed] = copy.failures().to_pylist()
    assert "\nfailures: truncated 1\n" in text
    assert f"\n  Ashford/zz.png: truncated in latents, {failed['detail']}\n  once they are mended: diffmine" in text
    assert "at 3.6 an hour" in text
    marker = copy.committed("typicality") or {}
    assert marker["newly_done"] == 21  # images
    copy.commit(
        "typicality", {**marker, "newly_done": 10, "wall_s": 4.0}, marker["files"]
    )  # the others were done before
    assert "21 maps in 4 s, 2.5 images/s" in lines(copy)
    assert "k-means" not in text
    assert "rows" not in text
    for name in (f"typicality/{MARKER}", part_name("typicality", 1), f"patches/{MARKER}"):
        copy.remove(name)
    for i, name in enumerate(copy.files("typicality")):  # 50 s between two of them: the pilot and two parts
        os.utime(copy.path(name), (0, 1e9 + 50 * i))
    for name in copy.files("patches"):
        os.utime(copy.path(name), (0, 1e9))
    before = sum(copy.committed(s.folders[0])["wall_s"] for s in STAGES if copy.committed(s.folders[0]))
    text = lines(copy, price=3600.0)
    run, config = open_run(copy.root)
    compute = config.compute.model_copy(update={"shard_images": 64})  # for new runs: this one's shards are there
    assert "\n".join(status(run, config.model_copy(update={"compute": compute}), 3600.0)) == text
    assert "typicality   not done  2 of 3 shards, about 0.08 images/s" in text
    assert "latents      done" in text
    assert f"cost {before + 100:.2f} at 3600 an hour" in text


def test_status_lists_the_first_failures_and_reads_no_more(copy: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a finished stage the marker tells the reasons; of another its parts are read."""
    row = {"image_id": "a\x1b[2J\n", "uri": "/a", "reason": "empty", "detail": "d" * 500}
    parts = (5, 9, 9000)
    for part, rows in zip(range(len(parts)), parts, strict=True):
        copy.remove(part_name("failures/latents", part))
        copy.write_part("failures/latents", part, rows_to_table("failures", [row] * rows))
    read: list[str] = []
    real = Run.read_part
    monkeypatch.setattr(Run, "read_part", lambda run, *args: read.append(f"{args[:2]}") or real(run, *args))
    marker = copy.committed("latents") or {}
    assert marker["reasons"] == {"truncated": 1}
    copy.commit("latents", {**marker, "reasons": {"empty": sum(parts)}}, marker["files"])
    found = lines(copy).splitlines()
    assert "failures: empty 9,014" in found
    listed = [line for line in found if line.startswith("  a?[2J?: empty in latents, ddd")]
    assert len(listed) == 10
    assert all(len(line) == 160 for line in listed)
    assert "  and 9,004 more; failures/*/*.parquet has all" in found
    assert read == ["('failures/latents', 0)", "('failures/latents', 1)"]
    copy.remove(f"latents/{MARKER}")
    assert "failures: empty 9,014" in lines(copy)


def test_the_end_of_a_run_says_how_its_failures_are_listed(copy: Run, capsys: pytest.CaptureFixture[str]) -> None:
    _say_what_was_found(Context(copy, open_run(copy.root)[1], Progress()))
    assert f"1 image could not be used: diffmine status {copy.root} says why\n" in capsys.readouterr().err


def test_commands_say_what_they_found(copy: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", copy.root]) == 0
    assert capsys.readouterr().out == f"{copy.root}: whole\n"
    marker = copy.read(f"clusters/{MARKER}")
    copy.remove(f"clusters/{MARKER}")
    assert main(["verify", copy.root]) == 0
    assert capsys.readouterr().out == f"{copy.root}: whole so far; not done: clusters\n"
    copy.put(f"clusters/{MARKER}", marker)
    copy.remove(part_name("clusters", 0))
    assert main(["verify", copy.root]) == 1
    assert capsys.readouterr().out == "clusters: clusters/part-00000.parquet is missing\n"
    assert main(["status", copy.root]) == 0
    assert main(["status", copy.root, "--price", "no"]) == 2
    assert main(["verify", f"{copy.root}/manifest"]) == 2
    with pytest.raises(InputError, match=r"looked for run\.yaml"):
        open_run(f"{copy.root}/absent")


def test_failed_images_are_tried_again(copy: Run, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A truncated image is mended: it alone is encoded, what looks at all images is made again, the rest is kept.

    A curator's words are not on the clusters that are made now.
    """
    copy.replace(KEPT, Curation(clusters_of=clusters_of(copy), clusters=[]).dump())
    assert kept_words(copy) is not None
    assert [f["image_id"] for f in copy.failures().to_pylist()] == ["Ashford/zz.png"]
    kept = {n: copy.digest(n) for n in committed(copy) if n.startswith(("latents/part-00001", "typicality/part-00001"))}
    image = images / "Ashford" / "zz.png"
    truncated = image.read_bytes()
    image.write_bytes((images / "Ashford" / "0000.png").read_bytes())
    try:
        assert main(["retry-failed", copy.root]) == 0
    finally:
        image.write_bytes(truncated)
    assert "report: curation.json is left out" in capsys.readouterr().err
    assert kept_words(copy) is None
    assert copy.failures().num_rows == 0
    assert "Ashford/zz.png" in copy.table("latents", ["image_id"])["image_id"].to_pylist()
    assert verify(copy) == []
    assert {n: copy.digest(n) for n in kept} == kept


def test_a_run_is_left_alone_where_no_failed_image_can_be_used_now(
    copy: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The truncated image is looked at, that without finite numbers is not, and no failure is no reason either."""
    before = {name: copy.times("")[name] for name in copy.files("")}
    assert main(["retry-failed", copy.root]) == 0
    out, err = capsys.readouterr()
    assert out == f"{copy.root}\n"
    assert "no image that failed can be read now" in err
    assert "0 of the images that could not be read can be read now" in err
    assert copy.times("") == before
    assert main(["retry-failed", copy.root, "--al"]) == 2
    monkeypatch.setattr("diffmine.stages.session.connected", None)  # nothing to look at: no Ray
    copy.remove("failures/latents")
    assert main(["retry-failed", copy.root]) == 0
    assert "no image failed; the run is unchanged" in capsys.readouterr().err


def test_a_reopening_takes_the_shards_that_it_is_told(copy: Run) -> None:
    failed = copy.read("failures/latents/part-00000.parquet")
    for stage, shard in (("latents", 2), ("typicality", 1)):
        copy.put(part_name(f"failures/{stage}", shard), failed)
    again = copy.path("run"), copy.path("all")
    for folder, unread, left in zip(again, ([0], None), ([1, 2], []), strict=True):
        shutil.copytree(copy.root, folder, ignore=shutil.ignore_patterns("run", "all"))
        reopen(Run(folder), unread)
        assert Run(folder).parts("typicality") == left
        assert Run(folder).parts("latents") == (left or [1])
        assert not any(Run(folder).exists(name) for name in ("patches", "clusters", "report"))


def test_a_run_of_another_version_is_not_reopened(copy: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffmine.pipeline.SCHEMA_VERSION", 0)
    before = copy.files("")
    assert main(["retry-failed", copy.root, "--all"]) == 2
    assert copy.files("") == before


def test_a_reopening_that_is_cut_off_is_finished(copy: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any step: no image is lost, as what was to be removed is removed before anything is made."""
    kept = copy.digests(["manifest", "latents/part-00001.parquet"])
    removed, real = [], Run.remove

    def remove(run: Run, name: str) -> None:
        if len(removed) == 12:
            raise KeyboardInterrupt
        removed.append(name)
        real(run, name)

    monkeypatch.setattr(Run, "remove", remove)
    with pytest.raises(KeyboardInterrupt):
        reopen(copy)
    monkeypatch.undo()
    firsts, others = json.loads(copy.read("_reopened.json"))
    wanted = [*firsts, *others]
    assert removed[: len(firsts)] == firsts
    assert len(removed) == 12
    assert removed[0].endswith(MARKER)
    finish_reopening(copy)
    assert not any(copy.exists(name) for name in wanted)
    assert not copy.exists("_reopened.json")
    assert copy.digests(["manifest", "latents/part-00001.parquet"]) == kept


def test_what_depends_on_all_images_is_made_again(copy: Run) -> None:
    """After a race every image's rows may be others; a training that is not done began with other images."""
    copy.put("rounds/0/part-00000.parquet", b"x")
    copy.remove(f"model/{MARKER}")
    for name in ("checkpoints/step-00000001/done.json", "held_out/part-00000.parquet"):
        copy.put(name, b"x")
    reopen(copy)
    assert copy.parts("typicality") == []
    assert copy.parts("latents") != []
    assert not any(copy.exists(folder) for folder in ("rounds", "checkpoints", "held_out"))


def test_a_run_in_a_notebook(first: Run) -> None:
    run = diffmine.open_run(first.root)
    assert run["patches"].num_rows == len(first.table("patches"))
    assert run.table("typicality", ["image_id"]).column_names == ["image_id"]
    assert run["failures"]["reason"].to_pylist() == ["truncated"]
    assert run.config["output"] == first.root
    assert repr(run).startswith(f"<diffmine run {first.root}: 22 images, ")
    shown = run._repr_html_()
    assert shown.count("<img ") == shown.count("data:image/webp;base64,") == shown.count("<tr>") - 1 > 0
    with pytest.raises(KeyError, match="tables are clusters, failures"):
        run["typicalities"]


def test_a_notebook_counts_labels_where_clusters_hold_several(copy: Run) -> None:
    clusters = copy.table("clusters")
    joint = clusters.set_column(0, "label", pa.nulls(len(clusters), pa.string()))
    copy.replace(part_name("clusters", 0), to_parquet(joint))
    assert repr(diffmine.open_run(copy.root)).endswith(": 22 images, 7 labels>")

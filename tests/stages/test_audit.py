"""Status, verify and retry-failed, on a small finished run."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest

import diffmine
from diffmine.audit import open_run, status, verify
from diffmine.cli import main
from diffmine.errors import InputError, StoreError
from diffmine.pipeline import STAGES
from diffmine.reopen import finish_reopening, reopen_failed
from diffmine.run import MARKER, Run, part_name

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
    assert "failures: truncated 1" in text
    assert "at 3.6 an hour" in text
    for name in (f"typicality/{MARKER}", part_name("typicality", 1), f"patches/{MARKER}"):
        copy.remove(name)
    for i, name in enumerate(copy.files("typicality")):  # 50 s between two of them: the pilot and two parts
        os.utime(copy.path(name), (0, 1e9 + 50 * i))
    for name in copy.files("patches"):
        os.utime(copy.path(name), (0, 1e9))
    before = sum(copy.committed(s.folders[0])["wall_s"] for s in STAGES if copy.committed(s.folders[0]))
    text = lines(copy, price=3600.0)
    assert "typicality not done  2 of 3 shards, about 0." in text
    assert "latents    done" in text
    assert f"cost {before + 100:.2f} at 3600 an hour" in text


def test_commands_say_what_they_found(copy: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", copy.root]) == 0
    assert capsys.readouterr().out == f"{copy.root}: whole\n"
    copy.remove(part_name("clusters", 0))
    assert main(["verify", copy.root]) == 1
    assert capsys.readouterr().out == "clusters: clusters/part-00000.parquet is missing\n"
    assert main(["status", copy.root]) == 0
    assert main(["status", copy.root, "--price", "no"]) == 2
    assert main(["verify", f"{copy.root}/manifest"]) == 2
    with pytest.raises(InputError, match=r"looked for run\.yaml"):
        open_run(f"{copy.root}/absent")


def test_failed_images_are_tried_again(copy: Run, images: Path) -> None:
    """A truncated image is mended: it alone is encoded, what looks at all images is made again, the rest is kept."""
    assert [f["image_id"] for f in copy.failures().to_pylist()] == ["Ashford/zz.png"]
    kept = {n: copy.digest(n) for n in committed(copy) if n.startswith(("latents/part-00001", "typicality/part-00001"))}
    image = images / "Ashford" / "zz.png"
    truncated = image.read_bytes()
    image.write_bytes((images / "Ashford" / "0000.png").read_bytes())
    try:
        assert main(["retry-failed", copy.root]) == 0
    finally:
        image.write_bytes(truncated)
    assert copy.failures().num_rows == 0
    assert "Ashford/zz.png" in copy.table("latents", ["image_id"])["image_id"].to_pylist()
    assert verify(copy) == []
    assert {n: copy.digest(n) for n in kept} == kept
    before = copy.digests(["latents", "typicality"])
    assert reopen_failed(copy) == 0  # nothing failed: nothing is removed
    assert copy.digests(["latents", "typicality"]) == before


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
        reopen_failed(copy)
    monkeypatch.undo()
    wanted = json.loads(copy.read("_reopened.json"))
    assert removed == wanted[:12]
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
    assert reopen_failed(copy) == 1
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

"""Manifests of folders and tables, local and in a store: what is found, what is merged, and what is refused how."""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffmine.config import Dataset
from diffmine.data import manifest as module
from diffmine.data.manifest import LAYOUTS, Manifest, scan
from diffmine.errors import InputError
from diffmine.run import SCHEMAS

CSV = "uri,label\na.png,red\nb.png,blue\n"


@pytest.fixture(autouse=True)
def _empty_store() -> Iterator[None]:
    yield
    store = fsspec.filesystem("memory")
    if store.exists("/store"):
        store.rm("/store", recursive=True)


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder, on the disk or in a store."""
    return str(tmp_path) if request.param == "local" else "memory://store"


def write(root: str, *names: str, **files: str | bytes) -> None:
    """Empty files `names`, and files with content: nothing here ever looks into an image."""
    for name, data in {**dict.fromkeys(names, b""), **files}.items():
        with fsspec.open(f"{root}/{name}", "wb", auto_mkdir=True) as file:
            file.write(data if isinstance(data, bytes) else data.encode())


def folder(root: str, **settings: Any) -> Manifest:
    return scan(Dataset(source=root, **settings))


def table(root: str, text: str | bytes = CSV, name: str = "images.csv", **settings: Any) -> Manifest:
    write(root, **{name: text})
    return scan(Dataset(source=f"{root}/{name}", layout="table", **settings))


def parquet(root: str, columns: dict[str, Any], **settings: Any) -> Manifest:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return table(root, sink.getvalue().to_pybytes(), "images.parquet", **settings)


def column(manifest: Manifest, name: str) -> list[Any]:
    return manifest.table[name].to_pylist()


def refused(call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------ folder


def test_folder(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "open", None)  # no image is opened
    write(root, "cat/2.png", "cat/1.JPG", "a/airfield/indoor/x.webp", "dog/1.JPG", "Ünï/ö ä.tiff")
    manifest = folder(root)
    ids = ["a/airfield/indoor/x.webp", "cat/1.JPG", "cat/2.png", "dog/1.JPG", "Ünï/ö ä.tiff"]
    assert column(manifest, "image_id") == ids
    assert column(manifest, "uri") == [f"{root}/{image_id}" for image_id in ids]
    assert column(manifest, "labels") == [["a/airfield/indoor"], ["cat"], ["cat"], ["dog"], ["Ünï"]]
    assert column(manifest, "boxes") == [None] * 5
    assert manifest.table.schema.equals(SCHEMAS["manifest"])
    assert manifest.skipped == {}
    assert manifest.notes == []
    for uri in column(manifest, "uri"):
        assert fsspec.open(uri, "rb").open().read() == b""


def test_folder_counts_what_it_leaves_out(root: str) -> None:
    write(root, "cat/1.png", "cat/notes.txt", "dog/README", "loose.png", "boxes.CSV", "dog/2.gif.part", "x.txt")
    write(root, ".git/y.png", "cat/.hidden.png", "cat/.thumbs/z.png")
    manifest = folder(root)
    assert column(manifest, "image_id") == ["cat/1.png"]
    assert manifest.skipped == {"(none)": 1, ".csv": 1, ".part": 1, ".txt": 2}
    assert list(manifest.skipped) == sorted(manifest.skipped)
    assert len(manifest.notes) == 1
    assert "1 image lies directly in" in manifest.notes[0]


def test_split_of_a_folder(root: str) -> None:
    write(root, "train/cat/1.png", "test/cat/1.png", "test/a/dog/2.png")
    manifest = folder(root, split="test")
    assert column(manifest, "image_id") == ["test/a/dog/2.png", "test/cat/1.png"]
    assert column(manifest, "labels") == [["a/dog"], ["cat"]]
    assert column(manifest, "uri") == [f"{root}/test/a/dog/2.png", f"{root}/test/cat/1.png"]
    message = refused(folder, root, split="val")
    assert "dataset.split" in message
    assert "test, train" in message


def test_folder_given_in_other_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(str(tmp_path), "data/cat/1.png")
    expected = folder(str(tmp_path / "data")).table
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in ("data", "./data/", "~/data", f"file://{tmp_path}/data", f"{tmp_path}/x/../data//"):
        assert folder(source).table.equals(expected), source


def test_linked_folders_are_followed_and_circles_are_not(tmp_path: Path) -> None:
    write(str(tmp_path), "data/cat/1.png", "elsewhere/2.png")
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "cat" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data" / "cat")
    (tmp_path / "data" / "cat" / "gone.png").symlink_to(tmp_path / "nowhere")  # will be a row of failures
    ids = column(folder(str(tmp_path / "data")), "image_id")
    assert ids == ["cat/1.png", "cat/gone.png", "dog/2.png", "dog/back/1.png", "dog/back/gone.png"]


def test_folder_that_is_not_there(root: str) -> None:
    message = refused(folder, f"{root}/nothing")
    assert f"{root}/nothing does not exist" in message
    assert "folder of images per label" in message


def test_file_as_a_folder(root: str) -> None:
    write(root, "images.csv")
    assert "set dataset.layout to table" in refused(folder, f"{root}/images.csv")


def test_folder_without_images(root: str) -> None:
    write(root, "cat/1.txt", "cat/2.txt", "loose.png")
    message = refused(folder, root)
    assert "looked for <label>/<name>" in message
    assert ".jpeg" in message
    assert "2 x .txt, 1 image directly in it" in message


def test_empty_folder(tmp_path: Path) -> None:
    assert "found no files" in refused(folder, str(tmp_path))


def test_name_that_is_not_utf_8(tmp_path: Path) -> None:
    os.mkdir(tmp_path / "cat")
    Path(os.fsdecode(os.fsencode(tmp_path / "cat") + b"/\xff.png")).touch()
    assert "not valid UTF-8" in refused(folder, str(tmp_path))


def test_unreadable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(str(tmp_path), "cat/1.png")

    def denied(_: str) -> None:
        raise PermissionError(13, "Permission denied", "cat")

    monkeypatch.setattr(os, "scandir", denied)
    assert "Permission denied" in refused(folder, str(tmp_path))


def test_a_folder_of_a_store_that_fails_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    write("memory://store", "cat/1.png", "dog/2.png")
    store, _ = module.filesystem("memory://store")
    listing = store.ls

    def failing(path: str, **options: Any) -> Any:
        if path.endswith("dog"):
            raise PermissionError("Access Denied")
        return listing(path, **options)

    monkeypatch.setattr(store, "ls", failing)
    assert "Access Denied" in refused(folder, "memory://store")


def test_listing_order_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{label}/{i}.png" for label in ("cat", "dog", "a/b") for i in range(20)] + ["cat/x.txt", "y.png"]
    write(str(tmp_path), *names)
    expected = folder(str(tmp_path), limit_per_label=7)
    walk = module._walk

    def shuffled(root: str) -> Iterator[tuple[str, list[str]]]:
        folders = list(walk(root))
        rng.shuffle(folders)
        for _, files in folders:
            rng.shuffle(files)
        yield from folders

    monkeypatch.setattr(module, "_walk", shuffled)
    for seed in range(5):
        rng = random.Random(seed)
        assert folder(str(tmp_path), limit_per_label=7) == expected


# ------------------------------------------------------------------------------------------------------------- table


def test_table(root: str) -> None:
    manifest = table(root, "uri,year,label\nimg/b.png,1920,blue\nimg/a.png,1930,red\n")
    assert column(manifest, "image_id") == ["img/a.png", "img/b.png"]
    assert column(manifest, "uri") == [f"{root}/img/a.png", f"{root}/img/b.png"]
    assert column(manifest, "labels") == [["red"], ["blue"]]
    assert column(manifest, "year") == [1930, 1920]
    assert manifest.table.column_names == ["image_id", "uri", "labels", "boxes", "year"]
    assert manifest.table.schema.field("year").type == pa.int64()
    assert pa.schema(list(manifest.table.schema)[:4]).equals(SCHEMAS["manifest"])
    assert (manifest.skipped, manifest.notes) == ({}, [])


def test_labels_of_a_csv_stay_text(root: str) -> None:
    assert column(table(root, "uri,label\na,1920\nb,NA\nc,null\nd,007\ne,True\n"), "labels") == [
        ["1920"], ["NA"], ["null"], ["007"], ["True"]
    ]  # fmt: skip


@pytest.mark.parametrize("mark", [";", "\t"])
def test_a_csv_of_a_spreadsheet(root: str, mark: str) -> None:
    """With a byte order mark, the columns' names as people write them, and what a comma does not end."""
    rows = ["URI", " Label", "Jahr"], ['"a.png"', "1920", "3"], ["b.png", "Bern, Stadt", "4"]
    text = "\ufeff" + "\r\n".join(mark.join(row) for row in rows)
    manifest = table(root, text)
    assert column(manifest, "labels") == [["1920"], ["Bern, Stadt"]]
    assert column(manifest, "Jahr") == [3, 4]
    boxes = ["Image", "LABEL", "x", "y", "w", "h"], ["a.png", "1920", "5", "5", "5", "5"]
    write(root, **{"boxes.csv": "\n".join(mark.join(row) for row in boxes)})
    [box] = column(table(root, text, boxes=f"{root}/boxes.csv"), "boxes")[0]
    assert box == {"label": "1920", "x": 5, "y": 5, "width": 5, "height": 5}


def test_several_labels_in_a_csv(root: str) -> None:
    manifest = table(root, 'uri,labels\na,red|blue|red\nb,"x, y"\nc,Zebra|ant|Ähre\n')
    assert column(manifest, "labels") == [["blue", "red"], ["x, y"], ["Zebra", "ant", "Ähre"]]
    manifest = table(root, "uri,labels\na,red | blue|\tred \nb,blue\n")
    assert column(manifest, "labels") == [["blue", "red"], ["blue"]]
    assert manifest.notes == []
    assert "labels holds an empty label in row 2" in refused(table, root, "uri,labels\na,red| \n")


def test_a_bar_in_a_column_label_is_noted(root: str) -> None:
    manifest = table(root, "uri,label\na,red|blue\nb,red\n")
    assert column(manifest, "labels") == [["red|blue"], ["red"]]  # `label` is one label
    assert manifest.notes == ["1 label contains \"|\", as 'red|blue': name the column labels to split them"]
    [note] = parquet(root, {"uri": ["a", "b", "c"], "label": ["x|y", "b|c", "b|c"]}).notes
    assert note == "2 labels contain \"|\", as 'b|c': name the column labels and make it lists of text to split them"
    assert parquet(root, {"uri": ["a"], "labels": [["x|y"]]}).notes == []


def test_quotes_newlines_and_byte_order_mark(root: str) -> None:
    manifest = table(root, b'\xef\xbb\xbfuri,label,text\n"a,b.png","new\nline","say ""hi"""\n')
    assert column(manifest, "image_id") == ["a,b.png"]
    assert column(manifest, "labels") == [["new\nline"]]
    assert column(manifest, "text") == ['say "hi"']


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("labels", [["red", "blue"], ["red"]]),
        ("labels", pa.array([["red", "blue"], ["red"]], pa.large_list(pa.large_string()))),
        ("labels", pa.array([["red", "blue"], ["red"]], pa.list_(pa.dictionary(pa.int32(), pa.string())))),
        ("labels", [[2, 1], [2]]),
        ("label", ["red", "blue"]),
        ("label", pa.array(["red", "blue"]).dictionary_encode()),
        ("label", [2, 1]),
    ],
)
def test_parquet(root: str, name: str, labels: Any) -> None:
    columns = {
        "uri": pa.array(["b.png", "a.png"], pa.large_string()),
        name: labels,
        "n": pa.array([1, None], pa.int8()),
        "artist": pa.array(["x", None], pa.large_string()),
        "medium": pa.array([None, "oil"], pa.string_view()),
        "kind": pa.array(["p", "q"], pa.large_string()).dictionary_encode(),
    }
    nested = pa.array([{"x": [1.5]}, None], pa.struct([("x", pa.list_(pa.float16()))]))
    manifest = parquet(root, {**columns, "nested": nested})
    values = pa.array(labels).to_pylist()
    expected = [sorted(str(v) for v in (value if name == "labels" else [value])) for value in reversed(values)]
    assert column(manifest, "labels") == expected
    assert column(manifest, "n") == [None, 1]
    assert manifest.table.schema.field("n").type == pa.int8()
    for text, found in {"artist": [None, "x"], "medium": ["oil", None], "kind": ["q", "p"]}.items():
        assert (manifest.table.schema.field(text).type, column(manifest, text)) == (pa.string(), found)
    assert manifest.table.schema.field("nested").type == nested.type
    assert column(manifest, "nested") == [None, {"x": [1.5]}]
    assert manifest.table.schema.metadata is None


def test_uris_of_every_kind(tmp_path: Path) -> None:
    text = (
        "uri,label\n./a.png,r\nsub/../b.png,r\n/abs/c.png,r\nfile:///abs//d.png,r\n"
        f"memory://x/e.png,r\n{tmp_path}/f.png,r\n../g.png,r\n"
    )
    manifest = table(str(tmp_path), text)
    assert dict(zip(column(manifest, "image_id"), column(manifest, "uri"), strict=True)) == {
        "/abs/c.png": "/abs/c.png",
        "/abs/d.png": "/abs/d.png",
        "a.png": f"{tmp_path}/a.png",
        "b.png": f"{tmp_path}/b.png",
        "f.png": f"{tmp_path}/f.png",
        f"{tmp_path.parent}/g.png": f"{tmp_path.parent}/g.png",
        "memory://x/e.png": "memory://x/e.png",
    }


def test_uris_beside_a_table_in_a_store() -> None:
    write(
        "memory://store",
        **{"meta/t.csv": "uri,label\n./a.png,r\n../img/b.png,r\nc//d.png,r\nmemory://store/meta/e.png,r\n"},
    )
    manifest = scan(Dataset(source="memory://store/meta/t.csv", layout="table"))
    ids = ["a.png", "c//d.png", "e.png", "memory://store/img/b.png"]  # a store may have keys with //
    assert column(manifest, "image_id") == ids
    assert column(manifest, "uri") == [i if "://" in i else f"memory://store/meta/{i}" for i in ids]
    write("memory://store", **{"meta/t.csv": "uri,label\n../../other/b.png,r\n"})
    assert "leads out of" in refused(scan, Dataset(source="memory://store/meta/t.csv", layout="table"))


def test_rows_of_one_image_are_merged(root: str) -> None:
    text = "uri,label,year,who\nb.png,x,1,p\na.png,red,2,q\n./a.png,blue,2,\na.png,red,3,q\nc.png,x,,\nc.png,y,,\n"
    manifest = table(root, text)
    assert column(manifest, "image_id") == ["a.png", "b.png", "c.png"]
    assert column(manifest, "labels") == [["blue", "red"], ["x"], ["x", "y"]]
    assert column(manifest, "year") == [2, 1, None]
    assert column(manifest, "who") == ["q", "p", ""]
    assert manifest.notes == [
        "3 rows name an image that an earlier row names; their labels are merged",
        "these columns differ between rows of one image, and keep the first row's value: "
        "year (1 images), who (1 images)",
    ]


def test_merging_compares_nested_columns(root: str) -> None:
    columns = {"uri": ["a", "a", "b", "b"], "label": ["x", "y", "x", "y"], "n": [float("nan")] * 4}
    nested = [[{"k": 1}], [{"k": 1}], [{"k": 1}], None]
    notes = parquet(root, {**columns, "nested": nested}).notes
    assert notes[1].endswith("nested (1 images)")
    assert len(parquet(root, {**columns, "nested": [nested[0]] * 4}).notes) == 1


@pytest.mark.parametrize(
    "values",
    [
        pa.array([None, True, None, False]),
        pa.array([None, 1, None, 2], pa.timestamp("ms")),
        pa.array([None, b"1", None, b"2"]),
        pa.array([None, 1, None, 2], pa.decimal128(5)),
    ],
)
def test_merging_compares_columns_of_any_type(root: str, values: pa.Array) -> None:
    columns = {"uri": ["a", "b", "a", "b"], "label": ["x", "x", "y", "y"], "nothing": pa.nulls(4), "values": values}
    manifest = parquet(root, columns)
    assert manifest.notes[1].endswith("first row's value: values (1 images)")
    assert manifest.table.schema.field("values").type == values.type
    assert column(manifest, "values") == values[:2].to_pylist()


def test_order_of_rows_does_not_matter(root: str) -> None:
    rng = random.Random(0)
    rows = [f"{rng.randrange(60)}.png,{rng.choice('abc')},c" for _ in range(100)]
    boxes = [f"{i}.png,{rng.choice('abc')},{rng.random()},2,{rng.choice((3, 4))},4" for i in range(60) for _ in "xx"]
    seen: list[Manifest] = []
    for _ in range(5):
        rng.shuffle(rows)
        rng.shuffle(boxes)
        write(root, **{"boxes.csv": "\n".join(["image,label,x,y,w,h", *boxes])})
        text = "\n".join(["uri,label,same", *rows])
        seen.append(table(root, text, boxes=f"{root}/boxes.csv", limit_per_label=9))
    assert all(other == seen[0] for other in seen)


def test_split_of_a_table(root: str) -> None:
    text = "uri,label,split\na,x,train\nb,,01\nc,x,01\nd,y,train\n"
    manifest = table(root, text, split="train")
    assert column(manifest, "image_id") == ["a", "d"]
    assert column(manifest, "split") == ["train", "train"]
    assert "label is empty" not in refused(table, root, text, split="val")
    assert "there are: 01, train" in refused(table, root, text, split="val")
    assert "row 3" in refused(table, root, text, split="01")  # rows are numbered as in the file
    assert "no column split" in refused(table, root, CSV, split="train")


# ------------------------------------------------------------------------------------------------------ bad tables


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("path,label\na,b\n", ["no column uri", "path, label"]),
        ("uri,class\na,b\n", ["no column label or labels", "uri, class"]),
        ("path;label\na;b\n", ["no column uri", "path, label"]),
        ("uri,Label,label \na,b,c\n", ["column label comes twice", "uri, Label, label "]),
        ("uri,label,labels\na,b,c\n", ["both label and labels"]),
        ("uri,label,uri\na,b,c\n", ["column uri comes twice"]),
        ("uri,label,image_id\na,b,c\n", ["its own column image_id"]),
        ("uri,label\na,x\nb,\nc,\n", ["empty label in row 3 and 1 more: mend these rows, or leave them out"]),
        ("uri,labels\na,x\nb,x||y\n", ["labels holds an empty label in row 3"]),
        ("uri,labels\na,x\nb,\n", ["labels holds an empty label in row 3"]),
        ("uri,label\na,x\n,y\n", ["the uri is empty in row 3: mend the row, or leave it out"]),
        ("uri,label\na,b\nc\n", ["cannot be read", "Row #3", "got 1"]),
        ("uri,label\n", ["has no rows"]),
        ("", ["cannot be read", "Empty CSV"]),
        (b"uri,label\na,\xff\n", ["cannot be read", "UTF8", "Row #2"]),
        (b"uri,label,who\na,b,\xe9\n", ["not valid UTF-8 in column who"]),
        (b"uri,label,\xe9\na,b,c\n", ["cannot be read", "utf-8"]),
        ("uri,label\n".encode("utf-16"), ["cannot be read", "UTF-8"]),
        ("uri,label\na,x\nhttp://example.org/b.png,y\n", ["http://example.org/b.png", "download the images first"]),
        ("uri,label\nHTTPS://example.org/b.png,y\n", ["download the images first"]),
        ("uri,label\nftp://example.org/b.png,y\n", ["download the images first"]),
        ("uri,label\nnope://b/c.png,y\n", ["nope://b/c.png", "Protocol not known: nope", "s3://"]),
        ("uri,label\nsimplecache::s3://b/c.png,y\n", ["'::'"]),
    ],
)
def test_bad_csv(root: str, text: str | bytes, expected: list[str]) -> None:
    message = refused(table, root, text)
    for part in expected:
        assert part in message


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"uri": ["a"], "label": [1.5]}, "column label must be text; got double"),
        ({"uri": ["a"], "label": [["x"]]}, "column label must be text; got list"),
        ({"uri": ["a"], "labels": ["x|y"]}, "column labels must be a list of text; got string"),
        ({"uri": ["a"], "labels": [[1.5]]}, "column labels must be a list of text; got list"),
        ({"uri": [b"a"], "label": ["x"]}, "column uri must be text; got binary"),
        ({"uri": ["a", None], "label": ["x", "y"]}, "the uri is empty in row 2"),
        ({"uri": ["a", "b"], "label": ["x", None]}, "label holds an empty label in row 2"),
        ({"uri": ["a", "b"], "labels": [["x"], None]}, "labels is empty in row 2"),
        ({"uri": ["a", "b"], "labels": [["x"], []]}, "labels is empty in row 2"),
        ({"uri": ["a", "b"], "labels": [["x"], ["y", None]]}, "labels holds an empty label in row 2"),
        ({"uri": ["a"], "label": ["x"], "boxes": [1]}, "its own column boxes"),
    ],
)
def test_bad_parquet(root: str, columns: dict[str, Any], expected: str) -> None:
    assert expected in refused(parquet, root, columns)


def test_table_that_is_not_there(root: str) -> None:
    for name in ("nothing.csv", "nothing.parquet"):
        message = refused(scan, Dataset(source=f"{root}/{name}", layout="table"))
        assert f"{root}/{name} does not exist" in message
        assert "looked for a" in message
    assert "ends in .csv or .parquet" in refused(scan, Dataset(source=root, layout="table"))
    assert "cannot be read" in refused(table, root, b"PAR1 not really", "images.parquet")


def test_web_addresses_as_a_source() -> None:
    for layout in ("folder", "table"):
        assert "download the images first" in refused(scan, Dataset(source="https://example.org/a.csv", layout=layout))


def test_a_store_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str, **__: Any) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    assert "extras s3 and gcs" in refused(scan, Dataset(source="s3://bucket/x", layout="folder"))


def test_unknown_layout() -> None:
    message = refused(scan, Dataset(source="x", layout="toytown"))
    assert ", ".join(LAYOUTS) in message


@pytest.mark.parametrize("other", ["Cafe\u0301", "Caf\u00e9 ", " Caf\u00e9"])
def test_labels_that_look_the_same(root: str, other: str) -> None:
    message = refused(table, root, f'uri,label\na,"Caf\u00e9"\nb,"{other}"\n')
    assert "'Caf\\xe9'" in message
    assert ascii(other) in message
    assert len(table(root, f'uri,label\na,"{other}"\n').table) == 1  # alone it is kept as it is
    assert column(table(root, f'uri,label\na,"{other}"\n'), "labels") == [[other]]


def test_two_images_of_one_name() -> None:
    text = "uri,label\nmemory://store/memory://q/a.png,x\nmemory://q/a.png,x\n"
    assert "two images have the image_id memory://q/a.png" in refused(table, "memory://store", text)


# ------------------------------------------------------------------------------------------------------------- boxes


def with_boxes(root: str, text: str, **settings: Any) -> Manifest:
    write(root, "cat/1.png", "cat/2.png", "dog/1.png", **{"boxes.csv": text})
    return folder(root, boxes=f"{root}/boxes.csv", **settings)


def test_boxes(root: str) -> None:
    manifest = with_boxes(
        root,
        f"label,image,x,y,w,h,comment\ndog,dog/1.png,1,2,3.5,4,far\ncat,cat/1.png,10,0,5,5,\n"
        f"cat,{root}/cat/1.png,2,0,5,1e1,\ncat,./dog/1.png,-1,0,2,2,\n",
    )
    assert manifest.table.schema.equals(SCHEMAS["manifest"])

    def box(label: str, x: float, y: float, width: float, height: float) -> dict[str, Any]:
        return {"label": label, "x": x, "y": y, "width": width, "height": height}

    assert column(manifest, "boxes") == [
        [box("cat", 2, 0, 5, 10), box("cat", 10, 0, 5, 5)],
        None,
        [box("cat", -1, 0, 2, 2), box("dog", 1, 2, 3.5, 4)],
    ]
    assert manifest.skipped == {}  # the boxes' own file is no stray file
    assert manifest.notes == []


def test_boxes_of_a_table(root: str) -> None:
    write(root, **{"boxes.csv": "image,label,x,y,w,h\nb.png,blue,1,2,3,4\n"})
    boxes = column(table(root, boxes=f"{root}/boxes.csv"), "boxes")
    assert boxes == [None, [{"label": "blue", "x": 1, "y": 2, "width": 3, "height": 4}]]


def test_boxes_of_unknown_images_and_labels_are_noted(root: str) -> None:
    text = "image,label,x,y,w,h\ncat/1.png,door,1,2,3,4\ncat/9.png,cat,1,2,3,4\ncat/9.png,cat,5,2,3,4\n"
    manifest = with_boxes(root, text)
    assert len(manifest.notes) == 2
    assert "2 rows of 1 images that are not in the dataset" in manifest.notes[0]
    assert "labels that no image has count for nothing: door" in manifest.notes[1]
    assert [len(boxes or []) for boxes in column(manifest, "boxes")] == [1, 0, 0]


def test_an_image_without_a_box_is_not_one_that_nobody_looked_at(root: str) -> None:
    rows = ["cat/2.png,,,,,", "cat/2.png,cat, ,,,", "dog/1.png,dog,1,2,3,4", "dog/1.png,dog,,,,"]
    manifest = with_boxes(root, "\n".join(["image,label,x,y,w,h", *rows, ""]))
    box = {"label": "dog", "x": 1, "y": 2, "width": 3, "height": 4}
    assert column(manifest, "boxes") == [None, [], [box]]
    assert manifest.notes == []
    assert column(with_boxes(root, "image,label,x,y,w,h\ncat/2.png,,,,,\n"), "boxes") == [None, [], None]
    message = refused(with_boxes, root, "image,label,x,y,w,h\ncat/2.png,,,,,\ncat/1.png,cat,1,2,3,\n")
    assert "h is '' in row 3" in message


def test_boxes_of_images_beyond_the_limit_are_no_mistake(root: str) -> None:
    text = "image,label,x,y,w,h\n" + "".join(f"cat/{i}.png,cat,1,2,3,4\n" for i in (1, 2))
    manifest = with_boxes(root, text, limit_per_label=1)
    assert not any("not in the dataset" in note for note in manifest.notes)
    assert [len(boxes or []) for boxes in column(manifest, "boxes")] == [1, 0]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("1.png,cat,1,2,3,4\n", ["none of its 1 rows", "1.png", "cat/1.png"]),
        ("", ["none of its 0 rows"]),
        ("cat/1.png,cat,1,2,3,4\ncat/1.png,cat,1,two,3,4\n", ["y is 'two' in row 3"]),
        ("cat/1.png,cat,1,2,3,\n", ["h is '' in row 2"]),
        ("cat/1.png,cat,nan,2,3,4\n", ["x is 'nan' in row 2"]),
        ("cat/1.png,cat,1,2,inf,4\n", ["w is 'inf' in row 2"]),
        ("cat/1.png,cat,1,2,0,4\n", ["not above zero in row 2"]),
        ("cat/1.png,cat,1,2,3,-4\n", ["not above zero in row 2"]),
        ("cat/1.png,,1,2,3,4\n", ["the label is empty in row 2"]),
        (",cat,1,2,3,4\n", ["the image is empty in row 2"]),
        ("cat/1.png,cat,1,2,3\n", ["cannot be read", "Row #2"]),
    ],
)
def test_bad_boxes(root: str, rows: str, expected: list[str]) -> None:
    message = refused(with_boxes, root, f"image,label,x,y,w,h\n{rows}")
    for part in expected:
        assert part in message


def test_bad_boxes_files(root: str) -> None:
    message = refused(with_boxes, root, "image,label,x,y,width,height\ncat/1.png,cat,1,2,3,4\n")
    assert "no column w, h" in message
    assert "width, height" in message
    message = refused(folder, root, boxes=f"{root}/nothing.csv")
    assert "nothing.csv does not exist" in message
    assert "dataset.boxes" in message


# ------------------------------------------------------------------------------------------------------------- limit


def many(root: str, count: int = 40) -> str:
    return "uri,labels\n" + "".join(f"{i}.png,{'red' if i % 2 else 'blue'}\n" for i in range(count))


def test_limit_per_label(root: str) -> None:
    manifest = table(root, many(root), limit_per_label=5)
    ids = column(manifest, "image_id")
    assert ids == sorted(ids)
    labels = [label for labels in column(manifest, "labels") for label in labels]
    assert {label: labels.count(label) for label in labels} == {"red": 5, "blue": 5}
    assert manifest.notes == ["limit_per_label 5: 10 of 40 images are used, 5 of a label"]
    everything = {f"{i}.png" for i in range(40)}
    whole = table(root, many(root), limit_per_label=40)
    assert set(column(whole, "image_id")) == everything
    assert whole.notes == [], "nothing is missing"


def test_limit_is_the_smallest_hashes_of_each_label(root: str) -> None:
    """An independent implementation, one label at a time."""
    expected = []
    for label, start in (("blue", 0), ("red", 1)):

        def drawn(image_id: str, label: str = label) -> int:
            return int.from_bytes(hashlib.sha256(f"3\0{label}\0{image_id}".encode()).digest()[:8], "little")

        expected += sorted((f"{i}.png" for i in range(start, 40, 2)), key=drawn)[:6]
    write(root, **{"images.csv": many(root)})
    manifest = scan(Dataset(source=f"{root}/images.csv", layout="table", limit_per_label=6), seed=3)
    assert column(manifest, "image_id") == sorted(expected)


def test_limit_depends_on_the_seed_and_not_on_other_labels(root: str) -> None:
    write(root, **{"images.csv": many(root)})
    dataset = Dataset(source=f"{root}/images.csv", layout="table", limit_per_label=5)
    picks = [tuple(column(scan(dataset, seed=seed), "image_id")) for seed in (0, 0, 1, 2)]
    assert picks[0] == picks[1]
    assert len(set(picks)) == 3
    red_only = "".join(line for line in many(root).splitlines(keepends=True) if "blue" not in line)
    red = [i for i in picks[0] if int(i.split(".")[0]) % 2]
    assert column(table(root, red_only, limit_per_label=5), "image_id") == red


def test_an_image_that_one_label_keeps_stays_with_all_its_labels(root: str) -> None:
    text = "uri,labels\n" + "".join(f"{i}.png,common|own {i}\n" for i in range(6))
    manifest = table(root, text, limit_per_label=1)
    assert len(manifest.table) == 6
    assert column(manifest, "labels")[2] == ["common", "own 2"]
    assert manifest.notes == [], "all are used"


def test_a_label_may_have_more_images_than_the_limit(root: str) -> None:
    """`common` is on all images, of which the other two labels draw two each, and it two more at the most."""
    text = "uri,labels\n" + "".join(f"{i}.png,common|{'red' if i % 2 else 'blue'}\n" for i in range(40))
    [note] = table(root, text, limit_per_label=2).notes
    found = re.fullmatch(r"limit_per_label 2: (\d) of 40 images are used, [23] to \1 of a label", note)
    assert found
    assert 4 <= int(found[1]) <= 6


# -------------------------------------------------------------------------------------------------- a million images

MEASURE = """
import json, re, sys, time
from diffmine.config import Dataset
from diffmine.data.manifest import scan
def peak():  # ru_maxrss would begin at the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024  # MiB
before, started = peak(), time.perf_counter()
manifest = scan(Dataset(source=sys.argv[1], layout=sys.argv[2], limit_per_label=int(sys.argv[3]) or None))
seconds = time.perf_counter() - started
grown, table_mib = peak() - before, manifest.table.nbytes / 2**20
print(json.dumps({"rows": len(manifest.table), "seconds": seconds, "grown_mib": grown, "table_mib": table_mib}))
"""


def measure(source: Path, layout: str, limit: int = 0) -> dict[str, float]:
    """In a process of its own: rows, seconds, growth of its peak memory."""
    command = [sys.executable, "-c", MEASURE, str(source), layout, str(limit)]
    figures = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print(source.name, layout, limit, figures)
    return figures


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
@pytest.mark.parametrize("extension", ["csv", "parquet"])
@pytest.mark.parametrize("limit", [0, 500])
def test_a_million_rows(tmp_path: Path, extension: str, limit: int) -> None:
    rng = np.random.default_rng(0)
    number, label = rng.permutation(1_000_000), rng.integers(0, 365, 1_000_000)
    columns = {
        "uri": [f"images/{i // 1000:04d}/Places365_val_{i:08d}.jpg" for i in number],
        "label": [f"a/scene with a name/{i}" for i in label],
        "width": rng.integers(200, 4000, 1_000_000),
        "note": [f"photographer {i}" for i in number % 5000],
    }
    source = tmp_path / f"images.{extension}"
    (pa.csv.write_csv if extension == "csv" else pq.write_table)(pa.table(columns), source)
    figures = measure(source, "table", limit)
    assert figures["rows"] == (365 * limit or 1_000_000)
    assert figures["seconds"] < 60
    assert figures["grown_mib"] < 1200


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_a_folder_of_a_hundred_thousand_files(tmp_path: Path) -> None:
    for label in range(100):
        (tmp_path / f"label {label}").mkdir()
        for i in range(1000):
            os.mknod(tmp_path / f"label {label}" / f"Places365_val_{label}{i:08d}.jpg")
    figures = measure(tmp_path, "folder")
    assert figures["rows"] == 100_000
    assert figures["seconds"] < 10
    assert figures["grown_mib"] < 400

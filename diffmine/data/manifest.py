"""A folder or a table of labelled images -> one row per image: which images there are, their labels and boxes.

A layout is a function `Dataset -> Found` and a name in `LAYOUTS`. It only lists: no image is opened here. Everything
after it is shared, works on whole columns, and does not depend on the order in which the images were listed.
"""

import csv
import hashlib
import os
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from diffmine.config import Dataset, absolute
from diffmine.data.images import EXTENSIONS
from diffmine.data.labels import label_sizes
from diffmine.errors import InputError
from diffmine.run import SCHEMAS
from diffmine.store import filesystem, local_copy, patiently

_LABELS = pa.list_(pa.string())
_TABLE = ("uri", "label", "labels", "split")  # columns that are looked for, in any case
_BOX = ("image", "label", "x", "y", "w", "h")
_BOXES = SCHEMAS["manifest"].field("boxes").type
_SCHEME = re.compile("[A-Za-z][A-Za-z0-9+.-]*://")
_OTHER_IMAGES = frozenset(  # that cameras and browsers write, and that are not read
    [".heic", ".heif", ".avif", ".jxl", ".jp2", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2"]
)
_WEB = frozenset({"http", "https", "ftp"})
_NO_WEB = "web addresses cannot be listed, nor read again with the same result: download the images first"


@dataclass(frozen=True)
class Manifest:
    """The images of a run.

    Attributes:
        table: image_id, uri, labels, boxes (null: not annotated), then the pass-through columns; sorted by image_id.
        skipped: how many files of a folder have an extension that is no image's, by extension.
        notes: sentences for the user.
    """

    table: pa.Table
    skipped: dict[str, int]
    notes: list[str]


@dataclass(frozen=True)
class Found:
    """What a layout lists: one row per mention of an image, in any order; a URI may come several times.

    Attributes:
        base: what `image_id` is relative to: a folder with a '/' at its end.
        uri: string [N], absolute.
        labels: list<string> [N], none of them empty.
        columns: N rows of pass-through columns.
    """

    base: str
    uri: pa.StringArray
    labels: pa.ListArray
    columns: pa.Table
    skipped: dict[str, int]
    notes: list[str]


def scan(dataset: Dataset, *, seed: int = 0) -> Manifest:
    """List the images of a dataset, with their labels and boxes.

    Reads `source`, `layout`, `boxes`, `split` and `limit_per_label`. With a limit, a label keeps the images that come
    first in an order drawn from `seed`; an image that one of its labels keeps stays, with all its labels.

    Raises:
        InputError: the source or the boxes cannot be read, hold nothing, or contradict themselves.
    """
    if dataset.layout not in LAYOUTS:
        raise InputError(f"dataset.layout: got {dataset.layout!r}; allowed: {', '.join(LAYOUTS)}")
    found = LAYOUTS[dataset.layout](dataset)
    _refuse_unreadable(found.uri)
    table, notes = _one_row_per_image(found)
    _refuse_lookalikes(pc.unique(pc.list_flatten(table["labels"])).to_pylist())
    boxes: pa.Array = pa.nulls(len(table), _BOXES)
    if dataset.boxes is not None:
        boxes, box_notes = _boxes(dataset.boxes, table, found.base)
        notes += box_notes
    table = table.add_column(3, "boxes", boxes)
    if dataset.limit_per_label is not None:
        kept = table.take(_limited(table, dataset.limit_per_label, seed))
        if len(kept) < len(table):
            sizes = label_sizes(kept).values()
            of_a_label = f"{min(sizes):,} to {max(sizes):,}" if min(sizes) < max(sizes) else f"{max(sizes):,}"
            used = f"{len(kept):,} of {len(table):,} images are used, {of_a_label} of a label"
            notes.append(f"limit_per_label {dataset.limit_per_label}: {used}")
        table = kept
    return Manifest(table, found.skipped, found.notes + notes)


# --------------------------------------------------------------------------------------------------- layout: folder


def _folder(dataset: Dataset) -> Found:
    """<source>[/<split>]/<label>/<name>; the label is the whole path of the folder, as "a/airfield"."""
    base = _as_base(absolute(dataset.source))
    within = f"{dataset.split.strip('/')}/" if dataset.split else ""
    _require_folder(dataset, base, within)
    boxes = None if dataset.boxes is None else absolute(dataset.boxes)
    ids: list[pa.Array] = []
    sizes: dict[str, int] = {}
    skipped: Counter[str] = Counter()
    unlabelled = 0
    for folder, names in _walk(base + within):
        images = [name for name in names if _extension(name) in EXTENSIONS]
        others = (name for name in names if _extension(name) not in EXTENSIONS)
        skipped.update(
            _extension(name) or "(none)" for name in others if posixpath.join(base + within, folder, name) != boxes
        )
        if not folder:
            unlabelled = len(images)
        elif images:
            ids.append(_strings(f"{within}{folder}/{name}" for name in images))
            sizes[folder] = len(images)
    if not ids:
        raise InputError(_no_images(base + within, unlabelled, skipped))
    labels = _strings(sizes).take(np.repeat(np.arange(len(sizes)), list(sizes.values())))
    image_ids = pa.concat_arrays(ids)
    return Found(
        base=base,
        uri=pc.binary_join_element_wise(base, image_ids, ""),
        labels=_each_a_list(labels),
        columns=pa.table({}),
        skipped=dict(sorted(skipped.items())),
        notes=[_unlabelled_note(base + within, unlabelled)] if unlabelled else [],
    )


def _require_folder(dataset: Dataset, base: str, within: str) -> None:
    fs, path = _filesystem(base)
    with _reading(base):
        if _kind(fs, path.rstrip("/")) == "file":
            raise InputError(
                f"dataset.source {dataset.source} is a file; layout: folder needs a folder that holds one folder of "
                "images per label (for a CSV or Parquet file set dataset.layout to table)"
            )
        if _kind(fs, path) != "directory":
            raise InputError(
                f"dataset.source {dataset.source} does not exist: looked for {base} as a folder that holds one folder "
                "of images per label"
            )
        if within and _kind(fs, f"{path.rstrip('/')}/{within}") != "directory":
            listed = patiently(lambda: fs.ls(path, detail=True))
            folders = sorted(posixpath.basename(e["name"].rstrip("/")) for e in listed if e["type"] == "directory")
            raise InputError(f"dataset.split: no folder {dataset.split!r} in {base}; there are: {some(folders)}")


def _kind(fs: fsspec.AbstractFileSystem, path: str) -> str | None:
    """What is there: a "file", a "directory" or None. A store's own `isfile` and `isdir` take an error for a no."""
    if isinstance(fs, LocalFileSystem):
        return "directory" if os.path.isdir(path) else "file" if os.path.exists(path) else None
    try:
        return str(patiently(lambda: fs.info(path))["type"])
    except FileNotFoundError:
        return None


def _walk(root: str) -> Iterator[tuple[str, list[str]]]:
    """Folder -> (path below it, names of the files there) of every folder, in any order; hidden ones are left out."""
    fs, path = _filesystem(root)
    with _reading(root):
        yield from _walk_local(path) if _is_local(root) else _walk_store(fs, path.rstrip("/"))


def _walk_local(root: str) -> Iterator[tuple[str, list[str]]]:
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while pending:
        folder, above = pending.pop()
        path = os.path.join(root, folder)
        status = os.stat(path)
        here = (status.st_dev, status.st_ino)
        if here in above:  # a link to a folder that it lies in
            continue
        files = []
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    pending.append((posixpath.join(folder, entry.name), above | {here}))
                else:
                    files.append(entry.name)
        yield folder, files


def _walk_store(fs: fsspec.AbstractFileSystem, root: str) -> Iterator[tuple[str, list[str]]]:
    """Folder by folder: fsspec's `find` would hold a million entries at once, and `walk` loses folders that fail."""
    pending = [root]
    while pending:
        path = pending.pop()
        files = []
        for entry in patiently(partial(fs.ls, path, detail=True)):
            name = entry["name"].rstrip("/")
            if name == path or posixpath.basename(name).startswith("."):  # some stores list the folder in itself
                continue
            if entry["type"] == "directory":
                pending.append(name)
            else:
                files.append(posixpath.basename(name))
        yield path[len(root) :].strip("/"), files


def _extension(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


def _strings(values: Iterable[str]) -> pa.StringArray:
    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError as error:
        raise InputError(f"file name {error.object!r} is not valid UTF-8: rename it") from error


def skipped_files(skipped: Mapping[str, int]) -> str:
    """How many files of which extension were left out, most first, and which of them are images all the same."""
    most_first = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    count = sum(skipped.values())
    kinds = some([f"{n:,} {extension}" for extension, n in most_first])
    return f"{count:,} other file{'s' if count != 1 else ''} skipped: {kinds}{to_convert(skipped)}"


def to_convert(skipped: Iterable[str]) -> str:
    """What to say of extensions that were left out and are of images; nothing where none is."""
    images = sorted(_OTHER_IMAGES.intersection(skipped))
    return f"; images of kind {', '.join(images)} must be converted first" if images else ""


def _no_images(folder: str, unlabelled: int, skipped: Counter[str]) -> str:
    found = [f"{count:,} x {extension}" for extension, count in sorted(skipped.items())]
    if unlabelled:
        found.append(f"{unlabelled:,} image{'s' if unlabelled > 1 else ''} directly in it, without a label")
    return (
        f"{folder} holds no labelled images: looked for <label>/<name> with one of the extensions "
        f"{' '.join(sorted(EXTENSIONS))}; found {', '.join(found) or 'no files'}{to_convert(skipped)}"
    )


def _unlabelled_note(folder: str, count: int) -> str:
    lie, they = ("image lies", "it is") if count == 1 else ("images lie", "they are")
    return f"{count:,} {lie} directly in {folder}, not in a label's folder; {they} left out"


# ---------------------------------------------------------------------------------------------------- layout: table


def _table(dataset: Dataset) -> Found:
    """A CSV or Parquet file with a column `uri` and a column `label` or `labels`; other columns are kept."""
    source = absolute(dataset.source)
    rows, first = _read_table(source)
    label_column = _check_columns(rows.column_names, source)
    numbers = np.arange(first, first + len(rows))
    if dataset.split is not None:
        chosen = _rows_of_split(rows, dataset.split, source)
        rows, numbers = rows.take(chosen), numbers[chosen]
    if not len(rows):
        raise InputError(f"{source} has no rows")
    base = source[: source.rindex("/") + 1]
    uri = _texts(rows["uri"], "uri", source)
    _refuse(pc.equal(pc.utf8_trim_whitespace(pc.fill_null(uri, "")), ""), numbers, f"{source}: the uri is empty")
    labels = _label_lists(rows[label_column], label_column, source, numbers)
    return Found(
        base=base,
        uri=_resolve_all(uri, base),
        labels=labels,
        columns=rows.drop_columns(["uri", label_column]).replace_schema_metadata(None),
        skipped={},
        notes=[*_unsplit_notes(labels, source)] if label_column == "label" else [],
    )


def _read_table(source: str) -> tuple[pa.Table, int]:
    """All rows, and the number by which a person calls the first one (the header of a CSV is row 1)."""
    extension = _extension(source)
    if extension == ".csv":
        return _read_csv(source, _TABLE, "dataset.source"), 2
    if extension != ".parquet":
        raise InputError(f"dataset.source {source}: layout: table reads a file whose name ends in .csv or .parquet")
    _filesystem(source)
    with _reading(source, "dataset.source: looked for a Parquet file"), local_copy(source) as path:
        rows = pq.read_table(path)
    return _plainly_named(_with_plain_texts(rows), _TABLE, source), 1


def _with_plain_texts(rows: pa.Table) -> pa.Table:
    """Text of any kind as string: pandas and polars write some that has 64-bit offsets, and categories."""
    for i, field in enumerate(rows.schema):
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        if _is_text(kind) and field.type != pa.string():
            rows = rows.set_column(i, field.name, rows[field.name].cast(kind).cast(pa.string()))
    return rows


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _read_csv(source: str, texts: Sequence[str], what: str) -> pa.Table:
    """Columns named in `texts` stay text ("1920", "NA" and "null" are labels); Arrow tells the types of the others.

    They are between commas, or between the semicolons or tabs of a header without a comma, as spreadsheets write them.
    """
    _filesystem(source)
    with _reading(source, f"{what}: looked for a CSV file in UTF-8"), local_copy(source) as path:
        names, delimiter = _header(path)
        own = [name for name in names if _plain(name) in texts]
        table = pa.csv.read_csv(
            path,
            pa.csv.ReadOptions(use_threads=False, block_size=2**24),  # one thread: only then errors name the row
            pa.csv.ParseOptions(newlines_in_values=True, delimiter=delimiter),
            pa.csv.ConvertOptions(column_types=dict.fromkeys(own, pa.string())),
        )
        bad = [
            name for name, kind in zip(table.column_names, table.schema.types, strict=True) if pa.types.is_binary(kind)
        ]
    if bad:  # what Arrow makes of text that it cannot read
        raise InputError(f"{source}: not valid UTF-8 in column {some(bad)}; save the file as UTF-8")
    return _plainly_named(table, texts, source)


def _header(path: str) -> tuple[list[str], str]:
    """Names of a CSV's columns, and what stands between them."""
    with open(path, "rb") as file:
        lines = file.read(2**16).splitlines()
    line = next(filter(None, lines), b"").decode("utf-8-sig", errors="replace")
    delimiter = next((mark for mark in ",;\t" if mark in line), ",")
    return next(csv.reader([line], delimiter=delimiter), []), delimiter


def _plain(name: str) -> str:
    return name.strip().lower()


def _plainly_named(table: pa.Table, wanted: Sequence[str], source: str) -> pa.Table:
    """The columns `wanted` under these names, whatever the case and outer blanks of theirs; others keep their names."""
    names = [_plain(name) if _plain(name) in wanted else name for name in table.column_names]
    twice = [name for name in wanted if names.count(name) > 1]
    if twice:
        raise InputError(
            f"{source}: column {some(twice)} comes twice (case and outer blanks do not count); "
            f"the columns are: {', '.join(table.column_names)}"
        )
    return table.rename_columns(names)


def _check_columns(names: list[str], source: str) -> str:
    """Name of the column with the labels."""
    there = f"the columns are: {', '.join(names)}"
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(f"{source}: column {some(twice)} comes twice; {there}")
    label_columns = [name for name in ("label", "labels") if name in names]
    if "uri" not in names or not label_columns:
        missing = "uri" if "uri" not in names else "label or labels"
        raise InputError(f"{source} has no column {missing}: looked for uri, and label or labels; {there}")
    if len(label_columns) > 1:
        raise InputError(f"{source} has both label and labels: remove or rename one; {there}")
    reserved = [name for name in ("image_id", "boxes") if name in names]
    if reserved:
        raise InputError(f"{source}: the manifest has its own column {some(reserved)}: rename or drop the table's")
    return label_columns[0]


def _rows_of_split(rows: pa.Table, split: str, source: str) -> np.ndarray:
    if "split" not in rows.column_names:
        names = ", ".join(rows.column_names)
        raise InputError(f"dataset.split is {split!r}, but {source} has no column split; the columns are: {names}")
    values = _texts(rows["split"], "split", source)
    chosen = np.flatnonzero(pc.fill_null(pc.equal(values, split), False))
    if not len(chosen):
        there = sorted(value for value in pc.unique(values).to_pylist() if value is not None)
        raise InputError(f"dataset.split: no row of {source} has split {split!r}; there are: {some(there)}")
    return chosen


def _texts(column: pa.ChunkedArray, name: str, source: str) -> pa.StringArray:
    """A column of text, categories or whole numbers -> string [N], nulls kept."""
    return _cast(column, pa.string(), column.type, f"{source}: column {name} must be text")


def _cast(column: pa.ChunkedArray, to: pa.DataType, kind: pa.DataType, message: str) -> pa.Array:
    """`kind` is the type of the single values."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (_is_text(kind) or pa.types.is_integer(kind)):
        raise InputError(f"{message}; got {column.type}")
    return column.combine_chunks().cast(to)


def _label_lists(column: pa.ChunkedArray, name: str, source: str, numbers: np.ndarray) -> pa.ListArray:
    """The column `label` or `labels` -> list<string> [N] without nulls or empty labels."""
    is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    if name == "label":
        lists = _each_a_list(_texts(column, name, source))
    elif is_list:
        lists = _cast(column, _LABELS, column.type.value_type, f"{source}: column labels must be a list of text")
    elif _extension(source) == ".csv":
        split = pc.split_pattern(_texts(column, name, source), "|")
        lists = pa.ListArray.from_arrays(split.offsets, pc.utf8_trim_whitespace(split.values))
    else:
        raise InputError(
            f"{source}: column labels must be a list of text; got {column.type} (a single label goes into label)"
        )
    _refuse(pc.equal(pc.fill_null(pc.list_value_length(lists), 0), 0), numbers, f"{source}: {name} is empty")
    blank = pc.equal(pc.utf8_trim_whitespace(pc.fill_null(pc.list_flatten(lists), "")), "")
    parents = numbers[pc.list_parent_indices(lists).to_numpy()]
    _refuse(blank, parents, f"{source}: {name} holds an empty label")
    return lists


def _unsplit_notes(labels: pa.ListArray, source: str) -> Iterator[str]:
    """A column `label` that was meant to be `labels`: each combination would be mined as a label of its own."""
    names = pc.unique(pc.list_flatten(labels))
    several = sorted(names.filter(pc.match_substring(names, "|")).to_pylist())
    if several:
        found = f"{len(several):,} labels contain" if len(several) > 1 else "1 label contains"
        lists = "" if _extension(source) == ".csv" else " and make it lists of text"
        yield f'{found} "|", as {several[0]!r}: name the column labels{lists} to split them'


def _each_a_list(values: pa.StringArray) -> pa.ListArray:
    return pa.ListArray.from_arrays(np.arange(len(values) + 1, dtype=np.int32), values)


def _refuse(bad: pa.BooleanArray, numbers: np.ndarray, message: str) -> None:
    """InputError that names the first bad row."""
    where = np.flatnonzero(bad)
    if len(where):
        more = f" and {len(where) - 1:,} more" if len(where) > 1 else ""
        rows = "these rows, or leave them out" if more else "the row, or leave it out"
        raise InputError(f"{message} in row {numbers[where[0]]}{more}: mend {rows}")


# ------------------------------------------------------------------------------------------------------------ boxes


def _boxes(source: str, table: pa.Table, base: str) -> tuple[pa.Array, list[str]]:
    """CSV image,label,x,y,w,h -> list<box> for each row of the manifest (null: none is known), and notes.

    `image` is an image_id, or a path or URI that leads to the image. A row without x, y, w and h names it, and no box.
    """
    source = absolute(source)
    rows = _read_csv(source, _BOX, "dataset.boxes")
    missing = [name for name in _BOX if name not in rows.column_names]
    if missing:
        names = ", ".join(rows.column_names)
        raise InputError(f"dataset.boxes {source} has no column {some(missing)}; the columns are: {names}")
    columns = {name: rows[name].combine_chunks() for name in _BOX}
    numbers = np.arange(2, 2 + len(rows))
    empty = {name: np.asarray(pc.equal(pc.utf8_trim_whitespace(columns[name]), "")) for name in _BOX}
    boxed = ~np.logical_and.reduce([empty[name] for name in ("x", "y", "w", "h")])
    for name, bad in (("image", empty["image"]), ("label", empty["label"] & boxed)):
        _refuse(bad, numbers, f"{source}: the {name} is empty")
    found = pc.index_in(_resolve_all(columns["image"], base), value_set=table["uri"].combine_chunks())
    if found.null_count == len(found):
        raise InputError(_no_match(source, columns["image"], table))
    unknown = columns["image"].filter(found.is_null())
    named = np.bincount(found.drop_null().to_numpy(), minlength=len(table)) > 0
    columns, numbers = {name: columns[name].filter(boxed) for name in _BOX}, numbers[boxed]
    x, y, width, height = (_numbers(columns[name], name, source, numbers) for name in ("x", "y", "w", "h"))
    _refuse((width <= 0) | (height <= 0), numbers, f"{source}: width or height is not above zero")
    known = np.flatnonzero(found.filter(boxed).is_valid())
    row = found.filter(boxed).take(known).to_numpy()
    label = columns["label"].take(known)
    order = np.lexsort((height[known], width[known], y[known], x[known], pc.rank(label, tiebreaker="dense"), row))
    fields = [label, *(pa.array(values[known]) for values in (x, y, width, height))]
    counts = np.bincount(row, minlength=len(table))
    boxes = pa.ListArray.from_arrays(
        pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32()),
        pa.StructArray.from_arrays(fields, fields=list(_BOXES.value_type)).take(order),
        mask=pa.array(~named),
    )
    return boxes, _box_notes(source, unknown, label, table)


def _numbers(column: pa.StringArray, name: str, source: str, rows: np.ndarray) -> np.ndarray:
    """Text -> float64 [N], all finite; `rows` [N]: the numbers by which a person calls them."""
    try:
        numbers = pc.cast(column, pa.float64()).to_numpy()
    except pa.ArrowInvalid:
        numbers = np.array([_number(text) for text in column.to_pylist()])
    bad = np.flatnonzero(~np.isfinite(numbers))
    if len(bad):
        raise InputError(
            f"{source}: {name} is {column[bad[0]].as_py()!r} in row {rows[bad[0]]}; a finite number is needed"
        )
    return numbers


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return np.nan


def _no_match(source: str, names: pa.StringArray, table: pa.Table) -> str:
    return (
        f"dataset.boxes {source}: none of its {len(names):,} rows is about an image of the dataset; column image holds "
        f"{some(names[:3].to_pylist())}, and image_ids look like {some(table['image_id'][:3].to_pylist())}"
    )


def _box_notes(source: str, unknown: pa.StringArray, label: pa.Array, table: pa.Table) -> list[str]:
    notes = []
    if len(unknown):
        images = len(pc.unique(unknown))
        notes.append(f"{source}: {len(unknown):,} rows of {images:,} images that are not in the dataset are left out")
    foreign = set(label.to_pylist()) - set(pc.list_flatten(table["labels"]).unique().to_pylist())
    if foreign:
        notes.append(f"{source}: boxes of labels that no image has count for nothing: {some(sorted(foreign))}")
    return notes


# ------------------------------------------------------------------------------------------------- images and labels


def _one_row_per_image(found: Found) -> tuple[pa.Table, list[str]]:
    """Mentions -> one row per URI, sorted by image_id: labels merged, other columns from the URI's first mention."""
    encoded = found.uri.dictionary_encode()
    image = encoded.indices.to_numpy()  # [N], the URIs numbered by first mention
    first = np.unique(image, return_index=True)[1]
    image_id = _image_ids(encoded.dictionary, found.base)
    columns = {"image_id": image_id, "uri": encoded.dictionary, "labels": _merged(found.labels, image, len(first))}
    kept = found.columns.take(first) if found.columns.num_columns else found.columns
    table = pa.table({**columns, **dict(zip(kept.column_names, kept.columns, strict=True))})
    table = table.take(pc.sort_indices(image_id)).combine_chunks()
    same = np.flatnonzero(pc.equal(table["image_id"][1:], table["image_id"][:-1]))
    if len(same):
        first_uri, second_uri = table["uri"][same[0]].as_py(), table["uri"][same[0] + 1].as_py()
        raise InputError(
            f"two images have the image_id {table['image_id'][same[0]].as_py()}: {first_uri} and {second_uri}"
        )
    return table, _merge_notes(found.columns, image, first)


def _image_ids(uri: pa.StringArray, base: str) -> pa.StringArray:
    """Path relative to `base`, else the URI itself."""
    return pc.if_else(pc.starts_with(uri, base), pc.utf8_slice_codeunits(uri, len(base)), uri)


def _merged(labels: pa.ListArray, image: np.ndarray, images: int) -> pa.ListArray:
    """Labels of N mentions, `image` [N] in 0..images -> the sorted distinct labels of each image."""
    values = pc.list_flatten(labels)
    names = pa.array(sorted(pc.unique(values).to_pylist()), pa.string())
    label = pc.index_in(values, value_set=names).to_numpy().astype(np.int64)
    owner = image[pc.list_parent_indices(labels).to_numpy()].astype(np.int64)
    pairs = np.unique(owner * len(names) + label)
    offsets = np.searchsorted(pairs, np.arange(images + 1) * len(names))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), names.take(pairs % len(names)))


def _merge_notes(columns: pa.Table, image: np.ndarray, first: np.ndarray) -> list[str]:
    """Which pass-through columns differ between the mentions of one image."""
    if len(first) == len(image):
        return []
    differs = {}
    for name in columns.column_names:
        codes = _codes(columns[name])
        conflicts = np.unique(image[codes != codes[first][image]])
        if len(conflicts):
            differs[name] = len(conflicts)
    merged = len(image) - len(first)
    notes = [f"{merged:,} rows name an image that an earlier row names; their labels are merged"]
    if differs:
        listed = ", ".join(f"{name} ({count:,} images)" for name, count in differs.items())
        notes.append(f"these columns differ between rows of one image, and keep the first row's value: {listed}")
    return notes


def _codes(column: pa.ChunkedArray) -> np.ndarray:
    """Integers [N] that are equal where the values are (null equals null)."""
    try:
        plain = column.combine_chunks()
        plain = plain.dictionary_decode() if pa.types.is_dictionary(plain.type) else plain
        return plain.dictionary_encode(null_encoding="encode").indices.to_numpy()
    except pa.ArrowNotImplementedError:  # lists and structs
        seen: dict[str, int] = {}
        return np.array([seen.setdefault(repr(value), len(seen)) for value in column.to_pylist()])


def _limited(table: pa.Table, limit: int, seed: int) -> np.ndarray:
    """Rows of the images that at least one of their labels keeps, ascending."""
    values = pc.list_flatten(table["labels"].combine_chunks()).dictionary_encode()
    row = pc.list_parent_indices(table["labels"].combine_chunks()).to_numpy()
    starts = [hashlib.sha256(f"{seed}\0{label}\0".encode()) for label in values.dictionary.to_pylist()]
    label = values.indices.to_numpy()
    drawn = np.fromiter(
        (
            _drawn(starts[i], image_id)
            for i, image_id in zip(label, table["image_id"].take(row).to_pylist(), strict=True)
        ),
        np.uint64,
        len(row),
    )
    order = np.lexsort((row, drawn, label))
    first = np.searchsorted(label[order], np.arange(len(starts)))
    rank = np.arange(len(order)) - first[label[order]]  # of an image among those of the label
    return np.unique(row[order][rank < limit])


def _drawn(start: "hashlib._Hash", image_id: str) -> int:
    digest = start.copy()
    digest.update(image_id.encode())
    return int.from_bytes(digest.digest()[:8], "little")


def _refuse_lookalikes(labels: list[str]) -> None:
    """Labels that a person cannot tell apart would be mined as two."""
    seen: dict[str, str] = {}
    for label in sorted(labels):
        plain = unicodedata.normalize("NFC", label).strip()
        if not plain:
            raise InputError(f"label {label!a} consists of spaces: rename it")
        if plain in seen:
            raise InputError(f"labels {seen[plain]!a} and {label!a} differ in spaces or Unicode form only: rename one")
        seen[plain] = label


# -------------------------------------------------------------------------------------------------- paths and stores


def _is_local(uri: str) -> bool:
    return not _SCHEME.match(uri)


def _as_base(uri: str) -> str:
    return uri if uri.endswith("/") else f"{uri}/"


def _resolve_all(uris: pa.StringArray, base: str) -> pa.StringArray:
    return pa.array((_resolve(uri, base) for uri in uris.to_pylist()), pa.string(), size=len(uris))


def _resolve(uri: str, base: str) -> str:
    """URI, absolute path, or path relative to `base` -> absolute path or URI; '.' and '..' are worked out."""
    if not _is_local(uri):
        return absolute(uri)
    if uri.startswith("/"):
        return posixpath.normpath(uri)
    if _is_local(base):
        return posixpath.normpath(base + uri)
    scheme, _, folder = base.partition("://")
    parts = uri.split("/")
    if "." not in parts and ".." not in parts:
        return base + uri
    path = posixpath.normpath(folder + uri)
    if path.startswith("..") or path.split("/")[0] != folder.split("/")[0]:
        raise InputError(f"uri {uri!r} leads out of {scheme}://{folder.split('/')[0]}: give the full URI")
    return f"{scheme}://{path}"


def _refuse_unreadable(uris: pa.StringArray) -> None:
    """What could never be read is refused before anything is spent: web addresses, unknown stores, '::'."""
    for uri in uris.filter(pc.match_substring(uris, "::")).to_pylist()[:1]:
        raise InputError(
            f"{uri}: '::' joins storage systems in fsspec's URIs, and cannot be in a name: rename the image"
        )
    schemes = pc.extract_regex(uris, f"^(?P<scheme>{_SCHEME.pattern})").field("scheme")
    for scheme in pc.unique(schemes).drop_null().to_pylist():
        _filesystem(uris[pc.index(schemes, scheme).as_py()].as_py())


def _filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Filesystem and path of a URI, or an InputError that says why there is none."""
    if uri.partition("://")[0].lower() in _WEB:
        raise InputError(f"{uri}: {_NO_WEB}")
    try:
        return filesystem(uri)
    except ImportError as error:
        raise InputError(f"{uri}: {error} (diffmine's extras s3 and gcs install the usual ones)") from error
    except ValueError as error:
        known = "a local path, s3://, gs:// or another of fsspec's"
        raise InputError(f"{uri}: {error}; allowed: {known}") from error


@contextmanager
def _reading(uri: str, looked_for: str = "") -> Iterator[None]:
    """What goes wrong while `uri` is read becomes an InputError that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{uri} does not exist ({looked_for})" if looked_for else f"{uri} does not exist") from error
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{uri} cannot be read: {reason}" + (f" ({looked_for})" if looked_for else "")) from error


def some(names: Sequence[str], most: int = 10) -> str:
    listed = ", ".join(map(str, names[:most]))
    return f"{listed} and {len(names) - most:,} more" if len(names) > most else listed or "none"


LAYOUTS: "dict[str, Callable[[Dataset], Found]]" = {"folder": _folder, "table": _table}

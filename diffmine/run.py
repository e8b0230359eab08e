"""The run folder: tables, commits, failures, and models fetched to local folders.

What a reader finds is always whole, as `store` promises for each file; a stage's `_commit.json` is written last and
names every file of the stage with its digest. `begun/<stage>.json` is written before a stage's first file and says with
which settings its files are made, so that no other settings ever add to them. If a run dies

- while a part is written: a temporary file is left, which no reader looks at, and the part is made again;
- between a part and the marker: the part is found and kept, as its name and bytes do not depend on time or chance;
- after the marker: the stage is done.
"""

import hashlib
import io
import json
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffmine.errors import InputError, StoreError
from diffmine.store import AHEAD, FAR_AHEAD, Store, at_once, fetch_folder, may_pass, patiently

_BOX = pa.struct(
    [(name, pa.string() if name == "label" else pa.float64()) for name in ("label", "x", "y", "width", "height")]
)
_PREPARED_BOX = pa.struct([(name, pa.float32()) for name in ("x", "y", "width", "height")])
_T = TypeVar("_T")
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

SCHEMAS: dict[str, pa.Schema] = {
    "manifest": pa.schema(
        [("image_id", pa.string()), ("uri", pa.string()), ("labels", pa.list_(pa.string())), ("boxes", pa.list_(_BOX))]
    ),
    "latents": pa.schema(
        [("image_id", pa.string()), ("width", pa.int32()), ("height", pa.int32()), ("h", pa.int32()), ("w", pa.int32()),
         ("latent", pa.list_(pa.float16())), ("latent_std", pa.list_(pa.float16())), ("scale", pa.float64()),
         ("crop_x", pa.int32()), ("crop_y", pa.int32())]
    ),
    "held_out": pa.schema([("image_id", pa.string())]),
    "samples": pa.schema([("label", pa.string()), ("index", pa.int32()), ("image", _IMAGE)]),
    "typicality": pa.schema(
        [("image_id", pa.string()), ("label", pa.string()), ("own", pa.bool_()), ("h", pa.int32()), ("w", pa.int32()),
         ("map", pa.list_(pa.float32())), ("mean", pa.float32()), ("stderr", pa.float32()),
         ("window_stderr", pa.list_(pa.float32())), ("draws", pa.int32()), ("degrees_of_freedom", pa.float32())]
    ),
    "patches": pa.schema(
        [("patch_id", pa.string()), ("image_id", pa.string()), ("label", pa.string()), ("kind", pa.string()),
         ("rank", pa.int32()), ("x", pa.int32()), ("y", pa.int32()), ("width", pa.int32()), ("height", pa.int32()),
         ("image_x", pa.float32()), ("image_y", pa.float32()), ("image_width", pa.float32()),
         ("image_height", pa.float32()), ("typicality", pa.float32()), ("stderr", pa.float32()),
         ("fresh_typicality", pa.float32()), ("fresh_stderr", pa.float32()), ("fresh_degrees_of_freedom", pa.float32()),
         ("contrast", pa.float32()), ("rival", pa.string()), ("fresh_contrast", pa.float32()),
         ("fresh_contrast_stderr", pa.float32()), ("fresh_contrast_degrees_of_freedom", pa.float32())]
    ),
    "features": pa.schema([("patch_id", pa.string()), ("feature", pa.list_(pa.float32()))]),
    "clusters": pa.schema(
        [("label", pa.string()), ("cluster", pa.int32()), ("rank", pa.int32()), ("size", pa.int32()),
         ("images", pa.int32()), ("median_typicality", pa.float32()), ("inertia", pa.float64())]
    ),
    "members": pa.schema(
        [("patch_id", pa.string()), ("label", pa.string()), ("cluster", pa.int32()), ("distance", pa.float32())]
    ),
    "localisation": pa.schema(
        [("image_id", pa.string()), ("label", pa.string()), ("boxes", pa.list_(_PREPARED_BOX)),
         ("prevalence", pa.float32()), ("average_precision", pa.float32()), ("pointing_hit", pa.bool_()),
         ("iou", pa.float32()), ("paper_auc_pr", pa.float32()),
         ("patch_average_precision", pa.float32()), ("patch_pointing_hit", pa.bool_()), ("patch_iou", pa.float32()),
         ("contrast_average_precision", pa.float32()), ("contrast_pointing_hit", pa.bool_()),
         ("contrast_iou", pa.float32())]
    ),
    "failures": pa.schema(
        [("image_id", pa.string()), ("uri", pa.string()), ("reason", pa.string()), ("detail", pa.string())]
    ),
}  # fmt: skip
SCHEMAS["rounds"] = SCHEMAS["typicality"].append(pa.field("share", pa.float64()))  # of a race; share of the timesteps
SCHEMA_VERSION = 4
MARKER = "_commit.json"
_READ_WHOLE = 1 << 24  # bytes of a file
GROUP_ROWS = 512  # that a reader decodes together: with a map each some megabytes
_ONE_AT_A_TIME = threading.Lock()
INDEXED = ("latents",)  # tables whose small columns many processes want of all parts
FAILING_STAGES = ("latents", "typicality")  # whose images can fail, one by one
TINY = Path(__file__).parent / "models" / "tiny"


class Run(Store):
    """One output folder."""

    # ------------------------------------------------------------------------------------------------------ tables

    def write_part(self, table: str, part: int, rows: pa.Table, over: bool = False) -> str:
        """`put` one part of a table; its SHA-256. `rows` already has the table's columns, sorted."""
        return self.put(part_name(table, part), to_parquet(rows.replace_schema_metadata()), over)

    def read_part(self, table: str, part: int, columns: Sequence[str] | None = None) -> pa.Table:
        """A part, or some of its columns; the checksums of its pages are compared. Few small columns are little read.

        Raises:
            StoreError: it is damaged.
        """
        large = _large_columns(table)
        if columns is not None and large and not large & set(columns):
            return self.pieces(table, part, lambda file: file.read(columns, use_threads=False))
        name = part_name(table, part)
        return self._or_damaged(name, lambda: from_parquet(self.read(name), columns))

    def looked_through(self, table: str, part: int) -> tuple[pa.Table, str]:
        """The small columns of a part, all of whose checksums are compared, and the SHA-256 of its file.

        Large ones, as with a map of every image and label, are read in pieces, one at a time in a process.
        """
        name, small = part_name(table, part), small_columns(table).names

        def look(file: pq.ParquetFile) -> pa.Table:
            rows = [batch.select(small) for batch in batches(file, GROUP_ROWS)]
            return pa.Table.from_batches(rows, file.read_row_groups([], small).schema)

        data = self.read(name, _READ_WHOLE + 1)
        if len(data) > _READ_WHOLE:
            del data
            with _ONE_AT_A_TIME:
                return self.pieces(table, part, look, most=True), self.digest(name)
        return self._or_damaged(name, lambda: from_parquet(data).select(small)), hashlib.sha256(data).hexdigest()

    def pieces(self, table: str, part: int, use: Callable[[pq.ParquetFile], _T], most: bool = False) -> _T:
        """What `use` makes of a part that it reads piece by piece; little more than that is fetched.

        Args:
            most: most of the part is read, so a store is asked for large pieces.
        """
        name = part_name(table, part)
        return self._or_damaged(
            name,
            lambda: self.stream(
                name,
                lambda file: use(pq.ParquetFile(file, page_checksum_verification=True)),
                FAR_AHEAD if most else AHEAD,
            ),
        )

    def _or_damaged(self, name: str, read: Callable[[], _T]) -> _T:
        """What `read` gives, or a StoreError that says that the file is damaged."""
        try:
            return read()
        except (pa.ArrowException, OSError) as error:
            raise StoreError(f"{self.uri}/{name}: is damaged ({error}); diffmine verify tells what else is") from error

    def part_rows(self, table: str, part: int) -> int:
        """Number of rows of a part."""
        return self.pieces(table, part, lambda file: int(file.metadata.num_rows))

    def parts(self, table: str) -> list[int]:
        """Numbers of the parts that are there, sorted."""
        return sorted(int(n[5:-8]) for n in self.names(table) if n.startswith("part-") and n.endswith(".parquet"))

    def read_parts(self, table: str, columns: Sequence[str] | None = None) -> dict[int, pa.Table]:
        """All parts of a table by their numbers, many read at once; small columns of an index, where there is one."""
        small = columns is not None and not _large_columns(table) & set(columns)
        if columns is not None and small and table in INDEXED and self.exists(index_name(table)):
            return self._indexed(table, columns)
        parts = self.parts(table)
        return dict(zip(parts, at_once(lambda part: self.read_part(table, part, columns), parts), strict=True))

    def write_index(self, table: str, parts: Mapping[int, pa.Table]) -> str:
        """Write the small columns of all parts (by their numbers) to one file; its SHA-256.

        It is read instead of the parts from then on: whoever removes a part removes the index first.
        """
        rows = [part.append_column("part", pa.array(np.full(len(part), n, np.int32))) for n, part in parts.items()]
        return self.put(index_name(table), to_parquet(pa.concat_tables(rows)), over=True)

    def _indexed(self, table: str, columns: Sequence[str]) -> dict[int, pa.Table]:
        name = index_name(table)
        rows = self._or_damaged(name, lambda: from_parquet(self.read(name), ["part", *columns])).combine_chunks()
        parts, firsts = np.unique(rows["part"].to_numpy(), return_index=True)
        ends = [*firsts[1:].tolist(), len(rows)]
        rows = rows.select(columns)
        return {n: rows.slice(a, b - a) for n, a, b in zip(parts.tolist(), firsts.tolist(), ends, strict=True)}

    def table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """All parts of a table; an empty table when there is none."""
        read = [*self.read_parts(name, columns).values()]
        schema = SCHEMAS[name.split("/")[0]]
        if not read:
            return (schema if columns is None else pa.schema([schema.field(c) for c in columns])).empty_table()
        return pa.concat_tables(read)

    def failures(self) -> pa.Table:
        """Images that a stage could not use: at most one row each, as later stages do not see them."""
        return pa.concat_tables([self.table(f"failures/{stage}") for stage in FAILING_STAGES])

    # ----------------------------------------------------------------------------------------------------- commits

    def committed(self, folder: str) -> dict[str, Any] | None:
        """The marker of a stage, or None when the stage is not complete."""
        return json.loads(self.read(f"{folder}/{MARKER}")) if self.exists(f"{folder}/{MARKER}") else None

    def commit(self, folder: str, marker: Mapping[str, Any], files: Mapping[str, str]) -> None:
        """Write a stage's marker: what `committed` will return. `files` are names with their SHA-256."""
        body = {**marker, "files": dict(sorted(files.items()))}
        self.replace(f"{folder}/{MARKER}", json.dumps(body, indent=1).encode())

    def begun(self, stage: str) -> dict[str, Any] | None:
        """What a stage is made with, finished or not; None when it was never begun."""
        return json.loads(self.read(f"begun/{stage}.json")) if self.exists(f"begun/{stage}.json") else None

    def begin(self, stage: str, made_with: Mapping[str, Any]) -> None:
        """Write down what `begun` will return, before the stage's first file."""
        if self.begun(stage) != made_with:
            self.replace(f"begun/{stage}.json", json.dumps(made_with, indent=1).encode())

    def digests(self, folders: Iterable[str]) -> dict[str, str]:
        """SHA-256 of every file below the folders, markers left out."""
        return {n: self.digest(n) for folder in folders for n in self.files(folder) if not n.endswith(MARKER)}


def run_here(uri: str) -> Run:
    """The run, for a task or an actor on whatever machine it is.

    Raises:
        InputError: it lies on the disk of another machine.
    """
    run = Run(uri)
    if run.local and not run.exists(f"manifest/{MARKER}"):
        raise InputError(
            f"output: {uri} is not the run's folder on {socket.gethostname()}: use a disk that all machines mount under"
            " that path, or an object store"
        )
    return run


def _large_columns(table: str) -> set[str]:
    """Those with lists of numbers or with images."""
    fields = SCHEMAS[table.split("/")[0]]
    lists = {f.name for f in fields if pa.types.is_list(f.type) and pa.types.is_floating(f.type.value_type)}
    return lists | {f.name for f in fields if f.type == _IMAGE}


def small_columns(table: str) -> pa.Schema:
    """Those without lists of numbers and images."""
    large = _large_columns(table)
    return pa.schema([field for field in SCHEMAS[table.split("/")[0]] if field.name not in large])


def index_name(table: str) -> str:
    """Who reads a folder of parts as one table passes over names that begin with an underscore."""
    return f"{table}/_index.parquet"


def part_name(table: str, part: int) -> str:
    return f"{table}/part-{part:05d}.parquet"


def to_parquet(table: pa.Table, row_group_size: int | None = None) -> bytes:
    """zstd Parquet with checksums; the same rows give the same bytes. Lists of numbers read 3 times faster plain."""
    out = io.BytesIO()
    words = [field.name for field in table.schema if not pa.types.is_nested(field.type)]
    words += [f"{field.name}.list.element" for field in table.schema if field.type == pa.list_(pa.string())]
    pq.write_table(
        table, out, compression="zstd", row_group_size=row_group_size, write_page_checksum=True, use_dictionary=words
    )
    return out.getvalue()


def from_parquet(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """What `to_parquet` wrote, or some of its columns; checksums are compared.

    In this thread alone: one of Arrow's that still holds `data` when Python ends aborts the process.
    """
    return pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read(columns, use_threads=False)


def batches(
    file: pq.ParquetFile, rows: int, columns: Sequence[str] | None = None, groups: Iterable[int] | None = None
) -> Iterator[pa.RecordBatch]:
    """Of a file, or of some of its row groups. Arrow holds all that one call of its own has read until the last row."""
    for group in range(file.num_row_groups) if groups is None else groups:
        yield from file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False)


def rows_to_table(name: str, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows of one of the tables of `SCHEMAS`."""
    return pa.Table.from_pylist(list(rows), schema=SCHEMAS[name])


# ----------------------------------------------------------------------------------------------------------- models


_PIPELINE = ("model_index.json", "*/*.json", "*/*.txt", "*/*.safetensors")  # not: the same once more in a single file
_TEXT_ENCODER = ("*.json", "*.txt", "*.safetensors")


def fetch_text_encoder(uri: str | None) -> Path | None:
    """As `fetch_model`; None: the model's own is used."""
    return None if uri is None else fetch_model(uri, _TEXT_ENCODER)


def from_elsewhere(model: str) -> bool:
    """Whether a model has to be fetched from an object store or a hub."""
    return model != "tiny" and not Path(model).is_dir() and ("://" in model or _hub_id(model))


def _hub_id(model: str) -> bool:
    return not model.startswith((".", "/", "~")) and model.count("/") == 1


def fetch_model(uri: str, files: Sequence[str] = _PIPELINE) -> Path:
    """'tiny', a local folder, an object-store URI or a hub id -> a local folder; fetched once per machine.

    Args:
        files: patterns of what is fetched from a hub.

    Raises:
        InputError: nothing is there.
        StoreError: the store or the hub did not answer.
    """
    if uri == "tiny":
        return TINY
    if Path(uri).is_dir():
        return Path(uri)
    if "://" in uri:
        return _fetch_folder(uri)
    if not _hub_id(uri):
        raise InputError(
            f"model {uri}: no such folder; give 'tiny', a folder, an object-store URI or a hub id 'owner/name'"
        )
    return _fetch_from_hub(uri, files)


def _fetch_folder(uri: str) -> Path:
    """A folder of an object store, copied into the user's cache."""
    folder = fetch_folder(uri, Path.home() / ".cache" / "diffmine")
    if folder is None:
        raise InputError(f"model {uri}: nothing is there")
    return folder


def _fetch_from_hub(repository: str, files: Sequence[str]) -> Path:
    """A repository of the hub, copied into the hub's cache.

    Raises:
        InputError: there is none, it is not for everybody, or it is not in the cache and the hub is not to be asked.
        StoreError: the hub did not answer.
    """
    import huggingface_hub  # only here: nothing else may reach for the network

    download = partial(
        huggingface_hub.snapshot_download,
        repository,
        allow_patterns=list(files),
        ignore_patterns=["*.fp16.*", "*non_ema*", "safety_checker/*"],
    )
    try:
        return Path(patiently(download))
    except Exception as error:
        said = f"({type(error).__name__}: {error})"
        if may_pass(error) or type(error) is RuntimeError:  # hf_xet's, which has tried again itself
            raise StoreError(
                f"model {repository}: cannot be fetched from the hub on {socket.gethostname()} {said}; give the same "
                "command again when the hub can be reached, or a folder with the model"
            ) from error
        raise InputError(f"model {repository}: not a folder here, and the hub did not give it {said}") from error

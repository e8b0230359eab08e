"""The run folder on any filesystem: tables, atomic writes, commits, failures, and models fetched to local folders.

What a reader finds is always whole. A file is written aside and put in place only if nothing is there yet; a stage's
`_commit.json` is written last and names every file of the stage with its digest. If a run dies

- while a part is written: a temporary file is left, which no reader looks at, and the part is made again;
- between a part and the marker: the part is found and kept, as its name and bytes do not depend on time or chance;
- after the marker: the stage is done.
"""

import hashlib
import io
import json
import os
import posixpath
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from diffmine.errors import InputError, StoreError

_BOX = pa.struct(
    [(name, pa.string() if name == "label" else pa.float64()) for name in ("label", "x", "y", "width", "height")]
)
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

SCHEMAS: dict[str, pa.Schema] = {
    "manifest": pa.schema(
        [("image_id", pa.string()), ("uri", pa.string()), ("labels", pa.list_(pa.string())), ("boxes", pa.list_(_BOX))]
    ),
    "latents": pa.schema(
        [("image_id", pa.string()), ("width", pa.int32()), ("height", pa.int32()), ("h", pa.int32()), ("w", pa.int32()),
         ("latent", pa.list_(pa.float16())), ("scale", pa.float64()), ("crop_x", pa.int32()), ("crop_y", pa.int32())]
    ),
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
         ("contrast", pa.float32())]
    ),
    "features": pa.schema([("patch_id", pa.string()), ("feature", pa.list_(pa.float32()))]),
    "clusters": pa.schema(
        [("label", pa.string()), ("cluster", pa.int32()), ("rank", pa.int32()), ("size", pa.int32()),
         ("images", pa.int32()), ("median_typicality", pa.float32()), ("inertia", pa.float64())]
    ),
    "members": pa.schema(
        [("patch_id", pa.string()), ("label", pa.string()), ("cluster", pa.int32()), ("distance", pa.float32())]
    ),
    "failures": pa.schema(
        [("image_id", pa.string()), ("uri", pa.string()), ("reason", pa.string()), ("detail", pa.string())]
    ),
}  # fmt: skip
SCHEMAS["rounds"] = SCHEMAS["typicality"]  # of a race, before they are merged
SCHEMA_VERSION = 2
MARKER = "_commit.json"
TINY = Path(__file__).parent / "models" / "tiny"


class Run:
    """One output folder. Paths below are relative to it and use '/'."""

    def __init__(self, uri: str) -> None:
        self.fs, root = fsspec.core.url_to_fs(uri)
        self.root = root.rstrip("/")
        self.local = "file" in ([self.fs.protocol] if isinstance(self.fs.protocol, str) else self.fs.protocol)
        self.uri = self.root if self.local else self.fs.unstrip_protocol(self.root)

    # ------------------------------------------------------------------------------------------------------- files

    def path(self, name: str) -> str:
        """Path of a file of the run, as its filesystem spells it."""
        return f"{self.root}/{name}"

    def exists(self, name: str) -> bool:
        return bool(self.fs.exists(self.path(name)))

    def read(self, name: str) -> bytes:
        try:
            return bytes(self.fs.cat_file(self.path(name)))
        except (FileNotFoundError, OSError) as error:
            raise StoreError(f"{self.uri}/{name}: cannot be read ({error})") from error

    def put(self, name: str, data: bytes) -> str:
        """Create a file if it is absent; its SHA-256.

        Raises:
            StoreError: it exists with other bytes, or cannot be written.
        """
        try:
            created = self._create(self.path(name), data)
        except OSError as error:
            raise StoreError(f"{self.uri}/{name}: cannot be written ({error})") from error
        if not created and self.read(name) != data:
            raise StoreError(f"{self.uri}/{name}: exists with other bytes; another run or version wrote it")
        return hashlib.sha256(data).hexdigest()

    def put_if_absent(self, name: str, data: bytes) -> None:
        """Create a file unless it is there, whatever its bytes.

        Raises:
            StoreError: it cannot be written.
        """
        try:
            self._create(self.path(name), data)
        except OSError as error:
            raise StoreError(f"{self.uri}/{name}: cannot be written ({error})") from error

    def replace(self, name: str, data: bytes) -> None:
        """Write a file whole, over what was there."""
        path = self.path(name)
        try:
            if not self.local:
                self.fs.pipe_file(path, data)
                return
            os.replace(self._write_aside(path, data), path)
        except OSError as error:
            raise StoreError(f"{self.uri}/{name}: cannot be written ({error})") from error

    def _create(self, path: str, data: bytes) -> bool:
        """Whether the file was created; False if it was there already."""
        if not self.local:
            try:
                self.fs.pipe_file(path, data, mode="create")
            except FileExistsError:
                return False
            return True
        aside = self._write_aside(path, data)
        try:
            os.link(aside, path)  # fails if the name is taken: never half a file, never over another's
        except FileExistsError:
            return False
        finally:
            os.unlink(aside)
        return True

    def _write_aside(self, path: str, data: bytes) -> str:
        os.makedirs(posixpath.dirname(path), exist_ok=True)
        aside = f"{path}.{uuid.uuid4().hex}.tmp"
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return aside

    def remove(self, name: str) -> None:
        """Remove a file or a folder, if it is there."""
        if self.exists(name):
            self.fs.rm(self.path(name), recursive=True)

    def names(self, folder: str) -> list[str]:
        """Names of the finished files directly in a folder, sorted."""
        if not self.exists(folder):
            return []
        names = (posixpath.basename(p.rstrip("/")) for p in self.fs.ls(self.path(folder), detail=False))
        return sorted(n for n in names if not n.endswith(".tmp"))

    def upload(self, folder: Path, name: str) -> None:
        """Copy a local folder into the run, file by file; what is there with the same bytes is kept."""
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            self.put(f"{name}/{file.relative_to(folder).as_posix()}", file.read_bytes())

    # ------------------------------------------------------------------------------------------------------ tables

    def write_part(self, table: str, part: int, rows: pa.Table) -> str:
        """Put one part of a table; its SHA-256. `rows` already has the table's columns, sorted."""
        return self.put(part_name(table, part), to_parquet(rows))

    def read_part(self, table: str, part: int, columns: Sequence[str] | None = None) -> pa.Table:
        return pq.read_table(io.BytesIO(self.read(part_name(table, part))), columns=columns)

    def parts(self, table: str) -> list[int]:
        """Numbers of the parts that are there."""
        return [int(n[5:-8]) for n in self.names(table) if n.startswith("part-") and n.endswith(".parquet")]

    def table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """All parts of a table; an empty table when there is none."""
        read = [self.read_part(name, part, columns) for part in self.parts(name)]
        schema = SCHEMAS[name.split("/")[0]]
        if not read:
            return (schema if columns is None else pa.schema([schema.field(c) for c in columns])).empty_table()
        return pa.concat_tables(read)

    def failures(self) -> pa.Table:
        """Images that a stage could not use: at most one row each, as later stages do not see them."""
        stages = [stage for stage in ("latents", "typicality") if self.exists(f"failures/{stage}")]
        return pa.concat_tables([SCHEMAS["failures"].empty_table(), *(self.table(f"failures/{s}") for s in stages)])

    # ----------------------------------------------------------------------------------------------------- commits

    def committed(self, folder: str) -> dict[str, Any] | None:
        """The marker of a stage, or None when the stage is not complete."""
        return json.loads(self.read(f"{folder}/{MARKER}")) if self.exists(f"{folder}/{MARKER}") else None

    def commit(self, folder: str, marker: Mapping[str, Any], files: Mapping[str, str]) -> None:
        """Write a stage's marker: what `committed` will return. `files` are names with their SHA-256."""
        body = {**marker, "files": dict(sorted(files.items()))}
        self.replace(f"{folder}/{MARKER}", json.dumps(body, indent=1).encode())

    def digest(self, name: str) -> str:
        return hashlib.sha256(self.read(name)).hexdigest()

    def digests(self, folders: Iterable[str]) -> dict[str, str]:
        """SHA-256 of every file below the folders, markers left out."""
        found = {}
        for folder in folders:
            if self.exists(folder):
                for path in self.fs.find(self.path(folder)):
                    name = path[len(self.root) + 1 :]
                    if not name.endswith((MARKER, ".tmp")):
                        found[name] = hashlib.sha256(self.fs.cat_file(path)).hexdigest()
        return found


def part_name(table: str, part: int) -> str:
    return f"{table}/part-{part:05d}.parquet"


def to_parquet(table: pa.Table, row_group_size: int | None = None) -> bytes:
    """zstd Parquet; the same rows give the same bytes."""
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd", row_group_size=row_group_size)
    return out.getvalue()


def rows_to_table(name: str, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows of one of the tables of `SCHEMAS`."""
    return pa.Table.from_pylist(list(rows), schema=SCHEMAS[name])


# ----------------------------------------------------------------------------------------------------------- models


def fetch_model(uri: str) -> Path:
    """'tiny', a local folder, an object-store URI or a hub id -> a local folder; fetched once per machine.

    Raises:
        InputError: nothing is there.
    """
    if uri == "tiny":
        return TINY
    if Path(uri).is_dir():
        return Path(uri)
    if "://" in uri:
        return _fetch_folder(uri)
    if uri.startswith((".", "/", "~")) or uri.count("/") != 1:
        raise InputError(
            f"model {uri}: no such folder; give 'tiny', a folder, an object-store URI or a hub id 'owner/name'"
        )
    return _fetch_from_hub(uri)


def _fetch_folder(uri: str) -> Path:
    """A folder of an object store, copied into the user's cache and put in place when it is complete."""
    cache = Path.home() / ".cache" / "diffmine" / hashlib.sha256(uri.encode()).hexdigest()[:24]
    if cache.is_dir():
        return cache
    fs, root = fsspec.core.url_to_fs(uri)
    if not fs.exists(root):
        raise InputError(f"model {uri}: nothing is there")
    aside = cache.with_name(f"{cache.name}.{uuid.uuid4().hex}.tmp")
    try:
        for path in fs.find(root):
            target = aside / path[len(root.rstrip("/")) + 1 :]
            target.parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(path, str(target))
        aside.rename(cache)
    except OSError:
        if not cache.is_dir():  # else another process of this machine was faster
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return cache


def _fetch_from_hub(repository: str) -> Path:
    import huggingface_hub  # only here: nothing else may reach for the network

    wanted = ["*.json", "*.txt", "*.safetensors"]
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository, allow_patterns=wanted, ignore_patterns=["*.fp16.*", "*non_ema*"]
            )
        )
    except Exception as error:
        raise InputError(
            f"model {repository}: not a folder here, and the hub did not give it ({type(error).__name__}: {error})"
        ) from error

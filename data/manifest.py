"""Streams and slices on disk: manifests, where files lie, and waiting for a slice to be committed.

stream/stream.json
stream/slice=000017/features/{part-00000.parquet, manifest.json}
stream/slice=000017/labels/{part-00000.parquet, manifest.json}     same parts, row groups and row order

Tasks with different label windows have a folder for each window (labels.600s), so that those who need only the early ones do not
wait. A joiner that amends labels writes the later generation beside the first (labels.600s.amended).
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from exfm.data.commit import Filesystem, commit_json, open_folder, read_json
from exfm.data.errors import UserError
from exfm.data.schema import Schema

T = TypeVar("T")

MANIFEST = "manifest.json"
POLL_S = 0.2
AMENDED = ".amended"
Generation = Literal["first", "amended"]


class RowGroup(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    rows: int
    id_digest: str


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    path: str
    bytes: int
    sha256: str
    rows: int
    row_groups: tuple[RowGroup, ...]


class SliceManifest(BaseModel):
    """One committed kind of files of a slice; [t0, t1) in Unix seconds. extra["at"]: when it was committed."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: str = Field(pattern=rf"^(features|supervision|labels(\.\d+s)?({re.escape(AMENDED)})?)$")
    stream: str
    schema_digest: str
    slice: int
    t0: int
    t1: int
    rows: int
    parts: tuple[Part, ...]
    extra: dict[str, Any] = Field(default_factory=dict)

    @property
    def row_groups(self) -> list[RowGroup]:
        return [group for part in self.parts for group in part.row_groups]

    def digest(self) -> str:
        """Hash of the slice's content: its files' checksums, rows and identity."""
        content = self.model_dump(include={"kind", "stream", "schema_digest", "slice", "rows"})
        content["files"] = [part.sha256 for part in self.parts]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def digest_ids(ids: np.ndarray) -> str:
    """Digest of example ids in row order; equal digests make a row-wise join safe."""
    return hashlib.sha256(np.ascontiguousarray(ids, dtype="<i8").tobytes()).hexdigest()[:16]


def slice_folder(root: str, index: int) -> str:
    return f"{root}/slice={index:06d}"


class StreamInfo(BaseModel):
    """stream.json. num_slices is None while their number is open; extra["join"]: how a joiner makes it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    stream_schema: Schema
    num_slices: int | None
    extra: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Stream:
    """A prepared stream, opened for reading. generation: of the labels, where late ones amend them."""

    fs: Filesystem
    root: str
    info: StreamInfo
    generation: Generation = "first"

    @property
    def schema(self) -> Schema:
        return self.info.stream_schema

    @cached_property
    def schema_digest(self) -> str:
        return self.schema.digest()

    def label_kinds(self, tasks: Sequence[str]) -> tuple[str, ...]:
        """The kinds of files that hold the labels of these tasks, of the generation in use."""
        suffix = AMENDED if self.generation == "amended" else ""
        files = self.schema.label_files()
        if len(files) > 1 and (unknown := [t for t in tasks if t not in self.schema.labels]):
            raise UserError(
                f"stream '{self.schema.name}' has no label(s) {', '.join(unknown)}; it has {', '.join(self.schema.labels)}"
            )
        if len(files) == 1:
            return tuple(kind + suffix for kind in files) if tasks else ()
        return tuple(kind + suffix for kind, own in files.items() if any(t in own for t in tasks))

    def types(self, kind: str) -> dict[str, pa.DataType]:
        """Arrow type of every column of one kind of files."""
        if kind == "features":
            return self.schema.feature_types()
        types = self.schema.label_types()
        return {task: types[task] for task in self.schema.label_files()[kind.removesuffix(AMENDED)]}

    def manifest(self, index: int, kind: str) -> SliceManifest | None:
        """The slice's manifest of that kind, or None where it has not been committed. UserError if it is wrong."""
        folder = f"{slice_folder(self.root, index)}/{kind}"
        manifest = load_manifest(self.fs, folder)
        if manifest is None:
            return None
        if manifest.schema_digest != self.schema_digest or manifest.slice != index or manifest.kind != kind:
            raise UserError(
                f"{folder}/{MANIFEST} is of stream '{manifest.stream}' slice {manifest.slice} ({manifest.kind}, schema "
                f"{manifest.schema_digest}); slice {index} ({kind}, schema {self.schema_digest}) was wanted"
            )
        if manifest.rows == 0:
            raise UserError(f"{folder} is empty (0 rows); drop the slice or prepare the stream with wider slices")
        return manifest

    def newest(self, kind: str, since: int) -> int:
        """The newest slice that has this kind, looked for from slice `since`, which has it; slices are committed in order."""
        while self.fs.exists(f"{slice_folder(self.root, since + 1)}/{kind}/{MANIFEST}"):
            since += 1
        return since

    def wait(self, index: int, kind: str, wait_s: float) -> SliceManifest:
        """The manifest, waited for up to wait_s seconds; UserError after that."""
        found = wait_for(lambda: self.manifest(index, kind), wait_s)
        if found is None:
            raise UserError(
                f"slice {index} of {self.root} has no committed {kind} (no {kind}/{MANIFEST}) after {wait_s:g} s; prepare "
                "it, name fewer slices (stream.last), or wait longer (stream.on_missing: wait, stream.wait_s)"
            )
        return found


def load_manifest(fs: Filesystem, folder: str) -> SliceManifest | None:
    try:
        return SliceManifest.model_validate(read_json(fs, f"{folder}/{MANIFEST}"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{folder}/{MANIFEST} is damaged: {error}") from None


def wait_for(look: Callable[[], T | None], wait_s: float) -> T | None:
    """Call `look` until it answers or wait_s seconds are over; its last answer."""
    deadline = time.monotonic() + wait_s
    while (found := look()) is None and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return found


def open_stream(url: str, generation: Generation = "first") -> Stream:
    """Open a prepared stream. UserError where there is none, or it has no labels of that generation."""
    fs, root = open_folder(url)
    try:
        info = StreamInfo.model_validate(read_json(fs, f"{root}/stream.json"))
    except FileNotFoundError:
        raise UserError(
            f"{root} is not a prepared stream (no stream.json); make one with `exfm data prepare` or `exfm data synth`"
        ) from None
    except ValueError as error:
        raise UserError(f"{root}/stream.json is damaged: {error}") from None
    if generation == "amended" and not info.extra.get("join", {}).get("amend_s"):
        raise UserError(
            f"stream.labels is amended, but {root} has first labels only: its joiner does not amend; set stream.labels: first"
        )
    return Stream(fs, root, info, generation)


def commit_stream(url: str, schema: Schema, num_slices: int | None, extra: dict[str, Any] | None = None) -> Stream:
    """Write stream.json."""
    fs, root = open_folder(url)
    info = StreamInfo(stream_schema=schema, num_slices=num_slices, extra=extra or {})
    commit_json(fs, f"{root}/stream.json", info.model_dump())
    return Stream(fs, root, info)


def column_array(table: pa.Table, name: str) -> pa.Array:
    """One contiguous array of a column."""
    column = table.column(name)
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()

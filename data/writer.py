"""Writing slices: features and labels as row-aligned Parquet, each committed by its manifest."""

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from exfm.data.commit import Filesystem, commit_json, sha256_of
from exfm.data.errors import UserError
from exfm.data.manifest import MANIFEST, Part, RowGroup, SliceManifest, Stream, digest_ids, slice_folder
from exfm.data.schema import Schema, check_types

ROW_GROUP_ROWS = 16_384
PART_ROWS = 4_194_304


def check_slice(table: pa.Table, schema: Schema, where: str) -> None:
    """Refuse a slice that a job could not train on. UserError says what, where and which example."""
    check_types(table.schema, schema.feature_types() | schema.label_types(), where)
    if table.num_rows == 0:
        raise UserError(f"{where} is empty (0 rows); use fewer or wider slices")
    check_features(table, schema, where)
    ids = table.column(schema.id).to_numpy()
    check_labels(table, schema.labels, ids, where)
    steps = np.diff(table.column(schema.timestamp).to_numpy())
    if (steps < 0).any():
        row = int(np.argmax(steps < 0)) + 1
        raise UserError(f"{where}: row {row} (example {ids[row]}) is earlier than the row before it; sort by timestamp")


def check_features(table: pa.Table, schema: Schema, where: str) -> None:
    """Refuse feature rows, in any order, that a job could not train on. UserError says what, where and which example."""
    for name in filter(None, (schema.id, schema.timestamp, schema.user, schema.weight)):
        if table.column(name).null_count:
            raise UserError(f"{where}: column '{name}' has {table.column(name).null_count} nulls, none are allowed")
    ids = table.column(schema.id).to_numpy()
    _check_numbers(table, schema, ids, where)
    _check_lists(table, schema, where)
    if len(np.unique(ids)) != len(ids):
        values, counts = np.unique(ids, return_counts=True)
        raise UserError(f"{where}: example id {values[counts > 1][0]} occurs more than once; ids must be unique")


def _check_numbers(table: pa.Table, schema: Schema, ids: np.ndarray, where: str) -> None:
    """UserError for an infinite dense value or an example weight that is negative, infinite or NaN."""
    for name in schema.dense:
        if (bad := np.isinf(table.column(name).to_numpy())).any():
            row = int(np.argmax(bad))
            raise UserError(
                f"{where}: '{name}' of example {ids[row]} is infinite; clip it, or leave it null if unknown"
            )
    if schema.weight:
        weights = table.column(schema.weight).to_numpy()
        if not (good := np.isfinite(weights) & (weights >= 0)).all():
            row = int(np.argmin(good))
            raise UserError(
                f"{where}: weight '{schema.weight}' of example {ids[row]} is {weights[row]}; weights are finite and at "
                "least 0"
            )


def _check_lists(table: pa.Table, schema: Schema, where: str) -> None:
    """UserError for nulls inside lists, and for per-id weights that are not as many as the ids."""
    for column in schema.sparse:
        for name in filter(None, (column.name if column.list else None, column.weights)):
            if any(chunk.flatten().null_count for chunk in table.column(name).chunks):
                raise UserError(f"{where}: lists of '{name}' contain nulls; leave them out of the lists")
        if column.weights:
            num_ids = (
                pc.list_value_length(table.column(column.name))
                if column.list
                else table.column(column.name).is_valid().cast(pa.int32())
            )
            num_weights = pc.list_value_length(table.column(column.weights))
            if not num_ids.fill_null(0).equals(num_weights.fill_null(0)):
                raise UserError(f"{where}: '{column.weights}' must have one weight for every id of '{column.name}'")


def check_labels(table: pa.Table, labels: tuple[str, ...], ids: np.ndarray, where: str) -> None:
    """UserError names the first label that is neither 0, 1 nor missing."""
    for name in labels:
        values = table.column(name).to_numpy()
        bad = ~((values == 0) | (values == 1) | np.isnan(values))
        if bad.any():
            row = int(np.argmax(bad))
            raise UserError(
                f"{where}: label '{name}' of example {ids[row]} is {values[row]:g}; labels are 0, 1 or null (not observed)"
            )


def write_slice(
    stream: Stream, index: int, t0: int, t1: int, table: pa.Table, extra: dict[str, Any] | None = None
) -> None:
    """Write and commit features and labels of one slice; rows sorted by timestamp, [t0, t1) in Unix seconds.

    extra: further facts for the labels manifests. An already committed slice is refused (UserError): what a job may have read is
    never replaced.
    """
    check_slice(table, stream.schema, f"slice {index}")
    ids = table.column(stream.schema.id).to_numpy()
    if stream.manifest(index, "features") is not None:
        raise UserError(f"slice {index} of {stream.root} is already committed; use an empty folder")
    for kind in ("features", *stream.schema.label_files()):
        write_kind(stream, index, kind, t0, t1, table, ids, None if kind == "features" else extra)


def write_kind(
    stream: Stream,
    index: int,
    kind: str,
    t0: int,
    t1: int,
    table: pa.Table,
    ids: np.ndarray,
    extra: dict[str, Any] | None = None,
    now: Callable[[], float] = time.time,
) -> SliceManifest:
    """Write and commit one kind of files of a slice, from the columns of `table` that belong there. ids [rows]; now: the clock."""
    folder = f"{slice_folder(stream.root, index)}/{kind}"
    parts = write_parts(stream.fs, folder, table.select(list(stream.types(kind))), ids)
    manifest = SliceManifest(
        kind=kind, stream=stream.schema.name, schema_digest=stream.schema_digest, slice=index, t0=t0, t1=t1,
        rows=table.num_rows, parts=parts, extra=(extra or {}) | {"at": now()},
    )  # fmt: skip
    commit_json(stream.fs, f"{folder}/{MANIFEST}", manifest.model_dump())
    return manifest


def write_parts(fs: Filesystem, folder: str, table: pa.Table, ids: np.ndarray) -> tuple[Part, ...]:
    """Write `table` as Parquet parts of at most PART_ROWS rows; ids [rows] are digested per row group."""
    fs.makedirs(folder, exist_ok=True)
    parts = []
    for number, start in enumerate(range(0, table.num_rows, PART_ROWS)):
        piece, piece_ids = table.slice(start, PART_ROWS), ids[start : start + PART_ROWS]
        groups = tuple(
            RowGroup(rows=len(g), id_digest=digest_ids(g))
            for g in (piece_ids[i : i + ROW_GROUP_ROWS] for i in range(0, len(piece_ids), ROW_GROUP_ROWS))
        )
        parts.append(write_part(fs, folder, f"part-{number:05d}.parquet", piece, groups))
    return tuple(parts)


def write_part(
    fs: Filesystem, folder: str, name: str, table: pa.Table, groups: tuple[RowGroup, ...], dense: bool = False
) -> Part:
    """One Parquet file whose row groups are exactly `groups`, written through to the disk.

    dense: floats that hardly repeat: without a dictionary, their bytes split by place (3.6 instead of 5.4 bytes a logit).
    """
    encoding: dict[str, Any] = {"use_dictionary": False, "use_byte_stream_split": True} if dense else {}
    path = f"{folder}/{name}"
    with fs.open(path, "wb") as f:
        with pq.ParquetWriter(f, table.schema, compression="zstd", write_page_checksum=True, **encoding) as writer:
            start = 0
            for group in groups:
                writer.write_table(table.slice(start, group.rows), row_group_size=group.rows)
                start += group.rows
        if isinstance(fs, LocalFileSystem):
            f.flush()
            os.fsync(f.fileno())
    return Part(path=name, bytes=fs.size(path), sha256=sha256_of(fs, path), rows=table.num_rows, row_groups=groups)

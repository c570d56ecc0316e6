"""Any Parquet of events with a schema becomes a stream."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from exfm.data.cut import Progress, equal_slices, window_slices, write_stream
from exfm.data.errors import UserError
from exfm.data.manifest import Stream, column_array
from exfm.data.schema import Schema, load_schema


def prepare_parquet(
    source: str | os.PathLike[str],
    schema: Schema | str | os.PathLike[str],
    out: str,
    num_slices: int | None = None,
    window_s: int | None = None,
    drop_extra: bool = False,
    progress: Progress | None = None,
) -> Stream:
    """Write a stream from one Parquet file, or all those under a folder in the order of their paths.

    schema: a Schema or its YAML file. Exactly one of num_slices (about equal counts) and window_s (seconds per slice) says
    how to cut. Types are changed only where no value changes, but for doubles, which are rounded to float32; timestamps
    may be Arrow timestamps. Rows are sorted by timestamp (stable); an absent id column becomes the row number after that.
    What was done is told to `progress` and kept in stream.json's `extra`. The source is held in memory as a whole.
    UserError where the source does not fit.
    """
    if (num_slices is None) == (window_s is None):
        raise UserError(f"num_slices is {num_slices} and window_s is {window_s}; give exactly one of them")
    schema = schema if isinstance(schema, Schema) else load_schema(Path(schema))
    files = _files(Path(source))
    tables, dropped = [], set()
    for number, path in enumerate(files):
        table, extra_columns = _read(path, schema, drop_extra)
        tables.append(table)
        dropped.update(extra_columns)
        if progress:
            progress("reading Parquet files", number + 1, len(files))
    if any(t.column_names != tables[0].column_names for t in tables):
        raise UserError(f"some files of {source} have column '{schema.id}' and some do not; make them alike")
    table, done = _sorted(pa.concat_tables(tables), schema, str(source))
    if dropped:
        done["dropped_columns"] = sorted(dropped)
    for what, value in done.items():
        if progress:
            progress(f"{what.replace('_', ' ')}: {value}", 1, 1)
    timestamps = table.column(schema.timestamp).to_numpy()
    cuts = equal_slices(timestamps, num_slices) if num_slices is not None else window_slices(timestamps, window_s or 0)
    return write_stream(out, schema, table, cuts, progress=progress, extra=done)


def _files(source: Path) -> list[Path]:
    if source.is_dir() and (files := sorted(source.rglob("*.parquet"))):
        return files
    if source.is_file():
        return [source]
    what = "has no *.parquet files" if source.is_dir() else "does not exist"
    raise UserError(f"source {source} {what}; name a Parquet file or a folder of them")


def _read(path: Path, schema: Schema, drop_extra: bool) -> tuple[pa.Table, list[str]]:
    """The schema's columns of one file, in its types, and the names of the columns left out."""
    wanted = schema.feature_types() | schema.label_types()
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is no Parquet file, corrupt or truncated ({error}); write it again") from None
    found = file.schema_arrow.names
    missing = [name for name in wanted if name not in found and name != schema.id]
    extra = [name for name in found if name not in wanted]
    if missing:
        raise UserError(f"{path} lacks column(s) {', '.join(missing)} of the schema; it has {', '.join(found)}")
    if extra and not drop_extra:
        raise UserError(
            f"{path} has column(s) {', '.join(extra)} that the schema does not name; add them to it, or drop them with "
            "--drop-extra"
        )
    names = [name for name in wanted if name in found]
    groups = [_read_group(file, path, group, names) for group in range(file.metadata.num_row_groups)]
    table = pa.concat_tables(groups) if groups else file.schema_arrow.empty_table().select(names)
    return pa.table(
        {n: _fit(table.column(n), wanted[n], n == schema.timestamp, f"{path}: column '{n}'") for n in names}
    ), extra


def _read_group(file: pq.ParquetFile, path: Path, group: int, names: list[str]) -> pa.Table:
    try:
        return file.read_row_group(group, columns=names)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} row group {group} is corrupt or truncated ({error}); write the file again") from None


def _fit(values: pa.ChunkedArray, wanted: pa.DataType, is_time: bool, where: str) -> pa.ChunkedArray:
    """The values in the wanted type. UserError where the type does not fit or a value would change."""
    kind = values.type
    if pa.types.is_dictionary(kind):
        values, kind = values.cast(kind.value_type), kind.value_type
    if not _fits(kind, wanted) and not (is_time and pa.types.is_timestamp(kind)):
        remedy = (
            "; map it to integer ids first"
            if _text(kind) and wanted != pa.float32()
            else "; convert it, or mend the schema"
        )
        raise UserError(f"{where} is {kind}, the schema says {wanted}{remedy}")
    try:
        if pa.types.is_timestamp(kind):
            values = values.cast(pa.timestamp("s", kind.tz))
        if pa.types.is_boolean(kind):
            values = values.cast(pa.uint8())
        result = values.cast(wanted)
    except pa.ArrowException as error:
        raise UserError(
            f"{where} is {kind} and does not fit into {wanted} without loss ({error}); convert it first"
        ) from None
    if wanted == pa.float32() and pc.sum(pc.is_inf(result)) != pc.sum(pc.is_inf(values.cast(pa.float64()))):
        raise UserError(f"{where} has values beyond float32's largest, 3.4e38; scale or clip it first")
    return result


def _fits(kind: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether values of one type may be cast, value by value, to the other."""
    if pa.types.is_list(wanted):
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        return is_list and _fits(kind.value_type, wanted.value_type)
    if wanted == pa.float32():
        return pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)
    return bool(pa.types.is_integer(kind))


def _text(kind: pa.DataType) -> bool:
    inner = kind.value_type if pa.types.is_list(kind) else kind
    return pa.types.is_string(inner) or pa.types.is_large_string(inner) or pa.types.is_binary(inner)


def _sorted(table: pa.Table, schema: Schema, source: str) -> tuple[pa.Table, dict[str, object]]:
    """The table in order of time, with ids, and what had to be done for it."""
    done: dict[str, object] = {}
    if nulls := table.column(schema.timestamp).null_count:
        raise UserError(f"{source}: column '{schema.timestamp}' has {nulls} nulls, none are allowed")
    timestamps = table.column(schema.timestamp).to_numpy()
    if (np.diff(timestamps) < 0).any():
        table = table.take(pa.array(np.argsort(timestamps, kind="stable")))
        done["sorted_by"] = schema.timestamp
    if schema.id not in table.column_names:
        table = table.append_column(schema.id, pa.array(np.arange(table.num_rows)))
        done["row_numbers_as"] = schema.id
    return pa.table({name: column_array(table, name) for name in table.column_names}), done

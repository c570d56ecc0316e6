"""Criteo's display ads logs as a stream: tab-separated, label, 13 counts, 26 categories of 8 hexadecimal digits.

Both layouts: `train.txt` of the Kaggle challenge, and `day_0` to `day_23` of the terabyte logs, plain or .gz. The logs have no
timestamps, only an order: example n is given second n. Files are read block by block; a slice is all that is held.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from exfm.data.cut import Progress, new_stream
from exfm.data.errors import UserError
from exfm.data.manifest import Stream, commit_stream
from exfm.data.schema import Schema, SparseColumn
from exfm.data.writer import write_slice

COUNTS = tuple(f"I{i}" for i in range(1, 14))
CATEGORIES = tuple(f"C{i}" for i in range(1, 27))
SCHEMA = Schema(
    name="criteo", labels=("click",), dense=COUNTS, sparse=tuple(SparseColumn(name=name) for name in CATEGORIES)
)
DIGITS = 8
BLOCK_BYTES = 1 << 24
DAY = re.compile(r"day_(\d+)(\.gz)?")
NIBBLES = np.full(256, 255, np.int64)  # of a character
NIBBLES[[ord(c) for c in "0123456789abcdef"]] = range(16)
NIBBLES[[ord(c) for c in "ABCDEF"]] = range(10, 16)
REMEDY = "name train.txt of the Kaggle challenge, a day_N or day_N.gz of the terabyte logs, or a folder of these days"


def prepare_criteo(source: Path, out: str, slice_rows: int, progress: Progress | None = None) -> Stream:
    """Write a stream of slices of `slice_rows` examples in the order of the files; the last of every file may have fewer.

    Counts stay as they are, -1 to millions, missing ones null (give them `log1p: true` in a job); categories become the 32-bit
    number that they are, missing ones null. UserError for a file of another form, naming it and the row.
    """
    if slice_rows < 1:
        raise UserError(f"--rows is {slice_rows}; at least 1 example per slice is needed")
    files = _files(source)
    stream, index, row = new_stream(out, SCHEMA, 0), 0, 0
    for path in files:
        begin = row
        for table in _slices(path, slice_rows, progress):
            examples = _examples(table, row, path, row - begin)
            write_slice(stream, index, row, row + len(examples), examples)
            index, row = index + 1, row + len(examples)
    return commit_stream(out, SCHEMA, index, {"files": [path.name for path in files]})


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if (source / "train.txt").is_file():
        return [source / "train.txt"]
    days = {int(m[1]): p for p in source.glob("day_*") if (m := DAY.fullmatch(p.name))} if source.is_dir() else {}
    if not days:
        raise UserError(f"source {source} has none of Criteo's files; {REMEDY}")
    return [days[day] for day in sorted(days)]


def _slices(path: Path, rows: int, progress: Progress | None) -> Iterator[pa.Table]:
    """Tables of `rows` rows, the last one of what is left."""
    held: list[pa.RecordBatch] = []
    size = path.stat().st_size
    with path.open("rb") as raw:
        for batch in _batches(path, raw):
            held.append(batch)
            if progress:
                progress(f"reading {path.name}", min(raw.tell(), size - 1), size)
            while sum(b.num_rows for b in held) >= rows:
                table = pa.Table.from_batches(held)
                yield table.slice(0, rows)
                held = table.slice(rows).to_batches()
    if sum(b.num_rows for b in held):
        yield pa.Table.from_batches(held)
    if progress:
        progress(f"reading {path.name}", size, size)


def _batches(path: Path, raw: BinaryIO) -> Iterator[pa.RecordBatch]:
    names = ("click", *COUNTS, *CATEGORIES)
    types = {"click": pa.int64()} | dict.fromkeys(COUNTS, pa.float32()) | dict.fromkeys(CATEGORIES, pa.string())
    opened = pa.CompressedInputStream(raw, "gzip") if path.suffix == ".gz" else raw
    try:
        yield from pyarrow.csv.open_csv(
            opened,
            pyarrow.csv.ReadOptions(column_names=names, block_size=BLOCK_BYTES),
            pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False),
            pyarrow.csv.ConvertOptions(column_types=types, null_values=[""], strings_can_be_null=True),
        )
    except (OSError, EOFError, pa.ArrowException) as error:
        raise UserError(
            f"{path} is not of Criteo's form, label, 13 counts and 26 categories between tabs: {error}; {REMEDY}"
        ) from None


def _examples(table: pa.Table, first: int, path: Path, in_file: int) -> pa.Table:
    """Rows of a file with the columns of SCHEMA. first: number of the first one; in_file: that in its file."""
    number = pa.array(np.arange(first, first + len(table)))
    columns: dict[str, pa.Array] = {SCHEMA.id: number, SCHEMA.timestamp: number}
    for name in CATEGORIES:
        columns[name] = _number(table.column(name).combine_chunks(), name, path, in_file)
    columns |= {name: table.column(name) for name in COUNTS}
    return pa.table(columns | {"click": table.column("click").cast(pa.float32())})


def _number(text: pa.Array, column: str, path: Path, first: int) -> pa.Array:
    """int64 of 8 hexadecimal digits each; nulls stay. UserError names the first row that has something else."""
    wrong = pc.not_equal(pc.binary_length(text), DIGITS).fill_null(False)
    if not pc.any(wrong).as_py():
        present = text.drop_null()
        # texts of one length lie one after the other
        values = NIBBLES[np.frombuffer(present.cast(pa.binary(DIGITS)).buffers()[1], np.uint8)].reshape(-1, DIGITS)[
            : len(present)
        ]
        if not (bad := (values > 15).any(axis=1)).any():
            out = np.zeros(len(text), np.int64)
            valid = text.is_valid().to_numpy(zero_copy_only=False)
            out[valid] = values @ (16 ** np.arange(DIGITS - 1, -1, -1, dtype=np.int64))
            return pa.array(out, mask=~valid)
        wrong = pc.is_in(text, value_set=pa.array([present[int(bad.argmax())].as_py()]))
    row = int(np.argmax(wrong.to_numpy(zero_copy_only=False)))
    raise UserError(
        f"{path}, row {first + row} of it, column {column}: '{text[row]}' is no category of {DIGITS} hexadecimal digits; {REMEDY}"
    )

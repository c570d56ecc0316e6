"""Frappe, mobile app usage: 10 fields of context and a label, as libFM text (frappe.*.libfm) or as Parquet.

The publisher's split is kept: training examples first, then those of validation, then of test, in slices of their own.
There are no timestamps, only an order: example n is given second n.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from exfm.data.cut import Cut, Progress, equal_slices, write_stream
from exfm.data.errors import UserError
from exfm.data.manifest import Stream, column_array
from exfm.data.schema import Schema, SparseColumn

# field -> number of its ids; libFM files count them on through all fields
FIELDS = {
    "user": 957, "item": 4082, "daytime": 7, "weekday": 7, "isweekend": 2, "homework": 3, "cost": 2, "weather": 9, "country": 80,
    "city": 233,
}  # fmt: skip
SCHEMA = Schema(name="frappe", user="user", labels=("used",), sparse=tuple(SparseColumn(name=name) for name in FIELDS))
SPLITS = {"train": ("train",), "validation": ("validation", "valid"), "test": ("test",)}
REMEDY = "name a folder with frappe.train.libfm, frappe.validation.libfm and frappe.test.libfm, or train, valid and test.parquet"


def prepare_frappe(
    source: Path, out: str, num_slices: int = 50, progress: Progress | None = None, epochs: int = 1
) -> Stream:
    """Write a stream with `num_slices` slices of training and one each of validation and test, which stream.json names in `extra`.

    epochs: the training examples are written so many times, each in slices of its own; with `stream.shuffle_window` a job has
    every slice in another order.

    UserError for a missing file and one of another form, naming it and the line.
    """
    if epochs < 1:
        raise UserError(f"--epochs is {epochs}; the training examples are written at least once")
    tables = {}
    for number, split in enumerate(SPLITS):
        tables[split] = _read(_find(source, split))
        if progress:
            progress("reading", number + 1, len(SPLITS))
    cuts, row = [], 0
    passes = [("train", tables["train"])] * epochs + [(split, tables[split]) for split in ("validation", "test")]
    for split, table in passes:
        wanted = num_slices if split == "train" else 1
        cuts += [
            Cut(c.row0 + row, c.row1 + row, c.t0 + row, c.t1 + row) for c in equal_slices(np.arange(len(table)), wanted)
        ]
        row += len(table)
    number = pa.array(np.arange(row))
    table = pa.concat_tables([table for _, table in passes])
    columns = {name: column_array(table, name) for name in (*FIELDS, "used")}
    trained = num_slices * epochs
    extra = {"first_slice": {"train": 0, "validation": trained, "test": trained + 1}}
    return write_stream(
        out,
        SCHEMA,
        pa.table({SCHEMA.id: number, SCHEMA.timestamp: number} | columns),
        cuts,
        progress=progress,
        extra=extra,
    )


def _find(source: Path, split: str) -> Path:
    for name in SPLITS[split]:
        for path in (source / f"frappe.{name}.libfm", source / f"{name}.libfm", source / f"{name}.parquet"):
            if path.is_file():
                return path
    raise UserError(f"source {source} has no {split} file of Frappe; {REMEDY}")


def _read(path: Path) -> pa.Table:
    """Columns of FIELDS, counted from 0 in every field, and `used`, 0 or 1."""
    try:
        columns = _parquet(path) if path.suffix == ".parquet" else _libfm(path)
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read ({error}); {REMEDY}") from None
    for name, size in FIELDS.items():
        if (wrong := (columns[name] < 0) | (columns[name] >= size)).any():
            row = int(np.argmax(wrong))
            raise UserError(f"{path}, row {row}: {name} is {columns[name][row]}; its ids are 0 to {size - 1}; {REMEDY}")
    return pa.table({n: c for n, c in columns.items() if n != "used"} | {"used": columns["used"].astype(np.float32)})


def _parquet(path: Path) -> dict[str, np.ndarray]:
    table = pq.read_table(path)
    if missing := [name for name in (*FIELDS, "label") if name not in table.column_names]:
        raise UserError(f"{path} lacks column(s) {', '.join(missing)}; {REMEDY}")
    return {name: table.column(name).to_numpy() for name in FIELDS} | {"used": table.column("label").to_numpy()}


def _libfm(path: Path) -> dict[str, np.ndarray]:
    """Lines of `label id:1 id:1 ...`, a feature of every field in their order; label 1 or -1."""
    labels, rows = [], []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        label, *pairs = line.split() or [""]
        ids = [pair.removesuffix(":1") for pair in pairs]
        if label not in ("1", "-1", "0") or len(ids) != len(FIELDS) or not all(i.isdigit() for i in ids):
            raise UserError(
                f"{path}, line {number}: '{line[:80]}' is no label with {len(FIELDS)} features id:1; {REMEDY}"
            )
        labels.append(label == "1")
        rows.append([int(i) for i in ids])
    if not rows:
        raise UserError(f"{path} is empty; {REMEDY}")
    first = np.concatenate([[0], np.cumsum(list(FIELDS.values()))[:-1]])
    values = np.array(rows) - first
    return {name: values[:, i] for i, name in enumerate(FIELDS)} | {"used": np.array(labels)}

"""A commit or snapshot for other programs: dense part as safetensors, tables as safetensors or Parquet, one manifest.

OUT/dense.safetensors          dense.* under their canonical names
OUT/tables/item-00000.parquet  row i64, values FixedSizeList<float>, adagrad_sum FixedSizeList<float> where wanted
OUT/tables/item-00000.safetensors   weight [rows, width], adagrad_sum [rows, segments]; rows are consecutive
OUT/export.json                what was exported, which rows each file holds; written last
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor

from exfm.checkpoints.layout import DTYPE_NAMES, bytes_of, header
from exfm.checkpoints.view import View
from exfm.data.commit import Filesystem, commit_json, open_folder
from exfm.data.errors import UserError
from exfm.launch.checkpoints import Place, Progress

Format = Literal["safetensors", "parquet"]
MANIFEST = "export.json"
FORMAT = 1


@dataclass
class Out:
    """The folder that is written, and how far that is."""

    fs: Filesystem
    root: str
    progress: Progress
    total: int
    done: int = 0

    @contextmanager
    def file(self, path: str) -> Iterator[Any]:
        """A new file, durable afterwards where it is local."""
        full = f"{self.root}/{path}"
        self.fs.makedirs(full.rsplit("/", 1)[0], exist_ok=True)
        with self.fs.open(full, "wb") as f:
            yield f
            if isinstance(self.fs, LocalFileSystem):
                f.flush()
                os.fsync(f.fileno())

    def size(self, path: str) -> int:
        return int(self.fs.size(f"{self.root}/{path}"))

    def count(self, num_bytes: int) -> None:
        self.done += num_bytes
        self.progress("exporting, bytes", min(self.done, self.total), self.total)


def export(
    where: Place, out_url: str, tables: Format, rows_per_file: int, sums: bool, progress: Progress
) -> dict[str, Any]:
    """Write a commit into a new folder; what export.json says. Memory is bounded by a part of a table, not by the table.

    sums: with the tables' Adagrad sums. UserError for a folder that is not empty.
    """
    if rows_per_file < 1:
        raise UserError(f"--rows-per-file is {rows_per_file}; use 1 or more")
    fs, root = open_folder(out_url)
    if fs.exists(root) and fs.ls(root, detail=False):
        raise UserError(f"{out_url} is not empty; export into a new folder")
    with where.opened() as (found, folders):
        view = View(folders)
        dense = [n for n in view.names if n.startswith("dense.")]
        kinds = ["weight", "adagrad_sum"] if sums else ["weight"]
        if missing := [t for t in view.tables if sums and f"tables.{t}.adagrad_sum" not in view.names]:
            raise UserError(f"{found.folder} has no Adagrad sums of {', '.join(missing)}; leave out --adagrad-sums")
        names = dense + [f"tables.{t}.{kind}" for t in view.tables for kind in kinds]
        out = Out(fs, root, progress, sum(view.bytes(n) for n in names))
        _safetensors(out, "dense.safetensors", view, {n: (n, 0, _rows(view, n)) for n in dense})
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "of": {"folder": found.folder, "name": found.name, "sum": found.manifest["sum"]},
            "dense": {"path": "dense.safetensors", "bytes": out.size("dense.safetensors"), "tensors": dense},
            "tables": {t: _table(out, view, t, kinds, tables, rows_per_file) for t in view.tables},
        }
        manifest |= {k: found.manifest[k] for k in ("position", "step", "slice", "version") if k in found.manifest}
        commit_json(fs, f"{root}/{MANIFEST}", manifest)
    return manifest


def _rows(view: View, name: str) -> int:
    shape = view.shape(name)
    return shape[0] if shape else 1


def _table(out: Out, view: View, table: str, kinds: Sequence[str], form: Format, at_once: int) -> dict[str, Any]:
    name = f"tables.{table}.weight"
    rows, width = view.shape(name)
    files = []
    for number, first in enumerate(range(0, rows, at_once)):
        last = min(first + at_once, rows)
        # a table's name is whatever the checkpoint says: quoted, it cannot leave the folder
        path = f"tables/{quote(table, safe='')}-{number:05d}.{form}"
        if form == "safetensors":
            _safetensors(out, path, view, {kind: (f"tables.{table}.{kind}", first, last) for kind in kinds})
        else:
            _parquet(out, path, view, table, kinds, first, last)
        files.append({"path": path, "bytes": out.size(path), "rows": [first, last]})
    return {"rows": rows, "width": width, "dtype": DTYPE_NAMES[view.dtype(name)], "format": form, "files": files}


def _safetensors(out: Out, path: str, view: View, tensors: dict[str, tuple[str, int, int]]) -> None:
    """One file. tensors: name in the file -> (name in the checkpoint, first row, last row)."""
    ordered = sorted(tensors.items(), key=lambda t: -view.dtype(t[1][0]).itemsize)  # keeps every tensor aligned
    described = []
    for own, (name, first, last) in ordered:
        shape = view.shape(name)
        described.append((own, view.dtype(name), (last - first, *shape[1:]) if shape else ()))
    with out.file(path) as f:
        f.write(header(described)[0])
        for _, (name, first, last) in ordered:
            for part in _parts(out, view, name, first, last):
                f.write(bytes_of(part[1]))


def _parquet(out: Out, path: str, view: View, table: str, kinds: Sequence[str], first: int, last: int) -> None:
    columns = {"weight": "values", "adagrad_sum": "adagrad_sum"}
    widths = {kind: view.shape(f"tables.{table}.{kind}")[1] for kind in kinds}
    types = {columns[k]: pa.list_(pa.float32(), widths[k]) for k in kinds}
    with out.file(path) as f, pq.ParquetWriter(f, pa.schema({"row": pa.int64()} | types)) as writer:
        for low, weights in _parts(out, view, f"tables.{table}.weight", first, last):
            arrays: dict[str, Any] = {"row": pa.array(range(low, low + len(weights)), pa.int64())}
            arrays["values"] = _lists(weights)
            if "adagrad_sum" in kinds:
                arrays["adagrad_sum"] = _lists(view.rows(f"tables.{table}.adagrad_sum", low, low + len(weights)))
            writer.write_table(pa.table(arrays, schema=writer.schema))


def _lists(rows: Tensor) -> pa.Array:
    """Rows [n, w] as lists of w floats; fp16 becomes fp32, which loses nothing."""
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.float().reshape(-1).numpy()), rows.shape[1])


def _parts(out: Out, view: View, name: str, first: int, last: int) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of a range of rows, a bounded number at a time."""
    step = next(iter(view.parts(name)), (0, 1))
    at_once = step[1] - step[0]
    for low in range(first, last, at_once):
        rows = view.rows(name, low, min(low + at_once, last))
        yield low, rows
        out.count(rows.numel() * rows.element_size())

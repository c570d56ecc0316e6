"""A chain of commits or snapshots as one state, read by rows whatever boxes its tensors lie in; in bounded memory."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from exfm.checkpoints.deltas import Patch, floats, patches
from exfm.checkpoints.layout import Chunk, Damaged, Entry
from exfm.checkpoints.reader import Folder
from exfm.checkpoints.sources import SCALE_BYTES, steps

PART_BYTES = 2**25


class View:
    """Tensors by canonical name: dtype, shape, rows. Int8 rows of snapshots are shown as the fp32 weights that they stand for.

    Damaged where a delta does not fit the chain's first folder, or a byte is not what was committed.
    """

    def __init__(self, folders: Sequence[Folder]) -> None:
        first, last = folders[0], folders[-1]
        self._where: dict[str, tuple[Folder, Entry, str]] = {}
        for name, entry in first.index.items():
            if name.startswith("tables."):
                _check_table(first, name, entry)
                self._where[name.removesuffix(".int8") + ".weight" * name.endswith(".int8")] = (first, entry, name)
        for name, entry in last.index.items():
            if not name.startswith(("tables.", "delta.")):
                self._where[name] = (last, entry, name)
        kinds = self._kinds(first)
        self._patches: dict[str, list[Patch]] = {}
        for folder in folders[1:]:
            for patch in patches(folder, first, kinds):
                self._patches.setdefault(patch.table, []).append(patch)

    @staticmethod
    def _kinds(first: Folder) -> list[str]:
        """What a delta of a chain that begins with this folder holds of every row."""
        ends = {name.rsplit(".", 1)[1] for name in first.index if name.startswith("tables.")}
        return [kind for kind in ("int8", "weight", "adagrad_sum") if kind in ends]

    @property
    def names(self) -> list[str]:
        return sorted(self._where)

    @property
    def tables(self) -> list[str]:
        return sorted(n.removeprefix("tables.").removesuffix(".weight") for n in self._where if _is_table(n))

    def dtype(self, name: str) -> torch.dtype:
        _, entry, stored = self._where[name]
        return torch.float32 if stored.endswith(".int8") else entry.dtype

    def shape(self, name: str) -> tuple[int, ...]:
        _, entry, stored = self._where[name]
        if stored.endswith(".int8"):
            return (entry.shape[0], entry.shape[1] - SCALE_BYTES * len(entry.columns))
        return entry.shape

    def bytes(self, name: str) -> int:
        return torch.Size(self.shape(name)).numel() * self.dtype(name).itemsize

    def parts(self, name: str, part_bytes: int = PART_BYTES) -> Iterator[tuple[int, int]]:
        """Ranges of rows of at most about part_bytes each; one range of one row for a tensor without dimensions."""
        shape = self.shape(name)
        row_bytes = max(1, torch.Size(shape[1:]).numel() * self.dtype(name).itemsize)
        return steps(shape[0] if shape else 1, max(1, part_bytes // row_bytes))

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows [first, last), all their columns, in new memory; a tensor without dimensions as one row."""
        folder, entry, stored = self._where[name]
        int8 = stored.endswith(".int8")
        columns = entry.columns if int8 else []
        out = torch.empty((last - first, *self.shape(name)[1:]), dtype=self.dtype(name))
        if not entry.shape:
            return out.copy_(folder.box(entry, entry.chunks[0], 0, 1))
        for chunk in entry.chunks:
            low, high = max(first, chunk.offsets[0]), min(last, chunk.offsets[0] + chunk.sizes[0])
            if low < high:
                box = folder.box(entry, chunk, low - chunk.offsets[0], high - low)
                _put(out, low - first, chunk, box, columns)
        if name.startswith("tables."):
            self.lay_over(name, first, 0, out)
        return out

    def lay_over(self, name: str, row: int, column: int, box: Tensor) -> None:
        """Put the rows of the chain's deltas over a box that begins at (row, column) of a table's tensor."""
        table, kind = name.removeprefix("tables.").rsplit(".", 1)
        for patch in self._patches.get(table, ()):
            patch.lay_over(kind, row, column, box)


def _is_table(name: str) -> bool:
    return name.startswith("tables.") and name.endswith(".weight")


def _check_table(folder: Folder, name: str, entry: Entry) -> None:
    int8 = name.endswith(".int8")
    if len(entry.shape) != 2 or (
        int8 and (entry.dtype != torch.uint8 or min(c.sizes[1] for c in entry.chunks) <= SCALE_BYTES)
    ):
        raise Damaged(f"{folder.storage.url}/{folder.folder}: {name} is no table")


def _put(out: Tensor, row: int, chunk: Chunk, box: Tensor, int8_columns: Sequence[int]) -> None:
    if int8_columns:
        box = floats(box)
        column = chunk.offsets[1] - SCALE_BYTES * int8_columns.index(chunk.offsets[1])
        out[row : row + len(box), column : column + box.shape[1]] = box
        return
    inner = tuple(slice(o, o + s) for o, s in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True))
    out[(slice(row, row + len(box)), *inner)] = box

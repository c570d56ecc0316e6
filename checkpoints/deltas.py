"""Deltas: of sharded tables only the rows touched since the commit before, everything else whole.

    delta.<table>@<row>,<column>,<segment>.{rows [n] i64, weight [n, width], adagrad_sum [n, 1]}

(row, column) is where the shard that wrote it begins in the table, rows are the table's, ascending; segment is the shard's place
among the column shards.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exfm.checkpoints.canonical import boxes
from exfm.checkpoints.layout import Damaged
from exfm.checkpoints.reader import Folder

NAME = re.compile(r"delta\.(?P<table>.+)@(?P<row>\d+),(?P<column>\d+),(?P<segment>\d+)\.rows")
AT_ONCE = 2**18


@dataclass(frozen=True)
class Patch:
    """The rows of one shard in a delta."""

    folder: Folder
    name: str
    table: str
    row: int
    column: int
    segment: int
    rows: Tensor

    def values(self, kind: str, first: int, last: int) -> Tensor:
        """Rows [first, last) of what it holds: kind is weight or adagrad_sum."""
        entry = self.folder.index[f"{self.name}.{kind}"]
        return self.folder.box(entry, entry.chunks[0], first, last - first)

    @property
    def width(self) -> int:
        """Columns of the table that it covers."""
        quantised = self.folder.index.get(f"{self.name}.int8")
        return quantised.shape[1] - 8 if quantised else self.folder.index[f"{self.name}.weight"].shape[1]


def delta_name(table: str, row: int, column: int, segment: int) -> str:
    return f"delta.{table}@{row},{column},{segment}"


def patches(folder: Folder, kinds: Sequence[str] = ("weight", "adagrad_sum")) -> list[Patch]:
    """The patches of a delta. Damaged where one lacks one of `kinds` or is no patch at all."""
    found = []
    for name in folder.index:
        if match := NAME.fullmatch(name):
            row, column, segment = (int(match[k]) for k in ("row", "column", "segment"))
            own, rows = name.removesuffix(".rows"), folder.tensor(name)
            found.append(Patch(folder, own, match["table"], row, column, segment, rows))
            _check(found[-1], kinds)
    return found


def _check(patch: Patch, kinds: Sequence[str]) -> None:
    rows = patch.rows
    entries = [patch.folder.index.get(f"{patch.name}.{kind}") for kind in kinds]
    whole = all(e is not None and len(e.chunks) == 1 and len(e.shape) == 2 and e.shape[0] == len(rows) for e in entries)
    if not whole or rows.dtype != torch.int64 or rows.dim() != 1 or not bool((rows[1:] > rows[:-1]).all()):
        raise Damaged(f"{patch.folder.storage.url}/{patch.folder.folder}: {patch.name} is no delta of a table's rows")


def apply_delta(folder: Folder, state: dict[str, Tensor]) -> None:
    """Put a delta's rows over the tables of `state`, as far as they live on this rank."""
    for patch in patches(folder):
        for kind, column, width in (("weight", patch.column, patch.width), ("adagrad_sum", patch.segment, 1)):
            tensor = state.get(f"tables.{patch.table}.{kind}")
            if tensor is not None:
                for offsets, box in boxes(tensor):
                    _put(patch, kind, column, width, offsets, box)


def _put(patch: Patch, kind: str, column: int, width: int, offsets: tuple[int, ...], box: Tensor) -> None:
    left, right = max(column, offsets[1]), min(column + width, offsets[1] + box.shape[1])
    if left >= right:
        return
    ends = torch.tensor([offsets[0], offsets[0] + len(box)])
    first, last = torch.searchsorted(patch.rows, ends).tolist()
    for start in range(first, last, AT_ONCE):
        stop = min(start + AT_ONCE, last)
        values = patch.values(kind, start, stop)[:, left - column : right - column]
        where = (patch.rows[start:stop] - offsets[0]).to(box.device)
        box[where, left - offsets[1] : right - offsets[1]] = values.to(box.device, box.dtype)

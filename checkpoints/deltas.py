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
from exfm.checkpoints.layout import Chunk, Damaged, Entry
from exfm.checkpoints.reader import Folder

NAME = re.compile(
    r"(?P<own>delta\.(?P<table>.+)@(?P<row>[0-9]{1,15}),(?P<column>[0-9]{1,15}),(?P<segment>[0-9]{1,15}))\.(?P<kind>\w+)"
)
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


def patches(folder: Folder, base: Folder | None, kinds: Sequence[str] = ("weight", "adagrad_sum")) -> list[Patch]:
    """The patches of a delta. Damaged where one lacks one of `kinds`, is no patch at all, or none of tables of `base`.

    base: the full state that the delta's chain begins with; None where that is unknown.
    """
    found = []
    for name in (n for n in folder.index if n.startswith("delta.")):
        match = NAME.fullmatch(name)
        if match is None or match["kind"] not in ("rows", *kinds) or f"{match['own']}.rows" not in folder.index:
            raise Damaged(f"{folder.storage.url}/{folder.folder}: {name} is no delta of a table's rows")
        if match["kind"] == "rows":
            found.append(_patch(folder, match))
            for kind in kinds:
                if not (_is_whole(found[-1], kind) and (base is None or _is_inside(found[-1], kind, base))):
                    raise Damaged(
                        f"{folder.storage.url}/{folder.folder}: {match['own']}.{kind} is no delta of a table's rows"
                    )
    return found


def _patch(folder: Folder, match: re.Match[str]) -> Patch:
    entry = folder.index[match[0]]
    if entry.dtype != torch.int64 or len(entry.shape) != 1:
        raise Damaged(f"{folder.storage.url}/{folder.folder}: {match[0]} is no list of rows")
    row, column, segment = (int(match[k]) for k in ("row", "column", "segment"))
    return Patch(folder, match["own"], match["table"], row, column, segment, folder.tensor(match[0]))


def _is_whole(patch: Patch, kind: str) -> bool:
    entry, rows = patch.folder.index.get(f"{patch.name}.{kind}"), patch.rows
    if entry is None or len(entry.chunks) != 1 or len(entry.shape) != 2 or entry.shape[0] != len(rows):
        return False
    typed = entry.dtype == torch.uint8 and entry.shape[1] > 8 if kind == "int8" else entry.dtype.is_floating_point
    ascending = bool((rows[1:] > rows[:-1]).all()) and (not len(rows) or int(rows[0]) >= patch.row)
    return typed and ascending and (kind != "adagrad_sum" or entry.shape[1] == 1)


def _is_inside(patch: Patch, kind: str, base: Folder) -> bool:
    """Whether the rows and columns are the table's."""
    entry, own = base.index.get(f"tables.{patch.table}.{kind}"), patch.folder.index[f"{patch.name}.{kind}"]
    if entry is None or len(entry.shape) != 2 or entry.dtype != own.dtype:
        return False
    if kind == "adagrad_sum":
        first = patch.segment
    else:  # int8 rows have eight bytes more for every column shard
        first = patch.column + (
            8 * sum(c.offsets[1] < patch.column for c in _first_row(entry)) if kind == "int8" else 0
        )
    fits = first + own.shape[1] <= entry.shape[1]
    return fits and (not len(patch.rows) or int(patch.rows[-1]) < entry.shape[0])


def _first_row(entry: Entry) -> list[Chunk]:
    return [c for c in entry.chunks if c.offsets[0] == 0]


def apply_delta(folder: Folder, state: dict[str, Tensor], base: Folder) -> None:
    """Put a delta's rows over the tables of `state`, as far as they live on this rank."""
    for patch in patches(folder, base):
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

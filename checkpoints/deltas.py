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
from exfm.checkpoints.sources import SCALE_BYTES

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

    @property
    def is_int8(self) -> bool:
        return f"{self.name}.int8" in self.folder.index

    def values(self, kind: str, first: int, last: int) -> Tensor:
        """Rows [first, last) of what it holds: kind is weight (of int8 rows, what they stand for) or adagrad_sum."""
        quantised = kind == "weight" and self.is_int8
        entry = self.folder.index[f"{self.name}.{'int8' if quantised else kind}"]
        stored = self.folder.box(entry, entry.chunks[0], first, last - first)
        return floats(stored) if quantised else stored

    @property
    def width(self) -> int:
        """Columns of the table that it covers."""
        kind, extra = ("int8", SCALE_BYTES) if self.is_int8 else ("weight", 0)
        return self.folder.index[f"{self.name}.{kind}"].shape[1] - extra

    def lay_over(self, kind: str, row: int, column: int, box: Tensor) -> None:
        """Put its rows over a box that begins at (row, column) of the table, as far as they meet."""
        at, width = (self.column, self.width) if kind == "weight" else (self.segment, 1)
        left, right = max(at, column), min(at + width, column + box.shape[1])
        first, last = torch.searchsorted(self.rows, torch.tensor([row, row + len(box)])).tolist()
        if left >= right:
            return
        for start in range(first, last, AT_ONCE):
            stop = min(start + AT_ONCE, last)
            values = self.values(kind, start, stop)[:, left - at : right - at]
            where = (self.rows[start:stop] - row).to(box.device)
            box[where, left - column : right - column] = values.to(box.device, box.dtype)


def floats(rows: Tensor) -> Tensor:
    """FBGEMM's 8-bit rows [n, w + 8] as fp32 [n, w]."""
    import fbgemm_gpu  # noqa: F401  (registers the operator)

    return torch.ops.fbgemm.Fused8BitRowwiseQuantizedToFloat(rows)


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
    typed = (
        entry.dtype == torch.uint8 and entry.shape[1] > SCALE_BYTES if kind == "int8" else entry.dtype.is_floating_point
    )
    ascending = bool((rows[1:] > rows[:-1]).all()) and (not len(rows) or int(rows[0]) >= patch.row)
    return typed and ascending and (kind != "adagrad_sum" or entry.shape[1] == 1)


def _is_inside(patch: Patch, kind: str, base: Folder) -> bool:
    """Whether the rows and columns are the table's."""
    entry, own = base.index.get(f"tables.{patch.table}.{kind}"), patch.folder.index[f"{patch.name}.{kind}"]
    if entry is None or len(entry.shape) != 2 or entry.dtype != own.dtype:
        return False
    # int8 rows have a scale and a bias for every column shard
    first = patch.segment if kind == "adagrad_sum" else patch.column + SCALE_BYTES * patch.segment * (kind == "int8")
    fits = first + own.shape[1] <= entry.shape[1]
    return fits and (not len(patch.rows) or int(patch.rows[-1]) < entry.shape[0])


def apply_delta(folder: Folder, state: dict[str, Tensor], base: Folder) -> None:
    """Put a delta's rows over the tables of `state`, as far as they live on this rank."""
    for patch in patches(folder, base):
        for kind in ("weight", "adagrad_sum"):
            tensor = state.get(f"tables.{patch.table}.{kind}")
            if tensor is not None:
                for (row, column), box in boxes(tensor):
                    patch.lay_over(kind, row, column, box)

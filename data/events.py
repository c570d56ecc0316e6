"""Label events and the examples that they are of, between their arrival and the end of the last window.

n examples of a slice, e events.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from exfm.data.inbox import TASK, VALUE
from exfm.data.schema import Schema

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Examples:
    """Ids [n] and timestamps [n] of one slice, in row order; `sorted` ids for looking up, `order` their rows."""

    ids: Ints
    timestamps: Ints
    sorted: Ints
    order: Ints

    @classmethod
    def of(cls, ids: Ints, timestamps: Ints) -> Self:
        order = np.argsort(ids, kind="stable")
        return cls(ids, timestamps, ids[order], order)

    def rows(self, ids: Ints) -> Ints:
        """Row [e] of every id, -1 where the slice has no such example."""
        if not len(self.ids):
            return np.full(len(ids), -1)
        at = np.minimum(np.searchsorted(self.sorted, ids), len(self.sorted) - 1)
        return np.where(self.sorted[at] == ids, self.order[at], -1)


@dataclass
class Known:
    """The examples that a label may still be of, by slice; those of the open slice under its future number."""

    slices: dict[int, Examples] = field(default_factory=dict)

    def find(self, ids: Ints) -> tuple[Ints, Ints]:
        """Slice [e] of every id, -1 for none, and the example's timestamp [e]."""
        slices, timestamps = np.full(len(ids), -1), np.zeros(len(ids), np.int64)
        for index, examples in self.slices.items():
            rows = examples.rows(ids)
            hit = rows >= 0
            slices[hit], timestamps[hit] = index, examples.timestamps[rows[hit]]
        return slices, timestamps


@dataclass
class Events:
    """Label events [e]. task: position in the schema's labels; value: 1, 0 or NaN (not observed); file: number of the file
    that it came in; settled: counted, as of a known example or of none."""

    ids: Ints
    task: Ints
    value: NDArray[np.float32]
    timestamps: Ints
    file: Ints
    settled: Bools

    @classmethod
    def none(cls) -> Self:
        empty = np.empty(0, np.int64)
        return cls(empty, empty, np.empty(0, np.float32), empty, empty, np.empty(0, bool))

    @classmethod
    def of(cls, table: pa.Table, schema: Schema, file: int) -> Self:
        task = pc.index_in(table.column(TASK), pa.array(schema.labels)).to_numpy().astype(np.int64)
        ids, timestamps = table.column(schema.id).to_numpy(), table.column(schema.timestamp).to_numpy()
        rows = table.num_rows
        return cls(ids, task, table.column(VALUE).to_numpy(), timestamps, np.full(rows, file), np.zeros(rows, bool))

    def __len__(self) -> int:
        return len(self.ids)

    def where(self, mask: Bools) -> Self:
        return self._made(lambda name: getattr(self, name)[mask])

    def plus(self, other: Self) -> Self:
        return self._made(lambda name: np.concatenate([getattr(self, name), getattr(other, name)]))

    def _made(self, column: Callable[[str], np.ndarray]) -> Self:
        return type(self)(**{f.name: column(f.name) for f in fields(self)})

    def labels(self, examples: Examples, task: int, within_s: float) -> NDArray[np.float32]:
        """The labels [n] of a slice: 1 with any positive event within so many seconds, else NaN with one that says so, else 0."""
        mine = self.where(self.task == task)
        rows = examples.rows(mine.ids)
        counts = (rows >= 0) & (mine.timestamps <= examples.timestamps[rows] + within_s) if len(mine) else rows >= 0
        out = np.zeros(len(examples.ids), np.float32)
        out[rows[counts & np.isnan(mine.value)]] = np.nan
        out[rows[counts & (mine.value == 1)]] = 1.0
        return out

"""The order of a slice's examples and how a global batch is cut over ranks.

Both are functions of (seed, slice, global batch size) and the data alone; the number of ranks only decides who takes which
contiguous piece of each global batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from exfm.data.hashing import hash64, salt_of

Rows = NDArray[np.int64]


@dataclass
class SliceOrder:
    """Order of the selected rows of one slice.

    num_rows: rows of the slice. selected: ascending rows that take part (a domain), None = all.
    window: rows are permuted inside consecutive windows of this many positions; 0 keeps the file's order.
    """

    num_rows: int
    selected: Rows | None
    window: int
    seed: int
    slice: int
    _cached: tuple[int, Rows] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return self.num_rows if self.selected is None else len(self.selected)

    def rows(self, start: int, stop: int) -> Rows:
        """Row numbers at positions [start, stop)."""
        if self.window <= 1:
            return self._in_file_order(start, stop)
        pieces = []
        while start < stop:
            number = start // self.window
            first = number * self.window
            end = min(stop, first + self.window)
            pieces.append(self._window(number)[start - first : end - first])
            start = end
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def _in_file_order(self, start: int, stop: int) -> Rows:
        return np.arange(start, stop, dtype=np.int64) if self.selected is None else self.selected[start:stop]

    def _window(self, number: int) -> Rows:
        if self._cached is None or self._cached[0] != number:
            first = number * self.window
            rows = self._in_file_order(first, min(first + self.window, len(self)))
            keys = hash64(np.arange(len(rows)), salt_of("order", self.seed, self.slice, number))
            self._cached = (number, rows[np.argsort(keys, kind="stable")])
        return self._cached[1]


@dataclass(frozen=True)
class Piece:
    """One rank's part of a global batch: positions [start, stop), padded to `size` rows; [first, last) is the whole batch."""

    start: int
    stop: int
    size: int
    first: int
    last: int


def pieces(
    num_examples: int, start: int, stop: int | None, global_batch: int, rank: int, world_size: int
) -> Iterator[Piece]:
    """This rank's piece of every global batch between positions start and stop (default: the end), in order."""
    end = num_examples if stop is None else min(stop, num_examples)
    for first in range(start, end, global_batch):
        last = min(first + global_batch, end)
        size = -(-(last - first) // world_size)
        mine = min(first + rank * size, last)
        yield Piece(mine, min(mine + size, last), size, first, last)

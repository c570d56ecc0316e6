"""How often every id of a column occurs, and in how many batches."""

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Ints = NDArray[np.int64]

PENDING = 1 << 20
MIN_FREQUENCY = 10  # rarer ids are too noisy for the fit


def _none() -> Ints:
    return np.empty(0, np.int64)


@dataclass
class Counter:
    """Counts of one column; 24 bytes for every distinct id. Call `finish` before reading them.

    ids, lookups, batches [distinct]: an id, how often it occurs, in how many batches. rates: distinct ids / ids of every
    whole batch that has ids, or of the only one.
    """

    batch: int
    examples: int = 0
    present: int = 0
    rates: list[float] = field(default_factory=list)
    ids: Ints = field(default_factory=_none)
    lookups: Ints = field(default_factory=_none)
    batches: Ints = field(default_factory=_none)
    _filling: list[Ints] = field(default_factory=list)
    _pending: list[tuple[Ints, Ints]] = field(default_factory=list)
    _num_pending: int = 0

    def add(self, column: pa.Array) -> None:
        """Count the next examples: a column of ids, or of lists of ids."""
        start = 0
        while start < len(column):
            piece = column.slice(start, self.batch - self.examples % self.batch)
            is_list = pa.types.is_list(piece.type)
            lengths = pc.list_value_length(piece).fill_null(0) if is_list else piece.is_valid()
            self.present += int(np.count_nonzero(lengths.to_numpy(zero_copy_only=False)))
            values = (piece.flatten() if is_list else piece).drop_null()
            self._filling.append(values.to_numpy(zero_copy_only=False))
            self.examples += len(piece)
            start += len(piece)
            if self.examples % self.batch == 0:
                self._close()

    def finish(self) -> None:
        self._close()
        self._merge()

    def _close(self) -> None:
        """End a batch."""
        values = np.concatenate([_none(), *self._filling])
        self._filling = []
        if not len(values):
            return
        found, counts = np.unique(values, return_counts=True)
        if self.examples % self.batch == 0 or self.examples < self.batch:
            self.rates.append(len(found) / len(values))
        self._pending.append((found, counts))
        self._num_pending += len(found)
        if self._num_pending > max(PENDING, len(self.ids)):
            self._merge()

    def _merge(self) -> None:
        """Add what is pending to the counts; done at doubling sizes, so that an id is sorted a few times only."""
        if not self._pending:
            return
        ids = np.concatenate([self.ids, *(found for found, _ in self._pending)])
        lookups = np.concatenate([self.lookups, *(counts for _, counts in self._pending)])
        batches = np.concatenate([self.batches, np.ones(self._num_pending, np.int64)])
        order = np.argsort(ids, kind="stable")
        starts = np.flatnonzero(np.append(True, np.diff(ids[order]) != 0))
        self.ids = ids[order][starts]
        self.lookups, self.batches = (np.add.reduceat(counts[order], starts) for counts in (lookups, batches))
        self._pending, self._num_pending = [], 0


def zipf_exponent(frequencies: Ints) -> float:
    """a >= 0 of frequency ~ rank**-a, by least squares of the logarithms. frequencies: descending.

    A rank weighs 1 / rank, its share of the logarithmic axis: weighed alike, the many rare ids, in the order of their
    noise, would make a slope of their own. 0 where fewer than two ids occur MIN_FREQUENCY times.
    """
    frequent = frequencies[frequencies >= MIN_FREQUENCY]
    if len(frequent) < 2:
        return 0.0
    ranks = np.arange(1, len(frequent) + 1)
    slope = np.polyfit(np.log(ranks), np.log(frequent), 1, w=ranks**-0.5)[0]
    return max(0.0, -float(slope))

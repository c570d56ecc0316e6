"""What a cache of a table's rows in device memory would miss, from the statistics of its columns, in TorchRec's form."""

import math
from collections.abc import Sequence

from torchrec.distributed.types import CacheStatistics

from exfm.data.stats import ColumnStats, StreamStats


class TableCache(CacheStatistics):
    """Of a table that some columns look up. rows: of the table; examples: of one step of all ranks that share the table.

    A column has D distinct ids in N lookups and d in the n lookups of a measured batch; in between distinct ids grow by Heaps' law,
    d (x / n)^b, which those two points fix. Ids of different columns are taken to be different rows.
    """

    def __init__(self, columns: Sequence[ColumnStats], stats: StreamStats, rows: int, examples: int) -> None:
        self.columns, self.rows = columns, rows
        self.lookups = [min(self._distinct(c, stats, examples), float(rows)) for c in columns]
        self.ids = sum(min(c.distinct, rows) for c in columns)

    @staticmethod
    def _distinct(column: ColumnStats, stats: StreamStats, examples: int) -> float:
        measured, wanted = column.pooling * stats.batch, column.pooling * examples
        some, whole = column.unique_rate * measured, column.pooling * stats.examples
        if not some:
            return 0.0
        growth = math.log(max(column.distinct / some, 1.0)) / math.log(whole / measured) if whole > measured else 1.0
        return float(min(some * (wanted / measured) ** min(growth, 1.0), wanted))

    @property
    def expected_lookups(self) -> float:
        """Distinct rows that a step of all ranks looks up."""
        return min(sum(self.lookups), float(self.rows))

    def expected_miss_rate(self, clf: float) -> float:
        """Share of those that are not among the hottest rows. clf: share of the table's rows that the cache holds."""
        total = sum(self.lookups)
        if clf >= 1 or not total:
            return 0.0
        cached = min(clf * self.rows / max(self.ids, 1), 1.0)  # the same share of every column's ids
        return sum(n * c.miss_ratio(cached) for n, c in zip(self.lookups, self.columns, strict=True)) / total

    @property
    def cacheability(self) -> float:
        """0: a small cache misses nothing, 1: any cache misses everything; the area under the miss curve."""
        return sum(self.expected_miss_rate(i / 20) for i in range(21)) / 21

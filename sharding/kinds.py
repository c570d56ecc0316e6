"""The tables of one rank as TorchRec treats them: all of one sharding type together, with what passes through them in a step.

B examples of all ranks, b of this one; sizes in bytes, averages where they are random.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torchrec.distributed.types import ParameterSharding

from exfm.embeddings.config import FeaturesConfig, SparseFeature, TableConfig, Tables

FLOAT, ID, LENGTH = 4, 8, 4  # of a pooled value or a weight, of an id or an offset, of a length
ROW = {"fp32": 4, "fp16": 2}  # of a value of a table
ON_NODES = ("table_row_wise", "grid_shard")
REDUCED = ("row_wise", *ON_NODES)
PERMUTED = ("column_wise", "table_column_wise", "grid_shard")


@dataclass(frozen=True)
class Kind:
    """All tables of one sharding type in one collection.

    pooled: this rank's outputs for B examples (of data-parallel tables for b); reduced: of those after the reduction within a node;
    received: [b, all widths]; local: id lists of b examples before they are sent; lists: received ids and weights; lengths: of
    those; gradient: of data-parallel tables, in backward; sorting: of FBGEMM's backward; split: lookups of several kernels are
    joined; alone: one rank has all outputs.
    """

    name: str
    pooled: int
    reduced: int
    received: int
    local: int
    lists: int
    lengths: int
    gradient: int
    sorting: int
    split: bool
    alone: bool

    @property
    def prepared(self) -> int:
        """The id lists in order of features, and once more cut by rows."""
        return (2 if self.name in REDUCED else 1) * self.local


def own_shards(parameter: ParameterSharding, rank: int, table: TableConfig) -> list[tuple[int, int]]:
    """Shapes of a rank's shards of a table."""
    if parameter.sharding_type == "data_parallel":
        return [(table.rows, table.width)]
    shards = parameter.sharding_spec.shards  # type: ignore[union-attr]
    return [(s.shard_sizes[0], s.shard_sizes[1]) for s in shards if s.placement.rank() == rank]


@dataclass(frozen=True)
class Ranks:
    """A rank among others, and its examples. pooling: ids per example of every feature, on average."""

    rank: int
    world_size: int
    ranks_per_node: int
    local_batch: int
    pooling: Mapping[str, float]

    def kind(
        self, name: str, sharded: Mapping[str, ParameterSharding], features: FeaturesConfig, tables: Tables
    ) -> Kind:
        b, everywhere = self.local_batch, name == "data_parallel"
        examples = b if everywhere else b * self.world_size
        columns = width = gradient = own_features = 0
        lists = local = 0.0
        sorts: dict[str, Sorting] = {}
        for name_of_table, parameter in sharded.items():
            table = tables[name_of_table]
            users = [f for f in features.sparse if f.table == name_of_table]
            list_bytes = sum(self.pooling[f.name] * (ID + FLOAT * f.weighted) for f in users)
            local += self._local(parameter, len(users), list_bytes)
            width += table.width * len(users)
            for rows, cols in own_shards(parameter, self.rank, table):
                columns += cols * len(users)
                sorting = sorts.setdefault(table.dtype, Sorting())
                if everywhere:  # accumulated in fp32, then cast
                    gradient += rows * cols * (FLOAT + (0 if table.dtype == "fp32" else ROW["fp16"]))
                    continue
                own_features += len(users)
                lists += examples * rows / table.rows * list_bytes
                sorting.add(sum(self.pooling[f.name] for f in users) * examples * rows / table.rows, rows, users)
        pooled = examples * columns * FLOAT
        return Kind(
            name=name,
            pooled=pooled,
            reduced=pooled // self.ranks_per_node if name in ON_NODES else 0,
            received=b * width * FLOAT,
            local=int(local),
            lists=int(lists),
            lengths=own_features * examples * LENGTH,
            gradient=gradient,
            sorting=int(max((s.kept + s.passing for s in sorts.values()), default=0)),
            split=len(sorts) > 1,
            alone=len(_holders(sharded.values())) == 1,
        )

    def batch(self, features: FeaturesConfig) -> int:
        """One local batch."""
        ids = sum(self.pooling[f.name] * (ID + FLOAT * f.weighted) for f in features.sparse)
        return int(self.local_batch * (ids + len(features.sparse) * LENGTH + len(features.dense) * FLOAT))

    def _local(self, parameter: ParameterSharding, num_features: int, list_bytes: float) -> float:
        """Column shards each get the ids; lengths are per part of the rows."""
        kind = parameter.sharding_type
        parts = self.world_size if kind == "row_wise" else self.ranks_per_node if kind in ON_NODES else 1
        shards = parameter.sharding_spec.shards if parameter.sharding_spec else []  # type: ignore[union-attr]
        times = len({s.shard_offsets[1] for s in shards}) or 1
        return times * self.local_batch * (list_bytes + num_features * LENGTH * parts)


def _holders(sharded: Iterable[ParameterSharding]) -> set[int]:
    specs = [p.sharding_spec for p in sharded if p.sharding_spec is not None]
    return {s.placement.rank() for spec in specs for s in spec.shards}  # type: ignore[union-attr]


class Sorting:
    """With what a backward kernel of FBGEMM for CPU puts the ids of its tables in the order of rows (batched_csr2csc), outside
    torch's allocator. kept: while the kernel runs; passing: of one table at a time.
    """

    def __init__(self) -> None:
        self.kept = self.passing = 0.0

    def add(self, ids: float, rows: int, users: list[SparseFeature]) -> None:
        """A shard of a table, by the average number of its ids."""
        if not rows:
            return
        self.kept += 8 * rows * -math.expm1(-ids / rows)  # of every row that occurs, were all as likely
        shared, weighted = len(users) > 1, users[0].weighted
        if weighted:  # an example, a weight, a feature; pairs are sorted; weights have a gradient
            self.kept += 16 * ids
            self.passing = max(self.passing, 24 * ids)
        else:  # an example, and the feature of a table with several; rows and places are sorted, with a copy of each
            self.kept += (8 if shared else 4) * ids
            self.passing = max(self.passing, (16 if shared else 12) * ids)

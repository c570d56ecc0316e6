"""A plan as a value: what each table is sharded as and where, compact, with its costs; JSON and back; TorchRec's form on demand.

A table's shards are not listed: row-wise over 4,096 ranks is one line here. `where` holds the rank of every shard of a table_wise
or (table_)column_wise table, the node of every column of a table_row_wise or grid_shard one, nothing for what lies everywhere.
"""

from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torchrec.distributed.sharding_plan import placement
from torchrec.distributed.types import (
    CacheParams,
    EmbeddingModuleShardingPlan,
    EnumerableShardingSpec,
    ParameterSharding,
    ShardingPlan,
    ShardingType,
    ShardMetadata,
)

from exfm.data.commit import commit, open_folder
from exfm.data.errors import UserError
from exfm.sharding.candidates import EVERYWHERE, ON_NODES
from exfm.sharding.topology import Topology

TIMES = ("fwd_compute", "fwd_comms", "bwd_compute", "bwd_comms", "input_dist_comms", "prefetch_compute")


class ShardRun(BaseModel):
    """`count` shards in a row that are alike: [rows, columns], ms of a step by TorchRec's estimator, bytes by its storage estimator."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    count: int
    rows: int
    columns: int
    fwd_compute: float
    fwd_comms: float
    bwd_compute: float
    bwd_comms: float
    input_dist_comms: float
    prefetch_compute: float
    hbm: int
    host: int

    @property
    def ms(self) -> float:
        """As TorchRec adds up: without the distribution of ids, which a pipeline does during the step before."""
        return sum(getattr(self, part) for part in TIMES if part != "input_dist_comms")


class TablePlan(BaseModel):
    """One table. path: of its collection in the model; cache_load: of fused_uvm_caching."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    table: str
    path: str
    rows: int
    width: int
    sharding_type: str
    kernel: str
    column_width: int
    cache_load: float | None = None
    where: tuple[int, ...] = ()
    runs: tuple[ShardRun, ...]

    @property
    def num_shards(self) -> int:
        return sum(run.count for run in self.runs)

    def ranks(self, group_size: int, ranks_per_node: int) -> np.ndarray:
        """The rank of every shard."""
        if self.sharding_type in EVERYWHERE:
            return np.arange(group_size)
        if self.sharding_type in ON_NODES:
            return (np.array(self.where)[:, None] * ranks_per_node + np.arange(ranks_per_node)).reshape(-1)
        return np.array(self.where)

    def boxes(self) -> np.ndarray:
        """[shards, 4]: (row, column, rows, columns) of every shard."""
        rows, columns = self.each("rows").astype(int), self.each("columns").astype(int)
        if self.sharding_type == ShardingType.DATA_PARALLEL.value:
            return np.stack([0 * rows, 0 * rows, rows, columns], 1)
        blocks = rows.reshape(self.width // self.column_width, -1)
        row = (blocks.cumsum(axis=1) - blocks).reshape(-1)
        column = np.repeat(np.arange(len(blocks)) * self.column_width, blocks.shape[1])
        return np.stack([row, column, rows, columns], 1)

    def total(self, what: str) -> float:
        return sum(run.count * getattr(run, what) for run in self.runs)

    def each(self, what: str) -> np.ndarray:
        """A number of every shard."""
        return np.repeat([float(getattr(run, what)) for run in self.runs], [run.count for run in self.runs])


class Plan(BaseModel):
    """Where all tables of a model go. batch: examples of a rank and step. bound_ms: no plan is faster. reserved_*: bytes of every rank
    that are kept free for everything but tables and their inputs and outputs. inputs: digests of what the plan was made from.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    topology: Topology
    batch: int
    tables: tuple[TablePlan, ...]
    bound_ms: float
    reserved_hbm: int = 0
    reserved_host: int = 0
    inputs: dict[str, str] = Field(default_factory=dict)

    def ranks(self, table: TablePlan) -> np.ndarray:
        return table.ranks(self.topology.group_size, self.group_node)

    @property
    def group_node(self) -> int:
        """Ranks of a sharding group that are on one node."""
        return min(self.topology.ranks_per_node, self.topology.group_size)

    def by_rank(self, what: str) -> np.ndarray:
        """A number of all shards added up by rank of the sharding group: `ms`, a part of TIMES, `hbm` or `host`."""
        total = np.zeros(self.topology.group_size)
        for table in self.tables:
            np.add.at(total, self.ranks(table), table.each(what))
        return total

    @cached_property
    def ms(self) -> np.ndarray:
        """Step time of every rank by the perf model of TorchRec: the sum of its shards' times."""
        return self.by_rank("ms")

    @property
    def cost(self) -> float:
        """ms of the slowest rank."""
        return float(self.ms.max())

    @property
    def worst(self) -> int:
        return int(self.ms.argmax())

    def on_rank(self, rank: int) -> list[tuple[TablePlan, tuple[int, int, int, int]]]:
        """(table, box) of the shards on one rank of the group."""
        found = []
        for table in self.tables:
            for index in np.flatnonzero(self.ranks(table) == rank):
                row, column, rows, columns = (int(x) for x in table.boxes()[index])
                found.append((table, (row, column, rows, columns)))
        return found

    def torchrec(
        self,
        tables: Iterable[str] | None = None,
        stochastic_rounding: bool | None = None,
        first_rank: int = 0,
        prefetch: bool = False,
    ) -> ShardingPlan:
        """TorchRec's form, shard by shard. tables: of these alone; stochastic_rounding: of fp16 rows, None for TorchRec's default;
        first_rank: of the sharding group; prefetch: the pipeline fetches rows into caches ahead.
        """
        wanted = None if tables is None else set(tables)
        modules: dict[str, EmbeddingModuleShardingPlan] = defaultdict(EmbeddingModuleShardingPlan)
        for table in self.tables:
            if wanted is None or table.table in wanted:
                modules[table.path][table.table] = self._parameter(table, stochastic_rounding, first_rank, prefetch)
        return ShardingPlan(dict(modules))  # type: ignore[arg-type]

    def _parameter(
        self, table: TablePlan, stochastic_rounding: bool | None, first_rank: int, prefetch: bool
    ) -> ParameterSharding:
        ranks = (self.ranks(table) + first_rank).tolist()
        spec = None
        if table.sharding_type != ShardingType.DATA_PARALLEL.value:
            device = self.topology.device
            boxes = table.boxes().tolist()
            spec = EnumerableShardingSpec(
                [
                    ShardMetadata(
                        shard_offsets=box[:2], shard_sizes=box[2:], placement=placement(device, rank, self.group_node)
                    )
                    for box, rank in zip(boxes, ranks, strict=True)
                ]
            )
        cache = None
        if table.cache_load is not None:
            cache = CacheParams(load_factor=table.cache_load, prefetch_pipeline=prefetch or None)
        return ParameterSharding(
            table.sharding_type, table.kernel, ranks, spec, cache_params=cache, stochastic_rounding=stochastic_rounding
        )

    def write(self, path: str | Path) -> None:
        fs, where = open_folder(path)
        commit(fs, where, self.model_dump_json(indent=None).encode())


def read_plan(path: str | Path) -> Plan:
    """UserError where the file is not there or no plan."""
    try:
        return Plan.model_validate_json(Path(path).read_text())
    except OSError as error:
        raise UserError(
            f"plan {path} cannot be read: {error.strerror}; make one with `exfm plan CONFIG --out {path}`"
        ) from None
    except ValidationError as error:
        first: Any = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise UserError(f"{path} is no plan: {where}: {first['msg']}; make one with `exfm plan`") from None

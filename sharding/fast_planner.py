"""The planner: TorchRec's interface and TorchRec's estimators around our own search.

`plan_model` gives a Plan; `Planner` is a torchrec ShardingPlanner, for whoever calls TorchRec directly.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.types import ModuleSharder, ShardingPlan, ShardingPlanner, ShardingType

from exfm.data.errors import UserError
from exfm.sharding.candidates import BY_COLUMN, EVERYWHERE, ON_NODES, Candidate, Run, candidates_of, tables_of
from exfm.sharding.limits import shortfall, table_too_large
from exfm.sharding.plan import TIMES, Plan, ShardRun, TablePlan
from exfm.sharding.search import Problem, solve
from exfm.sharding.topology import Topology

CACHE_LOADS = (0.05, 0.1, 0.2, 0.4)  # shares of rows that fused_uvm_caching may keep on the device


class TableSharder(EmbeddingBagCollectionSharder):
    """TorchRec's sharder with row-wise types offered on CPU too: gloo has the collectives they need."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [kind.value for kind in ShardingType]


class Planner(ShardingPlanner):
    """A drop-in for torchrec's EmbeddingShardingPlanner. reserved: share of every rank's device memory (host memory on a CPU) that is
    not for tables.
    """

    def __init__(
        self,
        topology: Topology,
        batch_size: int,
        constraints: Mapping[str, ParameterConstraints] | None = None,
        reserved: float = 0.15,
    ) -> None:
        self.topology, self.batch_size, self.constraints, self.reserved = (
            topology,
            batch_size,
            constraints or {},
            reserved,
        )

    def plan(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> ShardingPlan:
        cuda = self.topology.device == "cuda"
        hbm = int(self.reserved * self.topology.hbm_bytes) if cuda else 0
        host = 0 if cuda else int(self.reserved * self.topology.host_bytes)
        return plan_model(
            module, sharders, self.topology, self.batch_size, self.constraints, reserved_hbm=hbm, reserved_host=host
        ).torchrec()

    def collective_plan(
        self,
        module: nn.Module,
        sharders: list[ModuleSharder[nn.Module]] | None = None,
        pg: dist.ProcessGroup | None = None,
    ) -> ShardingPlan:
        """Every rank plans for itself and comes to the same: nobody waits in a collective."""
        return self.plan(module, sharders or [TableSharder()])  # type: ignore[list-item]


def plan_model(
    module: nn.Module,
    sharders: Sequence[ModuleSharder[nn.Module]],
    topology: Topology,
    batch_size: int,
    constraints: Mapping[str, ParameterConstraints],
    cache_loads: Sequence[float] = CACHE_LOADS,
    pins: Mapping[str, Sequence[int]] | None = None,
    column_shards: Mapping[str, int] | None = None,
    reserved_hbm: int = 0,
    reserved_host: int = 0,
) -> Plan:
    """The plan found for the tables of a module (parameters on the meta device).

    batch_size: examples of a rank and step. pins: of some tables, the ranks that their shards may lie on;
    column_shards: of some, the width of column shards. The same on every
    machine and in every process. UserError where a table or all of them do not fit, with the arithmetic and remedies.
    """
    tables = tables_of(module, sharders)
    if not tables:
        raise UserError("there are no tables to plan; the model has no EmbeddingBagCollection")
    free = max(0, topology.hbm_bytes - reserved_hbm), max(0, topology.host_bytes - reserved_host)
    every = candidates_of(tables, sharders, topology.torchrec(), batch_size, constraints, cache_loads)
    every = [_of_width(own, (column_shards or {}).get(own[0].table.name)) for own in every]
    fitting = [[c for c in own if c.most("hbm") <= free[0] and c.most("host") <= free[1]] for own in every]
    for own, left in zip(every, fitting, strict=True):
        if not left:
            raise UserError(table_too_large(own, free, topology))
    hbm, host = (np.full(topology.group_size, float(size)) for size in free)
    numbers = {table.name: n for n, table in enumerate(tables)}
    pinned = {numbers[name]: np.array(sorted(ranks)) for name, ranks in (pins or {}).items()}
    local = min(topology.ranks_per_node, topology.group_size)
    solution, bound = solve(Problem(fitting, local, hbm, host, pinned))
    if solution is None:
        raise UserError(shortfall(fitting, hbm, host, topology))
    chosen = [fitting[t][c] for t, c in enumerate(solution.chosen)]
    planned = tuple(_table_plan(c, ranks, local) for c, ranks in zip(chosen, solution.ranks, strict=True))
    return Plan(
        topology=topology, batch=batch_size, tables=planned, bound_ms=bound.ms, reserved_hbm=reserved_hbm, reserved_host=reserved_host
    )  # fmt: skip


def _of_width(own: list[Candidate], width: int | None) -> list[Candidate]:
    """Those whose column shards have this width. UserError where there are none."""
    left = [c for c in own if width is None or c.sharding_type not in BY_COLUMN or c.column_width == width]
    if not left:
        widths = sorted({c.column_width for c in own})
        raise UserError(
            f"table '{own[0].table.name}' is {own[0].table.shape[1]} wide and column_shard is {width}: its column shards can be "
            f"{', '.join(map(str, widths))} wide (equal, multiples of 4, at least min_column_shard); choose one of these"
        )
    return left


def _table_plan(candidate: Candidate, ranks: np.ndarray, local: int) -> TablePlan:
    where: tuple[int, ...] = tuple(int(rank) for rank in ranks)
    if candidate.sharding_type in EVERYWHERE:
        where = ()
    elif candidate.sharding_type in ON_NODES:
        where = tuple(int(rank) // local for rank in ranks[::local])
    rows, width = candidate.table.shape
    return TablePlan(
        table=candidate.table.name,
        path=candidate.table.path,
        rows=rows,
        width=width,
        sharding_type=candidate.sharding_type,
        kernel=candidate.kernel,
        column_width=candidate.column_width,
        cache_load=candidate.cache_load,
        where=where,
        runs=tuple(_shard_run(run) for run in candidate.runs),
    )


def _shard_run(run: Run) -> ShardRun:
    times = {part: float(getattr(run.perf, part)) for part in TIMES}
    return ShardRun(count=run.count, rows=run.rows, columns=run.columns, hbm=run.hbm, host=run.host, **times)

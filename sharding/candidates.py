"""The ways in which each table can be sharded, each with what TorchRec's own estimators say that a shard costs.

All shards of one shape cost the same, on whichever rank they lie, so each distinct shape is estimated once: row-wise over
4,096 ranks is two estimates and not 4,096. t tables, c candidates of a table.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel as Kernel
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.planner import Topology as TorchRecTopology
from torchrec.distributed.planner.enumerators import get_partition_by_type
from torchrec.distributed.planner.types import Perf, Shard, ShardingOption
from torchrec.distributed.planner.utils import sharder_name
from torchrec.distributed.types import CacheParams, ModuleSharder, ShardingType

from exfm.data.errors import UserError
from exfm.sharding.judge import estimate

POOLING_FACTOR = 1.0  # as TorchRec assumes where nothing is known
EVERYWHERE = (ShardingType.DATA_PARALLEL.value, ShardingType.ROW_WISE.value)
BY_COLUMN = (ShardingType.COLUMN_WISE.value, ShardingType.TABLE_COLUMN_WISE.value, ShardingType.GRID_SHARD.value)
ON_NODES = (ShardingType.TABLE_ROW_WISE.value, ShardingType.GRID_SHARD.value)
# those of disks and virtual tables are offered by TorchRec's planner only where a constraint names them
UNGUARDED = (Kernel.DENSE.value, Kernel.FUSED.value, Kernel.FUSED_UVM.value, Kernel.FUSED_UVM_CACHING.value)
Sharders = Sequence[ModuleSharder[nn.Module]]


@dataclass(frozen=True)
class Table:
    """A table of a module. path: of its collection in the module; parameter: on the meta device."""

    name: str
    path: str
    module: nn.Module
    parameter: torch.Tensor
    features: tuple[str, ...]
    sharder: ModuleSharder[nn.Module]

    @property
    def shape(self) -> tuple[int, int]:
        return self.parameter.shape[0], self.parameter.shape[1]


@dataclass(frozen=True)
class Run:
    """`count` shards in a row that are alike (a pattern of runs may repeat). load: ms of a step; bytes of device and host memory."""

    count: int
    rows: int
    columns: int
    perf: Perf
    hbm: int
    host: int

    @property
    def load(self) -> float:
        return self.perf.total


@dataclass(frozen=True)
class Candidate:
    """One way to shard a table. column_width: of a shard that is cut by columns, else the table's; cache_load: share of the rows
    that fused_uvm_caching keeps in device memory.
    """

    table: Table
    sharding_type: str
    kernel: str
    column_width: int
    cache_load: float | None
    runs: tuple[Run, ...] = ()

    @property
    def num_shards(self) -> int:
        return sum(run.count for run in self.runs)

    def _each(self, what: str) -> np.ndarray:
        return np.repeat([float(getattr(run, what)) for run in self.runs], [run.count for run in self.runs])

    @cached_property
    def load(self) -> np.ndarray:
        """ms of every shard."""
        return self._each("load")

    @cached_property
    def hbm(self) -> np.ndarray:
        return self._each("hbm")

    @cached_property
    def host(self) -> np.ndarray:
        return self._each("host")

    @property
    def largest(self) -> float:
        """ms of the slowest shard."""
        return self.most("load")

    def most(self, what: str) -> float:
        return max(float(getattr(run, what)) for run in self.runs)

    def total(self, what: str) -> float:
        return sum(run.count * float(getattr(run, what)) for run in self.runs)


def tables_of(module: nn.Module, sharders: Sharders) -> list[Table]:
    """All tables that the sharders can shard, found as TorchRec's enumerator finds them."""
    by_name = {sharder_name(s.module_type): s for s in sharders}
    found: list[Table] = []
    queue = [("", module)]
    while queue:
        path, child = queue.pop()
        sharder = by_name.get(sharder_name(type(child)))
        if sharder is None:
            queue += [(f"{path}.{n}" if path else n, m) for n, m in child.named_children()]
            continue
        features = {c.name: tuple(c.feature_names) for c in child.embedding_bag_configs()}  # type: ignore[operator,union-attr]
        parameters = sharder.shardable_parameters(child)
        found += [Table(name, path, child, p, features[name], sharder) for name, p in parameters.items()]
    return sorted(found, key=lambda t: t.name)


def candidates_of(
    tables: Sequence[Table],
    sharders: Sharders,
    topology: TorchRecTopology,
    batch_size: int,
    constraints: Mapping[str, ParameterConstraints],
    cache_loads: Sequence[float],
) -> list[list[Candidate]]:
    """Every table's candidates, estimated. UserError for a table whose constraints leave none."""
    enumerated = [list(_enumerate(t, topology, constraints.get(t.name), cache_loads)) for t in tables]
    for table, own in zip(tables, enumerated, strict=True):
        if not own:
            wanted = constraints[table.name]
            raise UserError(
                f"table '{table.name}' {list(table.shape)} cannot be sharded as {wanted.sharding_types} with {wanted.compute_kernels} "
                f"on {topology.compute_device} over {topology.world_size} ranks: too few rows or no such kernel; allow another type "
                f"or kernel for it (sharding.tables.{table.name})"
            )
    flat = [one for own in enumerated for one in own]
    options = [_option(c, shapes, batch_size, constraints.get(c.table.name)) for c, shapes, _ in flat]
    estimate(options, sharders, topology, constraints)
    done = iter(
        replace(c, runs=tuple(_run(count, option.shards[shape]) for shape, count in pattern))
        for (c, _, pattern), option in zip(flat, options, strict=True)
    )
    return [[next(done) for _ in own] for own in enumerated]


# a candidate, its distinct shard shapes, and in the order of its shards (which shape, how many of it in a row)
Enumerated = tuple[Candidate, list[list[int]], list[tuple[int, int]]]


def _enumerate(
    table: Table, topology: TorchRecTopology, wanted: ParameterConstraints | None, cache_loads: Sequence[float]
) -> Iterator[Enumerated]:
    """A table's candidates, not yet estimated."""
    device = topology.compute_device
    types = (wanted and wanted.sharding_types) or table.sharder.sharding_types(device)
    for kind in [t for t in table.sharder.sharding_types(device) if t in types]:
        offered = table.sharder.compute_kernels(kind, device)
        kernels = (wanted and wanted.compute_kernels) or [k for k in offered if k in UNGUARDED]
        for kernel in [k for k in offered if k in kernels]:
            cuts = [(w, *_shapes(table, topology, kind, w)) for w in _widths(table.shape[1], kind, wanted)]
            if not any(shapes for _, shapes, _ in cuts):  # too few ranks for two columns
                cuts = [(table.shape[1], *_shapes(table, topology, kind, table.shape[1]))]
            for width, shapes, pattern in [cut for cut in cuts if cut[1]]:
                loads = cache_loads if kernel == Kernel.FUSED_UVM_CACHING.value else (None,)
                for load in loads:
                    yield Candidate(table, kind, kernel, width, load), shapes, pattern


def _widths(width: int, kind: str, wanted: ParameterConstraints | None) -> list[int]:
    """Widths of column shards: FBGEMM wants multiples of 4, TorchRec equal ones; the narrowest is a constraint."""
    if kind not in BY_COLUMN:
        return [width]
    narrowest = (wanted and wanted.min_partition) or 128  # TorchRec's MIN_CW_DIM
    return [w for w in range(4, width, 4) if width % w == 0 and w >= narrowest] or [width]


def _shapes(
    table: Table, topology: TorchRecTopology, kind: str, width: int
) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Distinct shard shapes and their pattern; none where the table cannot be cut so."""
    world, local = topology.world_size, topology.intra_group_size
    rows, columns = table.shape
    if kind == ShardingType.DATA_PARALLEL.value:
        return [[rows, columns]], [(0, world)]
    by_rows, by_columns = split_of(kind, world, local), columns // width
    # column shards share a rank only where there are fewer ranks than shards
    room = {ShardingType.TABLE_COLUMN_WISE.value: local, ShardingType.GRID_SHARD.value: world // by_rows}.get(
        kind, by_columns
    )
    if rows < by_rows or by_columns > room or (kind == ShardingType.GRID_SHARD.value and by_columns == 1):
        return [], []
    if by_rows == 1:
        return [[rows, width]], [(0, by_columns)]
    sizes = [size for size, _ in _row_blocks(rows, by_rows)]
    shapes = [[size, width] for size in dict.fromkeys(sizes)]
    pattern = [(list(dict.fromkeys(sizes)).index(size), count) for size, count in _row_blocks(rows, by_rows)]
    return shapes, pattern * by_columns


def split_of(kind: str, world: int, local: int) -> int:
    """Into how many row blocks a sharding type cuts a table (or a column of it)."""
    return world if kind == ShardingType.ROW_WISE.value else local if kind in ON_NODES else 1


def _row_blocks(rows: int, parts: int) -> list[tuple[int, int]]:
    """(rows, how many in a row) of TorchRec's row blocks: equal ones rounded up, the rest, and empty ones where there is none left."""
    block = -(-rows // parts)
    full, rest = divmod(rows, block)
    blocks = [(block, full), (rest, 1 if rest else 0), (0, parts - full - (1 if rest else 0))]
    return [(size, count) for size, count in blocks if count]


def _option(
    c: Candidate, shapes: list[list[int]], batch_size: int, wanted: ParameterConstraints | None
) -> ShardingOption:
    """TorchRec's form, with one shard of each distinct shape."""
    cache = wanted.cache_params if wanted else None
    if c.cache_load is not None:
        cache = CacheParams(load_factor=c.cache_load, stats=cache.stats if cache else None)
    return ShardingOption(
        name=c.table.name,
        tensor=c.table.parameter,
        module=(c.table.path, c.table.module),
        input_lengths=list(wanted.pooling_factors) if wanted else [POOLING_FACTOR],
        batch_size=batch_size,
        sharding_type=c.sharding_type,
        partition_by=get_partition_by_type(c.sharding_type),
        compute_kernel=c.kernel,
        shards=[Shard(size=size, offset=[0, 0]) for size in shapes],
        cache_params=cache,
        enforce_hbm=wanted.enforce_hbm if wanted else None,
        stochastic_rounding=wanted.stochastic_rounding if wanted else None,
        bounds_check_mode=wanted.bounds_check_mode if wanted else None,
        feature_names=list(c.table.features),
        output_dtype=wanted.output_dtype if wanted else None,
        is_pooled=True,
    )


def _run(count: int, shard: Shard) -> Run:
    assert shard.perf is not None and shard.storage is not None
    return Run(count, shard.size[0], shard.size[1], shard.perf, shard.storage.hbm, shard.storage.ddr)

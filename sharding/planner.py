"""Planning: TorchRec's planner on the launched topology, without a process group."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import ShardingPlan, ShardingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from exfm.data.errors import UserError
from exfm.embeddings.config import TableConfig
from exfm.sharding.config import ShardingConfig

GIB = 2**30
# tables in device memory (or on CPU); rows cached from host memory would have to be flushed before every save
KERNELS = (EmbeddingComputeKernel.FUSED.value, EmbeddingComputeKernel.DENSE.value)
RESERVED = 0.15  # share of memory kept for the dense part and activations

# it advises a factory for fleets whose hardware it looks up; ours comes from the config
logging.getLogger("torchrec.distributed.planner.types").setLevel(logging.ERROR)


class TableSharder(EmbeddingBagCollectionSharder):
    """TorchRec's sharder with row-wise types offered on CPU too: gloo has the collectives they need."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [kind.value for kind in ShardingType]


def plan_tables(
    model: nn.Module, config: ShardingConfig, device_type: str, world_size: int, local_world_size: int, local_batch: int
) -> ShardingPlan:
    """Plan the collections of `model` (on the meta device) for world_size ranks.

    local_batch: examples per rank and step. UserError for tables that cannot use so many ranks or do not fit.
    """
    topology = Topology(
        world_size=world_size,
        local_world_size=local_world_size,
        compute_device=device_type,
        hbm_cap=int(config.hbm_gib * GIB) if device_type == "cuda" else 0,
        ddr_cap=int(config.host_gib * GIB),
    )
    sharder = TableSharder()
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=local_batch,
        constraints=_constraints(model, config, world_size),
        storage_reservation=FixedPercentageStorageReservation(percentage=RESERVED),
    )
    try:
        return planner.plan(model, [sharder])  # type: ignore[list-item]
    except PlannerError as error:
        raise UserError(
            f"no plan for {world_size} rank(s) with {config.hbm_gib:g} GiB of device and {config.host_gib:g} GiB of host memory "
            f"each: {error}; use more ranks, allow row_wise (sharding.allowed), or store fp16 rows (tables.NAME.dtype)"
        ) from None


def _constraints(model: nn.Module, config: ShardingConfig, world_size: int) -> dict[str, ParameterConstraints]:
    tables = {c.name: c for m in _collections(model) for c in m.embedding_bag_configs()}
    if unknown := sorted(set(config.tables) - set(tables)):
        raise UserError(f"sharding.tables names {', '.join(unknown)}, but the tables are {', '.join(tables)}")
    constraints = {}
    for name, table in tables.items():
        allowed = config.tables.get(name, config.allowed)
        possible = [
            t for t in allowed if not (t in ("row_wise", "table_row_wise") and table.num_embeddings < world_size)
        ]
        if not possible:
            raise UserError(
                f"table '{name}' has {table.num_embeddings} rows, too few for {' or '.join(allowed)} over {world_size} ranks; "
                f"use at most {table.num_embeddings} ranks or allow data_parallel or table_wise for it (sharding.tables.{name})"
            )
        constraints[name] = ParameterConstraints(
            sharding_types=possible, compute_kernels=list(KERNELS), min_partition=config.min_column_shard
        )
    return constraints


def _collections(model: nn.Module) -> Iterable[EmbeddingBagCollection]:
    return (m for m in model.modules() if isinstance(m, EmbeddingBagCollection))


def describe(plan: ShardingPlan) -> list[dict[str, Any]]:
    """The plan as JSON-able rows: table, sharding type, kernel, and per shard rank, offsets, sizes."""
    rows: list[dict[str, Any]] = []
    for module in plan.plan.values():
        for table, parameter in module.items():  # type: ignore[attr-defined]
            spec = parameter.sharding_spec
            shards = [
                {"rank": s.placement.rank(), "offsets": list(s.shard_offsets), "sizes": list(s.shard_sizes)}
                for s in (spec.shards if spec is not None else [])
            ]
            rows.append(
                {
                    "table": table,
                    "sharding_type": parameter.sharding_type,
                    "compute_kernel": parameter.compute_kernel,
                    "ranks": sorted(set(parameter.ranks or [s["rank"] for s in shards])),
                    "shards": shards,
                }
            )
    return sorted(rows, key=lambda r: str(r["table"]))


def plan_table(plan: list[dict[str, Any]], tables: Mapping[str, TableConfig]) -> list[str]:
    """The plan as aligned text lines: table, sharding type, ranks, GiB of weights."""
    lines = [f"{'table':<24} {'sharding':<18} {'kernel':<10} {'ranks':<12} {'GiB':>10}"]
    for row in plan:
        table = tables[row["table"]]
        size = table.rows * table.width * (2 if table.dtype == "fp16" else 4) / GIB
        ranks = row["ranks"]
        shown = ",".join(map(str, ranks)) if len(ranks) <= 4 else f"{ranks[0]}..{ranks[-1]}"
        lines.append(
            f"{row['table']:<24} {row['sharding_type']:<18} {row['compute_kernel']:<10} {shown:<12} {size:>10.4f}"
        )
    return lines

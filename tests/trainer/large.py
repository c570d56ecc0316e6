"""Small models of many ranks for dry runs: plans made by hand, one sharding type per table."""

from collections.abc import Mapping
from typing import Any

import torch
from torchrec.distributed import sharding_plan as by
from torchrec.distributed.types import ShardingPlan

from exfm.embeddings.tables import build_collection
from exfm.sharding.planner import TableSharder
from exfm.trainer.config import JobConfig
from exfm.trainer.request import Request

CPU_KINDS = (
    "table_wise", "column_wise", "table_column_wise", "row_wise", "table_row_wise", "grid_shard", "data_parallel",
)  # fmt: skip
CW_DIM = 128  # TorchRec cuts grid shards so narrow at least


def generator(kind: str, rank: int, world_size: int, ranks_per_node: int) -> Any:
    """A shard of the table on the rank, and on others."""
    node, nodes = rank // ranks_per_node, world_size // ranks_per_node
    match kind:
        case "table_wise":
            return by.table_wise(rank=rank)
        case "column_wise" | "table_column_wise":
            return by.column_wise(ranks=[rank, rank - 1 if rank % ranks_per_node else rank + 1])
        case "row_wise":
            return by.row_wise()
        case "table_row_wise":
            return by.table_row_wise(host_index=node)
        case "grid_shard":
            return by.grid_shard(host_indexes=[node, (node + 1) % nodes])
        case _:
            return by.data_parallel()


def planned(
    config: JobConfig, kinds: Mapping[str, str], rank: int, world_size: int, ranks_per_node: int, elsewhere: int
) -> ShardingPlan:
    """kinds: sharding types of tables with a part on the rank; all others lie whole on the rank `elsewhere`."""
    plan = {}
    for path, weighted in (("tables", False), ("weighted", True)):
        collection = build_collection(config.features, config.tables, weighted)
        if collection is None:
            continue
        makers = {
            t.name: generator(kinds[t.name], rank, world_size, ranks_per_node)
            if t.name in kinds
            else by.table_wise(rank=elsewhere)
            for t in collection.embedding_bag_configs()
        }
        module = by.construct_module_sharding_plan(
            collection,
            makers,
            TableSharder(),
            ranks_per_node,
            world_size,
            "cpu",  # type: ignore[arg-type]
        )
        for name, parameter in module.items():
            if kinds.get(name) == "table_column_wise":
                parameter.sharding_type = "table_column_wise"
            parameter.compute_kernel = "dense" if parameter.sharding_type == "data_parallel" else "fused"
        plan[path] = module
    return ShardingPlan(plan=plan)  # type: ignore[arg-type]


def request(
    kinds: tuple[str, ...],
    rank: int = 17,
    world_size: int = 1024,
    ranks_per_node: int = 8,
    local_batch: int = 4,
    steps: int = 1,
    features: int = 4,
    rows: int = 5000,
    width: int = 16,
    ids: float = 2.0,
    weighted: tuple[str, ...] = (),
    mean: tuple[str, ...] = (),
    dtype: str = "fp32",
    pipeline: str = "base",
    **sections: Any,
) -> Request:
    """`features` tables with one feature each; table i is sharded as kinds[i], those after lie on another rank. sections: of the config."""
    names = [f"t{i}" for i in range(features)]
    of_table = dict(zip(names, kinds, strict=False))
    if "grid_shard" in kinds:
        width = 2 * CW_DIM
    raw = {
        "run": {"name": "dry", "folder": "unused", "pipeline": pipeline},
        "stream": {"path": "unused", "global_batch": local_batch * world_size},
        "features": {
            "dense": ["d0", "d1"],
            "sparse": [{"name": f"f{t}", "table": t, "ids": "hash", "weighted": t in weighted} for t in names],
        },
        "tables": {
            t: {"rows": rows, "width": width, "dtype": dtype, "pooling": "mean" if t in mean else "sum"} for t in names
        },
        "model": {"kind": "dcnv2", "cross_layers": 1, "rank": 4, "deep_mlp": [16]},
        "heads": {"tasks": ["click"]},
    } | sections
    config = JobConfig.model_validate(raw)
    elsewhere = 0 if rank else world_size - 1
    plan = planned(config, of_table, rank, world_size, ranks_per_node, elsewhere)
    pooling, zipf = {f"f{t}": ids for t in names}, {f"f{t}": 1.05 for t in names}
    return Request(
        config, plan, rank, world_size, ranks_per_node, local_batch, steps, pooling, zipf, torch.device("cpu")
    )

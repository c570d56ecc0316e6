"""The plan of a job's tables: from its config, the machines and the tables' statistics to a Plan, and what people see of it."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.types import CacheParams, ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from exfm.data.errors import UserError
from exfm.data.stats import ColumnStats, StreamStats, read_stats
from exfm.embeddings.config import FeaturesConfig, TableConfig
from exfm.sharding.cache_stats import TableCache
from exfm.sharding.candidates import BY_COLUMN, EVERYWHERE, ON_NODES
from exfm.sharding.config import ShardingConfig, TableSharding
from exfm.sharding.fast_planner import TableSharder, plan_model
from exfm.sharding.plan import Plan, read_plan
from exfm.sharding.topology import Topology, cpu_topology, gpu_here, gpu_topology, preset_of, read_topology, with_size

GIB = 2**30
CPU_HOST_BYTES = (
    16 * GIB
)  # of a rank without a device: the same everywhere, so that a plan does not depend on what else runs
UNKNOWN_GPU = "a100-80g"  # whose speeds stand for those of a GPU without a data sheet here; its memory is asked for
OTHERWISE = TableSharding()


def topology_of(config: ShardingConfig, device_type: str, world_size: int, ranks_per_node: int) -> Topology:
    """The machines that a job's tables are planned for. UserError for a topology of another device, or none known."""
    size = world_size, ranks_per_node, config.replicas
    if config.topology and Path(config.topology).suffix in (".yaml", ".yml"):
        found = with_size(read_topology(config.topology), *size)
    elif config.topology:
        found = gpu_topology(config.topology, *size)
    elif device_type == "cpu":
        found = with_size(cpu_topology(world_size, ranks_per_node, CPU_HOST_BYTES), *size)
    else:
        name, hbm_bytes = gpu_here()
        preset = preset_of(name)
        found = gpu_topology(preset or UNKNOWN_GPU, *size, hbm_bytes=hbm_bytes)
        if preset is None:
            found = found.model_copy(update={"name": f"{name} with the speeds of {UNKNOWN_GPU}"})
    if found.device != device_type:
        raise UserError(
            f"sharding.topology {config.topology} is of {found.device}, the job runs on {device_type}; name another"
        )
    limits = {"hbm_bytes": config.hbm_gib if device_type == "cuda" else None, "host_bytes": config.host_gib}
    return found.model_copy(update={key: int(gib * GIB) for key, gib in limits.items() if gib is not None})


def plan_job(
    model: nn.Module,
    features: FeaturesConfig,
    tables: Mapping[str, TableConfig],
    config: ShardingConfig,
    topology: Topology,
    local_batch: int,
    dense_bytes: int = 0,
    cached: Plan | None = None,
    sharder: TableSharder | None = None,
) -> Plan:
    """The plan of the collections of `model` (on the meta device): that of `sharding.plan`, the cached one where it was made from
    the same, else a new one. local_batch: examples per rank and step; dense_bytes: what the dense part needs of every rank;
    sharder: with the codecs of what is sent in fewer bits.

    UserError for tables that cannot use so many ranks or do not fit, and for a plan file of something else, naming what differs.
    """
    inputs = inputs_of(features, tables, config, topology, local_batch, dense_bytes)
    if sharder is not None and sharder.qcomm_codecs_registry:
        codecs = sharder.qcomm_codecs_registry.values()
        inputs["precision"] = " ".join(f"{c.forward.quantized_dtype}/{c.backward.quantized_dtype}" for c in codecs)
    if config.plan:
        given = read_plan(config.plan)
        if changed := [what for what in ("tables", "ranks") if given.inputs.get(what) != inputs[what]]:
            raise UserError(
                f"sharding.plan {config.plan} was made for other {' and '.join(changed)}; make it anew with `exfm plan --out {config.plan}`"
            )
        return given
    if cached is not None and cached.inputs == inputs:
        return cached
    constraints = _constraints(model, features, config, topology.group_size, local_batch)
    for name, own in config.tables.items():
        _check_table(name, own, config, topology)
    pins = {name: own.ranks for name, own in config.tables.items() if own.ranks}
    cuda = topology.device == "cuda"
    reserved = int(config.reserved * (topology.hbm_bytes if cuda else topology.host_bytes)) + dense_bytes
    plan = plan_model(
        model,
        [sharder or TableSharder()],  # type: ignore[list-item]
        topology,
        local_batch,
        constraints,
        config.cache_loads,
        pins,
        {name: own.column_shard for name, own in config.tables.items() if own.column_shard},
        reserved_hbm=reserved if cuda else 0,
        reserved_host=0 if cuda else reserved,
    )
    return plan.model_copy(update={"inputs": inputs})


def inputs_of(
    features: FeaturesConfig,
    tables: Mapping[str, TableConfig],
    config: ShardingConfig,
    topology: Topology,
    local_batch: int,
    dense_bytes: int,
) -> dict[str, str]:
    """Digests of what decides a plan, by what people call it."""
    lookups = [f.model_dump(mode="json") for f in features.sparse]
    shapes = {name: [t.rows, t.width, t.dtype, t.pooling] for name, t in tables.items()}
    stats = Path(config.stats).read_text() if config.stats and Path(config.stats).exists() else ""
    allowed = config.model_dump(mode="json", exclude={"plan", "stats", "topology", "sync_steps"})
    ranks = [topology.device, topology.world_size, topology.ranks_per_node, topology.replicas]
    parts = {
        "tables": [lookups, shapes],
        "ranks": ranks,
        "topology": topology.model_dump(mode="json"),
        "sharding": allowed,
        "statistics": stats,
        "batch": [local_batch, dense_bytes],
    }
    return {k: hashlib.sha256(json.dumps(v, sort_keys=True).encode()).hexdigest()[:16] for k, v in parts.items()}


def changes(cached: Plan, plan: Plan) -> list[str]:
    """What a cached plan that was not used was made from otherwise."""
    return [what for what in plan.inputs if cached.inputs.get(what) != plan.inputs[what]]


def _constraints(
    model: nn.Module, features: FeaturesConfig, config: ShardingConfig, ranks: int, local_batch: int
) -> dict[str, ParameterConstraints]:
    """ranks: that share the tables."""
    known = {c.name: c for m in _collections(model) for c in m.embedding_bag_configs()}
    if unknown := sorted(set(config.tables) - set(known)):
        raise UserError(f"sharding.tables names {', '.join(unknown)}, but the tables are {', '.join(known)}")
    stats = read_stats(config.stats) if config.stats else None
    columns = _columns(features, stats)
    constraints = {}
    for name, table in known.items():
        own = config.tables.get(name, OTHERWISE)
        allowed = own.types or config.allowed
        rows = table.num_embeddings
        possible = [t for t in allowed if not (t in ("row_wise", "table_row_wise") and rows < ranks)]
        if ranks == 1 and possible != ["data_parallel"]:
            # a copy on every rank saves what is sent; alone it only loses the fused optimiser
            possible = [t for t in possible if t != "data_parallel"] or possible
        if not possible:
            raise UserError(
                f"table '{name}' has {rows} rows, too few for {' or '.join(allowed)} over {ranks} ranks; "
                f"use at most {rows} ranks or allow data_parallel or table_wise for it (sharding.tables.{name})"
            )
        constraints[name] = ParameterConstraints(
            sharding_types=list(possible),
            compute_kernels=[*(own.kernels or config.kernels), EmbeddingComputeKernel.DENSE.value],
            min_partition=config.min_column_shard,
            pooling_factors=[columns[f].pooling if f in columns else 1.0 for f in table.feature_names],
            cache_params=CacheParams(stats=_cache(table, columns, stats, ranks * local_batch)),
            is_weighted=any(f.weighted for f in features.sparse if f.table == name),
        )
    return constraints


def _check_table(name: str, own: TableSharding, config: ShardingConfig, topology: Topology) -> None:
    """UserError for settings of one table of which each is possible, but not together, naming both."""
    where, types = f"sharding.tables.{name}", own.types or config.allowed
    shown = f"{f'{where}.types' if own.types else 'sharding.allowed'} [{', '.join(types)}]"
    if own.types and own.column_shard and not set(types) & set(BY_COLUMN):
        raise UserError(
            f"{where}.column_shard {own.column_shard} and {shown} contradict: none of these cuts by columns; drop the one or allow "
            f"{' or '.join(BY_COLUMN)}"
        )
    if own.kernels and set(types) == {ShardingType.DATA_PARALLEL.value}:
        raise UserError(
            f"{where}.kernels [{', '.join(own.kernels)}] and {shown} contradict: copies are plain tensors beside the dense part and have no "
            "other kernel; drop kernels or allow another type"
        )
    if own.ranks is None:
        return
    if wrong := [r for r in own.ranks if not 0 <= r < topology.group_size]:
        raise UserError(
            f"{where}.ranks names rank {wrong[0]}; there are 0 to {topology.group_size - 1}; name some of these"
        )
    size = min(topology.ranks_per_node, topology.group_size)
    nodes = [n for n in range(topology.group_size // size) if set(range(n * size, (n + 1) * size)) <= set(own.ranks)]
    needs = dict.fromkeys(EVERYWHERE, len(set(own.ranks)) == topology.group_size) | dict.fromkeys(ON_NODES, bool(nodes))
    if not any(needs.get(kind, True) for kind in types):
        ranks = f"{where}.ranks [{', '.join(map(str, own.ranks))}]"
        raise UserError(
            f"{ranks} and {shown} contradict: {' and '.join(EVERYWHERE)} have a shard on each of the {topology.group_size} ranks, "
            f"{' and '.join(ON_NODES)} on each of a node's {size}; name all of those or allow table_wise or column_wise"
        )


def _columns(features: FeaturesConfig, stats: StreamStats | None) -> dict[str, ColumnStats]:
    """Statistics of every feature whose column was measured. UserError for statistics without any."""
    if stats is None:
        return {}
    found = {f.name: stats.columns[f.source] for f in features.sparse if f.source in stats.columns}
    if not found:
        raise UserError(
            f"sharding.stats is of stream '{stats.stream}' and has none of the columns {', '.join(f.source for f in features.sparse)}; "
            "measure the job's own stream with `exfm data stats`"
        )
    return found


def _cache(
    table: EmbeddingBagConfig, columns: Mapping[str, ColumnStats], stats: StreamStats | None, examples: int
) -> TableCache | None:
    """None unless all columns that look a table up were measured."""
    own = [columns[f] for f in table.feature_names if f in columns]
    if stats is None or len(own) < len(table.feature_names):
        return None
    return TableCache(own, stats, table.num_embeddings, examples)


def _collections(model: nn.Module) -> Iterable[EmbeddingBagCollection]:
    return (m for m in model.modules() if isinstance(m, EmbeddingBagCollection))


def describe(plan: Plan) -> list[dict[str, Any]]:
    """The plan as JSON-able rows: table, sharding type, kernel, and per shard rank, offsets, sizes."""
    rows: list[dict[str, Any]] = []
    for table in plan.tables:
        ranks = plan.ranks(table).tolist()
        whole = table.sharding_type == ShardingType.DATA_PARALLEL.value
        boxes = [] if whole else table.boxes().tolist()
        shards = [{"rank": rank, "offsets": b[:2], "sizes": b[2:]} for rank, b in zip(ranks, boxes, strict=False)]
        rows.append(
            {
                "table": table.table,
                "sharding_type": table.sharding_type,
                "compute_kernel": table.kernel,
                "ranks": sorted(set(ranks)),
                "shards": shards,
            }
        )
    return rows


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

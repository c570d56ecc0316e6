"""Plans of our own search: complete, within limits, judged by TorchRec's estimators, near the lower bound, buildable by TorchRec."""

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torchrec.distributed.model_parallel import DMPCollection
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.types import ShardingPlan, ShardingType
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from exfm.data.errors import UserError
from exfm.sharding import search
from exfm.sharding.fast_planner import Planner, plan_model
from exfm.sharding.loopback import loopback_group
from exfm.sharding.plan import Plan, read_plan
from exfm.sharding.planner import TableSharder
from exfm.sharding.topology import Topology, gpu_topology

GIB = 2**30
SHARDERS: Any = [TableSharder()]
ON_CUDA = ["fused", "dense"]
EVERY_TIER = [*ON_CUDA, "fused_uvm", "fused_uvm_caching"]


def model(rows: list[int], width: int = 64, dtype: DataType = DataType.FP16) -> nn.Module:
    tables = [
        EmbeddingBagConfig(
            name=f"t{i}", num_embeddings=n, embedding_dim=width, feature_names=[f"f{i}"], data_type=dtype
        )
        for i, n in enumerate(rows)
    ]
    return nn.ModuleDict({"tables": EmbeddingBagCollection(tables=tables, device=torch.device("meta"))})


def constraints(pooling: list[float], kernels: list[str] = ON_CUDA, **more: Any) -> dict[str, ParameterConstraints]:
    return {
        f"t{i}": ParameterConstraints(pooling_factors=[p], compute_kernels=kernels, min_partition=16, **more)
        for i, p in enumerate(pooling)
    }


def planned(
    rows: list[int], pooling: list[float], topology: Topology, kernels: list[str] = ON_CUDA, **more: Any
) -> Plan:
    return plan_model(model(rows), SHARDERS, topology, 256, constraints(pooling, kernels), **more)


def torchrecs_cost(plan: ShardingPlan, module: nn.Module, topology: Topology, own: dict[str, Any]) -> np.ndarray:
    """ms of every rank by TorchRec's enumerator and estimators, shard by shard."""
    loads = np.zeros(topology.group_size)
    widths = {
        n: p.sharding_spec.shards[0].shard_sizes[1] for m in plan.plan.values() for n, p in m.items() if p.sharding_spec
    }
    limited = {n: copy.copy(c) for n, c in own.items()}
    for name, constraint in limited.items():
        constraint.min_partition = widths.get(name, constraint.min_partition)
        constraint.sharding_types = [
            kind.value for kind in ShardingType
        ]  # grid_shard is offered only where it is named
    options = EmbeddingEnumerator(topology.torchrec(), 256, limited).enumerate(module, SHARDERS)
    for name, parameter in plan.plan["tables"].items():
        option = next(
            o
            for o in options
            if (o.name, o.sharding_type, o.compute_kernel) == (name, parameter.sharding_type, parameter.compute_kernel)
        )
        assert len(option.shards) == len(parameter.ranks)
        for shard, rank in zip(option.shards, parameter.ranks, strict=True):
            loads[rank] += shard.perf.total
    return loads


many = st.integers(3, 9).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(20, 40_000_000), min_size=n, max_size=n),
        st.lists(st.floats(0.5, 80), min_size=n, max_size=n),
        st.sampled_from([(4, 4, 1), (8, 4, 1), (16, 8, 1), (16, 4, 2), (8, 8, 4)]),
        st.sampled_from([ON_CUDA, EVERY_TIER]),
    )
)


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(many)
def test_every_row_and_column_lies_in_exactly_one_place_and_no_rank_is_over_its_limit(case):
    """With memory for the half of the rows where host memory may hold the others; of 2D plans, in one sharding group."""
    rows, pooling, (world, node, replicas), kernels = case
    world //= replicas
    hbm = 80e9 if kernels == ON_CUDA else max(0.5 * sum(rows) * 128 / world, 0.2 * GIB)
    topology = gpu_topology("h100", world * replicas, node, replicas, hbm_bytes=int(hbm))
    node = min(node, world)
    plan = planned(rows, pooling, topology, kernels)
    for table in plan.tables:
        if table.kernel in (
            "fused_uvm",
            "fused_uvm_caching",
        ):  # the rows are in host memory, on the device no more than cached
            weights = sum(run.count * run.rows * run.columns * 2 for run in table.runs)
            assert table.total("host") >= weights
            assert (table.cache_load is not None) == (table.kernel == "fused_uvm_caching")
        boxes, ranks = table.boxes(), plan.ranks(table)
        assert len(boxes) == len(ranks) == table.num_shards and ranks.min() >= 0 and ranks.max() < world
        if table.sharding_type == "data_parallel":
            assert (boxes == [0, 0, table.rows, table.width]).all() and sorted(ranks) == list(range(world))
            continue
        area = sum(int(r) * int(c) for _, _, r, c in boxes)
        assert area == table.rows * table.width
        whole = [box for box in boxes.tolist() if box[2]]
        for i, (r, c, h, w) in enumerate(whole):
            assert r + h <= table.rows and c + w <= table.width
            for r2, c2, h2, w2 in whole[i + 1 :]:
                assert r + h <= r2 or r2 + h2 <= r or c + w <= c2 or c2 + w2 <= c
        if table.sharding_type in ("table_row_wise", "table_column_wise"):
            assert len({rank // node for rank in ranks.tolist()}) == 1
        if table.sharding_type in ("column_wise", "table_column_wise") and len(ranks) <= world:
            assert len(set(ranks.tolist())) == len(ranks)
    assert plan.by_rank("hbm").max() <= topology.hbm_bytes and plan.by_rank("host").max() <= topology.host_bytes
    assert plan.cost >= plan.bound_ms * (1 - 1e-9)
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


@settings(max_examples=2, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(many)
def test_its_cost_is_what_torchrec_says_of_it(case):
    rows, pooling, (world, node, replicas), _ = case
    topology = gpu_topology("h100", world, node, replicas)
    plan, own = planned(rows, pooling, topology), constraints(pooling)
    theirs = torchrecs_cost(plan.torchrec(), model(rows), topology, own)
    assert plan.ms == pytest.approx(theirs, rel=1e-9, abs=0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.05, 1.0], ids=["tight", "loose"])
def test_it_is_never_worse_than_torchrecs_planner(seed, share):
    rng = np.random.default_rng(seed)
    rows = np.exp(rng.uniform(np.log(1e3), np.log(4e7), 10)).astype(int).tolist()
    pooling = rng.lognormal(1, 1, 10).tolist()
    need = sum(rows) * 64 * 2
    topology = gpu_topology("h100", 4, 4, hbm_bytes=int(need / 4 * 1.35 + GIB if share < 1 else 80 * GIB))
    own, module = constraints(pooling), model(rows)
    reservation = FixedPercentageStorageReservation(percentage=0.0)
    theirs = EmbeddingShardingPlanner(
        topology=topology.torchrec(), batch_size=256, constraints=own, storage_reservation=reservation
    ).plan(module, SHARDERS)
    ours = plan_model(module, SHARDERS, topology, 256, own)
    assert ours.cost <= torchrecs_cost(theirs, module, topology, own).max() * (1 + 1e-9)


def test_the_order_of_tables_does_not_change_the_cost():
    rows, pooling = [10_000_000, 3_000_000, 500, 40_000, 8_000_000], [3.0, 20.0, 1.0, 7.0, 40.0]
    topology = gpu_topology("h100", 8, 8)
    one = planned(rows, pooling, topology)
    other = planned(rows[::-1], pooling[::-1], topology)
    assert one.cost == pytest.approx(other.cost, rel=1e-9)
    assert planned(rows, pooling, topology) == one  # deterministic: every rank plans for itself


def test_the_numbers_of_equal_ranks_do_not_change_the_cost():
    """The ranks of a node are alike: tables pinned to some of them cost the same on others."""
    rows, pooling = [10_000_000, 3_000_000, 500_000, 40_000, 8_000_000], [3.0, 20.0, 1.0, 7.0, 40.0]
    topology, pins = gpu_topology("h100", 8, 8), {"t0": [0, 1], "t1": [1, 2, 3], "t4": [5]}
    one = planned(rows, pooling, topology, pins=pins)
    for order in np.random.default_rng(0).permuted(np.tile(np.arange(8), (4, 1)), axis=1).tolist():
        other = planned(rows, pooling, topology, pins={t: [order[r] for r in ranks] for t, ranks in pins.items()})
        assert other.cost == pytest.approx(one.cost, rel=1e-9)


def test_a_2d_plan_is_that_of_one_sharding_group():
    """TorchRec moves it to the ranks of every group: together they hold every row once per replica, and a group is whole nodes."""
    rows, pooling = [10_000_000, 3_000_000, 500, 40_000, 8_000_000], [3.0, 20.0, 1.0, 7.0, 40.0]
    replicated, alone = (planned(rows, pooling, gpu_topology("h100", *size)) for size in ((32, 8, 4), (8, 8)))
    assert replicated.tables == alone.tables and replicated.cost == alone.cost
    cells, on_cuda = {}, SimpleNamespace(_device=torch.device("cuda"))
    for rank in range(32):
        plan = replicated.torchrec()
        with loopback_group(rank, 32, 8):
            DMPCollection._remap_sharding_plan(on_cuda, plan, rank, 4, 8, use_inter_host_allreduce=True)
        for name, table in plan.plan["tables"].items():
            for shard in table.sharding_spec.shards if table.sharding_spec else ():
                assert shard.placement.rank() // 8 == rank // 8
                if shard.placement.rank() == rank:
                    cells[name] = cells.get(name, 0) + shard.shard_sizes[0] * shard.shard_sizes[1]
    sharded = [t for t in replicated.tables if t.sharding_type != "data_parallel"]
    assert cells == {t.table: 4 * t.rows * t.width for t in sharded} and sharded


def test_pinned_tables_stay_on_their_ranks_and_drop_in_for_torchrec():
    rows, pooling = [1_000_000] * 4, [5.0] * 4
    topology = gpu_topology("h100", 8, 8)
    plan = planned(rows, pooling, topology, pins={"t2": [5, 6]})
    pinned = next(t for t in plan.tables if t.table == "t2")
    assert set(plan.ranks(pinned).tolist()) <= {5, 6}
    direct = Planner(topology, 256, constraints(pooling), reserved=0.0).collective_plan(model(rows))
    assert direct.plan["tables"].keys() == {"t0", "t1", "t2", "t3"}


@pytest.mark.parametrize(("rows", "ranks", "limit"), [(300, 32, 1.05)])
def test_a_tight_model_of_many_tables_is_within_5_percent_of_the_bound(rows, ranks, limit):
    """A tenth of a trillion-parameter model in a tenth of the memory: sizes by a power law, 73% of all memory in rows."""
    sizes = 1 / np.arange(1, rows + 1)
    numbers = (sizes / sizes.sum() * 0.73 * ranks * 8e9 / 128).astype(int)
    pooling = np.clip(np.random.default_rng(0).lognormal(1, 1.2, rows), 1, 100).tolist()
    topology = gpu_topology("h100", ranks, 8, hbm_bytes=8_000_000_000)
    plan = planned(numbers.tolist(), pooling, topology)
    assert plan.cost <= limit * plan.bound_ms


def test_what_cannot_fit_is_refused_with_the_arithmetic_and_remedies():
    topology = gpu_topology("h100", 8, 8, hbm_bytes=GIB)
    with pytest.raises(UserError, match=r"need \S+ GiB of device memory at least, .* short.*use 16 ranks instead of 8"):
        planned([8_000_000] * 10, [1.0] * 10, topology)
    alone = constraints([1.0], sharding_types=["table_wise"])
    with pytest.raises(UserError, match=r"table 't0' does not fit: 9,000,000 rows x 64 x 2 bytes.*allow row_wise"):
        plan_model(model([9_000_000]), SHARDERS, topology, 256, alone)


def test_a_file_that_is_no_plan_is_named(tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(UserError, match=r"plan.json is no plan: topology: Field required"):
        read_plan(tmp_path / "plan.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_plan(tmp_path / "none.json")


def test_a_fast_plan_that_needs_less_memory_on_its_fullest_rank_is_preferred(monkeypatch):
    """Large tables with few ids cost as much time wherever they lie, so nothing but memory says how to spread them."""
    rng = np.random.default_rng(3)
    rows = [int(n) for n in np.exp(rng.uniform(np.log(1e4), np.log(4e8), 60))]
    pooling, topology = [float(p) for p in rng.uniform(1, 30, 60)], gpu_topology("h100", 16)
    light = planned(rows, pooling, topology)
    monkeypatch.setattr(search, "LIGHTER", 0.0)  # nothing fits into no memory
    heavy = planned(rows, pooling, topology)
    assert light.cost <= search.EQUAL * heavy.cost
    assert light.by_rank("hbm").max() <= 0.75 * heavy.by_rank("hbm").max()

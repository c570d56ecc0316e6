"""What a cache misses: by the measured curves, in the planner's cost by TorchRec's formula, and in what it then chooses."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.types import CacheParams
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from exfm.data.counts import Counter
from exfm.data.stats import ColumnStats, StreamStats, column_stats
from exfm.sharding.cache_stats import TableCache
from exfm.sharding.fast_planner import TableSharder, plan_model
from exfm.sharding.topology import gpu_topology

ROWS, WIDTH, GROUP, BATCH = 40_000_000, 64, 8, 512
HOT = {"0.001": 0.2, "0.01": 0.4, "0.1": 0.7}


def column(reuse: list[float], unique_rate: float = 0.5, distinct: int = 10_000_000) -> ColumnStats:
    return ColumnStats(
        pooling=10.0, presence=1.0, unique_rate=unique_rate, distinct=distinct, zipf=1.0, hot=HOT, reuse=tuple(reuse)
    )


def stream(columns: dict[str, ColumnStats], examples: int = 10_000_000) -> StreamStats:
    return StreamStats(stream="s", examples=examples, batch=1000, slices=(0, 1), bytes_per_example=1.0, columns=columns)


EASY = column([0.01 * (19 - i) / 19 for i in range(20)])
HARD = column([0.95 * (19 - i) / 19 for i in range(20)])


def test_the_measured_batch_and_the_whole_are_met_and_growth_between_them_is_a_power():
    def lookups(examples: int) -> float:
        return TableCache([EASY], stream({"a": EASY}), ROWS, examples).expected_lookups

    assert lookups(1000) == pytest.approx(0.5 * 10_000)
    assert lookups(10_000_000) == pytest.approx(10_000_000)
    assert lookups(100_000) == pytest.approx(np.sqrt(lookups(1000) * lookups(10_000_000)), rel=1e-6)
    assert TableCache([EASY], stream({"a": EASY}), 3000, 10**6).expected_lookups == 3000  # no more than there are rows


def test_it_is_near_what_is_counted_in_a_larger_batch():
    ids = np.random.default_rng(0).zipf(1.3, 400_000) % 50_000
    small, large = Counter(1000), Counter(20_000)
    for counter in (small, large):
        counter.add(pa.array(ids))
        counter.finish()
    found = column_stats(small)
    cache = TableCache([found], stream({"a": found}, len(ids)), 10**9, 20_000)
    assert cache.expected_lookups == pytest.approx(column_stats(large).unique_rate * 20_000, rel=0.15)


def test_the_miss_rate_falls_from_all_to_none_along_the_measured_curve():
    cache = TableCache([HARD], stream({"a": HARD}), ROWS, BATCH)
    assert cache.expected_miss_rate(0.0) == 1.0 and cache.expected_miss_rate(1.0) == 0.0
    assert cache.expected_miss_rate(0.25 * 0.5) == pytest.approx(
        HARD.reuse[9]
    )  # half of the ids, an eighth of the rows
    easy = TableCache([EASY], stream({"a": EASY}), ROWS, BATCH)
    assert easy.cacheability < cache.cacheability <= 1
    both = TableCache([EASY, HARD], stream({"a": EASY, "b": HARD}), ROWS, BATCH)
    # of twice as many ids
    assert easy.expected_miss_rate(0.05) < both.expected_miss_rate(0.1) < cache.expected_miss_rate(0.05)


def plan(kinds: list[ColumnStats], **limits: int):
    configs = [
        EmbeddingBagConfig(
            name=f"t{i}", num_embeddings=ROWS, embedding_dim=WIDTH, feature_names=[f"f{i}"], data_type=DataType.FP16
        )
        for i in range(len(kinds))
    ]
    module = nn.ModuleDict({"tables": EmbeddingBagCollection(tables=configs, device=torch.device("meta"))})
    caches = [TableCache([c], stream({"a": c}), ROWS, GROUP * BATCH) for c in kinds]
    constraints = {
        f"t{i}": ParameterConstraints(
            pooling_factors=[c.pooling],
            sharding_types=["table_wise"],
            compute_kernels=["fused", "fused_uvm_caching"],
            cache_params=CacheParams(stats=cache),
        )
        for i, (c, cache) in enumerate(zip(kinds, caches, strict=True))
    }
    topology = gpu_topology("h100", GROUP, **limits)
    return plan_model(module, [TableSharder()], topology, BATCH, constraints, (0.05, 0.2)), caches, topology


def test_the_planners_prefetch_is_the_misses_over_the_link_to_host_memory():
    found, caches, topology = plan([HARD] * 2, hbm_bytes=2_000_000_000)
    for table, cache in zip(found.tables, caches, strict=True):
        missed = cache.expected_lookups * cache.expected_miss_rate(table.cache_load)
        assert table.runs[0].prefetch_compute == pytest.approx(
            missed * WIDTH * 2 / (topology.pcie_bytes_per_s / 1000), rel=1e-6
        )


def test_device_memory_goes_to_the_tables_that_a_cache_serves_badly():
    """16 tables of 5.1 GB on 8 ranks of 8 GB: each rank has room for one."""
    hard = HARD.model_copy(update={"unique_rate": 1.0})
    found, _, _ = plan([EASY, hard] * 8, hbm_bytes=8_000_000_000)
    kernels = {t.table: t.kernel for t in found.tables}
    assert {kernels[f"t{i}"] for i in range(1, 16, 2)} == {"fused"}
    assert {kernels[f"t{i}"] for i in range(0, 16, 2)} == {"fused_uvm_caching"}

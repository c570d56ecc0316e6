"""One rank of many on this machine: its real share is built and stepped, and its memory is what the estimate says."""

import math
from itertools import islice

import numpy as np
import pytest
import torch

from exfm.data.errors import UserError
from exfm.sharding.memory import RankMemory
from exfm.trainer import dryrun
from exfm.trainer.build import build
from exfm.trainer.dense_memory import dense_memory
from exfm.trainer.dryrun import GIB, INITIAL, dry_run, endless, estimate, run_here
from exfm.trainer.env import RankEnv, process_group
from exfm.trainer.made import made_batch
from exfm.trainer.request import Request
from exfm.trainer.steps import PIPELINES
from tests.trainer.large import CPU_KINDS, request

RANKS, NODE = 1024, 8
MIB = 2**20
OBJECTS = 16 * MIB  # Python's own and blocks too small to be given back: absolute, whatever the tables

CPU = torch.device("cpu")
# (parts of the rows, parts of the columns) that rank 17 shares a table with
SPLIT = {
    "table_wise": (1, 1), "column_wise": (1, 2), "table_column_wise": (1, 2), "row_wise": (RANKS, 1),
    "table_row_wise": (NODE, 1), "grid_shard": (NODE, 2), "data_parallel": (1, 1),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "pipeline"),
    [(k, "base") for k in CPU_KINDS] + [("table_wise", "sparse_dist"), ("table_row_wise", "sparse_dist")],
)
def test_rank_17_of_1024_builds_its_shards_and_steps(kind, pipeline):
    asked = request((kind, kind), pipeline=pipeline)
    found = run_here(asked)
    assert len(found.losses) == 3 and all(map(math.isfinite, found.losses)) and found.losses[0] > 0
    table, (rows, columns) = asked.config.tables["t0"], SPLIT[kind]
    shard = -(-table.rows // rows) * (table.width // columns) * 4
    assert found.weights_bytes == 2 * shard + dense_memory(asked.config, asked.local_batch, RANKS).weights
    parts = found.tables_seconds, found.dense_seconds, found.backward_seconds
    assert min(parts) > 0 and found.step_seconds == pytest.approx(sum(parts))


def real_losses(asked: Request, kind: str, steps: int) -> list[float]:
    """Of a job of one process by the trainer's own code, from the same constant rows."""
    config = asked.config.model_copy(update={"sharding": asked.config.sharding.model_copy(update={"allowed": (kind,)})})
    with process_group(RankEnv(), CPU, 60.0):
        built = build(config, RankEnv(), CPU, (0.0,))
        for shard in built.shards:
            shard.weight.fill_(INITIAL)
        pipeline = PIPELINES[config.run.pipeline](built.model, built.optimizers, CPU)
        batches = endless(asked)
        return [float(pipeline.progress(batches).loss) for _ in range(steps)]


@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "data_parallel"])
def test_alone_in_the_world_it_trains_exactly_as_a_real_process_does(kind):
    asked = request((kind,) * 4, rank=0, world_size=1, ranks_per_node=1, steps=2, local_batch=32)
    assert list(run_here(asked).losses) == real_losses(asked, kind, 4)


@pytest.mark.parametrize(
    "asked",
    [
        request(
            ("table_wise", "row_wise", "table_row_wise", "column_wise"),
            world_size=256, local_batch=128, features=48, rows=200_000, width=160, ids=12.0, dtype="fp16",
        ),
        request(
            ("table_wise", "row_wise", "table_wise", "grid_shard"),
            world_size=256, local_batch=64, features=24, rows=150_000, ids=20.0, weighted=("t0",),
            mean=("t1", "t2"), pipeline="sparse_dist",
        ),
        request((), world_size=32, local_batch=256, features=128, width=256),
        request(
            (), world_size=64, local_batch=64, features=32, width=128, dense_engine={"kind": "fsdp"},
            model={"kind": "dcnv2", "cross_layers": 1, "rank": 4, "deep_mlp": [4096, 4096, 4096]},
        ),
        *(
            pytest.param(
                request(
                    (), rank=0, world_size=64, local_batch=64, features=32, width=128,
                    dense_engine={"kind": "deepspeed", "stage": stage},
                    model={"kind": "dcnv2", "cross_layers": 1, "rank": 4, "deep_mlp": [4096, 4096, 4096]},
                ),
                marks=[pytest.mark.slow] * (stage != 3),
            )
            for stage in (1, 2, 3)
        ),
    ],
    ids=["half-precision rows", "weights, means, ids sent ahead", "no table", "a dense part in pieces", "zero 1", "zero 2", "zero 3"],
)  # fmt: skip
def test_the_estimate_is_within_a_tenth_of_the_measured_peak(asked, warm):
    expected, found = estimate(asked), dry_run(asked)
    assert found.peak_bytes > 100 * MIB, "too small to say anything"
    assert abs(expected.total - found.peak_bytes) < 0.1 * found.peak_bytes + OBJECTS, (expected, found)


def test_under_zero_3_rank_0_alone_can_be_run():
    with pytest.raises(UserError, match=r"rank 17 has no dry run under deepspeed's stage 3.* dry-run rank 0"):
        dry_run(request((), dense_engine={"kind": "deepspeed", "stage": 3}))


def test_what_does_not_fit_is_refused_before_a_process_is_started(monkeypatch):
    asked = request(("table_wise",), rows=200_000_000, width=16)
    monkeypatch.setattr(dryrun, "available_bytes", lambda _: GIB)
    monkeypatch.setattr(dryrun.subprocess, "run", lambda *_, **__: pytest.fail("started"))
    with pytest.raises(UserError, match=r"needs 12\.8 GiB, but 1\.0 GiB are available"):
        dry_run(asked)


def test_an_estimate_adds_up_and_grows_with_what_a_rank_holds():
    nothing, table = estimate(request(())), estimate(request(("table_wise",)))
    assert isinstance(table, RankMemory) and table.tables_bytes == 5000 * 16 * 4 and table.table_state_bytes == 5000 * 4
    assert nothing.tables_bytes == 0 and nothing.total < table.total - table.tables_bytes
    fields = table.tables_bytes, table.table_state_bytes, table.dense_bytes, table.activations_bytes
    assert table.total == sum(fields) + table.input_bytes + table.output_bytes


def test_a_made_batch_has_the_asked_list_lengths_and_popular_ids():
    config = request(("table_wise",), rows=100_000, weighted=("t1",)).config
    pooling, zipf = {f"ft{i}": 3.0 * i for i in range(4)}, {f"ft{i}": 1.2 if i == 2 else 0.0 for i in range(4)}
    batch = made_batch(config, 2000, pooling, zipf, (0,))
    assert batch.sparse.keys() == ["ft0", "ft2", "ft3"] and batch.weighted is not None
    lengths = batch.sparse.lengths().view(3, 2000).float().mean(1)
    assert lengths.tolist() == pytest.approx([0, 6, 9], abs=0.3)
    skewed, even = (batch.sparse[f].values().numpy() for f in ("ft2", "ft3"))
    assert np.bincount(skewed).max() > 0.05 * len(skewed) and np.bincount(even).max() < 20
    assert max(skewed.max(), even.max()) < 100_000
    first, again = (made_batch(config, 50, pooling, zipf, (0,)).sparse.values() for _ in range(2))
    assert first.equal(again)


def test_a_pipeline_gets_different_batches_in_turn():
    batches = list(islice(endless(request(("table_wise",), local_batch=64)), 3))
    assert batches[0] is batches[2] and not batches[0].dense.equal(batches[1].dense)


@pytest.mark.parametrize("kind", CPU_KINDS)
def test_a_request_survives_json(kind):
    asked = request((kind, kind), weighted=("t1",))
    again = Request.from_json(asked.to_json())
    assert again == asked and estimate(again) == estimate(asked)


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="0 steps measures nothing"):
        request((), steps=0)

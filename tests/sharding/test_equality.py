"""Sharded training equals an independent single-process reference on any number of ranks, sharding type and pipeline.

What is compared: the 20 global losses, table weights, row-wise Adagrad accumulators and dense weights after 20 steps; for each
of these four kinds, the largest absolute difference over all its tensors. It may be 4 times what the float32 reference itself
is away from its float64 twin, plus 4 float32 ulps of the largest value of that kind. The reference follows a sharding type
where that is another algorithm: column_wise keeps one accumulator per column shard.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from exfm.sharding.plan import read_plan
from tests.sharding.reference import Reference
from tests.trainer.jobs import global_losses, job, last_state, make_stream, on, same, tables_of
from tests.trainer.starts import initial_state

KINDS = ["table_wise", "row_wise", "data_parallel", "column_wise"]


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> str:
    return make_stream(tmp_path_factory.mktemp("equality") / "stream").root


def batches() -> list[Any]:
    return [t.slice(start, 32) for t in tables_of() for start in range(0, t.num_rows, 32)]


@cache
def references(kind: str, stream: str, folder: str) -> dict[torch.dtype, tuple[list[float], dict[str, Tensor]]]:
    """(losses, state) of the reference in float32 and float64."""
    raw = job(f"{folder}/initial", stream, sharding__allowed=[kind])
    initial = initial_state(raw)
    out = {}
    for dtype in (torch.float32, torch.float64):
        reference = Reference(raw, initial, dtype)
        out[dtype] = ([reference.step(rows) for rows in batches()], reference.state())
    return out


def by_kind(losses: list[float], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """All values of a kind as one float64 vector, in the order of the names."""
    kinds = {"losses": [torch.tensor(losses)], "weights": [], "accumulators": [], "dense": []}
    for name in sorted(state):
        if name.startswith("adam."):
            continue
        kind = "dense" if name.startswith("dense.") else "weights" if name.endswith("weight") else "accumulators"
        kinds[kind].append(state[name])
    return {k: torch.cat([t.double().flatten() for t in v]) for k, v in kinds.items()}


def agree(
    losses: list[float], state: dict[str, Tensor], reference: dict[torch.dtype, tuple[list[float], dict[str, Tensor]]]
) -> None:
    got = by_kind(losses, state)
    single, double = (by_kind(*reference[d]) for d in (torch.float32, torch.float64))
    assert len(got["losses"]) == 20
    ulp = torch.finfo(torch.float32).eps
    for name, value in got.items():
        allowed = 4 * (single[name] - double[name]).abs().max() + 4 * ulp * double[name].abs().max()
        assert (value - single[name]).abs().max() <= allowed, name
        assert allowed < 1e-4  # the bound means something


@pytest.fixture(scope="module")
def trained(stream, tmp_path_factory, rank_pool) -> Callable[[int, str, str], tuple[list[float], dict[str, Tensor]]]:
    """trained(ranks, kind, pipeline): (losses, state) of a finished job; each is run once."""

    @cache
    def finished(ranks: int, kind: str, pipeline: str) -> tuple[list[float], dict[str, Tensor]]:
        raw = job(tmp_path_factory.mktemp("job") / "run", stream, sharding__allowed=[kind], run__pipeline=pipeline)
        return global_losses(on(rank_pool, ranks, raw)), last_state(raw)

    return finished


@pytest.mark.parametrize("pipeline", [pytest.param("base", marks=pytest.mark.slow), "sparse_dist"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_twenty_steps_equal_the_reference(ranks, kind, pipeline, trained, stream, tmp_path_factory):
    agree(*trained(ranks, kind, pipeline), references(kind, stream, str(tmp_path_factory.getbasetemp())))


# a type that knows nodes -> the type whose initial state the reference starts from
ON_NODES = {"table_row_wise": "table_wise", "table_column_wise": "column_wise", "grid_shard": "column_wise"}


@pytest.mark.parametrize("kind", ON_NODES)
def test_types_that_know_nodes_equal_the_reference_on_two_nodes_of_two(
    kind, stream, tmp_path, tmp_path_factory, on_ranks
):
    """grid_shard cuts by columns, and `viewed` is one column shard wide: it is row-wise within a node."""
    alone = {"viewed": ["table_row_wise"]} if kind == "grid_shard" else {}
    raw = job(tmp_path / "run", stream, sharding__allowed=[kind], sharding__tables=alone)
    records = on(on_ranks, 4, raw)
    plan = read_plan(tmp_path / "run/plan.json")
    assert {t.sharding_type for t in plan.tables if t.table not in alone} == {kind}
    assert plan.topology.nodes == 2
    reference = references(ON_NODES[kind], stream, str(tmp_path_factory.getbasetemp()))
    agree(global_losses(records), last_state(raw), reference)


def test_the_reference_has_batches_that_no_rank_count_divides():
    sizes = [b.num_rows for b in batches()]
    assert len(sizes) == 20 and 1 in sizes and 3 in sizes and all(s % 3 for s in sizes if s == 32)


@pytest.mark.parametrize("kind", KINDS)
def test_sparse_dist_is_bitwise_the_base_pipeline(kind, trained):
    (losses, a), (sent_ahead, b) = (trained(3, kind, pipeline) for pipeline in ("base", "sparse_dist"))
    assert losses == sent_ahead
    assert same(a, b) == []


def test_mixed_sharding_types_in_one_plan_equal_the_reference(stream, tmp_path, tmp_path_factory, on_ranks):
    tables = {"user": ["row_wise"], "item": ["data_parallel"], "viewed": ["table_wise"], "tags": ["row_wise"]}
    raw = job(tmp_path / "run", stream, sharding__tables=tables)
    records = on(on_ranks, 3, raw)
    agree(
        global_losses(records),
        last_state(raw),
        references("table_wise", stream, str(tmp_path_factory.getbasetemp())),
    )

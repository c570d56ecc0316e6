"""2D parallelism on gloo: groups of ranks with all tables each, averaged."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from exfm.checkpoints.commits import committed
from exfm.data.cut import Cut, write_stream
from exfm.data.errors import UserError
from exfm.trainer.config import check_ranks
from tests.trainer.jobs import (
    SCHEMA,
    Raw,
    all_logits,
    global_losses,
    job,
    last_state,
    make_stream,
    on,
    parsed,
    replaced,
    same,
    scores,
    some_rows,
)

TABLES = ("user", "item", "viewed", "tags")
Ranks = Callable[..., list[Any]]


def equal_weights(n: int) -> pa.Table:
    """Examples that weigh the same, so that half of a batch has half of its weight."""
    table = some_rows(n, 3, 0)
    number = table.column_names.index("importance")
    return table.set_column(number, "importance", pa.array(np.ones(n, np.float32)))


def stream_of(folder: Path, table: pa.Table) -> str:
    return write_stream(str(folder), SCHEMA, table, [Cut(0, table.num_rows, 0, 10_000)]).root


def of_tables(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t for name, t in state.items() if name.startswith("tables.")}


def test_a_step_of_two_replicas_is_the_mean_of_two_jobs_on_half_the_batch_each(on_ranks: Ranks, tmp_path: Path) -> None:
    """The oracle is the definition: each group learns from its part alone, then weights and Adagrad sums are averaged."""
    table = equal_weights(32)
    both = job(tmp_path / "both", stream_of(tmp_path / "s", table), sharding={"allowed": ["table_wise"], "replicas": 2})
    on(on_ranks, 2, both)
    halves = []
    for half in range(2):
        part = stream_of(tmp_path / f"s{half}", table.slice(16 * half, 16))
        alone = job(tmp_path / f"h{half}", part, sharding={"allowed": ["table_wise"]}, stream__global_batch=16)
        on(on_ranks, 1, alone)
        halves.append(of_tables(last_state(alone)))
    found = of_tables(last_state(both))
    assert {n.split(".")[1] for n in found} == set(TABLES)
    for name, own in found.items():
        torch.testing.assert_close(own, (halves[0][name] + halves[1][name]) / 2, rtol=1e-5, atol=1e-7, msg=name)


def test_tables_that_all_ranks_have_are_learned_as_without_replicas(on_ranks: Ranks, tmp_path: Path) -> None:
    stream = make_stream(tmp_path / "stream").root
    raws = [
        job(tmp_path / f"r{n}", stream, sharding={"allowed": ["data_parallel"], "replicas": n, "sync_steps": 3})
        for n in (1, 2)
    ]
    for raw in raws:
        on(on_ranks, 2, raw)
    assert same(last_state(raws[0]), last_state(raws[1])) == []


@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "column_wise"])
@pytest.mark.parametrize("pipeline", ["base", "sparse_dist"])
def test_a_group_of_two_ranks_learns_what_a_group_of_one_does(
    kind: str, pipeline: str, on_ranks: Ranks, tmp_path: Path
) -> None:
    """2 replicas x 2 ranks against 2 replicas x 1 rank: the same examples are in a group."""
    stream = make_stream(tmp_path / "stream", (64, 64)).root
    over = {"run__pipeline": pipeline, "optim__dense__clip_norm": 0.0}
    # accumulators of column shards are another algorithm, so both are cut alike or not at all
    one = job(tmp_path / "one", stream, sharding={"allowed": ["table_wise"], "replicas": 2}, **over)
    two = job(tmp_path / "two", stream, sharding={"allowed": [kind], "replicas": 2, "min_column_shard": 8}, **over)
    first, second = on(on_ranks, 2, one), on(on_ranks, 4, two)
    torch.testing.assert_close(global_losses(first), global_losses(second), rtol=2e-5, atol=1e-6)
    a, b = of_tables(last_state(one)), of_tables(last_state(two))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("sync_steps", [1, 3])
def test_a_restart_changes_nothing_and_every_commit_is_of_equal_replicas(
    sync_steps: int, on_ranks: Ranks, tmp_path: Path
) -> None:
    stream = make_stream(tmp_path / "stream").root
    over: dict[str, Any] = {"sharding": {"allowed": ["row_wise"], "replicas": 2, "sync_steps": sync_steps}}
    whole = job(tmp_path / "whole", stream, checkpoint__every_slices=1, **over)
    on(on_ranks, 4, whole)
    parts = job(tmp_path / "parts", stream, checkpoint__every_slices=1, stream__last=2, **over)
    on(on_ranks, 4, parts)
    rest = replaced(parts, stream__last=None)
    on(on_ranks, 4, rest)
    assert same(last_state(whole), last_state(rest)) == []
    assert scores(whole)["groups"] == scores(rest)["groups"]


def test_averaging_rarely_is_another_way_of_learning(on_ranks: Ranks, tmp_path: Path) -> None:
    stream = make_stream(tmp_path / "stream").root
    logits = []
    for every in (1, 5):
        raw = job(
            tmp_path / f"e{every}", stream, sharding={"allowed": ["table_wise"], "replicas": 2, "sync_steps": every}
        )
        logits.append(all_logits(on(on_ranks, 2, raw)))
    assert logits[0].keys() == logits[1].keys() and logits[0] != logits[1]


def test_a_checkpoint_of_replicas_is_of_one_copy_and_goes_on_without_them(on_ranks: Ranks, tmp_path: Path) -> None:
    stream = make_stream(tmp_path / "stream").root
    raw = job(tmp_path / "run", stream, sharding={"allowed": ["row_wise"], "replicas": 2}, stream__last=2)
    on(on_ranks, 4, raw)
    index = json.loads((Path(committed(tmp_path / "run/checkpoints")[-1].folder) / "index.json").read_text())["tensors"]
    assert {name.split(".")[1] for name in index if name.startswith("tables.")} == set(TABLES)
    for name, entry in index.items():
        if name.startswith("tables."):
            written = sum(math.prod(chunk[1]) for chunk in entry["chunks"])
            assert written == math.prod(entry["shape"]), f"{name} is there more than once"
    alone = replaced(raw, sharding__replicas=1, stream__last=None)
    assert [code for code, _ in on(on_ranks, 1, alone)] == [0]


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"checkpoint": {"full_every": 2}}, r"checkpoint.full_every is 2, but sharding.replicas 2 .* use 1"),
        ({"checkpoint": {"staging": "copy_on_write"}}, r"checkpoint.staging is copy_on_write, .* use full"),
        ({"checkpoint": {"snapshots": {"full_every": 3}}}, r"checkpoint.snapshots.full_every is 3"),
        (
            {"sharding__allowed": ["table_row_wise"]},
            r"table_row_wise, which can be planned with 2 replicas but not trained",
        ),
    ],
)
def test_what_does_not_go_with_replicas_is_refused_before_any_rank(over: Raw, message: str, tmp_path: Path) -> None:
    raw = job(tmp_path / "run", tmp_path, sharding__replicas=2, **over)
    with pytest.raises(UserError, match=message):
        check_ranks(parsed(raw), 4)


def test_ranks_that_replicas_do_not_divide_are_refused(on_ranks: Ranks, tmp_path: Path) -> None:
    stream = make_stream(tmp_path / "stream").root
    raw = job(tmp_path / "run", stream, sharding__replicas=3)
    with pytest.raises(UserError, match=r"replicas is 3, which does not divide world_size 1"):
        on(on_ranks, 1, raw)

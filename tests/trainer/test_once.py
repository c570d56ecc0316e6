"""Lists that repeat are looked up once per batch, and what is learned is what it would have been."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from exfm.data.block import first_with_list
from exfm.data.cut import Cut, write_stream
from exfm.data.errors import UserError
from exfm.data.manifest import Stream, open_stream
from exfm.data.reader import open_slice
from exfm.trainer.columns import batch_columns
from tests.trainer.jobs import ROWS, SCHEMA, Raw, global_losses, job, last_state, on, parsed, replaced, run, tables_of

ONCE = ["recent", "viewed"]


def repeating(table: pa.Table, seed: int) -> pa.Table:
    """The rows with lists that a user keeps for some examples, some of them empty."""
    rng = np.random.default_rng(seed)
    users = table.column("user").to_pylist()
    for name, top in (("recent", 50), ("viewed", 30)):
        held: dict[int, list[int]] = {}
        lists = []
        for user in users:
            if user not in held or rng.random() < 0.2:
                held[user] = rng.integers(0, top, rng.integers(0, 6)).tolist()
            lists.append(held[user])
        place = table.column_names.index(name)
        table = table.set_column(place, name, pa.array(lists, pa.list_(pa.int64())))
    return table


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> Stream:
    edges = np.concatenate([[0], np.cumsum(ROWS)]).tolist()
    cuts = [Cut(edges[i], edges[i + 1], 1_000 + 100_000 * i, 1_000 + 100_000 * (i + 1)) for i in range(len(ROWS))]
    table = pa.concat_tables(repeating(t, i) for i, t in enumerate(tables_of()))
    return write_stream(str(tmp_path_factory.mktemp("once") / "stream"), SCHEMA, table, cuts)


def test_a_list_goes_back_to_the_first_of_its_run():
    users = np.array([1, 2, 1, 2, 1, 1, 2, 1])
    lists = [[5, 6], [5, 6], [5, 6], [], [7, 6], [5, 6], [], [5, 6]]
    ends = np.cumsum([0, *map(len, lists)])
    values = np.array([i for own in lists for i in own])
    assert first_with_list(users, values, ends).tolist() == [0, 1, 0, 3, 4, 5, 3, 5]
    assert first_with_list(users[:0], values[:0], ends[:1]).tolist() == []


@pytest.mark.parametrize("window", [0, 64])
def test_every_example_finds_its_list_in_its_batch_and_fewer_ids_are_sent(stream, window):
    raw = job(Path("unused"), stream.root, stream__shuffle_window=window)
    configs = [parsed(r) for r in (raw, replaced(raw, stream__once=ONCE))]
    plain, once = (open_slice(stream, c.stream, batch_columns(c, stream), 0, 3, 1, 2).batches() for c in configs)
    kept = sent = 0
    for a, b in zip(plain, once, strict=True):
        assert a.repeats is None and b.repeats.shape == (2, len(b))
        assert b.repeats.data_ptr() >= b.buffer.data_ptr()
        for name, holders in zip(ONCE, b.repeats.tolist(), strict=True):
            wanted, found = (k.sparse[name].to_dense() for k in (a, b))
            assert [found[h].tolist() for h in holders] == [w.tolist() for w in wanted]
            assert all(h <= i for i, h in enumerate(holders))
        for name in ("user", "item"):
            assert torch.equal(a.sparse[name].values(), b.sparse[name].values())
        kept, sent = kept + a.sparse.values().numel(), sent + b.sparse.values().numel()
    assert sent < kept


def near(a: Raw, b: Raw) -> None:
    one, two = last_state(a), last_state(b)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=2e-4, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("pipeline", [pytest.param("base", marks=pytest.mark.slow), "sparse_dist"])
@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "column_wise", "data_parallel"])
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_losses_weights_and_accumulators_are_those_of_the_lookup_of_every_list(
    ranks, kind, pipeline, stream, tmp_path, on_ranks
):
    plain = job(tmp_path / "plain", stream.root, sharding__allowed=[kind], run__pipeline=pipeline)
    once = replaced(plain, run__folder=str(tmp_path / "once"), stream__once=ONCE)
    expected, found = (global_losses(on(on_ranks, ranks, raw)) for raw in (plain, once))
    assert len(found) > 10 and found == pytest.approx(expected, rel=1e-5)
    near(plain, once)


def test_a_job_may_go_on_with_and_without_it(stream, tmp_path):
    raw = job(tmp_path / "run", stream.root)
    assert parsed(raw).digest() == parsed(replaced(raw, stream__once=ONCE)).digest()


@pytest.mark.parametrize("name", ["tags", "nope", "price"])
def test_what_is_no_unweighted_feature_is_refused(name, stream, tmp_path):
    with pytest.raises(UserError, match=rf"stream.once names {name}, .* it may name user, item, recent, viewed"):
        run(job(tmp_path, open_stream(stream.root).root, stream__once=[name]))

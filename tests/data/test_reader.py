"""Order, pieces, batches and resuming: against the files themselves, read plainly."""

import math
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exfm.data import writer
from exfm.data.batch import Batch
from exfm.data.columns import BatchColumns, Domain, SparseInput
from exfm.data.manifest import Stream
from exfm.data.order import SliceOrder, pieces
from exfm.data.reader import SliceReader, StreamConfig, ahead, open_slice
from tests.data.small import COLUMNS, identity, write_small


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> Iterator[Stream]:
    """Two slices of 230 and 101 rows, in row groups of 40 and parts of 120 rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "ROW_GROUP_ROWS", 40)
        patch.setattr(writer, "PART_ROWS", 120)
        yield write_small(tmp_path_factory.mktemp("streams") / "s", (230, 101))


def reader(stream: Stream, rank: int = 0, world_size: int = 1, index: int = 0, **config) -> SliceReader:
    config = StreamConfig(path=stream.root, **{"global_batch": 24, "shuffle_window": 64} | config)
    return open_slice(stream, config, COLUMNS, index, seed=5, rank=rank, world_size=world_size)


def plain_rows(stream: Stream, index: int = 0) -> list[dict]:
    rows: list[dict] = []
    folder = Path(stream.root) / f"slice={index:06d}"
    for part in sorted(p.name for p in (folder / "features").glob("*.parquet")):
        two = [pq.read_table(folder / kind / part).to_pylist() for kind in ("features", "labels")]
        rows += [a | b for a, b in zip(*two, strict=True)]
    return rows


def as_rows(batch: Batch) -> list[dict]:
    """The examples of a batch as plain values, padding left out."""
    keys = [*batch.sparse.keys(), *batch.weighted.keys()]
    columns = {}
    for jagged in (batch.sparse, batch.weighted):
        for key in jagged.keys():  # noqa: SIM118
            one = jagged[key]
            ends = one.lengths().cumsum(0)
            columns[key] = [one.values()[e - n : e].tolist() for e, n in zip(ends, one.lengths(), strict=True)]
            if one.weights_or_none() is not None:
                columns["w"] = [one.weights()[e - n : e].tolist() for e, n in zip(ends, one.lengths(), strict=True)]
    facts = {"id": batch.ids, "ts": batch.timestamps, "user_of": batch.users, "row": batch.rows}
    facts |= {"dense": batch.dense, "labels": batch.labels, "weight": batch.weights, "domain": batch.domain}
    values = {name: tensor.tolist() for name, tensor in facts.items()} | columns
    assert set(columns) >= set(keys)
    rows = [{name: column[i] for name, column in values.items()} for i in range(len(batch))]
    return [row for row in rows if row["id"] != -1]


def wanted_row(number: int, row: dict) -> dict:
    """What the definition of Batch makes of a row of the files."""
    known = [math.nan if row[n] is None else row[n] for n in ("click", "buy")]
    return {
        "id": row["example_id"], "ts": row["timestamp"], "user_of": row["user"], "row": number, "weight": 1.0, "domain": -1,
        "dense": [row["price"] or 0.0, pytest.approx(math.log1p(row["age_s"]), rel=1e-6)],
        "labels": pytest.approx(known, nan_ok=True), "user": [row["user"]], "item": [] if row["item"] is None else [row["item"]],
        "recent": row["recent"], "tags": row["tags"], "w": row["tag_weights"],
    }  # fmt: skip


def test_every_value_of_a_batch_is_the_files(stream):
    plain = plain_rows(stream)
    got = [row for batch in reader(stream).batches() for row in as_rows(batch)]
    assert sorted(row["row"] for row in got) == list(range(230))
    for row in got:
        assert row == wanted_row(row["row"], plain[row["row"]])


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("window", [0, 64])
def test_the_pieces_of_all_ranks_make_the_global_batch_of_one_rank(stream, world_size, window):
    whole = [as_rows(b) for b in reader(stream, shuffle_window=window).batches()]
    ranks = [reader(stream, r, world_size, shuffle_window=window).batches() for r in range(world_size)]
    joined = [[row for b in piece for row in as_rows(b)] for piece in zip(*ranks, strict=True)]
    assert repr(joined) == repr(whole)


def test_uneven_and_empty_pieces_are_padded_to_equal_length(stream):
    last = [list(reader(stream, r, 7, index=1, global_batch=99).batches())[-1] for r in range(7)]
    assert [len(b) for b in last] == [1] * 7
    assert [int((b.ids >= 0).sum()) for b in last] == [1, 1, 0, 0, 0, 0, 0]
    padding = last[-1]
    assert padding.weights.tolist() == [0.0] and padding.domain.tolist() == [-1] and padding.rows.tolist() == [-1]
    assert padding.labels.isnan().all() and padding.dense.tolist() == [[0.0, 0.0]]
    assert padding.sparse.lengths().tolist() == [0, 0, 0] and padding.weighted.values().numel() == 0
    first = [next(iter(reader(stream, r, 7, global_batch=24).batches())) for r in range(7)]
    assert [len(b) for b in first] == [4] * 7 and sum(float(b.weights.sum()) for b in first) == 24


def test_shuffling_permutes_within_windows_and_depends_on_seed_and_slice():
    order = SliceOrder(1000, None, 64, seed=1, slice=3)
    rows = order.rows(0, 1000)
    for start in range(0, 1000, 64):
        window = rows[start : start + 64]
        assert sorted(window) == list(range(start, min(start + 64, 1000)))
        assert len(window) < 20 or (np.diff(window) < 0).any()
    for other in (SliceOrder(1000, None, 64, 2, 3), SliceOrder(1000, None, 64, 1, 4)):
        assert (other.rows(0, 1000) != rows).mean() > 0.9
    assert SliceOrder(1000, None, 64, 1, 3).rows(100, 300).tolist() == rows[100:300].tolist()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    step=st.integers(0, 10), before=st.integers(1, 5), after=st.integers(1, 7), batch=st.integers(1, 60),
    window=st.sampled_from([0, 1, 17, 64, 500]), modulo=st.sampled_from([None, 3]),
)  # fmt: skip
def test_resuming_with_another_number_of_ranks_gives_exactly_the_rest(
    stream, step, before, after, batch, window, modulo
):
    domains = () if modulo is None else (Domain(name="d", column="user", values=(0,), modulo=modulo),)
    config = {"global_batch": batch, "shuffle_window": window, "domains": domains, "domain": "d" if modulo else None}

    def ids(world_size: int, start: int, stop: int | None) -> list[int]:
        ranks = [reader(stream, r, world_size, **config).batches(start, stop) for r in range(world_size)]
        return [i for piece in zip(*ranks, strict=True) for b in piece for i in b.ids.tolist() if i >= 0]

    at = step * batch
    assert ids(before, 0, at) + ids(after, at, None) == ids(1, 0, None)


@given(n=st.integers(0, 500), start=st.integers(0, 500), batch=st.integers(1, 99), world_size=st.integers(1, 9))
def test_pieces_tile_the_positions_with_equal_sizes(n, start, batch, world_size):
    for ranks in zip(*(pieces(n, start, None, batch, r, world_size) for r in range(world_size)), strict=True):
        assert len({(p.size, p.first, p.last) for p in ranks}) == 1
        assert [i for p in ranks for i in range(p.start, p.stop)] == list(range(ranks[0].first, ranks[0].last))
        assert all(p.stop - p.start <= p.size for p in ranks)


def test_a_domain_selects_and_numbers_its_examples(stream):
    domains = (Domain(name="a", column="user", values=(1, 2), modulo=5), Domain(name="b", column="user", values=(2, 3)))
    wanted = [row for row in plain_rows(stream) if row["user"] % 5 in (1, 2)]
    config = StreamConfig(path=stream.root, domains=domains, domain="a", global_batch=50)
    columns = BatchColumns(COLUMNS.schema, (), (), ("click",), domains=domains)
    batches = list(open_slice(stream, config, columns, 0, seed=0).batches())
    assert [i for b in batches for i in b.ids.tolist()] == [row["example_id"] for row in wanted]
    everyone = open_slice(stream, StreamConfig(path=stream.root, domains=domains), columns, 0, 0)
    found = torch.cat([b.domain for b in everyone.batches()]).tolist()
    assert found == [0 if r["user"] % 5 in (1, 2) else 1 if r["user"] == 3 else -1 for r in plain_rows(stream)]


def test_only_wanted_columns_are_decoded(stream, monkeypatch):
    asked: list[str] = []
    read = pq.ParquetFile.read_row_group

    def spy(self, group, columns=None, **options):
        asked.extend(columns)
        return read(self, group, columns=columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", spy)
    want = BatchColumns(COLUMNS.schema, (("price", False),), (SparseInput("i", "item", identity),), ("buy",))
    batch = next(iter(open_slice(stream, StreamConfig(path=stream.root), want, 0, 0).batches()))
    assert set(asked) == {"example_id", "timestamp", "user", "item", "price", "buy"}
    assert batch.weighted is None and batch.labels.shape[1] == 1


def test_every_row_group_is_decoded_once_also_in_wide_shuffle_windows(stream, monkeypatch):
    seen: list[int] = []
    read = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda f, g, **o: (seen.append(g), read(f, g, **o))[1])
    one = reader(stream, shuffle_window=10_000)
    assert sum(1 for _ in one.batches()) == 10
    assert len(seen) == 2 * one.source.num_groups


def test_prefetching_changes_nothing_and_its_thread_ends(stream):
    plain = [repr(as_rows(b)) for b in reader(stream).batches()]
    assert [repr(as_rows(b)) for b in reader(stream).batches(prefetch=3)] == plain
    batches = reader(stream).batches(prefetch=1)
    next(batches)
    assert "exfm-reader" in [t.name for t in threading.enumerate()]
    batches.close()
    assert "exfm-reader" not in [t.name for t in threading.enumerate()]


def test_an_error_arrives_after_the_items_before_it():
    def work():
        yield from (1, 2)
        raise RuntimeError("third")

    got = []
    with pytest.raises(RuntimeError, match="third"):
        for item in ahead(work(), depth=8):
            got.append(item)
    assert got == [1, 2]
    assert "exfm-reader" not in [t.name for t in threading.enumerate()]


def test_a_batch_moves_as_a_whole(stream):
    batch = next(iter(reader(stream).batches()))
    moved = batch.to(torch.device("cpu"), non_blocking=True)
    assert repr(as_rows(moved)) == repr(as_rows(batch)) and moved.supervision is None

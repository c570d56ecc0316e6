"""Examples converted together give the batches that they give one by one, and lie in one buffer."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from exfm.data import writer
from exfm.data.batch import Batch
from exfm.data.columns import Domain, SparseInput
from exfm.data.errors import UserError
from exfm.data.manifest import Stream
from exfm.data.reader import StreamConfig, open_slice
from tests.data.small import COLUMNS, write_small

FIRST = "slice=000000/{}/part-00000.parquet"
USER = (Domain(name="a", column="user", values=(0,), modulo=3),)


@pytest.fixture
def stream(tmp_path, monkeypatch) -> Stream:
    """A slice of 230 rows in row groups of 72 and parts of 144."""
    monkeypatch.setattr(writer, "ROW_GROUP_ROWS", 72)
    monkeypatch.setattr(writer, "PART_ROWS", 144)
    return write_small(tmp_path / "s", (230,))


def batches(stream: Stream, columns=COLUMNS, rank=0, ranks=1, stop=None, **config) -> Iterator[Batch]:
    own = StreamConfig(path=stream.root, **{"global_batch": 24} | config)
    return open_slice(stream, own, columns, 0, 5, rank, ranks).batches(0, stop)


def same(a: Batch, b: Batch) -> bool:
    one, two = a.tensors(), b.tensors()
    return one.keys() == two.keys() and all(torch.equal(one[n].nan_to_num(-9), two[n].nan_to_num(-9)) for n in one)


@pytest.mark.parametrize("config", [{}, {"shuffle_window": 64}, {"domains": USER, "domain": "a"}])
@pytest.mark.parametrize("ranks", [1, 3])
def test_batches_do_not_depend_on_how_many_are_converted_together(tmp_path, monkeypatch, ranks, config):
    """Row groups of 7 rows convert every batch alone, those of 100 some together, one of 230 all."""
    found = []
    for rows in (7, 100, 230):
        monkeypatch.setattr(writer, "ROW_GROUP_ROWS", rows)
        stream = write_small(tmp_path / str(rows), (230,))
        found.append([list(batches(stream, rank=r, ranks=ranks, **config)) for r in range(ranks)])
    assert len(found[0][0]) >= 3
    for other in found[1:]:
        for own, theirs in zip(found[0], other, strict=True):
            assert all(same(a, b) for a, b in zip(own, theirs, strict=True))


def refusing(bad: int):
    """Columns whose mapping of `item` refuses the example of that id."""

    def to_rows(ids: np.ndarray, lengths: np.ndarray, examples: np.ndarray) -> np.ndarray:
        if bad in examples:
            raise UserError(f"example {bad} of {len(examples)}")
        return ids

    return replace(COLUMNS, sparse=(*COLUMNS.sparse[:3], SparseInput("item2", "item", to_rows), COLUMNS.sparse[3]))


def test_a_bad_example_ends_its_own_batch_and_those_before_it_arrive(stream):
    got = []
    with pytest.raises(UserError, match="example 1000 of 24"):
        for batch in batches(stream, refusing(1000)):  # row 100, of the fifth batch
            got.append(batch)
    assert all(same(a, b) for a, b in zip(got, list(batches(stream, refusing(-1)))[:4], strict=True))


def test_a_bad_example_that_does_not_take_part_stops_nobody(stream):
    users = pq.read_table(Path(stream.root) / FIRST.format("features")).column("user").to_numpy()
    other = int(np.argmax(users % 3 != 0))
    assert list(batches(stream, refusing(10 * other), domains=USER, domain="a", shuffle_window=50))
    assert len(list(batches(stream, refusing(1000), stop=96))) == 4
    second = list(batches(stream, refusing(0), rank=1, ranks=2))  # example 0 is rank 0's
    assert len(second) == 10


def test_a_bad_label_is_named_with_the_rows_of_its_batch(stream):
    path = Path(stream.root) / FIRST.format("labels")
    table = pq.read_table(path)
    values = table.column("click").to_numpy().copy()
    values[70] = 3
    manifest = stream.wait(0, "labels", 0)
    groups = manifest.parts[0].row_groups
    table = table.set_column(0, "click", pa.array(values))
    part = writer.write_part(stream.fs, str(path.parent), path.name, table, groups)
    forged = manifest.model_copy(update={"parts": (part, *manifest.parts[1:])})
    (path.parent / "manifest.json").write_text(forged.model_dump_json())
    with pytest.raises(UserError, match=r"slice=000000/features rows 48\.\.72: label 'click' of example 700 is 3"):
        list(batches(stream))


def test_a_batch_lies_in_one_buffer_and_moves_in_one_copy(stream):
    for batch in batches(stream):
        assert batch.buffer is not None and set(batch.tensors()) > {"weighted.weights", "sparse.values", "dense", "ids"}
        begin, end = batch.buffer.data_ptr(), batch.buffer.data_ptr() + batch.buffer.nbytes
        places = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in batch.tensors().values() if t.nbytes)
        assert begin <= places[0][0] and places[-1][1] <= end and all(p % 64 == 0 for p, _ in places)
        assert all(a[1] <= b[0] for a, b in pairwise(places))
        copy = Mock(side_effect=torch.clone)
        other = batch._each(copy)
        copy.assert_called_once_with(batch.buffer)
        assert same(other, batch)
        assert len({t.untyped_storage().data_ptr() for t in other.tensors().values()}) == 1
        assert other.sparse.keys() == batch.sparse.keys() and other.sparse.stride() == len(batch)
        assert same(other._each(torch.clone), batch)  # and again from there


def test_a_batch_with_a_field_of_another_memory_moves_with_that_field(stream):
    batch = next(batches(stream))
    changed = replace(batch, weights=batch.weights * 2)
    moved = changed._each(torch.clone)
    assert same(moved, changed) and not same(moved, batch) and moved.buffer is None


def test_a_batch_that_is_there_stays_as_it_is(stream):
    batch = next(batches(stream))
    assert batch.to(torch.device("cpu"), non_blocking=True) is batch


@pytest.mark.gpu
def test_a_pinned_batch_is_on_the_device_after_one_copy(stream):
    own = StreamConfig(path=stream.root, global_batch=24)
    for batch in open_slice(stream, own, COLUMNS, 0, 5).batches(pinned=True):
        assert batch.buffer.is_pinned()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            there = batch.to(torch.device("cuda"), non_blocking=True)
            torch.cuda.synchronize()
        assert sum(e.count for e in profile.key_averages() if "Memcpy HtoD" in e.key) == 1
        assert len({t.untyped_storage().data_ptr() for t in there.tensors().values()}) == 1
        assert same(there.to(torch.device("cpu")), batch)

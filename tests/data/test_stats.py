"""What stats measures, against numbers counted by hand, brute force and known laws."""

import json
import sys
from collections import Counter as Plain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml
from rich.console import Console

from exfm.data import counts, writer
from exfm.data.counts import Counter, zipf_exponent
from exfm.data.cut import Cut, write_stream
from exfm.data.errors import UserError
from exfm.data.manifest import Stream, commit_stream, open_stream
from exfm.data.schema import Schema, SparseColumn
from exfm.data.stats import STEPS, ColumnStats, column_stats, measure, read_stats, slices_given, write_stats
from exfm.launch import cli
from tests.data.small import SCHEMA, some_rows, write_small

ALL = 10**9


def counted(column: pa.Array, batch: int) -> ColumnStats:
    counter = Counter(batch)
    counter.add(column)
    counter.finish()
    return column_stats(counter)


@pytest.fixture
def small(tmp_path, monkeypatch) -> Stream:
    monkeypatch.setattr(writer, "ROW_GROUP_ROWS", 40)
    return write_small(tmp_path / "s", (130, 70))


@pytest.fixture
def tiny(tmp_path) -> Stream:
    """Five examples in two slices, small enough to count by hand."""
    schema = Schema(
        name="tiny",
        labels=("click",),
        sparse=(SparseColumn(name="item"), SparseColumn(name="tags", list=True), SparseColumn(name="nothing")),
    )
    columns = {
        "example_id": [1, 2, 3, 4, 5],
        "timestamp": [0, 1, 2, 3, 4],
        "item": [7, 7, None, 8, 7],
        "tags": [[1, 1, 2], [], [2, 3], [1], None],
        "nothing": [None] * 5,
        "click": [0, 1, 0, 1, 0],
    }
    types = schema.feature_types() | schema.label_types()
    table = pa.table({name: pa.array(columns[name], type=kind) for name, kind in types.items()})
    return write_stream(str(tmp_path / "tiny"), schema, table, [Cut(0, 3, 0, 3), Cut(3, 5, 3, 5)])


def test_a_tiny_stream_has_the_numbers_counted_by_hand(tiny):
    found = measure(tiny, None, 0, 2, batch=2, max_examples=ALL)
    assert (found.stream, found.examples, found.batch, found.slices) == ("tiny", 5, 2, (0, 2))
    item, tags, nothing = (found.columns[name] for name in ("item", "tags", "nothing"))
    # batches [7 7] [- 8] [7], the last one incomplete
    assert (item.pooling, item.presence, item.distinct) == (4 / 5, 4 / 5, 2)
    assert item.unique_rate == (1 / 2 + 1) / 2
    assert item.hot == {"0.001": 3 / 4, "0.01": 3 / 4, "0.1": 3 / 4}
    assert item.reuse == pytest.approx([1.0] * 9 + [1 / 3] * 10 + [0.0], rel=1e-5)
    # batches [1 1 2] [2 3 1] []; 1 and 2 are in two batches, 3 in one
    assert (tags.pooling, tags.presence, tags.distinct) == (6 / 5, 3 / 5, 3)
    assert tags.unique_rate == pytest.approx((2 / 3 + 1) / 2, rel=1e-5)
    assert tags.hot["0.1"] == 1 / 2
    assert tags.reuse == pytest.approx([1.0] * 6 + [3 / 5] * 7 + [1 / 5] * 6 + [0.0], rel=1e-5)
    assert (nothing.pooling, nothing.presence, nothing.unique_rate, nothing.distinct, nothing.zipf) == (0, 0, 0, 0, 0)
    assert set(nothing.reuse) | set(nothing.hot.values()) == {0.0}


def test_bytes_per_example_are_those_of_the_files(tiny):
    found = measure(tiny, ["item"], 0, 2, 2, ALL)
    files = sum(path.stat().st_size for path in Path(tiny.root).rglob("*.parquet"))
    assert found.bytes_per_example == pytest.approx(files / 5, rel=1e-5) and list(found.columns) == ["item"]


@pytest.mark.parametrize("batch", [1, 17, 64, 1000])
def test_every_number_is_what_a_plain_count_gives(small, batch, monkeypatch):
    monkeypatch.setattr(counts, "PENDING", 50)
    found = measure(small, None, 0, 2, batch, ALL)
    rows = pa.concat_tables([some_rows(130, 0), some_rows(70, 1, 100_000)])
    for name, column in found.columns.items():
        lists = [x if isinstance(x, list) else [] if x is None else [x] for x in rows.column(name).to_pylist()]
        groups = [[x for ids in lists[i : i + batch] for x in ids] for i in range(0, 200, batch)]
        whole = [ids for ids in groups[: 200 // batch] or groups if ids]
        lookups, batches = Plain(x for ids in lists for x in ids), Plain(x for ids in groups for x in set(ids))
        assert column.pooling == pytest.approx(lookups.total() / 200, rel=1e-5)
        assert column.presence == pytest.approx(sum(map(bool, lists)) / 200, rel=1e-5)
        assert column.unique_rate == pytest.approx(np.mean([len(set(ids)) / len(ids) for ids in whole]), rel=1e-5)
        assert column.distinct == len(lookups)
        top = [n for _, n in lookups.most_common(-(-len(lookups) // 10))]
        assert column.hot["0.1"] == pytest.approx(sum(top) / lookups.total(), rel=1e-5)
        hits = [sum(n for _, n in batches.most_common(len(batches) * k // STEPS)) for k in range(1, STEPS + 1)]
        assert column.reuse == pytest.approx([1 - n / batches.total() for n in hits], abs=1e-5)


def test_the_exponent_of_a_zipf_column_is_recovered():
    rng = np.random.default_rng(0)
    for exponent in (0.6, 1.1):
        weights = np.arange(1, 50_001) ** -exponent
        ids = rng.permutation(50_000)[rng.choice(50_000, 500_000, p=weights / weights.sum())]
        assert counted(pa.array(ids), 4096).zipf == pytest.approx(exponent, abs=0.1)
    exact = np.round(1e9 * np.arange(1, 1001) ** -1.1).astype(np.int64)
    assert zipf_exponent(exact) == pytest.approx(1.1, abs=1e-3)


def test_uniform_ids_have_an_exponent_near_0():
    ids = np.random.default_rng(0).integers(0, 10_000, 500_000)
    found = counted(pa.array(ids), 4096)
    assert 0 <= found.zipf < 0.1 and found.hot["0.1"] == pytest.approx(0.1, abs=0.03)
    assert zipf_exponent(np.full(100, 50)) == 0
    assert zipf_exponent(np.array([50, 9, 9])) == 0  # too rare for a fit


def test_the_miss_curve_falls_from_1_to_0_and_lies_between_its_points_on_a_line():
    ids = np.random.default_rng(0).zipf(1.3, 20_000)
    found = counted(pa.array(ids), 512)
    curve = [found.miss_ratio(share) for share in np.linspace(0, 1, 201)]
    assert curve[0] == 1 and curve[-1] == 0 and (np.diff(curve) <= 0).all()
    assert found.miss_ratio(0.05) == found.reuse[0] < 1
    assert found.miss_ratio(0.075) == pytest.approx((found.reuse[0] + found.reuse[1]) / 2)


def test_at_most_max_examples_are_read_and_the_slices_say_which(small):
    found = measure(small, ["item"], 0, 2, 16, 100)
    assert (found.examples, found.slices) == (100, (0, 1))
    assert measure(small, ["item"], 0, 1, 16, 130).columns == measure(small, ["item"], 0, 2, 16, 130).columns
    found = measure(small, ["item"], 1, 2, 16, ALL)
    assert (found.examples, found.slices) == (70, (1, 2))


def test_a_written_file_has_a_line_for_every_column_and_reads_back_equal(small, tmp_path):
    found = measure(small, None, 0, 2, 16, ALL)
    path = tmp_path / "new" / "stats.yaml"
    write_stats(path, found)
    assert read_stats(path) == found
    lines = [line for line in path.read_text().splitlines() if line.startswith("  ")]
    assert [line.split(":")[0].strip() for line in lines] == ["user", "item", "recent", "tags"]


def test_a_bad_file_is_refused_by_file_key_and_value(small, tmp_path):
    path = tmp_path / "stats.yaml"
    write_stats(path, measure(small, ["item"], 0, 2, 16, ALL))
    good = path.read_text()
    for change, message in (
        ({"presence": 1.5}, r"stats.yaml: 'columns.item.presence' is 1.5: .*less than or equal to 1"),
        ({"zipf": float("nan")}, r"'columns.item.zipf' is nan"),
        ({"reuse": [1.0]}, r"'columns.item.reuse' is \[1.0\]: .*at least 20"),
        ({"hot": {"0.5": 1}}, r"'columns.item.hot.0.5"),
        ({"poling": 1}, r"'columns.item.poling' is 1: Extra"),
    ):
        value = yaml.safe_load(good)
        value["columns"]["item"] |= change
        path.write_text(yaml.safe_dump(value))
        with pytest.raises(UserError, match=message):
            read_stats(path)
    for text, message in (
        (good.replace("batch: 16\n", ""), "key 'batch' is missing"),
        ("[1, 2", "stats.yaml cannot be read"),
        ("3", r"'\(all\)' is 3"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_stats(path)
    with pytest.raises(UserError, match="none.yaml cannot be read"):
        read_stats(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot be written"):
        write_stats(path / "below" / "stats.yaml", measure(small, [], 0, 1, 16, ALL))


def test_slices_that_are_not_there_are_refused_and_a_growing_stream_gives_what_it_has(small):
    assert slices_given(small, None) == (0, 2) and slices_given(small, "1:2") == (1, 2)
    for text in ("0:3", "1:1", "-1:1", "2:1"):
        with pytest.raises(UserError, match=f"--slices {text} is not a part of 0:2"):
            slices_given(small, text)
    for text in ("1", "a:b", "0:1:2", ""):
        with pytest.raises(UserError, match=f"--slices {text} is not of the form A:B, for instance 0:2"):
            slices_given(small, text)
    assert slices_given(commit_stream(small.root, SCHEMA, None), None) == (0, 2)
    with pytest.raises(UserError, match="slice=000002 has no committed features"):
        measure(commit_stream(small.root, SCHEMA, 3), ["item"], 0, 3, 16, ALL)
    with pytest.raises(UserError, match="has no slice yet"):
        slices_given(commit_stream(f"{small.root}-empty", SCHEMA, None), None)
    with pytest.raises(UserError, match="slices 2:2 of .* are none"):
        measure(small, None, 2, 2, 16, ALL)
    with pytest.raises(UserError, match="no sparse column 'price'; it has user, item"):
        measure(small, ["price"], 0, 2, 16, ALL)


def test_the_command_writes_the_file_prints_a_table_or_json_and_refuses_with_2(small, tmp_path, monkeypatch, capfd):
    def exfm(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["exfm", "data", "stats", *map(str, args)])
        monkeypatch.setattr(cli, "console", Console(stderr=True, width=10_000))
        capfd.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capfd.readouterr()

    out = tmp_path / "stats.yaml"
    code, text, said = exfm(small.root, "--out", out, "--batch", 16)
    assert code == 0 and "counted: 800/800" in said
    for word in ("small: 200 examples of slices 0:2", "batches of 16", "user", "recent", "zipf"):
        assert word in text
    assert "…" not in text
    assert read_stats(out) == measure(open_stream(small.root), None, 0, 2, 16, ALL)
    code, text, _ = exfm(small.root, "--out", out, "--slices", "1:2", "--max-examples", 50, "--json")
    assert code == 0 and json.loads(text) == read_stats(out).model_dump(mode="json")
    assert json.loads(text)["examples"] == 50 and json.loads(text)["batch"] == 4096
    for args, message in (
        ((tmp_path / "none", "--out", out), "none is not a prepared stream"),
        ((small.root, "--out", out, "--slices", "1:9"), "--slices 1:9 is not a part of 0:2"),
        ((small.root, "--out", out, "--batch", 0), "--batch is 0; at least 1"),
        ((small.root, "--out", out, "--max-examples", 0), "--max-examples is 0; at least 1"),
        ((small.root, "--out", tmp_path), "is a folder; name a file in it"),
    ):
        code, _, said = exfm(*args)
        assert code == 2 and message in said

"""Any Parquet with a schema: what is converted, what is refused, and how."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from exfm.data.errors import UserError
from exfm.data.manifest import Stream
from exfm.data.parquet import prepare_parquet
from exfm.data.schema import Schema, SparseColumn
from tests.data.small import SCHEMA, some_rows

PLAIN = Schema(
    name="plain",
    labels=("click",),
    dense=("price",),
    sparse=(SparseColumn(name="item"), SparseColumn(name="recent", list=True)),
)


def columns(**changed) -> dict[str, pa.Array]:
    """Four rows of PLAIN, out of order, without ids, in types that convert; None leaves a column out."""
    plain = {
        "timestamp": pa.array([30, 10, 20, 20], pa.int32()),
        "item": pa.array([7, None, 8, 9], pa.uint16()),
        "recent": pa.array([[1], [], None, [2, 3]], pa.large_list(pa.int32())),
        "price": pa.array([0.5, 1 / 3, None, float("nan")], pa.float64()),
        "click": pa.array([True, False, None, True]),
    } | changed
    return {name: values for name, values in plain.items() if values is not None}


def prepare(tmp_path: Path, schema: Schema = PLAIN, num_slices: int | None = 1, changed=None, **options) -> Stream:
    pq.write_table(pa.table(columns(**(changed or {}))), tmp_path / "source.parquet")
    return prepare_parquet(tmp_path / "source.parquet", schema, str(tmp_path / "out"), num_slices, **options)


def written(stream: Stream, index: int = 0) -> list[dict]:
    two = [
        pq.read_table(f"{stream.root}/slice={index:06d}/{k}/part-00000.parquet").to_pylist()
        for k in ("features", "labels")
    ]
    return [a | b for a, b in zip(*two, strict=True)]


def test_rows_are_sorted_converted_and_numbered_and_it_is_said(tmp_path):
    said = []
    stream = prepare(tmp_path, progress=lambda *step: said.append(step[0]))
    rows = written(stream)
    assert [(r["example_id"], r["timestamp"], r["item"]) for r in rows] == [
        (0, 10, None),
        (1, 20, 8),
        (2, 20, 9),
        (3, 30, 7),
    ]
    assert [r["recent"] for r in rows] == [[], None, [2, 3], [1]]
    assert [r["click"] for r in rows] == [0.0, None, 1.0, 1.0]
    assert rows[0]["price"] == np.float32(1 / 3) and rows[1]["price"] is None and np.isnan(rows[2]["price"])
    assert {"sorted by: timestamp", "row numbers as: example_id"} <= set(said)
    assert stream.info.extra == {"sorted_by": "timestamp", "row_numbers_as": "example_id"}


def test_a_folder_of_files_gives_what_was_written(tmp_path):
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    table = some_rows(100)
    pq.write_table(table.slice(0, 60), source / "a.parquet", row_group_size=25)
    pq.write_table(table.slice(60), source / "deep/b.parquet")
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(SCHEMA.model_dump(mode="json")))
    stream = prepare_parquet(source, tmp_path / "schema.yaml", str(tmp_path / "out"), num_slices=3)
    names = [*SCHEMA.feature_types(), *SCHEMA.label_types()]
    assert written(stream) + written(stream, 1) + written(stream, 2) == table.select(names).to_pylist()
    assert stream.info.extra == {}


def test_windows_of_seconds_cut_the_time(tmp_path):
    stream = prepare(tmp_path, num_slices=None, window_s=10)
    assert [(stream.wait(i, "labels", 0).t0, stream.wait(i, "labels", 0).rows) for i in range(3)] == [
        (10, 1),
        (20, 2),
        (30, 1),
    ]


def test_arrow_timestamps_of_whole_seconds_and_dictionaries_are_converted(tmp_path):
    when = [datetime(2024, 1, 1, 0, 0, s, tzinfo=UTC) for s in (3, 1, 2, 2)]
    changed = {
        "timestamp": pa.array(when, pa.timestamp("us", "UTC")),
        "item": pa.array([5, 6, 5, 6]).dictionary_encode(),
    }
    rows = written(prepare(tmp_path, changed=changed))
    assert [(r["timestamp"], r["item"]) for r in rows] == [
        (1704067200 + s, i) for s, i in ((1, 6), (2, 5), (2, 6), (3, 5))
    ]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"price": None}, r"lacks column\(s\) price of the schema; it has timestamp, item"),
        ({"more": pa.array([1] * 4)}, r"has column\(s\) more that the schema does not name.*--drop-extra"),
        (
            {"item": pa.array(list("abcd"))},
            "column 'item' is string, the schema says int64; map it to integer ids first",
        ),
        ({"item": pa.array([1.0] * 4)}, "column 'item' is double, the schema says int64"),
        (
            {"item": pa.array([2**63 + 1] * 4, pa.uint64())},
            "column 'item' is uint64 and does not fit into int64 without loss",
        ),
        ({"recent": pa.array([1] * 4)}, "column 'recent' is int64, the schema says list"),
        ({"price": pa.array([2**24 + 1] * 4)}, "'price' is int64 and does not fit into float without loss"),
        ({"price": pa.array([1e39] * 4)}, "'price' has values beyond float32's largest"),
        ({"timestamp": pa.array([1, None, 3, 4])}, "column 'timestamp' has 1 nulls"),
        ({"timestamp": pa.array([1500] * 4, pa.timestamp("ms"))}, "'timestamp' is timestamp.* without loss"),
        ({"click": pa.array([0, 1, 2, 1])}, "label 'click' of example 1 is 2; labels are 0, 1 or null"),
        ({"click": pa.array([0.5, 1, 0, 1])}, "label 'click' of example 3 is 0.5"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_remedy(tmp_path, changed, message):
    with pytest.raises(UserError, match=message):
        prepare(tmp_path, changed=changed)
    assert not (tmp_path / "out" / "stream.json").exists()


def test_extra_columns_are_dropped_when_told_so(tmp_path):
    stream = prepare(tmp_path, changed={"more": pa.array([1] * 4)}, drop_extra=True)
    assert "more" not in written(stream)[0] and stream.info.extra["dropped_columns"] == ["more"]


def test_missing_sources_and_schemas_and_both_or_no_cuts_are_refused(tmp_path):
    with pytest.raises(UserError, match="give exactly one"):
        prepare(tmp_path, num_slices=None)
    with pytest.raises(UserError, match="give exactly one"):
        prepare(tmp_path, num_slices=2, window_s=3)
    with pytest.raises(UserError, match=r"nothing does not exist; name a Parquet file"):
        prepare_parquet(tmp_path / "nothing", PLAIN, str(tmp_path / "out"), 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty has no \*\.parquet files"):
        prepare_parquet(tmp_path / "empty", PLAIN, str(tmp_path / "out"), 1)
    with pytest.raises(UserError, match=r"schema file .*no\.yaml does not exist"):
        prepare(tmp_path, schema=tmp_path / "no.yaml")
    (tmp_path / "bad.yaml").write_text("name: x\nlabels: [y]\nsprase: []\n")
    with pytest.raises(UserError, match="sprase"):
        prepare(tmp_path, schema=tmp_path / "bad.yaml")


def test_a_damaged_source_is_named_with_its_row_group(tmp_path):
    path = tmp_path / "source.parquet"
    rows = some_rows(200)
    pq.write_table(rows, path, row_group_size=100, compression="zstd")
    whole = path.read_bytes()
    path.write_bytes(whole[:-50])
    with pytest.raises(UserError, match=r"source\.parquet is no Parquet file, corrupt or truncated"):
        prepare_parquet(path, SCHEMA, str(tmp_path / "out"), 2)
    chunk = pq.ParquetFile(pa.BufferReader(whole)).metadata.row_group(1).column(0)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    path.write_bytes(whole[:start] + b"\xff" * 60 + whole[start + 60 :])
    with pytest.raises(UserError, match=r"source\.parquet row group 1 is corrupt or truncated"):
        prepare_parquet(path, SCHEMA, str(tmp_path / "out"), 2)

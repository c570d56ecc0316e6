"""What inspect reports, against the same numbers computed plainly."""

import json
import shutil
from io import StringIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from exfm.data import inspect as inspecting
from exfm.data import writer
from exfm.data.errors import UserError
from exfm.data.inspect import Distinct, inspect, render
from exfm.data.manifest import Stream, commit_stream
from tests.data.small import SCHEMA, some_rows, write_small


@pytest.fixture
def stream(tmp_path, monkeypatch) -> Stream:
    monkeypatch.setattr(writer, "ROW_GROUP_ROWS", 40)
    return write_small(tmp_path / "s", (130, 70))


def test_every_number_is_what_plain_numpy_gives(stream):
    found = inspect(stream.root)
    assert json.loads(json.dumps(found)) == found
    table = pa.concat_tables([some_rows(130, 0), some_rows(70, 1, 100_000)])
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    price = np.array([x for x in columns["price"] if x is not None])
    assert found["rows"] == 200 and found["sealed"]
    assert found["features"]["price"] == pytest.approx(
        {"type": "dense", "nulls": columns["price"].count(None) / 200, "nans": 0, "mean": price.mean(), "std": price.std(), "min": price.min(), "max": price.max()}
    )  # fmt: skip
    items = {x for x in columns["item"] if x is not None}
    wanted = {
        "type": "id",
        "nulls": columns["item"].count(None) / 200,
        "distinct": len(items),
        "distinct_is_exact": True,
    }
    assert found["features"]["item"] == wanted
    tags = [x for row in columns["tags"] for x in row]
    assert found["features"]["tags"]["mean_length"] == len(tags) / 200
    assert found["features"]["tags"]["distinct"] == len(set(tags))
    weights = [x for row in columns["tag_weights"] for x in row]
    assert found["features"]["tag_weights"]["mean"] == pytest.approx(np.mean(weights))


def test_slices_have_state_times_and_label_rates(stream):
    shutil.rmtree(Path(stream.root) / "slice=000001/labels")
    commit_stream(stream.root, SCHEMA, 3)
    found = inspect(stream.root)["slices"]
    assert [s["state"] for s in found] == ["labelled", "features", "missing"]
    assert (found[0]["t0"], found[0]["t1"], found[0]["rows"]) == (1_000, 101_000, 130)
    rows = some_rows(130)
    buy = [x for x in rows.column("buy").to_pylist() if x is not None]
    assert found[0]["labels"]["buy"] == {"observed": len(buy) / 130, "rate": 0.0}
    assert found[0]["labels"]["click"]["rate"] == pytest.approx(np.mean(rows.column("click").to_pylist()))


def test_a_growing_stream_shows_what_it_has(stream):
    commit_stream(stream.root, SCHEMA, None)
    found = inspect(stream.root)
    assert not found["sealed"] and [s["slice"] for s in found["slices"]] == [0, 1]


def test_missing_numbers_are_counted_as_nulls_and_nans(tmp_path):
    stream = commit_stream(str(tmp_path / "s"), SCHEMA, 1)
    table = some_rows(4)
    position = table.column_names.index("price")
    for values, wanted in (([None, float("nan"), 3.0, 5.0], 4.0), ([None, None, float("nan"), None], None)):
        shutil.rmtree(tmp_path / "s/slice=000000", ignore_errors=True)
        writer.write_slice(stream, 0, 0, 9_999, table.set_column(position, "price", pa.array(values, pa.float32())))
        price = inspect(stream.root)["features"]["price"]
        assert (price["nulls"], price["nans"], price["mean"]) == (values.count(None) / 4, 0.25, wanted)


def test_more_ids_than_the_sketch_holds_are_estimated_closely(monkeypatch):
    monkeypatch.setattr(inspecting, "SKETCH", 4_096)
    ids, some = np.random.default_rng(0).permutation(100_000), Distinct()
    for start in range(0, 100_000, 7_000):
        some.add(ids[start : start + 9_000])
    assert not some.exact and abs(some.count() / 100_000 - 1) < 4 / 4_096**0.5
    few = Distinct()
    for _ in range(3):
        few.add(np.arange(4_096))
    assert few.exact and few.count() == 4_096


def test_labels_of_other_features_and_a_truncated_file_are_refused(stream):
    root = Path(stream.root)
    manifest = root / "slice=000000/labels/manifest.json"
    whole = manifest.read_text()
    content = json.loads(whole)
    content["parts"][0]["row_groups"][0]["id_digest"] = "0" * 16
    manifest.write_text(json.dumps(content))
    with pytest.raises(UserError, match="slice=000000: labels are not of these features"):
        inspect(stream.root)
    manifest.write_text(whole)
    part = root / "slice=000001/features/part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"slice=000001/features/part-00000\.parquet row group 0"):
        inspect(stream.root)


def test_the_tables_name_every_column_and_slice(stream):
    console = Console(width=100, record=True, file=StringIO())
    console.print(render(inspect(stream.root)))
    text = console.export_text()
    for name in ("labelled", "1970-01-01 00:16", "user", "recent", "tag_weights", "age_s", "130", "click"):
        assert name in text
    assert "…" not in text

"""Wrong and damaged streams are refused with a message that names the file, the row group or the example."""

import shutil
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from exfm.data import writer
from exfm.data.columns import BatchColumns, SparseInput
from exfm.data.cut import Cut, write_stream
from exfm.data.errors import UserError
from exfm.data.manifest import Stream, commit_stream, open_stream
from exfm.data.reader import StreamConfig, open_slice, slices_of
from exfm.data.source import AlignedFiles
from exfm.data.writer import write_slice
from tests.data.small import COLUMNS, SCHEMA, identity, some_rows, write_small

FEATURES, LABELS = (f"slice=000000/{kind}/part-00000.parquet" for kind in ("features", "labels"))


@pytest.fixture
def stream(tmp_path, monkeypatch) -> Stream:
    """Two slices of 100 rows in row groups of 40."""
    monkeypatch.setattr(writer, "ROW_GROUP_ROWS", 40)
    return write_small(tmp_path / "s", (100, 100))


def read(stream: Stream, index: int = 0, sidecars=None, **config) -> int:
    opened = open_slice(
        open_stream(stream.root), StreamConfig(path=stream.root, **config), COLUMNS, index, 0, sidecars=sidecars
    )
    return sum(len(batch) for batch in opened.batches())


def replaced(column: str, values: pa.Array | None) -> pa.Table:
    table = some_rows(6)
    position = table.column_names.index(column) if column in table.column_names else -1
    if values is None:
        return table.drop_columns(column)
    if position < 0:
        return table.append_column(column, values)
    return table.set_column(position, column, values)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("price", None, r"slice 0 lacks column\(s\) price"),
        ("surprise", pa.array([1] * 6), r"slice 0 has column\(s\) surprise that the schema does not name"),
        ("item", pa.array(list("abcdef")), "column 'item' is string, the schema says int64"),
        ("recent", pa.array([1] * 6), "column 'recent' is int64, the schema says list"),
        (
            "click",
            pa.array([0, 1, 2, 0, 0, 0], pa.float32()),
            "label 'click' of example 20 is 2; labels are 0, 1 or null",
        ),
        ("example_id", pa.array([1, 2, 3, 2, 5, 6]), "example id 2 occurs more than once"),
        ("example_id", pa.array([1, None, 3, 2, 5, 6]), "column 'example_id' has 1 nulls"),
        ("user", pa.array([1, None, 3, 2, None, 6]), "column 'user' has 2 nulls"),
        ("timestamp", pa.array([5, 6, 4, 7, 8, 9]), r"row 2 \(example 20\) is earlier"),
        ("price", pa.array([0, np.inf, 0, 0, 0, 0], pa.float32()), "'price' of example 10 is infinite"),
        ("recent", pa.array([[1], [None], [], [], [], []], pa.list_(pa.int64())), "lists of 'recent' contain nulls"),
        ("tag_weights", pa.array([[0.5] * 9] * 6, pa.list_(pa.float32())), "one weight for every id of 'tags'"),
    ],
)
def test_an_unfit_slice_is_not_written(tmp_path, column, values, message):
    stream = commit_stream(str(tmp_path / "s"), SCHEMA, None)
    with pytest.raises(UserError, match=message):
        write_slice(stream, 0, 0, 99_999, replaced(column, values))
    assert stream.manifest(0, "features") is None and not list(tmp_path.rglob("*.parquet"))


def test_an_empty_slice_and_bad_weights_are_not_written(tmp_path):
    stream = commit_stream(str(tmp_path / "s"), SCHEMA, None)
    with pytest.raises(UserError, match="slice 4 is empty"):
        write_slice(stream, 4, 0, 9, some_rows(0))
    weighted = SCHEMA.model_copy(update={"weight": "w"})
    table = some_rows(3).append_column("w", pa.array([1, -1, 1], pa.float32()))
    with pytest.raises(UserError, match=r"weight 'w' of example 10 is -1\.0"):
        write_stream(str(tmp_path / "t"), weighted, table, [Cut(0, 3, 0, 9_999)])


def test_a_committed_slice_is_never_replaced(stream):
    with pytest.raises(UserError, match=r"slice 0 of .* is already committed"):
        write_slice(stream, 0, 0, 99_999, some_rows(6))
    assert read(stream) == 100


def test_a_truncated_file_is_refused_naming_file_and_row_group(stream):
    path = Path(stream.root) / FEATURES
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"{FEATURES} row group 0: the file has \d+ bytes, its manifest says \d+"):
        read(stream)


def contents(stream: Stream) -> str:
    batches = list(open_slice(stream, StreamConfig(path=stream.root), COLUMNS, 0, 0).batches())
    jagged = [k for b in batches for k in (b.sparse, b.weighted)]
    lists = [[k.values().tolist(), k.lengths().tolist()] for k in jagged] + [
        b.weighted.weights().tolist() for b in batches
    ]
    return repr((lists, [(b.dense.tolist(), b.labels.tolist()) for b in batches]))


def test_changed_bytes_in_a_row_group_are_refused_by_name_or_change_nothing(stream):
    path = Path(stream.root) / FEATURES
    whole, wanted = path.read_bytes(), contents(stream)
    group = pq.ParquetFile(path).metadata.row_group(1)
    ends = [
        (c.dictionary_page_offset or c.data_page_offset) + c.total_compressed_size for c in map(group.column, range(9))
    ]
    payload = [end - 2 for end in ends]
    anywhere = np.random.default_rng(0).integers(group.column(0).dictionary_page_offset or 0, ends[-1], 60).tolist()
    refused = 0
    for place in payload + anywhere:
        broken = bytearray(whole)
        broken[place] ^= 0xFF
        path.write_bytes(broken)
        try:
            assert contents(stream) == wanted and place in anywhere, f"byte {place} was changed unnoticed"
        except UserError as error:
            assert f"{FEATURES} row group 1" in str(error)
            refused += 1
    assert refused > 50


def test_a_file_that_is_gone_is_named(stream):
    (Path(stream.root) / LABELS).unlink()
    with pytest.raises(UserError, match=f"{LABELS} is named by its manifest but does not exist"):
        read(stream)


def test_edited_example_ids_are_refused(stream, monkeypatch):
    table = pq.read_table(Path(stream.root) / FEATURES)
    ids = table.column("example_id").to_numpy().copy()
    ids[55] += 1
    table = table.set_column(0, "example_id", pa.array(ids))
    manifest = stream.wait(0, "features", 0)
    part = writer.write_part(
        stream.fs, f"{stream.root}/slice=000000/features", "part-00000.parquet", table, manifest.parts[0].row_groups
    )
    forged = manifest.model_copy(update={"parts": (part,)})
    (Path(stream.root) / "slice=000000/features/manifest.json").write_text(forged.model_dump_json())
    with pytest.raises(UserError, match=f"{FEATURES} row group 1: example ids are not those of the manifest"):
        read(stream)


def test_a_slice_without_manifest_is_refused_and_one_that_comes_is_waited_for(stream):
    manifest = Path(stream.root) / "slice=000001/labels/manifest.json"
    aside = manifest.rename(manifest.with_suffix(".aside"))
    with pytest.raises(UserError, match=r"slice 1 of .* has no committed labels"):
        read(stream, 1)
    with pytest.raises(UserError, match=r"after 0\.1 s"):
        read(stream, 1, on_missing="wait", wait_s=0.1)
    timer = threading.Timer(0.5, aside.rename, [manifest])
    timer.start()
    assert read(stream, 1, on_missing="wait", wait_s=10) == 100
    timer.join()


def test_files_of_another_slice_are_refused(stream):
    root = Path(stream.root)
    other = stream.wait(1, "labels", 0)
    sidecar = AlignedFiles(stream.fs, f"{root}/slice=000001/labels", other, ("click",), SCHEMA.label_types())
    with pytest.raises(UserError, match=r"slice=000001/labels does not belong to .*slice=000000/features"):
        read(stream, 0, sidecars=lambda features: [sidecar])
    shutil.rmtree(root / "slice=000000/labels")
    shutil.copytree(root / "slice=000001/labels", root / "slice=000000/labels")
    with pytest.raises(UserError, match=r"is of stream 'small' slice 1 .*slice 0 \(labels"):
        read(stream)


def test_another_schema_a_damaged_manifest_and_no_stream_are_refused(stream, tmp_path):
    with pytest.raises(UserError, match=r"is not a prepared stream \(no stream\.json\)"):
        open_stream(str(tmp_path / "nothing"))
    commit_stream(stream.root, SCHEMA.model_copy(update={"name": "renamed"}), 2)
    with pytest.raises(UserError, match=r"is of stream 'small' slice 0 \(features, schema"):
        read(stream)
    commit_stream(stream.root, SCHEMA, 2)
    (Path(stream.root) / "slice=000000/features/manifest.json").write_text('{"kind": ')
    with pytest.raises(UserError, match=r"features/manifest\.json is damaged"):
        read(stream)
    (Path(stream.root) / "stream.json").write_text("{}")
    with pytest.raises(UserError, match=r"stream\.json is damaged"):
        open_stream(stream.root)


def test_a_label_edited_behind_the_manifest_is_refused_when_read(stream):
    table = pq.read_table(Path(stream.root) / LABELS)
    values = table.column("click").to_numpy().copy()
    values[70] = 3
    manifest = stream.wait(0, "labels", 0)
    table = table.set_column(0, "click", pa.array(values))
    part = writer.write_part(
        stream.fs, f"{stream.root}/slice=000000/labels", "part-00000.parquet", table, manifest.parts[0].row_groups
    )
    forged = manifest.model_copy(update={"parts": (part,)})
    (Path(stream.root) / "slice=000000/labels/manifest.json").write_text(forged.model_dump_json())
    with pytest.raises(UserError, match="label 'click' of example 700 is 3"):
        read(stream)


def test_slices_beyond_the_stream_and_unknown_ends_are_refused(stream, tmp_path):
    assert slices_of(stream, StreamConfig(path=stream.root)) == range(2)
    with pytest.raises(UserError, match=r"is 0\.\.3, but .* has slices 0\.\.2"):
        slices_of(stream, StreamConfig(path=stream.root, last=3))
    growing = commit_stream(str(tmp_path / "growing"), SCHEMA, None)
    with pytest.raises(UserError, match=r"still growing and stream\.last is not set"):
        slices_of(growing, StreamConfig(path=growing.root))


def test_an_id_that_a_mapping_refuses_ends_the_batch_with_its_message(stream):
    def refuse(ids: np.ndarray, lengths: np.ndarray, examples: np.ndarray) -> np.ndarray:
        raise UserError(f"id {ids.max()} of {len(examples)} examples")

    want = BatchColumns(
        SCHEMA, (), (SparseInput("user", "user", identity), SparseInput("i", "item", refuse)), ("click",)
    )
    config = StreamConfig(path=stream.root, global_batch=10)
    with pytest.raises(UserError, match="of 10 examples"):
        next(iter(open_slice(stream, config, want, 0, 0).batches(prefetch=2)))

"""Criteo's logs and Frappe: every value of the publisher's text arrives, in order, in slices; other files are named and refused."""

import gzip
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from exfm.data import criteo, frappe
from exfm.data.criteo import CATEGORIES, COUNTS, prepare_criteo
from exfm.data.errors import UserError
from exfm.data.frappe import FIELDS, prepare_frappe
from exfm.data.manifest import Stream, slice_folder


def rows_of(n: int, seed: int = 0) -> list[list[str]]:
    """Label, counts and categories as text, some of them missing."""
    rng = np.random.default_rng(seed)
    counts = np.where(rng.random((n, 13)) < 0.3, "", rng.integers(-3, 60_000, (n, 13)).astype(str))
    categories = [["" if rng.random() < 0.2 else f"{rng.integers(2**32):08x}" for _ in range(26)] for _ in range(n)]
    return [[str(rng.integers(2)), *c, *k] for c, k in zip(counts.tolist(), categories, strict=True)]


def text(rows: list[list[str]]) -> str:
    return "".join("\t".join(row) + "\n" for row in rows)


def read(stream: Stream) -> tuple[pa.Table, list[int]]:
    """All columns, and the rows of every slice."""
    found = []
    for index in range(stream.info.num_slices or 0):
        folder = Path(slice_folder(stream.root, index))
        parts = [pq.ParquetFile(next((folder / kind).glob("*.parquet"))).read() for kind in ("features", "labels")]
        table = parts[0]
        for name in parts[1].column_names:
            if name not in table.column_names:
                table = table.append_column(name, parts[1].column(name))
        found.append(table)
    return pa.concat_tables(found), [len(t) for t in found]


def check(table: pa.Table, rows: list[list[str]]) -> None:
    columns = ("click", *COUNTS, *CATEGORIES)
    for i, name in enumerate(columns):
        wanted = [None if row[i] == "" else int(row[i], 16) if name in CATEGORIES else float(row[i]) for row in rows]
        assert table.column(name).to_pylist() == wanted, name
    assert table.column("example_id").to_pylist() == table.column("timestamp").to_pylist() == list(range(len(rows)))


def test_every_value_of_the_kaggle_file_arrives_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(criteo, "BLOCK_BYTES", 4096)  # blocks and slices end at different rows
    rows = rows_of(250)
    (tmp_path / "train.txt").write_text(text(rows))
    table, sizes = read(prepare_criteo(tmp_path, str(tmp_path / "out"), 60))
    assert sizes == [60, 60, 60, 60, 10]
    check(table, rows)


def test_days_of_the_terabyte_logs_follow_each_other_and_share_no_slice(tmp_path):
    days = {0: rows_of(70, 1), 2: rows_of(50, 2), 10: rows_of(30, 3)}
    for day, rows in days.items():
        with gzip.open(tmp_path / f"day_{day}.gz", "wt") as file:
            file.write(text(rows))
    table, sizes = read(prepare_criteo(tmp_path, str(tmp_path / "out"), 40))
    assert sizes == [40, 30, 40, 10, 30]
    check(table, [row for rows in days.values() for row in rows])


def test_the_published_sample_is_what_its_parquet_says(tmp_path, data_dir):
    events = pq.read_table(data_dir / "criteo_kaggle_10k/events.parquet").slice(0, 500)
    number = {n: events.column(n).to_numpy() for n in events.column_names}
    rows = [
        [str(number["label"][i])]
        + ["" if np.isnan(v := number[n][i]) else str(int(v)) for n in COUNTS]
        + ["" if (v := number[n][i]) == 0 else f"{v:08x}" for n in CATEGORIES]
        for i in range(len(events))
    ]
    (tmp_path / "train.txt").write_text(text(rows))
    table, _ = read(prepare_criteo(tmp_path / "train.txt", str(tmp_path / "out"), 10_000))
    for name in CATEGORIES:
        assert [v or 0 for v in table.column(name).to_pylist()] == number[name].tolist()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda rows: rows[3].__setitem__(20, "xyz"), r"row 3 of it, column C7: 'xyz' is no category"),
        (lambda rows: rows[3].__setitem__(20, "0123456g"), r"row 3 of it, column C7: '0123456g' is no category"),
        (lambda rows: rows[2].pop(), r"is not of Criteo's form"),
        (lambda rows: rows[1].__setitem__(2, "many"), r"is not of Criteo's form"),
        (lambda rows: rows[4].__setitem__(0, "2"), r"example 4"),
    ],
)
def test_a_file_of_another_form_is_refused(broken, message, tmp_path):
    tmp_path = tmp_path / "with {braces}"
    tmp_path.mkdir()
    rows = rows_of(6)
    broken(rows)
    (tmp_path / "train.txt").write_text(text(rows))
    with pytest.raises(UserError, match=message):
        prepare_criteo(tmp_path, str(tmp_path / "out"), 10)
    assert not (tmp_path / "out/stream.json").exists()


def test_a_folder_without_its_files_and_a_cut_archive_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"has none of Criteo's files; name train.txt"):
        prepare_criteo(tmp_path, str(tmp_path / "out"), 10)
    whole = gzip.compress(text(rows_of(500)).encode())
    (tmp_path / "day_0.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"day_0.gz is not of Criteo's form"):
        prepare_criteo(tmp_path, str(tmp_path / "out"), 10**6)


def contexts(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(0, size, n) for size in FIELDS.values()], 1), rng.integers(0, 2, n)


def libfm(ids: np.ndarray, labels: np.ndarray) -> str:
    first = np.cumsum([0, *FIELDS.values()])[:-1]
    lines = [f"{2 * y - 1} " + " ".join(f"{i}:1" for i in row + first) for row, y in zip(ids, labels, strict=True)]
    return "\n".join(lines) + "\n"


def test_frappes_text_and_parquet_give_the_same_stream(tmp_path):
    splits = {"train": contexts(200, 0), "valid": contexts(40, 1), "test": contexts(30, 2)}
    for name, (ids, labels) in splits.items():
        long = "validation" if name == "valid" else name
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / f"frappe.{long}.libfm").write_text(libfm(ids, labels))
        (tmp_path / "parquet").mkdir(exist_ok=True)
        columns = {field: ids[:, i] for i, field in enumerate(FIELDS)} | {"label": labels}
        pq.write_table(pa.table(columns), tmp_path / "parquet" / f"{name}.parquet")
    streams = [prepare_frappe(tmp_path / kind, str(tmp_path / f"out-{kind}"), 4) for kind in ("text", "parquet")]
    (one, sizes), (other, _) = map(read, streams)
    assert one.equals(other) and sizes == [50, 50, 50, 50, 40, 30]
    for i, field in enumerate(FIELDS):
        assert one.column(field).to_pylist() == np.concatenate([ids[:, i] for ids, _ in splits.values()]).tolist()
    assert one.column("used").to_pylist() == np.concatenate([labels for _, labels in splits.values()]).tolist()
    assert streams[0].info.extra["first_slice"] == {"train": 0, "validation": 4, "test": 5}


def test_what_is_not_frappe_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no train file of Frappe"):
        prepare_frappe(tmp_path, str(tmp_path / "out"))
    for name in ("train", "validation", "test"):
        (tmp_path / f"frappe.{name}.libfm").write_text(libfm(*contexts(5, 0)))
    (tmp_path / "frappe.test.libfm").write_text("1 3:1 4:1\n")
    with pytest.raises(UserError, match=r"frappe.test.libfm, line 1: '1 3:1 4:1' is no label with 10 features"):
        prepare_frappe(tmp_path, str(tmp_path / "out"), 2)
    (tmp_path / "frappe.test.libfm").write_text(libfm(contexts(3, 0)[0] + 5000, np.ones(3, int)))
    with pytest.raises(UserError, match=r"row 0: user is \d+; its ids are 0 to 956"):
        prepare_frappe(tmp_path, str(tmp_path / "out"), 2)
    assert frappe.SCHEMA.user == "user"

"""What is wrong with an inbox, a joiner's config or a clock is refused with a message that names it."""

import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from exfm.data.clock import ManualClock, RealClock, SimulatedClock, SimulatedConfig, open_clock
from exfm.data.errors import UserError
from exfm.data.inbox import replay
from exfm.data.join import Joiner
from exfm.data.manifest import commit_stream
from tests.data.joining import config, drop, drop_events, drop_rows, joiner, rows
from tests.data.small import SCHEMA


def refused(folder: Path, message: str, **over: object) -> None:
    with pytest.raises(UserError, match=message):
        Joiner(config(folder, **over), ManualClock(2_000)).step()


def test_an_example_id_that_comes_twice_is_named(tmp_path):
    table = rows(20)
    drop_rows(tmp_path, "a.parquet", table)
    drop_rows(tmp_path, "b.parquet", table.slice(3, 2))
    refused(tmp_path, r"features/b.parquet: example id 30 has been there before")
    drop_rows(tmp_path, "a.parquet", pa.concat_tables([table, table.slice(7, 1)]))
    refused(tmp_path, r"features/a.parquet: example id 70 occurs more than once")


def test_rows_that_a_job_could_not_train_on_are_refused_before_they_are_taken(tmp_path):
    table = rows(5)
    price = table.column_names.index("price")
    bad = table.set_column(price, "price", pa.array([0, np.inf, 0, 0, 0], pa.float32()))
    drop_rows(tmp_path, "a.parquet", bad)
    refused(tmp_path, r"features/a.parquet: 'price' of example 10 is infinite")
    drop(tmp_path, "features", "a.parquet", table.select(["example_id", "timestamp"]))
    refused(tmp_path, r"features/a.parquet lacks column\(s\) user, item")
    (tmp_path / "inbox/features/a.parquet").write_bytes(b"no Parquet")
    refused(tmp_path, r"features/a.parquet is corrupt or truncated")
    drop_rows(tmp_path, "a.parquet", table)  # mended
    assert Joiner(config(tmp_path), ManualClock(2_000)).step()[0]["rows"] == 5


def test_labels_are_of_known_tasks_and_0_1_or_null(tmp_path):
    drop_rows(tmp_path, "a.parquet", rows(5))
    drop_events(tmp_path, "a.parquet", [(0, "click", 1, 1_000), (10, "buy", 0.5, 1_000)])
    refused(tmp_path, r"labels/a.parquet: the label 'buy' of example 10 is 0.5; labels are 0, 1 or null")
    drop_events(tmp_path, "a.parquet", [(0, "like", 1, 1_000)])
    refused(tmp_path, r"labels/a.parquet has labels of task 'like'; stream 'small' has click, buy")
    drop_events(tmp_path, "a.parquet", [(0, "click", 1, None)])  # type: ignore[list-item]
    refused(tmp_path, r"labels/a.parquet: column 'timestamp' has 1 nulls")
    drop(tmp_path, "labels", "a.parquet", pa.table({"example_id": [1]}))
    refused(tmp_path, r"labels/a.parquet lacks column\(s\) task, value, timestamp")


def test_rows_before_the_open_slice_are_refused_where_the_config_says_so(tmp_path):
    drop_rows(tmp_path, "a.parquet", rows(5))
    refused(
        tmp_path,
        r"features/a.parquet: example 0 is earlier than the open slice, which begins at 1001",
        start=1_001,
        late_features="refuse",
    )


def test_files_under_a_temporary_name_are_left_alone(tmp_path):
    drop_rows(tmp_path, "a.parquet", rows(5))
    for name in ("_b.parquet", ".b.parquet", "b.parquet.tmp"):
        (tmp_path / "inbox/features" / name).write_bytes(b"half")
    assert Joiner(config(tmp_path), ManualClock(2_000)).step()[0]["rows"] == 5


def test_folders_that_are_not_writable_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    refused(
        tmp_path,
        r"inbox .*/file/features is not writable .* the joiner moves files there",
        inbox=str(tmp_path / "file"),
    )
    refused(tmp_path, r"/file/out is not writable", out=str(tmp_path / "file/out"))


def test_a_stream_that_no_joiner_made_is_left_alone(tmp_path):
    commit_stream(str(tmp_path / "out"), SCHEMA, 3)
    refused(tmp_path, r"/out holds a stream that no joiner made; choose another `out`")
    growing = commit_stream(str(tmp_path / "growing"), SCHEMA, None)
    with pytest.raises(UserError, match="is still growing; replay a finished stream"):
        replay(growing, str(tmp_path / "inbox"))


def test_amending_needs_a_bound_and_dropping_has_none(tmp_path):
    for late, bound in (("amend", 0), ("drop", 5)):
        with pytest.raises(ValueError, match=f"late_labels is {late} and amend_s is {bound}"):
            config(tmp_path, late_labels=late, amend_s=bound)
    with pytest.raises(UserError, match=r"label_windows or negative_rates do not fit .*schema.yaml.*nothing: 7"):
        config(tmp_path, label_windows={"nothing": 7}).schema_of()
    rates = config(tmp_path, negative_rates={"click": 0.1}).schema_of()
    assert rates.negative_rates == {"click": 0.1} and rates.label_windows == {"click": 60, "buy": 1_000}


def test_all_who_share_a_folder_agree_on_the_simulated_time(tmp_path, monkeypatch):
    real = [5_000.0]
    monkeypatch.setattr(time, "time", lambda: real[0])
    wanted = SimulatedConfig.model_validate({"simulated": {"start": 100, "speed": 60}})
    first = open_clock(wanted, str(tmp_path))
    assert first.now() == 100
    real[0] += 2.5
    second = open_clock(wanted, str(tmp_path))
    assert first.now() == second.now() == 250 and first == second == SimulatedClock(100, 60, 5_000)
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    second.sleep(30)
    assert slept == [0.5]
    with pytest.raises(
        UserError, match=r"clock.json is of a clock that starts at 100.0 with speed 60.0; the config says 100.0 and 1.0"
    ):
        open_clock(SimulatedConfig.model_validate({"simulated": {"start": 100}}), str(tmp_path))
    assert (
        isinstance(open_clock("real", str(tmp_path)), RealClock) and open_clock("real", str(tmp_path)).now() == real[0]
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clock.json"]


def test_time_by_hand_passes_only_forwards(tmp_path):
    clock = ManualClock(5)
    clock.sleep(2)
    clock.advance(-9)
    assert clock.now() == 7
    joined, _ = joiner(tmp_path)
    assert joined.now() == 1_000

"""A joiner that is killed at any file operation and started again makes, byte by byte, the undisturbed stream."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from exfm.data.errors import UserError
from exfm.data.join import Joiner
from tests.data.joining import START, config, drop_events, drop_rows, files, joiner, kinds, rows
from tests.data.test_join import some_events

WRITES = {"os.rename", "os.mkdir", "os.link", "os.remove"}


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


class Killer:
    """Ends the process, so to say, before the file operation number `left`, counted from 1; 0 lets it live."""

    def __init__(self) -> None:
        self.left, self.root = 0, ""

    def __call__(self, event: str, args: tuple) -> None:
        if self.left and (event in WRITES or (event == "open" and args[1] not in (None, "r", "rb"))):
            if not str(args[0]).startswith(self.root):
                return
            self.left -= 1
            if self.left == 0:
                raise Killed(event, args[0])


@pytest.fixture(scope="module")
def killer() -> Iterator[Killer]:
    found = Killer()
    sys.addaudithook(found)  # for the life of the process: idle outside of these tests
    yield found
    found.left = 0


SETTINGS = {"late_labels": "amend", "amend_s": 90, "slices": 4, "remember_s": 100, "features_delay_s": 200}


def arrivals(folder: Path, number: int) -> float:
    """What comes into the inbox before step `number`, and the clock then: rows and events, some late, some of nothing."""
    at = START + 40 + 160 * number
    if number < 4:
        drop_rows(folder, f"{number}.parquet", rows(430).slice(100 * number + number, 101))
    if number == 5:
        drop_rows(folder, "late.parquet", rows(1).set_column(0, "example_id", pa.array([9])))
    happened = [e for e in some_events(300, 1) if at - 160 <= e[3] < at]
    delayed = [e for e in some_events(300, 2) if at - 480 <= e[3] < at - 320]
    drop_events(folder, f"{number}-a.parquet", [*happened, (3, "click", 1.0, int(at))])
    drop_events(folder, f"{number - 1}-z.parquet", delayed)
    return at


def played(folder: Path, killer: Killer | None, steps: int = 10) -> tuple[dict[str, bytes], dict, int]:
    """The joined stream, what was counted, and how often the joiner was killed: at every file operation of every step."""
    kills = 0
    joined, clock = joiner(folder, **SETTINGS)
    for number in range(steps):
        clock.at = arrivals(folder, number)
        wait = 0
        while True:
            wait += 1
            if killer:
                killer.root, killer.left = str(folder), wait
            try:
                if killer:
                    joined = Joiner(config(folder, **SETTINGS), clock)
                joined.step()
                break
            except Killed:
                kills += 1
            finally:
                if killer:
                    killer.left = 0
    assert joined.finished
    return files(folder), joined.totals(), kills


def test_every_file_operation_may_be_the_last_one(tmp_path, killer):
    calm, counted, _ = played(tmp_path / "calm", None)
    rough, again, kills = played(tmp_path / "rough", killer)
    assert kills > 100
    assert sorted(rough) == sorted(calm) and [n for n in calm if rough[n] != calm[n]] == []
    assert again == counted and counted["late"]["click"] > 20 and counted["late_features"] == 1
    assert counted["unknown"]["click"] > 0 and counted["amended"]["click"] > 0 and counted["dropped"]["click"] > 0


def test_a_clock_earlier_than_the_last_commit_is_refused_and_names_both_times(tmp_path):
    drop_rows(tmp_path, "a.parquet", rows(100))
    joined, clock = joiner(tmp_path)
    clock.advance(200)
    joined.step()
    message = r"the clock says 1100.0, which is earlier than the last commit in .*/out, at 1200.0; set the clock right"
    clock.at = 1_100
    with pytest.raises(UserError, match=message):
        joined.step()
    with pytest.raises(UserError, match=message):
        Joiner(config(tmp_path), clock)
    clock.at = 1_199.5  # set back by less than a second: time stands still
    assert Joiner(config(tmp_path), clock).now() == 1_200
    # also where join.json is of an older time than the last slice
    (tmp_path / "out/join.json").unlink()
    shutil.rmtree(tmp_path / "inbox")
    clock.at = 1_100
    with pytest.raises(UserError, match=message):
        Joiner(config(tmp_path), clock)


def test_an_inbox_file_that_vanished_before_it_was_used_up_is_missed(tmp_path):
    drop_rows(tmp_path, "a.parquet", rows(100))
    joined, clock = joiner(tmp_path)
    joined.step()
    (tmp_path / "inbox/features/a.parquet").unlink()
    with pytest.raises(
        UserError, match=r"features/a.parquet is gone, but rows of it are not in the stream yet; put it back"
    ):
        Joiner(config(tmp_path), clock)


def test_a_stream_goes_on_only_as_it_was_begun(tmp_path):
    drop_rows(tmp_path, "a.parquet", rows(100))
    joined, clock = joiner(tmp_path, slices=1)
    for over in (
        {"slice_s": 60},
        {"late_labels": "amend", "amend_s": 5},
        {"label_windows": {"click": 7}},
        {"start": 0},
    ):
        with pytest.raises(UserError, match=r"/out was begun with .* the config says .*; set these again"):
            Joiner(config(tmp_path, **over), clock)
    clock.advance(5_000)
    joined.step()
    assert joined.finished and kinds(tmp_path, 0) == ["features", "labels.1000s", "labels.60s"]
    with pytest.raises(UserError, match=r"is complete with 1 slices; set slices: 1"):
        Joiner(config(tmp_path, slices=2), clock)

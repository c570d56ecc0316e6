"""The startup benchmark's items add up to the whole, and a stage inside another is counted once."""

import time

import pytest

from benchmarks import startup
from benchmarks._startup_marks import Marks
from exfm.data.errors import UserError


def test_items_add_up_to_the_time_from_the_command_to_the_first_step():
    launcher = {
        "stages": {"interpreter": [0.1, 0.05], "imports": [4.0, 3.0]},
        "began": 100.2,
        "ended": 105.0,
        "cpu": 3.5,
    }
    rank = {"stages": {"imports": [5.0, 4.0], "first step": [0.5, 0.4]}, "began": 107.0, "ended": 113.5, "cpu": 5.0}
    items = startup.itemised(100.0, launcher, rank)
    assert sum(wall for wall, _ in items.values()) == pytest.approx(13.5)
    assert items["launcher: interpreter"][0] == pytest.approx(0.3) and items["torchrun: until it starts a rank"][
        0
    ] == pytest.approx(2.0)
    assert items["rank: rest"] == pytest.approx((1.0, 0.6))


def test_a_stage_inside_another_is_counted_once():
    marks = Marks()
    with marks.stage("outer"):
        time.sleep(0.02)
        for _ in range(2):
            with marks.stage("inner"):
                time.sleep(0.03)
    assert marks.stages["inner"][0] >= 0.06 and 0.02 <= marks.stages["outer"][0] < marks.stages["inner"][0]


def test_medians_and_a_table():
    runs = [{"rank: imports": (1.0, 0.5), "torchrun: until it starts a rank": (2.0, float("nan"))}] * 3
    items = startup.medians(runs)
    where = {"device": "a CPU", "date": "2026-01-02", "load": 1.0}
    text = startup.markdown(
        {"machine": where, "turns": 3, "bound_s": 1.5, "bound_cpu_s": 1.0, "rows": [{"ranks": 2, "items": items, "total_s": 3.0}]}
    )  # fmt: skip
    assert "| rank: imports | 1.00 (0.50) |" in text and "| **all** | **3.0**, 2.0 x the bound |" in text


def test_wrong_ranks_are_refused():
    with pytest.raises(UserError, match="--ranks is two"):
        startup.main(["--ranks", "two"])

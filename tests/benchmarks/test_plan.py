"""The planner's benchmark: which ranks are built for a dry run, and what becomes of results."""

import json

import numpy as np
import pytest

from benchmarks import _plan_dryrun, plan
from benchmarks._plan_report import figure, markdown
from exfm.data.errors import UserError


class Planned:
    """Ranks that hold so many bytes."""

    def __init__(self, size: list[float]) -> None:
        self.plan = self
        self.size = np.array(size)

    def by_rank(self, what: str) -> np.ndarray:
        return self.size if what == "hbm" else 0 * self.size


def test_ranks_are_spread_over_what_this_machine_can_hold():
    assert _plan_dryrun.OTHERS == 0.7
    planned = Planned([100, 1, 50, 51, 2, 75, 25, 26, 7, 1000])
    assert _plan_dryrun.ranks_of(planned, 5, 143) == [1, 7, 2, 5, 0]  # type: ignore[arg-type]
    assert 9 not in _plan_dryrun.ranks_of(planned, 9, 143)  # type: ignore[arg-type]


def test_results_become_tables_and_a_figure(tmp_path):
    size = {"cost": 1.1, "bound": 1.0, "seconds": 0.2}
    late = {"cost": None, "late": True, "seconds": 300.0}
    rows = [
        {"tables": 50, "ranks": ranks, "ours": size, "torchrec": late if ranks > 16 else {"cost": 2.2, "seconds": 4.0}}
        for ranks in (16, 64)
    ]
    text = markdown({"scale": {"rows": rows}})
    assert "| 50 | 16 | 0.20 | 1.100 | 4.0 | 0.500 |" in text and "| 50 | 64 | 0.20 | 1.100 | over 300 |  |" in text
    figure(rows, tmp_path / "planning.svg")
    svg = (tmp_path / "planning.svg").read_text()
    assert svg.count("stopped at 300 s") == 1 and "tables x ranks" in svg


def test_a_case_is_planned_by_both_and_the_parts_are_named(tmp_path):
    ours, theirs = plan.ours(4, 2, 0, True), plan.theirs(4, 2, 0, True)
    assert 0 < ours["bound"] <= ours["cost"] * (1 + 1e-9) and ours["cost"] <= theirs["cost"] * (1 + 1e-9)
    assert json.dumps(ours)
    with pytest.raises(UserError, match="--parts names speed; there are: grid, models, scale, dryrun"):
        plan.main(["--parts", "speed", "--out", str(tmp_path)])

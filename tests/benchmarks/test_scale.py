"""The scale benchmark: what is modelled from what is measured, sizes that do not fit are named, results become tables and a figure."""

import json
from typing import Any

import pytest

from benchmarks import _scale_ranks, scale
from benchmarks._scale_point import Point, job_of
from benchmarks._scale_report import explained, figure, markdown
from exfm.data.errors import UserError
from exfm.sharding.topology import cpu_topology
from exfm.trainer.planning import plan_on


def point(rows: int = 1000, ranks: int = 1, huge: bool = False, step_s: float = 0.05) -> dict[str, Any]:
    times = dict.fromkeys(("tables_s", "dense_s", "backward_s", "step_low_s", "step_high_s"), step_s)
    ms = {"fwd_comms": 3.0, "bwd_comms": 4.0, "input_dist_comms": 1.0, "fwd_compute": 9.0}
    return times | {
        "rows": rows, "ranks": ranks, "huge": huge, "batch": 100, "step_s": step_s, "examples_per_s": 100 / step_s, "kinds": ["row_wise"],
        "bytes": {"tables": 32 * rows, "accumulators": 4 * rows, "dense": 10_000_000}, "faults_per_step": 2.0,
        "gather_rows_s": step_s / 10, "gather_state_s": step_s / 5, "modelled_ms": ms,
    }  # fmt: skip


def test_a_modelled_step_is_the_measured_one_and_what_is_sent():
    found = scale.modelled(point(ranks=16), cpu_topology(16, 8))
    assert found["table_comms_s"] == pytest.approx(0.008)  # the compute of the perf model is not in it
    assert found["dense_comms_s"] == pytest.approx(2 * 15 / 16 * 1e7 / 0.5e9)
    assert found["modelled_step_s"] == pytest.approx(0.05 + 0.008 + found["dense_comms_s"])
    assert found["modelled_examples_per_s"] == pytest.approx(16 * 100 / found["modelled_step_s"])
    alone = scale.modelled(point(), cpu_topology(1, 1))
    assert alone["modelled_step_s"] == 0.05


def test_growth_is_held_against_reading_rows_twice_and_accumulators_once():
    grown, read = explained(point(step_s=0.05), point(step_s=0.07))
    assert grown == pytest.approx(0.02) and read == pytest.approx(2 * 0.002 + 0.004)


def test_points_plan_for_any_number_of_ranks():
    config = job_of(Point(10_000, ranks=16, batch=8))
    plan = plan_on(config, cpu_topology(16, 8))
    assert config.stream.global_batch == 128 and sum(t.rows for t in config.tables.values()) <= 10_000
    assert plan.batch == 8 and len(plan.tables) == 32


def test_sizes_that_do_not_fit_are_left_out_by_name(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(scale, "run_points", lambda points: [point(p.rows, p.ranks, p.huge) for p in points])
    args = ["--parts", "size,modelled", "--rows", "1e5,1e6,1e12", "--modelled-ranks", "2,8", "--out", str(tmp_path)]
    assert scale.main(args) == 0
    result = json.loads((tmp_path / "scale.json").read_text())
    assert [r["rows"] for r in result["size"]["rows"]] == [10**5, 10**6, 10**5, 10**6]
    assert result["size"]["left_out"][0].startswith("1e+12 rows: 33527.6 GiB needed")
    text = capsys.readouterr().out
    assert "Left out: 1e+12 rows" in text and "(modelled)" in text


def test_results_become_tables_and_a_figure(tmp_path):
    modelled = [point(ranks=n) | scale.modelled(point(ranks=n), cpu_topology(n, min(n, 8))) for n in (2, 8)]
    job = {"kind": "both", "ranks": 1, "global_batch": 64, "examples_per_s": 9000.0, "cpu_us_per_example": 100.0, "cores_had": 1.0, "oversubscribed": False}  # fmt: skip
    where = {"device": "a CPU", "date": "2026-01-02", "load": 1.0}
    four = job | {"kind": "weak", "ranks": 4, "cpu_us_per_example": 125.0, "oversubscribed": True}
    result = {
        "size": {"rows": [point(1000), point(9000, step_s=0.1), point(1000, huge=True)], "left_out": [], "machine": where},
        "modelled": {"rows": modelled, "machine": where},
        "ranks": {"rows": [job, four], "machine": where},
    }  # fmt: skip
    text = markdown(result)
    assert "| 9e+03 | 0.000 | 4 KiB | 1,000 [1,000, 1,000] | 100.0 |" in text
    assert "| weak | 4 (oversubscribed) | 64 | 9,000 | 125 | 1.00 | 1.25 |" in text
    figure(result, tmp_path / "scale.svg")
    svg = (tmp_path / "scale.svg").read_text()
    assert "modelled: step and communication" in svg and "measured on gloo, weak" in svg and "L3, 32 MiB" in svg


def test_strong_runs_keep_the_global_batch_and_weak_ones_keep_the_ranks_share():
    found = {(r.kind, r.ranks): r.global_batch for r in _scale_ranks.runs([1, 2, 4], 512)}
    assert found[("both", 1)] == 512 and found[("strong", 4)] == 512 and found[("weak", 4)] == 2048


@pytest.mark.parametrize(
    "args, message",
    [
        (["--parts", "speed"], "--parts names speed; there are: size, modelled, ranks"),
        (["--parts", "size", "--rows", "many"], "--rows is 'many'"),
        (["--parts", "ranks", "--ranks", "0,2"], "--ranks names 0; use whole numbers"),
    ],
)
def test_what_cannot_be_measured_is_refused(args, message, tmp_path):
    with pytest.raises(UserError, match=message):
        scale.main([*args, "--out", str(tmp_path)])

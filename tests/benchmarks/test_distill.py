"""`exfm bench distill`: equal budgets, no tuning on what is reported, and statistics that are held to known answers."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import _distill_cost, _distill_runs, _distill_sweeps, _distill_table, distill
from benchmarks._distill_figures import write_page
from benchmarks._distill_report import markdown
from benchmarks._distill_runs import ADAPTER, ARMS, UNDISTILLED, Runner, Study, Teacher, Tuned, tune
from benchmarks._distill_stats import Run, calibration_change, gain, pooled, pooled_ratio, transfer
from exfm.data.synth import synth
from exfm.distillation.supervision import SupervisionLog
from exfm.trainer.metrics import Metrics, Predictions, replicate_calibration

RNG = np.random.default_rng(0)
USERS = RNG.normal(0, 0.01, 4000)  # what the resampled users do to every run alike


def run_of(ne: float, noise: Any = 0.0, calibration: float = 1.0, calibration_noise: Any = 0.0) -> Run:
    calibrations = calibration * np.exp(np.zeros(4000) + calibration_noise)
    return Run(ne, 0.7, 0.6, calibration, 1.0, 100, ne + USERS + noise, calibrations)


def interval(e: dict[str, Any]) -> list[float]:
    return list(e["interval"])


def test_a_gain_is_the_mean_over_paired_seeds_and_what_users_and_seeds_have_in_common_cancels() -> None:
    seeds = [0.01, -0.02, 0.03]
    before, after = [run_of(0.90 + s) for s in seeds], [run_of(0.88 + s) for s in seeds]
    found = gain(before, after)
    assert found["value"] == pytest.approx(0.02) and interval(found) == pytest.approx([0.02, 0.02])
    assert found["sd"] == pytest.approx(0, abs=1e-12)


def test_a_gain_of_one_seed_has_the_interval_of_its_own_noise() -> None:
    found = gain([run_of(0.90)], [run_of(0.88, RNG.normal(0, 0.005, 4000))])
    assert interval(found) == pytest.approx([0.02 - 1.96 * 0.005, 0.02 + 1.96 * 0.005], abs=6e-4)


def test_gains_that_differ_over_seeds_widen_the_interval() -> None:
    # of two seeds drawn twice: .01, .02 and .03 with probabilities 1/4, 1/2, 1/4
    found = gain([run_of(0.9), run_of(0.9)], [run_of(0.89), run_of(0.87)])
    assert found["value"] == pytest.approx(0.02) and interval(found) == pytest.approx([0.01, 0.03])
    assert found["sd"] == pytest.approx(np.std([0.01, 0.03], ddof=1))


def test_a_transfer_ratio_is_the_gain_by_the_teachers_advantage_and_shares_the_undistilled_runs_luck() -> None:
    luck = RNG.normal(0, 0.02, 4000)
    before = [run_of(0.90, luck), run_of(0.92, luck)]
    after = [run_of(0.88, 0.8 * luck), run_of(0.90, 0.8 * luck)]
    teachers = [run_of(0.80), run_of(0.82)]
    found = transfer(before, after, teachers)
    # replicate by replicate (.02 + .2 luck) / (.1 + luck) = .2: the luck cancels
    assert found["value"] == pytest.approx(0.2) and interval(found) == pytest.approx([0.2, 0.2])


@pytest.mark.parametrize(
    ("before", "after", "noise", "change", "verdict"),
    [
        (1.0, 1.10, 0.0, np.log(1.10), "violated"),
        (1.0, 1 / 1.10, 0.0, np.log(1.10), "violated"),  # too low is as bad as too high
        (1.10, 1 / 1.10, 0.0, 0.0, "holds"),
        (1.05, 1.0, 0.0, -np.log(1.05), "holds"),
        (1.0, 1.005, 0.0, np.log(1.005), "holds"),
        (1.05, 1.055, 0.02, np.log(1.055 / 1.05), "open"),
    ],
)
def test_calibration_is_judged_by_how_much_further_from_1_it_is(
    before: float, after: float, noise: float, change: float, verdict: str
) -> None:
    own = RNG.normal(0, noise, 4000)
    found = calibration_change([run_of(0.9, 0, before)], [run_of(0.9, 0, after, own)])
    assert found["value"] == pytest.approx(change) and found["verdict"] == verdict
    low, high = found["interval"]
    assert high - low == pytest.approx(2 * 1.96 * noise, rel=0.05)


def test_domains_count_the_same_and_their_independent_users_narrow_the_interval() -> None:
    parts = [gain([run_of(0.9)], [run_of(0.9 - g, RNG.normal(0, 0.01, 4000))]) for g in (0.01, 0.02, 0.03, 0.06)]
    found = pooled(parts)
    assert found["value"] == pytest.approx(0.03)
    assert interval(found) == pytest.approx([0.03 - 1.96 * 0.005, 0.03 + 1.96 * 0.005], abs=8e-4)
    advantages = [gain([run_of(0.9)], [run_of(0.8)]) for _ in parts]
    assert pooled_ratio(parts, advantages)["value"] == pytest.approx(0.3)


def test_a_calibration_replicate_is_the_calibration_of_the_resampled_users() -> None:
    n, num_users = 3000, 50
    users = RNG.integers(0, num_users, n)
    labels = (RNG.random(n) < 0.3).astype(np.float32)
    logits = RNG.normal(-1, 1, n).astype(np.float32)
    metrics = Metrics(0, 1, 6)
    ones, nobody = np.ones(n, np.float32), np.full(n, -1, np.int32)
    metrics.add(Predictions(logits[:, None], labels[:, None], ones, nobody, users), True)
    drawn = metrics._draws(np.arange(num_users))  # times that each user was drawn, [users, replicates]
    probability = 1 / (1 + np.exp(-logits.astype(np.float64)))
    for r, found in enumerate(replicate_calibration(metrics.replicates[:, 0, 0])):
        again = np.repeat(np.arange(n), drawn[users, r].astype(int))
        assert found == pytest.approx(probability[again].sum() / labels[again].sum())


def test_every_arm_is_tuned_with_the_same_number_of_trials_on_the_other_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[str, str, int, tuple[Any, ...]]] = []

    def student(
        self: Any, arm: str, domain: str, seed: int, settings: dict[str, Any], teacher: Teacher, changes: Any
    ) -> Run:
        tried.append((arm, domain, seed, tuple(settings.values())))
        return run_of(0.9 + settings["optim.dense.lr"])

    monkeypatch.setattr(Runner, "student", student)
    study = Study("s", "S", Path(), {}, {}, {}, {}, "d7", ("d1", "d3"))
    runner, teacher = Runner(Path(), study), Teacher(Path(), "")
    best = {arm: tune(runner, arm, distill.TRIALS, teacher) for arm in ARMS}
    assert Counter(arm for arm, *_ in tried) == dict.fromkeys(ARMS, distill.TRIALS)
    assert len(set(tried)) == len(tried), "no setting is tried twice by one arm"
    assert {domain for _, domain, *_ in tried} == {"d7"}
    assert _distill_runs.TUNING_SEED not in range(100), "the tuning seed is none of the reported ones"
    lowest = min(_distill_runs.GRID["optim.dense.lr"])
    assert all(t.settings["optim.dense.lr"] == lowest and t.trials == distill.TRIALS for t in best.values())


# ------------------------------------------------------------- small jobs


def small_job(width: int, sparse: Sequence[str]) -> dict[str, Any]:
    return {
        "run": {"name": "small", "folder": ""},
        "stream": {"path": "", "global_batch": 128, "prefetch": 0},
        "features": {"sparse": [{"name": n, "table": n, "ids": "hash"} for n in sparse]},
        "tables": {n: {"rows": 50, "width": width} for n in sparse},
        "model": {"kind": "dlrm", "width": width, "bottom_mlp": [4], "top_mlp": [8]},
        "heads": {"tasks": ["click"]},
        "sharding": {"allowed": ["data_parallel"]},
    }


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    stream = tmp_path_factory.mktemp("distill") / "stream"
    synth(str(stream), num_slices=5, rows_per_slice=600, seed=0)
    domains = {f"d{k}": {"column": "domain", "values": [k]} for k in (0, 1, 2)}
    teacher = small_job(8, ("user_id", "item_id", "segment")) | {"distillation": {"publish": {"teacher": "teacher"}}}
    return Study(
        "small", "Small", stream, teacher, small_job(4, ("item_id", "segment")), domains,
        {d: f"domain {d}" for d in domains}, "d0", ("d1", "d2"),
    )  # fmt: skip


def test_the_table_is_made_of_finished_runs_and_finds_them_again(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_distill_table, "ARMS", {arm: ARMS[arm] for arm in (UNDISTILLED, ADAPTER)})
    first, again = Runner(tmp_path, study), Runner(tmp_path, study)
    made = _distill_table.table(first, 2, 1)
    # 2 teachers; 2 arms x (1 trial + 2 domains x 2 seeds)
    assert first.done == 12
    found = _distill_table.table(again, 2, 1)
    assert again.done == 0 and found["overall"] == made["overall"]
    arm = made["domains"]["d1"]["arms"][ADAPTER]
    assert made["tuned"][ADAPTER]["trials"] == made["tuned"][UNDISTILLED]["trials"] == 1
    text = markdown({"table": made})
    assert f"| {ADAPTER} | {arm['ne']:.4f} ± {arm['ne_sd']:.4f} |" in text and "1 of 36 settings" in text
    write_page({"table": made}, tmp_path / "page.html")
    assert "table-calibration" in (tmp_path / "page.html").read_text()


def test_predictions_of_every_age_come_from_teachers_that_learned_equally_many_slices(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_distill_sweeps, "SWEEP_ARMS", (UNDISTILLED, ADAPTER))
    runner = Runner(tmp_path, study)
    tuned = {arm: Tuned({}, 0.9, 1, 1) for arm in ARMS}
    found = _distill_sweeps.staleness(runner, 1, tuned, 5, ages=(0, 1))
    assert list(found["ages"]) == ["forward", "0", "1"] and found["begin"] == 2
    learned = {}
    for age in (0, 1):
        log = SupervisionLog(_distill_sweeps.supervised(runner, 0, age, 2, 5).log)
        for index in range(2, 5):
            manifest = log.manifest(index)
            assert manifest is not None and manifest.extra["mode"] == "snapshot"
            watermark = manifest.extra["watermark"]
            assert index - 1 - watermark == age
            learned[age, index] = watermark - manifest.extra["first"] + 1
    assert all(learned[0, index] == learned[1, index] == index - 1 for index in range(2, 5))
    assert "| 1 | " in markdown({"staleness": found})


def test_a_larger_size_is_larger_in_every_table_and_the_sweep_compares_like_with_like(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {"small": {"width": 4}, "large": {"width": 8}}
    monkeypatch.setattr(_distill_sweeps, "STUDENT_SIZES", models)
    monkeypatch.setattr(_distill_sweeps, "TEACHER_SIZES", models)
    runner = Runner(tmp_path, study)
    found = _distill_sweeps.sizes(runner, 1, {arm: Tuned({}, 0.9, 1, 1) for arm in ARMS}, [ADAPTER])
    rows = {size: m["table_parameters"] for size, m in found["teachers"].items()}
    assert rows == {"small": 3 * 50 * 4, "large": 3 * 50 * 8}
    large = found["students"]["large"]
    assert large["base"]["table_parameters"] == 2 * 50 * 8
    taught = large["taught"]["small"][ADAPTER]
    assert taught["gain"]["value"] == pytest.approx(large["base"]["ne"] - taught["ne"])
    assert "largest against smallest" in markdown({"sizes": found})


def test_every_limit_of_cost_is_measured_and_judged_on_its_side(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {
        "SLICE": 1,
        "STEPS": 2,
        "TURNS": 2,
        "LAST": 4,
        "TEACHER_TURNS": 1,
        "READ_SLICES": 2,
        "STUDENTS": {"small": {}},
    }
    for name, value in small.items():
        monkeypatch.setattr(_distill_cost, name, value)
    runner = Runner(tmp_path, study)
    found = _distill_cost.cost(runner)
    log = Path(runner.teacher(0).log)
    assert found["bytes"]["bytes"] == sum(f.stat().st_size for f in log.rglob("*.parquet"))
    assert found["bytes"]["per_prediction"] == found["bytes"]["bytes"] / (5 * 600)
    at_most = {"step, small", "mode forward", "bytes"}
    assert set(found["verdicts"]) == at_most | {"reading", "scoring"}
    for name, v in found["verdicts"].items():
        assert v["holds"] == (v["value"] <= v["limit"] if name in at_most else v["value"] >= v["limit"])
    assert found["forward"]["ratio"] > 1
    assert "supervision, bytes per example and task" in markdown({"cost": found})

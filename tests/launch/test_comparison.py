"""Runs are written with known numbers; what compare() says about them is computed by hand or simulated at large."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

from exfm.data.errors import UserError
from exfm.launch.comparison import Estimate, StudentPair, compare, table
from exfm.trainer.metrics import NUM, Metrics, Predictions, replicate_ne, summarise

RNG = np.random.default_rng(7)
NOISE = RNG.normal(0, 0.01, 200)  # what all models of a domain share: which users were drawn


def write_run(
    folder: Path,
    ne: dict[str, float],
    replicates: dict[str, np.ndarray] | None = None,
    tasks: tuple[str, ...] = ("liked",),
    **changes: object,
) -> Path:
    """A finished run with groups `ne`; changes: of the values of every group, or of the summary."""
    folder.mkdir()
    values = {"examples": 1000.0, "auc": 0.7, "log_loss": 0.6, "calibration": 1.01, "base_rate": 0.5}
    values |= {key: value for key, value in changes.items() if key in values}
    groups = {group: {task: {**values, "ne": own} for task in tasks} for group, own in ne.items()}
    summary = {"name": folder.name, "slices": [0, 50], "evaluated_from": 10, "groups": groups}
    summary |= {key: value for key, value in changes.items() if key in summary}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text(yaml.safe_dump({"heads": {"tasks": list(tasks)}}))
    drawn = replicates or {group: own + NOISE for group, own in ne.items()}
    np.savez(folder / "bootstrap.npz", **{f"{g}/{t}": r for g, r in drawn.items() for t in tasks})  # type: ignore[arg-type]
    return folder


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return write_run(tmp_path / "teacher", {"all": 0.78, "d3": 0.80})


@pytest.fixture
def pair(tmp_path: Path) -> StudentPair:
    before = write_run(tmp_path / "undistilled", {"d3": 0.90})
    return StudentPair("d3", before, write_run(tmp_path / "distilled", {"d3": 0.88}))


def width(estimate: Estimate | None) -> float:
    assert estimate is not None and estimate.low is not None and estimate.high is not None
    return estimate.high - estimate.low


def test_gain_advantage_and_transfer_ratio_are_those_of_the_definition(teacher, pair):
    c = compare(teacher, [pair])
    (student,) = c.students
    assert c.task == "liked" and c.slices == (10, 50) and c.teacher.ne.value == 0.78
    assert student.gain.value == pytest.approx(0.02)
    assert student.gain_percent.value == pytest.approx(100 * 0.02 / 0.90)
    assert student.advantage.value == pytest.approx(0.10)
    assert student.transfer_ratio.value == pytest.approx(0.2)
    assert (student.teacher.ne.value, student.undistilled.ne.value, student.distilled.ne.value) == (0.80, 0.90, 0.88)


def test_intervals_are_percentiles_of_paired_replicates(tmp_path, teacher):
    after = 0.88 + NOISE + RNG.normal(0, 0.001, 200)
    before = write_run(tmp_path / "u", {"d3": 0.90})
    distilled = write_run(tmp_path / "d", {"d3": 0.88}, {"d3": after})
    (student,) = compare(teacher, [StudentPair("d3", before, distilled)]).students
    low, high = np.percentile((0.90 + NOISE) - after, [2.5, 97.5])
    assert (student.gain.low, student.gain.high) == (pytest.approx(low), pytest.approx(high))
    low, high = np.percentile((0.90 + NOISE - after) / (0.90 - 0.80), [2.5, 97.5])
    assert (student.transfer_ratio.low, student.transfer_ratio.high) == (pytest.approx(low), pytest.approx(high))
    low, high = np.percentile(after, [2.5, 97.5])
    assert (student.distilled.ne.low, student.distilled.ne.high) == (pytest.approx(low), pytest.approx(high))


def simulated(num_users: int, seed: int) -> dict[str, tuple[dict[str, float], np.ndarray]]:
    """Summary values and replicates of three models of different error, scored by the job's own metrics."""
    rng = np.random.default_rng(seed)
    users = np.repeat(np.arange(num_users, dtype=np.int64) + 10**6 * seed, 10)
    truth = np.repeat(rng.normal(0.3, 1.0, num_users), 10) + rng.normal(0, 1, len(users))
    labels = (rng.random(len(users)) < 1 / (1 + np.exp(-truth))).astype(np.float32)
    error = rng.normal(0, 1, len(users))
    found = {}
    for name, size in (("teacher", 0.2), ("undistilled", 0.8), ("distilled", 0.7)):
        metrics = Metrics(0, 1, 200 if num_users < 10_000 else 0)
        logits = (truth + size * error).astype(np.float32)[:, None]
        ones = np.ones(len(users), np.float32)
        metrics.add(Predictions(logits, labels[:, None], ones, np.zeros(len(users), np.int32), users), evaluated=True)
        found[name] = (summarise(metrics.total[0, 0]), replicate_ne(metrics.replicates[:, 0, 0]))
        assert metrics.total[0, 0, NUM] == len(users)
    return found


def test_a_paired_interval_covers_the_truth_and_is_much_narrower_than_an_unpaired_one(tmp_path):
    large = {name: values["ne"] for name, (values, _) in simulated(100_000, 1).items()}
    small = simulated(2_000, 2)
    runs = {
        name: write_run(
            tmp_path / name,
            {"all": v["ne"], "d": v["ne"]},
            {"all": r, "d": r},
            examples=v["examples"],
            base_rate=v["base_rate"],
        )
        for name, (v, r) in small.items()
    }
    (student,) = compare(runs["teacher"], [StudentPair("d", runs["undistilled"], runs["distilled"])]).students
    gain = large["undistilled"] - large["distilled"]
    assert student.gain.low < gain < student.gain.high and student.gain.resolved
    ratio = gain / (large["undistilled"] - large["teacher"])
    assert student.transfer_ratio.low < ratio < student.transfer_ratio.high
    unpaired = small["undistilled"][1] - np.roll(small["distilled"][1], 1)
    assert width(student.gain) < 0.35 * np.subtract(*np.percentile(unpaired, [97.5, 2.5]))
    assert width(student.gain) < 0.35 * width(student.distilled.ne)


def test_no_transfer_ratio_where_the_teacher_is_not_resolvedly_better(tmp_path, pair):
    wide = {"all": 0.78 + NOISE, "d3": 0.895 + RNG.normal(0, 0.02, 200)}
    worse = write_run(tmp_path / "poor teacher", {"all": 0.78, "d3": 0.895}, wide)
    (student,) = compare(worse, [pair]).students
    assert student.advantage.value > 0 and not student.advantage.resolved and student.transfer_ratio is None


def test_without_replicates_there_are_values_and_no_intervals(tmp_path):
    none = {"all": np.zeros(0), "d3": np.zeros(0)}
    teacher, before, after = (
        write_run(tmp_path / name, {"all": ne, "d3": ne}, none) for name, ne in (("t", 0.8), ("u", 0.9), ("d", 0.88))
    )
    (student,) = compare(teacher, [StudentPair("d3", before, after)]).students
    assert student.transfer_ratio == Estimate(pytest.approx(0.2)) and not student.gain.resolved


def test_without_an_undistilled_run_there_is_no_gain(teacher, pair):
    (student,) = compare(teacher, [replace(pair, undistilled=None)]).students
    assert student.undistilled is None and student.gain is None and student.transfer_ratio is None


def test_the_task_may_be_chosen_and_the_first_of_the_teacher_is_the_default(tmp_path):
    runs = [write_run(tmp_path / n, {"all": 0.8, "d3": 0.8}, tasks=("viewed", "bought")) for n in "td"]
    pair = StudentPair("d3", None, runs[1])
    assert compare(runs[0], [pair]).task == "viewed" and compare(runs[0], [pair], "bought").task == "bought"
    with pytest.raises(UserError, match="no task 'sold'; its tasks are viewed, bought"):
        compare(runs[0], [pair], "sold")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"examples": 999.0}, "evaluated 1,000 examples, .*distilled.* 999"),
        ({"evaluated_from": 11}, "evaluated slices 10 to 49, .* slices 11 to 49"),
        ({"slices": [0, 49]}, "slices 10 to 48"),
        ({"base_rate": 0.51}, "base rate 0.500000, .* 0.510000"),
        ({"replicates": {"d3": 0.88 + NOISE[:100]}}, "200 bootstrap replicates, .* 100; .*evaluation.bootstrap"),
    ],
)
def test_runs_evaluated_on_other_examples_are_refused(tmp_path, teacher, pair, change, message):
    other = write_run(tmp_path / "other (distilled)", {"d3": 0.88}, **change)
    with pytest.raises(UserError, match=f"not comparable on domain 'd3': .*{message}"):
        compare(teacher, [replace(pair, distilled=other)])


def test_a_run_that_is_missing_unfinished_or_of_another_domain_is_named(tmp_path, teacher, pair):
    with pytest.raises(UserError, match="nowhere' does not exist"):
        compare(tmp_path / "nowhere", [pair])
    with pytest.raises(UserError, match=r"did not measure domain 'd9', only all, d3; name it in its stream\.domains"):
        compare(teacher, [replace(pair, domain="d9")])
    one_class = write_run(tmp_path / "one class", {"d3": float("nan")})
    with pytest.raises(UserError, match="has no NE for 'd3'"):
        compare(teacher, [replace(pair, distilled=one_class)])
    (pair.distilled / "bootstrap.npz").unlink()
    with pytest.raises(UserError, match=r"distilled' has no bootstrap.npz"):
        compare(teacher, [pair])
    (pair.distilled / "summary.json").unlink()
    with pytest.raises(UserError, match=r"distilled' has no summary.json: it has not finished"):
        compare(teacher, [pair])


def test_the_table_has_a_row_per_model_and_says_what_is_not_resolved(tmp_path, teacher, pair):
    same = write_run(tmp_path / "same", {"d3": 0.899}, {"d3": 0.899 + NOISE + RNG.normal(0, 0.005, 200)})
    c = compare(teacher, [pair, replace(pair, distilled=same)])
    console = Console(width=200, file=io.StringIO())
    console.print(table(c))
    shown = console.file.getvalue()
    for said in ("teacher, all traffic", "d3: teacher", "d3: undistilled", "d3: distilled", "d3: distilled same"):
        assert len(re.findall(rf"│ {said} +│", shown)) == 1
    assert "+0.0200 (+2.22%" in shown and shown.count("not resolved") == 1
    assert json.loads(json.dumps(c.as_dict()))["students"][0]["transfer_ratio"]["value"] == pytest.approx(0.2)

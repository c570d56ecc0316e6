"""What the teacher bought: teacher, undistilled and distilled student on each domain, with paired bootstrap intervals.

Every job draws the same Poisson weights for the same user, so replicate k of two jobs resampled the same users: the
difference of the two is a replicate of the difference, and what the users have in common cancels.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text

from exfm.data.commit import nan_for_null
from exfm.data.errors import UserError

F64 = NDArray[np.float64]
LEVEL = 0.95
LEAST_FINITE = 0.95  # share of replicates that must have an NE for an interval to be given


@dataclass(frozen=True)
class StudentPair:
    """Runs of one student: without the teacher (None: not trained) and with it."""

    domain: str
    undistilled: Path | None
    distilled: Path


@dataclass(frozen=True)
class Estimate:
    """A value and its 95% percentile interval over users; low and high are None where a run kept no replicates."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def resolved(self) -> bool:
        """The interval excludes 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class ModelResult:
    """One run on one group of its evaluated examples. role: teacher, undistilled or distilled."""

    role: str
    name: str
    run: str
    group: str
    examples: int
    ne: Estimate
    auc: float
    log_loss: float
    calibration: float


@dataclass(frozen=True)
class StudentResult:
    """gain: NE of undistilled minus distilled, so positive is better; gain_percent: of the undistilled NE.

    advantage: NE of undistilled minus teacher, on the domain. transfer_ratio: gain / advantage, None unless the
    advantage is resolved and positive.
    """

    domain: str
    teacher: ModelResult
    undistilled: ModelResult | None
    distilled: ModelResult
    gain: Estimate | None
    gain_percent: Estimate | None
    advantage: Estimate | None
    transfer_ratio: Estimate | None


@dataclass(frozen=True)
class Comparison:
    """slices: the evaluated window [first, last)."""

    task: str
    slices: tuple[int, int]
    teacher: ModelResult
    students: tuple[StudentResult, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Scored:
    """A model's result with what comparing needs: its NE replicates, window and base rate."""

    result: ModelResult
    replicates: F64
    window: tuple[int, int]
    base_rate: float


def compare(teacher: Path, students: Sequence[StudentPair], task: str | None = None) -> Comparison:
    """Compare finished runs on one task (default: the teacher's first). UserError for runs that are not comparable."""
    task = task or _first_task(teacher)
    whole = _load(teacher, "all", task, "teacher")
    results = tuple(_student(teacher, pair, task) for pair in students)
    return Comparison(task, whole.window, whole.result, results)


def _student(teacher: Path, pair: StudentPair, task: str) -> StudentResult:
    best = _load(teacher, pair.domain, task, "teacher")
    after = _load(pair.distilled, pair.domain, task, "distilled")
    _check_comparable(best, after)
    if pair.undistilled is None:
        return StudentResult(pair.domain, best.result, None, after.result, None, None, None, None)
    before = _load(pair.undistilled, pair.domain, task, "undistilled")
    _check_comparable(before, after)

    # first element: the measured value; the others: replicates
    ne_before, ne_after, ne_best = (np.concatenate(([m.result.ne.value], m.replicates)) for m in (before, after, best))
    gain, advantage = ne_before - ne_after, ne_before - ne_best
    teacher_ahead = estimate(advantage)
    ratio = None
    if teacher_ahead.value > 0 and (teacher_ahead.low is None or teacher_ahead.low > 0):
        ratio = estimate(gain / advantage)
    gains = estimate(gain), estimate(100 * gain / ne_before)
    return StudentResult(pair.domain, best.result, before.result, after.result, *gains, teacher_ahead, ratio)


def estimate(values: F64) -> Estimate:
    """From [the measured value, replicates...]; without an interval where too few replicates have a value."""
    replicates = values[1:]
    finite = replicates[np.isfinite(replicates)]
    if len(replicates) == 0 or len(finite) < LEAST_FINITE * len(replicates):
        return Estimate(float(values[0]))
    low, high = np.percentile(finite, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Estimate(float(values[0]), float(low), float(high))


def _first_task(run: Path) -> str:
    _summary(run)
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"run '{run}' has no config.yaml, which names its tasks; name the task to compare")
    return str(yaml.safe_load(path.read_text())["heads"]["tasks"][0])


def _summary(run: Path) -> dict[str, Any]:
    if not run.is_dir():
        raise UserError(f"run '{run}' does not exist; give the folder that its job wrote")
    path = run / "summary.json"
    if not path.is_file():
        raise UserError(f"run '{run}' has no summary.json: it has not finished; run its job to the end, then compare")
    summary: dict[str, Any] = nan_for_null(json.loads(path.read_text()))
    return summary


def _load(run: Path, group: str, task: str, role: str) -> _Scored:
    summary = _summary(run)
    groups = summary["groups"]
    if group not in groups:
        raise UserError(
            f"run '{run}' did not measure domain '{group}', only {', '.join(groups)}; name it in its stream.domains"
        )
    if task not in groups[group]:
        raise UserError(f"run '{run}' has no task '{task}'; its tasks are {', '.join(groups[group])}")
    values = groups[group][task]
    if not math.isfinite(values["ne"]):
        raise UserError(
            f"run '{run}' has no NE for '{group}': its {values['examples']:.0f} evaluated examples have not both labels; "
            "evaluate more slices (evaluation.skip) or choose a larger domain"
        )
    replicates = replicates_of(run, f"{group}/{task}")
    result = ModelResult(
        role=role,
        name=summary["name"],
        run=str(run),
        group=group,
        examples=int(values["examples"]),
        ne=estimate(np.concatenate(([values["ne"]], replicates))),
        auc=values["auc"],
        log_loss=values["log_loss"],
        calibration=values["calibration"],
    )
    return _Scored(result, replicates, (summary["evaluated_from"], summary["slices"][1]), values["base_rate"])


def replicates_of(run: Path, key: str) -> F64:
    """NE replicates [r] of `group/task`."""
    path = run / "bootstrap.npz"
    if not path.is_file():
        raise UserError(f"run '{run}' has no bootstrap.npz beside its summary.json; run its job again")
    with np.load(path) as arrays:
        if key not in arrays:
            raise UserError(f"bootstrap.npz of run '{run}' lacks '{key}', has {', '.join(arrays)}; run its job again")
        return np.asarray(arrays[key], np.float64)


def _check_comparable(a: _Scored, b: _Scored) -> None:
    """UserError unless both runs were evaluated on the same examples with the same bootstrap."""
    one, other = f"'{a.result.run}' ({a.result.role})", f"'{b.result.run}' ({b.result.role})"
    where = f"on domain '{b.result.group}'"
    if a.window != b.window:
        raise UserError(
            f"not comparable {where}: {one} evaluated slices {a.window[0]} to {a.window[1] - 1}, "
            f"{other} slices {b.window[0]} to {b.window[1] - 1}; "
            "give both the same stream.last and evaluation.skip"
        )
    if a.result.examples != b.result.examples:
        raise UserError(
            f"not comparable {where}: {one} evaluated {a.result.examples:,} examples, {other} {b.result.examples:,}; "
            "give both the same stream and the same definition of the domain"
        )
    if not math.isclose(a.base_rate, b.base_rate, rel_tol=1e-6):
        raise UserError(
            f"not comparable {where}: {one} saw base rate {a.base_rate:.6f}, {other} {b.base_rate:.6f}, so other examples; "
            "give both the same stream and the same definition of the domain"
        )
    if len(a.replicates) != len(b.replicates):
        raise UserError(
            f"not comparable {where}: {one} kept {len(a.replicates)} bootstrap replicates, {other} {len(b.replicates)}; "
            "give both the same evaluation.bootstrap"
        )


def interval(estimate: Estimate, digits: int) -> str:
    """` [low, high]`, or nothing where there is no interval."""
    if estimate.low is None or estimate.high is None:
        return ""
    return f" [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def gain_text(student: StudentResult) -> str:
    """`0.0149 (1.67% [1.35, 1.99])`, and `not resolved` where the interval holds 0."""
    gain, percent = student.gain, student.gain_percent
    if gain is None or percent is None:
        return "no undistilled run"
    text = f"{gain.value:+.4f} ({percent.value:+.2f}%{interval(percent, 2)})"
    return text if gain.resolved or gain.low is None else f"{text}, not resolved"


def ratio_text(student: StudentResult) -> str:
    """The transfer ratio and its interval, or why there is none."""
    if student.advantage is None:
        return "no undistilled run"
    if student.transfer_ratio is None:
        return "teacher not resolvedly better"
    return f"{student.transfer_ratio.value:.2f}{interval(student.transfer_ratio, 2)}"


def full_name(model: ModelResult) -> str:
    """Role and name, for models of one role that must be told apart."""
    return model.name if model.name.startswith(model.role) else f"{model.role} {model.name}"


def rows(comparison: Comparison) -> list[list[str]]:
    """The table as texts, in the order of COLUMNS."""
    lines = [_row("teacher, all traffic", comparison.teacher, "", "")]
    seen: set[tuple[str, str, str]] = set()
    for student in comparison.students:
        for model in (student.teacher, student.undistilled, student.distilled):
            # several students of one domain share the teacher's row and often the undistilled one
            if model is None or (key := (student.domain, model.role, model.run)) in seen:
                continue
            seen.add(key)
            gain, ratio = (gain_text(student), ratio_text(student)) if model.role == "distilled" else ("", "")
            several = model.role == "distilled" and [s.domain for s in comparison.students].count(student.domain) > 1
            name = full_name(model) if several else model.role
            lines.append(_row(f"{student.domain}: {name}", model, gain, ratio))
    return lines


def _row(label: str, m: ModelResult, gain: str, ratio: str) -> list[str]:
    ne = f"{m.ne.value:.4f}{interval(m.ne, 4)}"
    return [label, ne, f"{m.auc:.4f}", f"{m.log_loss:.4f}", f"{m.calibration:.3f}", gain, ratio]


COLUMNS = ("model", "NE [95% interval]", "AUC", "log loss", "calibration", "NE gain", "transfer ratio")


def table(comparison: Comparison) -> Table:
    """For the terminal: the teacher on all traffic, then per domain teacher, undistilled, distilled."""
    first, last = comparison.slices
    shown = Table(title=Text(f"task {comparison.task}, evaluated slices {first} to {last - 1}"), title_justify="left")
    for column in COLUMNS:
        shown.add_column(column, justify="left" if column == "model" else "right")
    for line in rows(comparison):
        if line[0].endswith(": teacher"):
            shown.add_section()
        shown.add_row(*map(Text, line))
    return shown

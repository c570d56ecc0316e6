"""The report's sentences and tables, as plain texts; the page escapes them."""

from collections.abc import Iterable

import numpy as np

from exfm.launch.comparison import (
    Comparison,
    ModelResult,
    StudentResult,
    estimate,
    full_name,
    interval,
    replicates_of,
)
from exfm.launch.report.runs import Run

Cell = tuple[str, str]  # what the cell says, and below it in small print


def headline(comparison: Comparison) -> list[str]:
    """One sentence per student."""
    several = {s.domain for s in comparison.students if _students_of(comparison, s.domain) > 1}
    return [_sentence(s, s.domain in several) for s in comparison.students]


def _students_of(comparison: Comparison, domain: str) -> int:
    return sum(s.domain == domain for s in comparison.students)


def _sentence(student: StudentResult, named: bool) -> str:
    who = f"The student of domain {student.domain}" + (f" ({student.distilled.name})" if named else "")
    gain = student.gain_percent
    if gain is None:
        ne = student.distilled.ne
        return f"{who} reached NE {ne.value:.4f}{interval(ne, 4)}; without an undistilled run its gain is not known."
    if gain.low is None:
        verb = "gained" if gain.value >= 0 else "lost"
        said = f"{who} {verb} {abs(gain.value):.2f}% NE with the teacher (no interval)"
    elif not gain.resolved:
        said = f"{who}: the gain from the teacher is not resolved, {gain.value:+.2f}% NE{interval(gain, 2)}"
    elif gain.value > 0:
        said = f"{who} gained {gain.value:.2f}% NE{interval(gain, 2)} from the teacher"
    else:
        said = f"{who} lost NE to distillation: {gain.value:+.2f}%{interval(gain, 2)}"
    return f"{said}; {_ratio(student)}."


def _ratio(student: StudentResult) -> str:
    ratio = student.transfer_ratio
    if ratio is not None:
        return f"transfer ratio {ratio.value:.2f}{interval(ratio, 2)}"
    return "no transfer ratio, because the teacher is not resolvedly better than the undistilled student there"


def run_sentence(run: Run) -> str:
    """What one run reached, or how far it is."""
    if run.summary is None:
        if not run.slices:
            return f"{run.name} has not finished its first slice."
        last = run.slices[-1]
        return (
            f"{run.name} is not finished: {last['share']:.0%} of {last['slices']} slices, "
            f"{last['examples']:,} examples, NE so far {last['ne_so_far']:.4f}."
        )
    m = run.summary["groups"][run.groups[0]][run.task]
    first, last_slice = run.summary["evaluated_from"], run.summary["slices"][1] - 1
    return (
        f"{run.name} reached NE {m['ne']:.4f}{_interval_of(run, run.groups[0], run.task)}, AUC {m['auc']:.4f} and calibration {m['calibration']:.3f} "
        f"on the {m['examples']:,.0f} examples of slices {first} to {last_slice}."
    )


def _interval_of(run: Run, group: str, task: str) -> str:
    assert run.summary is not None
    value = run.summary["groups"][group][task]["ne"]
    return interval(estimate(np.concatenate(([value], replicates_of(run.folder, f"{group}/{task}")))), 4)


REACHED = ("group", "NE", "AUC", "log loss", "calibration", "base rate", "examples")


def reached_rows(run: Run) -> list[tuple[str, list[Cell]]]:
    """Every group and task of a finished run."""
    if run.summary is None:
        return []
    several = len(run.config["heads"]["tasks"]) > 1
    lines = []
    for group in run.groups:
        for task, m in run.summary["groups"][group].items():
            numbers = [f"{m['auc']:.4f}", f"{m['log_loss']:.4f}", f"{m['calibration']:.3f}", f"{m['base_rate']:.4f}"]
            cells = [(text, "") for text in (*numbers, f"{m['examples']:,.0f}")]
            name = ("all traffic" if group == "all" else f"domain {group}", f"task {task}" if several else "")
            lines.append(("", [name, (f"{m['ne']:.4f}", _interval_of(run, group, task).strip()), *cells]))
    return lines


COMPARED = ("model", "NE", "AUC", "log loss", "calibration", "NE gain", "transfer ratio")


def comparison_rows(comparison: Comparison) -> list[tuple[str, list[Cell]]]:
    """(row class, cells): the teacher on all traffic, then per domain teacher, undistilled, distilled."""
    lines = [("first", [("teacher", "all traffic"), *_measured(comparison.teacher), ("", ""), ("", "")])]
    seen: set[tuple[str, str, str]] = set()
    for student in comparison.students:
        several = _students_of(comparison, student.domain) > 1
        for model in (student.teacher, student.undistilled, student.distilled):
            if model is None or (key := (student.domain, model.role, model.run)) in seen:
                continue
            seen.add(key)
            ours = model.role == "distilled"
            name = full_name(model) if ours and several else model.role
            last = [_gain(student), _ratio_cell(student)] if ours else [("", ""), ("", "")]
            kind = {"teacher": "first", "distilled": "strong"}.get(model.role, "")
            lines.append((kind, [(name, f"domain {student.domain}"), *_measured(model), *last]))
    return lines


def _measured(m: ModelResult) -> list[Cell]:
    return [
        (f"{m.ne.value:.4f}", interval(m.ne, 4).strip()),
        (f"{m.auc:.4f}", ""),
        (f"{m.log_loss:.4f}", ""),
        (f"{m.calibration:.3f}", ""),
    ]


def _gain(student: StudentResult) -> Cell:
    gain = student.gain_percent
    if gain is None or student.gain is None:
        return "", "no undistilled run"
    below = interval(gain, 2).strip() or "no interval"
    unresolved = "" if gain.resolved or gain.low is None else "not resolved\n"
    return f"{gain.value:+.2f}%", f"{below}\n{unresolved}{student.gain.value:+.4f} NE"


def _ratio_cell(student: StudentResult) -> Cell:
    ratio = student.transfer_ratio
    if ratio is None:
        return "", "" if student.advantage is None else "teacher not resolvedly better"
    return f"{ratio.value:.2f}", interval(ratio, 2).strip()


FACTS = (
    "run",
    "ranks",
    "device",
    "table parameters",
    "dense parameters",
    "FLOPs / example",
    "examples",
    "seconds",
    "examples/s",
    "supervision",
)


def fact_rows(runs: Iterable[Run]) -> list[list[str]]:
    lines = []
    for run in runs:
        s = run.summary
        if s is None:
            lines.append([run.name, "not finished", *[""] * (len(FACTS) - 2)])
            continue
        learns = run.config["distillation"].get("learn")
        covered = f"{s['covered'] / max(s['examples'], 1):.1%}" if learns else "none used"
        lines.append(
            [
                run.name,
                str(s["world_size"]),
                s["device"],
                quantity(s["table_parameters"]),
                quantity(s["dense_parameters"]),
                quantity(s["flops_per_example"]),
                f"{s['examples']:,}",
                f"{s['seconds']:,.1f}",
                f"{s['examples_per_s']:,.0f}",
                covered,
            ]
        )
    return lines


TIME = ("run", "goodput", "FLOP/s of a rank", "MFU", "what takes most, and what to change")


def time_rows(runs: Iterable[Run]) -> list[list[str]]:
    """Of finished runs."""
    return [
        [
            run.name,
            f"{s['goodput']:.0%}",
            quantity(s["flops_per_s"]),
            f"{s['mfu']:.0%}" if "mfu" in s else "no peak known",
            s["bottleneck"].removeprefix("bottleneck: "),
        ]
        for run in runs
        if (s := run.summary) is not None
    ]


def quantity(value: float) -> str:
    """Three digits and a decimal prefix: 306 k, 1.24 M, 3.20 T."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            scaled = value / size
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f} {prefix}"
    return f"{value:.0f}"

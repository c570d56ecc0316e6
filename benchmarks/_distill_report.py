"""The tables of `exfm bench distill` as Markdown, from its JSON."""

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks._distill_runs import UNDISTILLED

Part = dict[str, Any]
CLAIMS = {"holds": "within 1%", "violated": "**worse by more than 1%**", "open": "not resolved"}


def markdown(result: dict[str, Part]) -> str:
    """One section per part that was run."""
    sections = [SECTIONS[name](result[name]) for name in SECTIONS if name in result]
    return "\n".join("\n".join(lines) + "\n" for lines in sections)


def rows(header: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    return [
        "",
        f"| {' | '.join(header)} |",
        f"|{'---|' * len(header)}",
        *(f"| {' | '.join(line)} |" for line in lines),
        "",
    ]


def ranged(e: Part | None, digits: int, factor: float = 1.0, sign: bool = False) -> str:
    """`0.0149 [0.0100, 0.0194]`."""
    if e is None:
        return ""
    low, high = e["interval"]
    plus = "+" if sign else ""
    return f"{factor * e['value']:{plus}.{digits}f} [{factor * low:.{digits}f}, {factor * high:.{digits}f}]"


def spread(m: Part, name: str, digits: int = 4) -> str:
    sd = m[f"{name}_sd"]
    return f"{m[name]:.{digits}f}" + ("" if sd is None else f" ± {sd:.{digits}f}")


def table_section(r: Part) -> list[str]:
    budget = "; ".join(dict.fromkeys(f"{t['trials']} of {t['of']} settings" for t in r["tuned"].values()))
    lines = [
        f"## {r['title']}: {len(r['domains'])} domains x {len(r['tuned'])} methods x {r['seeds']} seeds",
        "",
        f"Mean ± deviation over seeds (teacher and student); intervals: 95%, paired over users (Poisson bootstrap) and over seeds. "
        f"Tuning budget: every method the same, on {r['tuned_on']} alone (undistilled and distilled: {budget}). Teacher on all traffic: NE {spread(r['teacher'], 'ne')}, "
        f"AUC {spread(r['teacher'], 'auc')}, {r['teacher']['cpu_seconds']:.0f} CPU s. Supervision: "
        f"{r['supervision']['bytes_per_prediction']:.2f} bytes per example and task, {r['supervision']['bytes'] / 2**20:.2f} MiB per "
        "teacher.",
        "",
        "Mean over the domains:",
    ]
    header = (
        "method",
        "NE gain",
        "gain, %",
        "transfer ratio",
        "calibration error change, %",
        "by domain",
        "CPU time",
    )
    lines += rows(header, (_overall(arm, o) for arm, o in r["overall"].items()))
    for domain, d in r["domains"].items():
        lines += _domain(r["described"][domain], d)
    lines += ["Settings chosen:", ""]
    lines += [f"- {arm}: {_settings(t['settings'])}" for arm, t in r["tuned"].items()]
    return [*lines, ""]


def _settings(settings: Part) -> str:
    return ", ".join(f"{k} {v:g}" for k, v in settings.items())


def _overall(arm: str, o: Part) -> Sequence[str]:
    verdicts = list(o["calibration_verdicts"].values())
    counted = [f"{verdicts.count(v)} {CLAIMS[v]}" for v in CLAIMS if v in verdicts]
    return (
        arm,
        ranged(o["gain"], 4),
        ranged(o["gain_percent"], 2),
        ranged(o["transfer"], 2),
        ranged(o["calibration_change"], 2, 100, sign=True),
        ", ".join(counted),
        f"x {o['time_ratio']:.2f}",
    )


def _domain(named: str, d: Part) -> list[str]:
    base = d["arms"][UNDISTILLED]
    lines = [f"**{named}**, {base['examples']:,} examples evaluated, the teacher ahead by {ranged(d['advantage'], 4)}:"]
    header = ("model", "NE", "AUC", "log loss", "calibration", "NE gain", "transfer ratio", "calibration error change, %", "CPU s")  # fmt: skip
    body: list[Sequence[str]] = [(*_model("teacher", d["teacher"]), "", "", "", f"{d['teacher']['cpu_seconds']:.1f}")]
    for arm, a in d["arms"].items():
        change = a.get("calibration_change")
        body.append(
            (
                *_model(arm, a),
                ranged(a.get("gain"), 4),
                ranged(a.get("transfer"), 2),
                f"{ranged(change, 2, 100, sign=True)}, {CLAIMS[change['verdict']]}" if change else "",
                f"{a['cpu_seconds']:.1f}",
            )
        )
    return [*lines, *rows(header, body)]


def _model(name: str, m: Part) -> tuple[str, ...]:
    return name, spread(m, "ne"), spread(m, "auc"), f"{m['log_loss']:.4f}", spread(m, "calibration", 3)


def staleness_section(r: Part) -> list[str]:
    arms = list(next(iter(r["ages"].values())))
    lines = [
        "## Staleness",
        "",
        f"Student on {r['domain']}, {r['seeds']} seeds, slices {r['begin']} to the end. NE gain over the undistilled student "
        f"(NE {spread(r['base'], 'ne')}) by how many slices old the predictions are. Slice t is scored by a teacher that has "
        f"learned the t - {r['begin'] - 1} slices up to t - 1 - age, so its data volume is the same for every age. `forward`: the "
        "teacher's own forward pass, as old as 0 at a slice's beginning and fresher within it.",
    ]
    body = [(age, *(ranged(by_arm[arm]["gain"], 4) for arm in arms)) for age, by_arm in r["ages"].items()]
    lines += rows(("age, slices", *arms), body)
    return lines


def sizes_section(r: Part) -> list[str]:
    (arm,) = r["arms"]
    lines = [
        "## Sizes of teacher and student",
        "",
        f"Student on {r['domain']}, {r['seeds']} seeds, method: {arm}, settings of the table above for all sizes. NE gain over the "
        "undistilled student of the same size, and transfer ratio.",
    ]
    teachers = r["teachers"]
    header = ("student", "undistilled NE", *(f"teacher {t}" for t in teachers), "largest against smallest teacher")
    params = lambda m: f"{m['table_parameters'] + m['dense_parameters']:,} parameters"  # noqa: E731
    body = [("(teacher's NE here)", "", *(f"{spread(m, 'ne')}, {params(m)}" for m in teachers.values()), "")]
    for student, s in r["students"].items():
        cells = [
            f"{ranged(s['taught'][t][arm]['gain'], 4)}; {ranged(s['taught'][t][arm]['transfer'], 2)}" for t in teachers
        ]
        size = f"{student}, {params(s['base'])}"
        body.append((size, spread(s["base"], "ne"), *cells, ranged(s["small_to_large"][arm], 4, sign=True)))
    lines += rows(header, body)
    return lines


def smoke_section(r: Part) -> list[str]:
    lines = [
        "## Open Bandit: a smoke test",
        "",
        f"{r['clicks']} clicks among {r['examples']:,} impressions decide nothing; it runs:",
    ]
    body = [(name, f"{m['ne']:.4f}", f"{m['auc']:.4f}") for name, m in r["models"].items()]
    return [*lines, *rows(("model", "NE", "AUC"), body)]


def cost_section(r: Part) -> list[str]:
    lines = [
        "## Cost",
        "",
        "Median over turns in one process; steps without reading; reading without training.",
    ]
    body = []
    for name, v in r["verdicts"].items():
        least = name in ("reading", "scoring")
        limit = f"{'at least' if least else 'at most'} {v['limit']:g}"
        body.append(
            (MEASURED.get(name, f"AH+SA {name}"), f"{v['value']:.3f}", limit, "yes" if v["holds"] else "**no**")
        )
    lines += rows(("measurement", "value", "limit", "holds"), body)
    return lines


MEASURED = {
    "reading": "reading joined slices, rows/s by plain ones",
    "mode forward": "the teacher's time with logging by without",
    "scoring": "a scorer's rows/s by training's",
    "bytes": "supervision, bytes per example and task",
}
SECTIONS = {
    "table": table_section,
    "renttherunway": table_section,
    "staleness": staleness_section,
    "sizes": sizes_section,
    "cost": cost_section,
    "open_bandit": smoke_section,
}

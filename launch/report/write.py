"""Put the report together: words, tables and figures of some runs and, where there is one, of their comparison."""

import json
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

from exfm.launch.comparison import Comparison
from exfm.launch.report import figures as draw
from exfm.launch.report import words
from exfm.launch.report.figures import Figure, Line, Style, Window
from exfm.launch.report.page import details_html, figures_html, page_html, section_html, table_html
from exfm.launch.report.plan import plan_figure
from exfm.launch.report.runs import Run, read_run
from exfm.launch.report.stages import stages_figure

USERS = "Intervals: 95%, by bootstrap over users; they do not cover the training seed."


def write_report(
    out: Path,
    runs: Sequence[Path],
    comparison: Comparison | None,
    title: str,
    bayes_ne: Mapping[str, float] | None = None,
) -> Path:
    """Write one self-contained HTML page to `out`.

    comparison: of some of these runs, or None for a report on the runs alone, finished or not.
    bayes_ne: best reachable NE, by domain ("all": of all traffic), where a stream's is known.
    """
    read = {str(folder): read_run(folder) for folder in runs}
    for folder in _compared(comparison):
        read.setdefault(folder, read_run(Path(folder)))
    everything = list(read.values())
    lead = words.headline(comparison) if comparison else [words.run_sentence(run) for run in everything]
    body = "".join(
        [
            _compared_section(comparison) if comparison else _reached(everything),
            _curves(read, comparison, bayes_ne or {}),
            _plans(everything),
            _facts(read, comparison),
            section_html("Configuration", *(details_html(_config_title(r), r.config_text) for r in everything)),
        ]
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page_html(title, lead, body), encoding="utf-8")
    return out


def _compared(comparison: Comparison | None) -> list[str]:
    """Folders of the compared runs, each once."""
    if comparison is None:
        return []
    models = [comparison.teacher, *(m for s in comparison.students for m in (s.teacher, s.undistilled, s.distilled))]
    return list(dict.fromkeys(m.run for m in models if m is not None))


def _reached(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        note = f"{run.name}, progressive: every prediction was made before its example was learned. {USERS}"
        if lines := words.reached_rows(run):
            parts.append(table_html(words.REACHED, lines, note))
    return section_html("What it reached", *parts)


def _compared_section(comparison: Comparison) -> str:
    first, last = comparison.slices
    note = f"Task {comparison.task}, slices {first} to {last - 1}, every prediction made before its example was learned. {USERS} Gains are paired: the same users were drawn for all models."
    parts = [table_html(words.COMPARED, words.comparison_rows(comparison), note)]
    if any(s.gain_percent for s in comparison.students):
        caption = (
            "Right of the dashed line distillation helped; a hollow dot is a gain that these examples do not resolve."
        )
        plot = draw.gains_figure(comparison.students)
        parts.append(figures_html([Figure("gains", "NE gained from the teacher", caption, plot)]))
    return section_html("What the teacher bought", *parts)


def _curves(read: Mapping[str, Run], comparison: Comparison | None, bayes_ne: Mapping[str, float]) -> str:
    """NE and calibration per slice: of every domain's models, or of every run's groups."""
    panels: list[tuple[str, list[Line], str, Window | None, list[str]]] = []
    if comparison is not None:
        for domain in dict.fromkeys(s.domain for s in comparison.students):
            lines = draw.domain_lines(comparison, read, domain)
            panels.append((f"domain {domain}", lines, comparison.task, comparison.slices, [domain]))
    else:
        for run in read.values():
            panels.append((run.name, draw.run_lines(run), run.task, _window(run), run.groups))
    ne, calibration = [], []
    for i, (name, lines, task, window, groups) in enumerate(panels):
        if not any(line.run.slices for line in lines):
            continue
        best = {f"best reachable{_of(g, groups)}": bayes_ne[g] for g in groups if g in bayes_ne}
        plot = draw.ne_figure(lines, task, window, best)
        ne.append(Figure(f"ne-{i}", f"NE per slice, {name}", _ne_caption(lines, window), plot))
        caption = "Above the dashed line a model predicts more positives than there were; it should stay close to it."
        plot = draw.calibration_figure(lines, task, window)
        calibration.append(Figure(f"calibration-{i}", f"Calibration per slice, {name}", caption, plot))
    return section_html("Slice by slice", figures_html(ne), figures_html(calibration))


def _window(run: Run) -> Window | None:
    """The evaluated slices of a finished run."""
    return (run.summary["evaluated_from"], run.summary["slices"][1]) if run.summary else None


def _ne_caption(lines: Sequence[Line], window: Window | None) -> str:
    width = draw.pooled_width(lines)
    said = "Lower is better"
    if width > 1:
        said += f": each line is the NE of the last {width} slices together, each dot of one slice"
    return said + ("; the evaluated slices are shaded." if window else ".")


def _of(group: str, groups: Sequence[str]) -> str:
    return f", {group}" if len(groups) > 1 else ""


def _plans(runs: Sequence[Run]) -> str:
    """Each different plan once."""
    by_plan: dict[str, list[Run]] = {}
    for run in runs:
        if run.plan:
            by_plan.setdefault(json.dumps([run.plan, run.config["tables"]]), []).append(run)
    caption = "One bar per rank: bars of equal size are a balanced plan; point at a piece for its table and shard."
    drawn = [
        Figure(f"plan-{i}", ", ".join(r.name for r in same), caption, plan_figure(same[0]))
        for i, same in enumerate(by_plan.values())
    ]
    return section_html("Where the tables live", figures_html(drawn))


def _facts(read: Mapping[str, Run], comparison: Comparison | None) -> str:
    runs = list(read.values())
    lines = [("", [(cell, "") for cell in line]) for line in words.fact_rows(runs)]
    note = "Supervision: share of the trained examples that came with a prediction of the teacher."
    parts = [table_html(words.FACTS, lines, note)]
    if any(run.ticks for run in runs):
        caption = "A flat curve is a steady job; a dip is a wait for data, for supervision or for a commit."
        plot = draw.throughput_figure(runs, _styles(read, comparison))
        parts.append(figures_html([Figure("throughput", "Throughput", caption, plot)]))
    if finished := [run for run in runs if run.summary]:
        caption = "Lookup, forward, backward, optimizer and pipeline are training steps, the rest is what a job does beside them; point at a piece for its seconds."
        parts.append(figures_html([Figure("stages", "Where the time went", caption, stages_figure(finished))]))
        note = "Goodput: share of all time since the job began in which steps were made that count. FLOP/s: of matrix products, three times the forward pass."
        times = [("", [(cell, "") for cell in line]) for line in words.time_rows(finished)]
        parts.append(table_html(words.TIME, times, note))
    return section_html("How it ran", *parts)


def _styles(read: Mapping[str, Run], comparison: Comparison | None) -> dict[str, Style]:
    """Colours as in the domains' figures; a dash per domain, for the models of two domains share their colours."""
    styles: dict[str, Style] = {}
    if comparison is not None:
        domains = dict.fromkeys(s.domain for s in comparison.students)
        for domain, dash in zip(domains, cycle(("solid", "dot", "dash", "dashdot")), strict=False):
            for line in draw.domain_lines(comparison, read, domain):
                styles.setdefault(str(line.run.folder), (line.colour, dash))
    return styles


def _config_title(run: Run) -> str:
    return f"{run.name}: {run.folder / 'config.yaml'}"

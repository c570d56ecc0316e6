"""The page of `exfm bench distill`: its tables' numbers as figures, self-contained."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from benchmarks._distill_stats import LIMIT
from exfm.launch.report.figures import NEUTRAL, Figure, blank, text
from exfm.launch.report.page import figure_html, page_html, section_html, table_html

Part = dict[str, Any]
COLOURS = ("#3a8fd0", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
MEAN = "mean of the domains"
Point = tuple[str, dict[str, Any]]  # name, estimate


def write_page(result: dict[str, Part], path: Path) -> None:
    body = "".join(SECTIONS[name](name, result[name]) for name in SECTIONS if name in result)
    path.write_text(page_html("What distillation buys, and what it costs", lead(result), body))


def lead(result: dict[str, Part]) -> Iterable[str]:
    for name in ("table", "renttherunway"):
        if name not in result:
            continue
        r = result[name]
        arm, best = max(r["overall"].items(), key=lambda item: item[1]["gain"]["value"])
        low, high = best["transfer"]["interval"]
        yield (
            f"{r['title']}: the best method on average over {len(r['domains'])} domains, {arm}, lowers NE by "
            f"{best['gain_percent']['value']:.2f}%; transfer ratio {best['transfer']['value']:.2f} [{low:.2f}, {high:.2f}]."
        )
    if "cost" in result:
        verdicts = result["cost"]["verdicts"].values()
        yield f"{sum(v['holds'] for v in verdicts)} of {len(verdicts)} limits of cost hold on this machine."


def dots(groups: Sequence[tuple[str, Sequence[Point]]], factor: float, axis: str, **layout: Any) -> go.Figure:
    """A row of dots with intervals per name; a colour per group."""
    names = [name for name, _ in groups[0][1]]
    plot = blank(130 + 20 * len(names) * (len(groups) + 1), **layout)
    for number, (group, points) in enumerate(groups):
        shift = (number - (len(groups) - 1) / 2) * 0.8 / len(groups)
        values = [factor * e["value"] for _, e in points]
        low, high = ([factor * e["interval"][i] for _, e in points] for i in (0, 1))
        mean = group == MEAN
        colour = NEUTRAL if mean else COLOURS[number % len(COLOURS)]
        plot.add_scatter(
            x=values,
            y=[row + shift for row in range(len(points))],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [h - v for h, v in zip(high, values, strict=True)],
                "arrayminus": [v - b for b, v in zip(low, values, strict=True)],
                "thickness": 3 if mean else 2,
                "width": 3,
            },
            mode="markers",
            name=text(group),
            marker={"color": colour, "size": 11 if mean else 8, "symbol": "diamond" if mean else "circle"},
            hovertemplate="%{x:.3f}",
        )
    plot.add_vline(x=0, line={"dash": "dash", "color": NEUTRAL, "width": 1.5})
    ticks = {"tickvals": list(range(len(names))), "ticktext": [text(n).replace(" + ", "<br>+ ") for n in names]}
    plot.update_yaxes(range=[len(names) - 0.5, -0.5], ticklabelstandoff=8, showgrid=False, **ticks)
    plot.update_xaxes(title_text=axis)
    return plot


def table_figures(name: str, r: Part) -> str:
    domains = r["domains"]
    arms = list(r["overall"])

    def points(key: str) -> list[tuple[str, list[Point]]]:
        named = [(r["described"][d], [(arm, domains[d]["arms"][arm][key]) for arm in arms]) for d in domains]
        return [*named, (MEAN, [(arm, r["overall"][arm][key]) for arm in arms])]

    calibration = dots(points("calibration_change"), 100, "change of |log calibration|, %; right of 0 is worse")
    calibration.add_vline(x=100 * LIMIT, line={"dash": "dot", "color": "#d55e00", "width": 1.5})
    figures = [
        Figure(f"{name}-gain", "NE gain", "Against the undistilled student, in % of its NE; 95% intervals over users and seeds.",
               dots([(n, _percent(r, n, p)) for n, p in points("gain")], 1, "NE gain, %")),
        Figure(f"{name}-transfer", "Transfer ratio", "The student's gain by the teacher's advantage.",
               dots(points("transfer"), 1, "transfer ratio")),
        Figure(f"{name}-calibration", "Calibration",
               "How much further from 1 the served student's calibration is than the undistilled one's; dotted: the limit of 1%.",
               calibration),
    ]  # fmt: skip
    return section_html(r["title"], _overall(r), _grid(figures))


def _overall(r: Part) -> str:
    """The means over domains as a table."""
    header = ("method", "NE gain", "gain, %", "transfer ratio", "calibration error change, %", "CPU time")
    shown = (("gain", 4, 1.0), ("gain_percent", 2, 1.0), ("transfer", 2, 1.0), ("calibration_change", 2, 100.0))
    lines = []
    for arm, o in r["overall"].items():
        cells = [(arm, "")]
        for key, digits, factor in shown:
            low, high = (factor * bound for bound in o[key]["interval"])
            cells.append((f"{factor * o[key]['value']:.{digits}f}", f"{low:.{digits}f} to {high:.{digits}f}"))
        lines.append(("", (*cells, (f"x {o['time_ratio']:.2f}", ""))))
    budget = next(iter(r["tuned"].values()))["trials"]
    note = f"Means over {len(r['domains'])} domains, {r['seeds']} seeds; every method had {budget} tuning trials on {r['tuned_on']}."
    return table_html(header, lines, note)


def _percent(r: Part, group: str, points: Sequence[Point]) -> list[Point]:
    domain = next((d for d, named in r["described"].items() if named == group), None)
    if domain is None:
        return [(arm, r["overall"][arm]["gain_percent"]) for arm, _ in points]
    return [(arm, r["domains"][domain]["arms"][arm]["gain_percent"]) for arm, _ in points]


def _grid(figures: Sequence[Figure]) -> str:
    drawn = "".join(map(figure_html, figures))
    return f'<div class="grid">{drawn}</div>'


def curves(lines: Sequence[tuple[str, Sequence[Point]]], x_title: str, y_title: str) -> go.Figure:
    """A line with intervals per name over the same points."""
    plot = blank(380)
    for number, (name, points) in enumerate(lines):
        # beside each other, or intervals would hide intervals
        places = [i + 0.06 * (number - (len(lines) - 1) / 2) for i in range(len(points))]
        plot.add_scatter(
            x=places,
            y=[e["value"] for _, e in points],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [e["interval"][1] - e["value"] for _, e in points],
                "arrayminus": [e["value"] - e["interval"][0] for _, e in points],
                "thickness": 1.5,
                "width": 3,
            },
            mode="lines+markers",
            name=text(name),
            line={"color": COLOURS[number % len(COLOURS)], "width": 2.2},
            hovertemplate="%{y:.4f}",
        )
    names = [text(n).replace(", ", ",<br>") for n, _ in lines[0][1]]
    plot.update_xaxes(title_text=x_title, tickvals=list(range(len(names))), ticktext=names)
    plot.update_yaxes(title_text=y_title, rangemode="tozero")
    return plot


def staleness_figure(name: str, r: Part) -> str:
    arms = list(next(iter(r["ages"].values())))
    lines = [(arm, [(age, by_arm[arm]["gain"]) for age, by_arm in r["ages"].items()]) for arm in arms]
    caption = f"Student on {r['domain']}; the teacher's data volume is the same for every age. 95% intervals over users and seeds."
    plot = curves(lines, "age of the predictions, slices", "NE gain")
    return section_html("Staleness", _grid([Figure(name, "NE gain by the age of predictions", caption, plot)]))


def sizes_figure(name: str, r: Part) -> str:
    (arm,) = r["arms"]

    def lines(key: str) -> list[tuple[str, list[Point]]]:
        return [
            (f"student {s}", [(t, v["taught"][t][arm][key]) for t in r["teachers"]]) for s, v in r["students"].items()
        ]

    caption = f"Student on {r['domain']}, {arm}. 95% intervals over users and seeds."
    figures = [
        Figure(f"{name}-gain", "NE gain by the teacher's size", caption, curves(lines("gain"), "teacher", "NE gain")),
        Figure(f"{name}-transfer", "Transfer ratio by the teacher's size", caption,
               curves(lines("transfer"), "teacher", "transfer ratio")),
    ]  # fmt: skip
    return section_html("Sizes of teacher and student", _grid(figures))


def cost_table(name: str, r: Part) -> str:
    lines = [
        (
            "",
            (
                (key, ""),
                (f"{v['value']:.3f}", ""),
                (f"{v['limit']:g}", ""),
                ("holds" if v["holds"] else "does not hold", ""),
            ),
        )
        for key, v in r["verdicts"].items()
    ]
    return section_html("Cost", table_html(("measurement", "value", "limit", ""), lines))


SECTIONS = {
    "table": table_figures,
    "renttherunway": table_figures,
    "staleness": staleness_figure,
    "sizes": sizes_figure,
    "cost": cost_table,
}

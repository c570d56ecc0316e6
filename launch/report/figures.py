"""The report's curves and dots as Plotly figures. Colours of text, grid and background come from the page's theme."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import cycle
from typing import TypeAlias

import numpy as np
import plotly.graph_objects as go

from exfm.launch.comparison import Comparison, StudentResult, full_name
from exfm.launch.report.runs import Run

# told apart by colour-blind readers, on white and on black (after Okabe and Ito)
ROLE_COLOURS = {"teacher": "#3a8fd0", "undistilled": "#e69f00", "distilled": "#009e73"}
GAINED, LOST = "#009e73", "#d55e00"
MORE_COLOURS = ("#cc79a7", "#d55e00", "#56b4e9", "#999999")
NEUTRAL = "#8a8f98"
MAX_TICKS = 40  # points of a throughput curve
WIDE = 20  # ratio of throughputs from which their axis is logarithmic
LONGEST = 40  # letters of a name in a figure
POOLED_SHARE = 0.1  # of the slices, in one point of a smoothed curve

Window: TypeAlias = tuple[int, int]  # evaluated slices [first, last)
Style: TypeAlias = tuple[str, str]  # colour, dash


@dataclass(frozen=True)
class Figure:
    """`key` is unique on the page; caption: one sentence on what to look for. Texts are plain, the page escapes them."""

    key: str
    title: str
    caption: str
    plot: go.Figure


@dataclass(frozen=True)
class Line:
    """One model on one group of its examples."""

    label: str
    run: Run
    group: str
    colour: str


def text(value: str) -> str:
    """For Plotly, which reads tags and entities in every text."""
    return escape(value if len(value) <= LONGEST else f"{value[: LONGEST - 1]}…", quote=False)


def blank(height: int, **layout: object) -> go.Figure:
    plot = go.Figure(layout={"height": height, "margin": {"l": 64, "r": 16, "t": 40, "b": 48}, **layout})
    plot.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hoverlabel={"namelength": -1},
        legend={"orientation": "h", "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom"},
        font={"size": 13},
    )
    unified = layout.get("hovermode") == "x unified"
    plot.update_xaxes(zeroline=False, automargin=True, title={"standoff": 8, "font": {"size": 13}})
    plot.update_xaxes(showspikes=unified, spikethickness=1, spikedash="solid")
    plot.update_yaxes(zeroline=False, automargin=True, title={"standoff": 12, "font": {"size": 13}}, showspikes=False)
    return plot


def domain_lines(comparison: Comparison, runs: Mapping[str, Run], domain: str) -> list[Line]:
    """Teacher, undistilled and distilled runs of one domain; each run once."""
    students = [s for s in comparison.students if s.domain == domain]
    models = {m.run: m for s in students for m in (s.teacher, s.undistilled, s.distilled) if m is not None}
    more = cycle(MORE_COLOURS)
    lines: list[Line] = []
    used: set[str] = set()
    for model in models.values():
        colour = next(more) if model.role in used else ROLE_COLOURS[model.role]
        used.add(model.role)
        several = sum(m.role == model.role for m in models.values()) > 1
        label = full_name(model) if several else model.role
        lines.append(Line(label, runs[model.run], domain, colour))
    return lines


def run_lines(run: Run) -> list[Line]:
    """One line per group that a run measured."""
    colours = cycle((*ROLE_COLOURS.values(), *MORE_COLOURS))
    return [Line(group, run, group, colour) for group, colour in zip(run.groups, colours, strict=False)]


def pooled_width(lines: Sequence[Line]) -> int:
    """Slices in one point of a smoothed curve."""
    return max(1, round(max(len(line.run.slices) for line in lines) * POOLED_SHARE))


def ne_figure(lines: Sequence[Line], task: str, window: Window | None, best: Mapping[str, float]) -> go.Figure:
    """NE of single slices as dots and of `pooled_width` slices together as a line; best: names and known best NE."""
    plot = blank(400, hovermode="x unified")
    width = pooled_width(lines)
    for line in lines:
        if width > 1:
            slices, values = line.run.series(line.group, task, "ne")
            dots = {"color": line.colour, "size": 4, "opacity": 0.4}
            plot.add_scatter(x=slices, y=values, mode="markers", marker=dots, hoverinfo="skip", showlegend=False)
        slices, values = line.run.pooled_ne(line.group, task, width)
        _curve(plot, line, slices, values, ".4f")
    reach = _reach(plot, window, list(best.values()))
    first, last = _slice_axis(plot, lines, window)
    for name, value in best.items():
        style = {"color": NEUTRAL, "dash": "dash", "width": 2}
        hover = "%{y:.4f}"
        plot.add_scatter(
            x=[first, last],
            y=[value] * 2,
            mode="lines",
            line=style,
            name=text(f"{name} {value:.4f}"),
            hovertemplate=hover,
        )
    plot.update_yaxes(title_text="NE (lower is better)", tickformat=".3f", range=reach)
    return plot


def calibration_figure(lines: Sequence[Line], task: str, window: Window | None) -> go.Figure:
    """Sum of predictions over sum of labels, per slice."""
    plot = blank(320, hovermode="x unified")
    for line in lines:
        slices, values = line.run.series(line.group, task, "calibration")
        _curve(plot, line, slices, values, ".3f")
    low, high = _reach(plot, window, [1.0])
    farthest = max(1 - low, high - 1)
    _slice_axis(plot, lines, window)
    plot.add_hline(y=1, line={"dash": "dash", "color": NEUTRAL, "width": 1.5})
    plot.update_yaxes(title_text="predicted / observed", tickformat=".2f", range=[1 - farthest, 1 + farthest])
    return plot


def _curve(plot: go.Figure, line: Line, slices: list[int], values: list[float], digits: str) -> None:
    mode = "lines" if len(slices) > 1 else "markers"
    style = {"color": line.colour, "width": 2.2}
    hover = f"%{{y:{digits}}}"
    plot.add_scatter(x=slices, y=values, mode=mode, name=text(line.label), line=style, hovertemplate=hover)


def _slice_axis(plot: go.Figure, lines: Sequence[Line], window: Window | None) -> tuple[float, float]:
    """Slices from edge to edge, the evaluated ones shaded; the edges."""
    numbers = [line["slice"] for own in lines for line in own.run.slices]
    first, last = min(numbers) - 0.5, max(numbers) + 0.5
    plot.update_xaxes(title_text="slice", range=[first, last])
    if window is not None:
        shade = {"fillcolor": NEUTRAL, "opacity": 0.09, "line": {"width": 0}, "layer": "below"}
        plot.add_vrect(x0=window[0] - 0.5, x1=window[1] - 0.5, **shade)
    return first, last


def _reach(plot: go.Figure, window: Window | None, more: Sequence[float]) -> tuple[float, float]:
    """Holds every evaluated point; earlier ones only where they are near, or the first slices would flatten the rest."""
    points = [(x, y) for trace in plot.data for x, y in zip(trace.x, trace.y, strict=True)]
    first = window[0] if window else 0
    values = [*([y for x, y in points if x >= first] or [y for _, y in points]), *more]
    low, high = min(values, default=0.0), max(values, default=1.0)
    pad = 0.08 * (high - low) or 0.01
    return low - pad, high + pad


def gains_figure(students: Sequence[StudentResult]) -> go.Figure:
    """NE gain in % of the undistilled NE, with its interval; hollow where the interval holds 0."""
    shown = [(_student_label(s, students), s.gain_percent) for s in students if s.gain_percent is not None]
    plot = blank(110 + 46 * len(shown), showlegend=False)
    for row, (name, gain) in enumerate(shown):
        known = gain.low is not None and gain.high is not None
        interval = f"95% interval [{gain.low:.2f}, {gain.high:.2f}]" if known else "no interval"
        colour = NEUTRAL if known and not gain.resolved else GAINED if gain.value > 0 else LOST
        bars = {"type": "data", "symmetric": False, "thickness": 2, "width": 5}
        if gain.low is not None and gain.high is not None:
            bars |= {"array": [gain.high - gain.value], "arrayminus": [gain.value - gain.low]}
        plot.add_scatter(
            x=[gain.value],
            y=[row],
            error_x=bars,
            mode="markers+text",
            text=[f"{gain.value:+.2f}%"],
            textposition="top center",
            marker={"size": 11, "color": colour, "symbol": "circle-open" if colour == NEUTRAL else "circle"},
            customdata=[[text(name), interval]],
            hovertemplate="%{customdata[0]}: %{x:+.2f}%<br>%{customdata[1]}<extra></extra>",
        )
    plot.add_vline(x=0, line={"dash": "dash", "color": NEUTRAL, "width": 1.5})
    ticks = {"tickvals": list(range(len(shown))), "ticktext": [text(name) for name, _ in shown]}
    plot.update_yaxes(range=[len(shown) - 0.5, -0.7], ticklabelstandoff=8, **ticks)
    plot.update_xaxes(title_text="NE gain, % of the undistilled NE", rangemode="tozero", ticksuffix="%")
    return plot


def _student_label(student: StudentResult, students: Sequence[StudentResult]) -> str:
    several = [s.domain for s in students].count(student.domain) > 1
    return f"{student.domain}: {student.distilled.name}" if several else student.domain


def throughput_figure(runs: Sequence[Run], styles: Mapping[str, Style]) -> go.Figure:
    """Examples per second between logged lines. styles: (colour, dash) by run folder."""
    plot = blank(360)
    more = cycle(MORE_COLOURS if styles else (*ROLE_COLOURS.values(), *MORE_COLOURS))
    medians = []
    for run in runs:
        shares, rates, seconds = _rates(run.ticks)
        if not rates:
            continue
        medians.append(float(np.median(rates)))
        colour, dash = styles.get(str(run.folder)) or (next(more), "solid")
        plot.add_scatter(
            x=shares,
            y=rates,
            mode="lines" if len(rates) > 1 else "markers",
            line={"color": colour, "width": 2.2, "dash": dash},
            name=text(run.name),
            customdata=seconds,
            hovertemplate="%{y:,.0f} examples/s after %{customdata:,.1f} s",
        )
    wide = bool(medians) and max(medians) > WIDE * max(min(medians), 1e-9)
    plot.update_yaxes(title_text="examples/s", **({"type": "log"} if wide else {"rangemode": "tozero"}))
    plot.update_xaxes(title_text="share of the job", range=[0, 1.005], dtick=0.2, tickformat=".0%")
    return plot


def _rates(ticks: Sequence[tuple[float, float, float]]) -> tuple[list[float], list[float], list[float]]:
    """(shares, examples per second since the point before, seconds), in steps long enough to be steady."""
    shares, rates, seconds = [], [], []
    last_seconds, last_examples = 0.0, 0.0
    least = ticks[-1][1] / MAX_TICKS if ticks else 0.0
    for share, now, examples in ticks:
        if now - last_seconds < least:
            continue
        shares.append(share)
        seconds.append(now)
        rates.append((examples - last_examples) / max(now - last_seconds, 1e-9))
        last_seconds, last_examples = now, examples
    return shares, rates, seconds

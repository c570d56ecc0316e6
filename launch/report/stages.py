"""Where the time of finished jobs went, as bars of the report."""

from collections.abc import Sequence

import plotly.graph_objects as go

from exfm.launch.report.figures import MORE_COLOURS, NEUTRAL, ROLE_COLOURS, blank, text
from exfm.launch.report.runs import Run
from exfm.trainer.anatomy import IN_STEP, LOST, STAGES

COLOURS = dict(zip(IN_STEP, (*ROLE_COLOURS.values(), *MORE_COLOURS), strict=False))
WAITS = ("#f0e442", "#c7a0d8", "#4d4d4d", "#b0b7c3", "#7fcdbb", NEUTRAL)


def stages_figure(runs: Sequence[Run]) -> go.Figure:
    """One bar per finished job, in shares of all its time; what trains first, then what does not."""
    plot = blank(140 + 44 * len(runs), barmode="stack")
    plot.update_layout(legend={"traceorder": "normal"})
    order = [*IN_STEP, *(s for s in (*STAGES, LOST) if s not in IN_STEP)]
    colours = COLOURS | dict(zip(order[len(IN_STEP) :], WAITS, strict=True))
    stages = [(run.summary or {})["stages"] for run in runs]
    totals = [max(sum(own.values()), 1e-9) for own in stages]
    for stage in order:
        shares = [own[stage] / total for own, total in zip(stages, totals, strict=True)]
        if max(shares) < 0.001:
            continue
        plot.add_bar(
            y=[text(run.name) for run in runs],
            x=shares,
            name=stage,
            orientation="h",
            marker={"color": colours[stage], "line": {"width": 1}},
            customdata=[own[stage] for own in stages],
            hovertemplate="%{x:.1%}, %{customdata:,.1f} s",
        )
    plot.update_yaxes(autorange="reversed")
    plot.update_xaxes(title_text="share of all time since the job began", range=[0, 1.005], tickformat=".0%")
    return plot

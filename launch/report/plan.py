"""The plan as a picture: per rank, the bytes of weights it keeps of every table, coloured by sharding type."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import plotly.graph_objects as go

from exfm.launch.report.figures import blank, text
from exfm.launch.report.runs import Run

SHARDING_COLOURS = {
    "data_parallel": "#999999",
    "table_wise": "#3a8fd0",
    "row_wise": "#e69f00",
    "column_wise": "#009e73",
    "table_row_wise": "#cc79a7",
    "table_column_wise": "#56b4e9",
    "grid_shard": "#d55e00",
}
UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
MAX_PIECES = 3_000  # rectangles in one picture
UPRIGHT_RANKS = 25  # from here on ranks stand side by side


@dataclass(frozen=True)
class Piece:
    """What one rank keeps of one table (or of several together, where a picture would hold too many)."""

    rank: int
    kind: str
    label: str
    shape: str
    size_bytes: int


def pieces(run: Run) -> list[Piece]:
    found = []
    for row in run.plan:
        rows, width, value_bytes = run.table_shape(row["table"])
        whole = [{"rank": rank, "sizes": [rows, width]} for rank in row["ranks"]]
        for shard in row["shards"] or whole:
            own_rows, own_width = shard["sizes"]
            size = own_rows * own_width * value_bytes
            found.append(
                Piece(shard["rank"], row["sharding_type"], row["table"], f"{own_rows:,} rows x {own_width}", size)
            )
    found.sort(key=lambda p: -p.size_bytes)
    return found if len(found) <= MAX_PIECES else _merged(found)


def _merged(found: Iterable[Piece]) -> list[Piece]:
    """One piece per rank and sharding type."""
    together: dict[tuple[int, str], list[Piece]] = defaultdict(list)
    for piece in found:
        together[piece.rank, piece.kind].append(piece)
    return [
        Piece(rank, kind, f"{len(own)} shards", f"largest: {own[0].label}", sum(p.size_bytes for p in own))
        for (rank, kind), own in together.items()
    ]


def plan_figure(run: Run) -> go.Figure:
    found = pieces(run)
    totals: dict[int, int] = defaultdict(int)
    for piece in found:
        totals[piece.rank] += piece.size_bytes
    most = max(totals.values(), default=0)
    unit, unit_bytes = next(((u, b) for u, b in UNITS if most >= b), UNITS[-1])
    upright = len(totals) >= UPRIGHT_RANKS
    plot = blank(420 if upright else 120 + 44 * len(totals), barmode="stack", bargap=0.0 if upright else 0.25)
    plot.update_layout(uniformtext={"mode": "hide", "minsize": 10})
    for kind in sorted({p.kind for p in found}):
        own = [p for p in found if p.kind == kind]
        ranks, sizes = [p.rank for p in own], [p.size_bytes / unit_bytes for p in own]
        plot.add_bar(
            x=ranks if upright else sizes,
            y=sizes if upright else ranks,
            orientation="v" if upright else "h",
            name=text(kind),
            marker={"color": SHARDING_COLOURS.get(kind, "#999999"), "line": {"width": 0 if upright else 1}},
            customdata=[[p.rank, text(p.label), text(p.kind), text(p.shape)] for p in own],
            text=[text(p.label) for p in own],
            textposition="none" if upright else "inside",
            insidetextanchor="middle",
            insidetextfont={"color": "#111111"},
            textangle=0,
            hovertemplate="rank %{customdata[0]}: %{customdata[1]}<br>%{customdata[2]}, %{customdata[3]}"
            f"<br>%{{{'y' if upright else 'x'}:.3g}} {unit}<extra></extra>",
        )
    rank_axis = {"title_text": "rank", "tickmode": "auto" if upright else "linear", "dtick": None if upright else 1}
    size_axis = {"title_text": f"{unit} of weights"}
    plot.update_xaxes(rank_axis if upright else size_axis)
    plot.update_yaxes(size_axis if upright else {**rank_axis, "autorange": "reversed"})
    plot.update_layout(showlegend=True, legend={"traceorder": "normal"})
    return plot

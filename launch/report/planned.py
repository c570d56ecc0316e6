"""`plan.html`: a plan, or two side by side: every rank's time and memory as bars, and which tables are on it."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import plotly.graph_objects as go

from exfm.data.commit import commit, open_folder
from exfm.launch.report.figures import Figure, blank, text
from exfm.launch.report.page import figures_html, page_html, section_html, table_html
from exfm.launch.report.plan import SHARDING_COLOURS
from exfm.sharding.plan import TIMES, Plan, TablePlan

GIB = 2**30
NAMED = 10  # tables of a rank and sharding type that are named
SHOWN = 20  # tables of a list
WORDS = {
    "fwd_compute": "forward compute",
    "fwd_comms": "forward communication",
    "bwd_compute": "backward compute",
    "bwd_comms": "backward communication",
    "input_dist_comms": "distribution of ids (during the step before)",
    "prefetch_compute": "prefetch",
}


@dataclass
class Share:
    """What a rank has of tables of one sharding type."""

    ms: float = 0.0
    gib: float = 0.0
    tables: list[tuple[float, str]] = field(default_factory=list)

    @property
    def names(self) -> str:
        first = [name for _, name in sorted(self.tables, reverse=True)]
        more = f"<br>and {len(first) - NAMED} more" if len(first) > NAMED else ""
        return "<br>".join(map(text, first[:NAMED])) + more


def shares(plan: Plan) -> dict[str, dict[int, Share]]:
    """By sharding type and rank."""
    found: dict[str, dict[int, Share]] = defaultdict(lambda: defaultdict(Share))
    for table in plan.tables:
        ms, memory = table.each("ms"), (table.each("hbm") + table.each("host")) / GIB
        for rank, own_ms, own_gib in zip(plan.ranks(table).tolist(), ms, memory, strict=True):
            share = found[table.sharding_type][rank]
            share.ms += float(own_ms)
            share.gib += float(own_gib)
            share.tables.append((float(own_ms), f"{table.table}: {own_ms:.3g} ms, {own_gib:.3g} GiB"))
    return found


def bars(plan: Plan, what: str, unit: str, top: float) -> go.Figure:
    """A bar per rank, stacked by sharding type. top: end of the axis, the same for plans that are compared."""
    plot = blank(360, barmode="stack", bargap=0.0)
    for kind, by_rank in sorted(shares(plan).items()):
        ranks = sorted(by_rank)
        plot.add_bar(
            x=ranks,
            y=[getattr(by_rank[r], what) for r in ranks],
            name=text(kind),
            marker={"color": SHARDING_COLOURS[kind], "line": {"width": 0}},
            customdata=[by_rank[r].names for r in ranks],
            hovertemplate=f"rank %{{x}}, {text(kind)}: %{{y:.3g}} {unit}<br>%{{customdata}}<extra></extra>",
        )
    plot.update_xaxes({"title_text": "rank"})
    plot.update_yaxes({"title_text": unit, "range": [0, 1.05 * top]})
    plot.update_layout(showlegend=True, legend={"traceorder": "normal"})
    return plot


def write_plan_page(path: Path, plans: Sequence[tuple[str, Plan]]) -> Path:
    """plans: one, or two to be compared, each with a name."""
    time_top = max(plan.cost for _, plan in plans)
    tops = [float((plan.by_rank("hbm") + plan.by_rank("host")).max()) / GIB for _, plan in plans]
    times, memory = [], []
    for number, (name, plan) in enumerate(plans):
        caption = (
            f"Slowest rank {plan.cost:.3g} ms, lower bound {plan.bound_ms:.3g} ms. Point at a bar for the tables on it."
        )
        times.append(
            Figure(f"time-{number}", f"{name}: embedding time of a step", caption, bars(plan, "ms", "ms", time_top))
        )
        kept = (plan.reserved_hbm + plan.reserved_host) / GIB
        caption = f"Fullest rank {tops[number]:.3g} GiB; {kept:.3g} GiB of every rank are kept for everything else."
        plot = bars(plan, "gib", "GiB", max(tops))
        memory.append(Figure(f"memory-{number}", f"{name}: memory of tables and their buffers", caption, plot))
    body = section_html("Time", figures_html(times)) + section_html("Memory", figures_html(memory))
    body += section_html("The slowest rank", _split(plans)) + _tables(plans)
    fs, where = open_folder(path)
    commit(fs, where, page_html("exfm plan", [_lead(name, plan) for name, plan in plans], body).encode())
    return path


def _lead(name: str, plan: Plan) -> str:
    t = plan.topology
    over = max(0.0, 100 * (plan.cost / plan.bound_ms - 1)) if plan.bound_ms else 0.0
    parameters = sum(table.rows * table.width for table in plan.tables)
    return (
        f"{name}: {parameters:,} parameters in {len(plan.tables)} tables fit on {t.world_size:,} ranks ({t.name}); the slowest one takes {plan.cost:.3g} ms, at most "
        f"{over:.1f}% above the best plan"
    )


def _split(plans: Sequence[tuple[str, Plan]]) -> str:
    header = ["ms of the slowest rank", *(f"{name} (rank {plan.worst})" for name, plan in plans)]
    lines = []
    for part in TIMES:
        values = [float(plan.by_rank(part)[plan.worst]) for _, plan in plans]
        if any(values):
            lines.append(("", [(WORDS[part], ""), *((f"{value:.3g}", "") for value in values)]))
    return table_html(header, lines, "By TorchRec's perf model and the topology's figures.")


def _tables(plans: Sequence[tuple[str, Plan]]) -> str:
    """The costliest tables; of two plans those that differ."""
    (name, first), others = plans[0], plans[1:]
    order = sorted(first.tables, key=lambda t: -t.total("ms"))
    if not others:
        lines = [("", [(t.table, f"{t.rows:,} x {t.width}"), *_cells(t)]) for t in order[:SHOWN]]
        return section_html("The costliest tables", table_html(["table", "sharding", "ms in all", "GiB"], lines))
    other_name, second = others[0]
    by_name = {t.table: t for t in second.tables}
    changed = [(t, by_name[t.table]) for t in order if t.table in by_name and _way(t) != _way(by_name[t.table])]
    lines = [("", [(a.table, f"{a.rows:,} x {a.width}"), *_cells(a), *_cells(b)]) for a, b in changed[:SHOWN]]
    header = ["table", *(f"{n}: {what}" for n in (name, other_name) for what in ("sharding", "ms in all", "GiB"))]
    note = f"{len(changed)} of {len(order)} tables are sharded another way; the costliest {min(SHOWN, len(changed))} are shown."
    return section_html("Tables that differ", table_html(header, lines, note))


def _way(table: TablePlan) -> str:
    cut = f" by {table.column_width}" if table.column_width != table.width else ""
    kernel = "" if table.kernel in ("fused", "dense") else f", {table.kernel}"
    return f"{table.sharding_type}{cut}{kernel}"


def _cells(table: TablePlan) -> list[tuple[str, str]]:
    memory = (table.total("hbm") + table.total("host")) / GIB
    return [(_way(table), f"{table.num_shards:,} shards"), (f"{table.total('ms'):.3g}", ""), (f"{memory:.3g}", "")]

"""The results of `exfm bench plan` as Markdown and as a figure."""

from pathlib import Path
from typing import Any

import matplotlib

from benchmarks import _plan_dryrun

Result = dict[str, Any]
LIMIT_S = 300.0  # of a case


def markdown(result: dict[str, Result]) -> str:
    lines = []
    if "grid" in result:
        g = result["grid"]
        lines += [
            "## Beside TorchRec's planner",
            "",
            f"Cost by TorchRec's perf model under the H100 topology, ours by theirs: median {g['median_ratio']:.3f}, worst {g['worst_ratio']:.4f}; infeasible where "
            f"theirs was not: {g['infeasible_where_torchrec_is_not']}; cases that TorchRec's planner did not finish in {LIMIT_S:.0f} s: {g['late']}.",
            "",
            "| tables | ranks | seed | memory | ours / theirs | ours / bound | ours, s | theirs, s |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for r in g["rows"]:
            a, b = r["ours"], r["torchrec"]
            ratio = (
                f"{a['cost'] / b['cost']:.4f}"
                if a["cost"] and b["cost"]
                else "infeasible"
                if not b.get("late")
                else "late"
            )
            bound = f"{a['cost'] / a['bound']:.3f}" if a["cost"] else "infeasible"
            memory = "tight" if r["tight"] else "loose"
            lines.append(
                f"| {r['tables']} | {r['ranks']} | {r['seed']} | {memory} | {ratio} | {bound} | {a['seconds']:.2f} | {b['seconds']:.1f} |"
            )
        lines.append("")
    if "models" in result:
        lines += [
            "## Trillions of parameters",
            "",
            "| model | H100 | slowest rank, ms | lower bound, ms | ratio | CPU s | peak GiB |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {r['model']} | {r['ranks']} | {r['cost']:.2f} | {r['bound']:.2f} | {r['ratio']:.4f} | {r['seconds']:.1f} | {r['peak_gib']:.2f} |"
            for r in result["models"]["rows"]
        ]
        lines.append("")
    if "scale" in result:
        lines += [
            "## Seconds against size",
            "",
            "![seconds against tables x ranks](planning.svg)",
            "",
            "| tables | ranks | ours, s | by the bound | TorchRec's, s | ours / theirs |",
            "|---|---|---|---|---|---|",
        ]
        for r in result["scale"]["rows"]:
            a, b = r["ours"], r["torchrec"]
            theirs = f"over {LIMIT_S:.0f}" if b.get("late") else f"{b['seconds']:.1f}"
            ratio = "" if b.get("late") or not b["cost"] else f"{a['cost'] / b['cost']:.3f}"
            lines.append(
                f"| {r['tables']} | {r['ranks']} | {a['seconds']:.2f} | {a['cost'] / a['bound']:.3f} | {theirs} | {ratio} |"
            )
        lines.append("")
    if "dryrun" in result:
        lines += _plan_dryrun.markdown(result["dryrun"]["rows"])
    return "\n".join(lines)


def figure(rows: list[Result], path: Path) -> None:
    """Seconds of both planners against tables x ranks, on logarithmic axes."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(figsize=(10, 5))
    for n, tables in enumerate(sorted({r["tables"] for r in rows})):
        own = [r for r in rows if r["tables"] == tables]
        size = [tables * r["ranks"] for r in own]
        axes.plot(size, [r["ours"]["seconds"] for r in own], "o-", color=f"C{n}", label=f"exfm, {tables} tables")
        done = [(s, r["torchrec"]["seconds"]) for s, r in zip(size, own, strict=True) if not r["torchrec"].get("late")]
        late = [s for s, r in zip(size, own, strict=True) if r["torchrec"].get("late")]
        if done:
            axes.plot(*zip(*done, strict=True), "x--", color=f"C{n}", label=f"TorchRec, {tables} tables")
        if late:
            axes.plot(
                late,
                [LIMIT_S] * len(late),
                "^",
                color=f"C{n}",
                mfc="none",
                label=f"TorchRec, {tables} tables, stopped at {LIMIT_S:.0f} s",
            )
    axes.set(xscale="log", yscale="log", xlabel="tables x ranks", ylabel="seconds to plan, one core")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    fig.tight_layout()
    fig.savefig(path)
    plt.close(fig)

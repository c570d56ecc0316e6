"""The results of `exfm bench scale` as Markdown and as a figure."""

from pathlib import Path
from typing import Any

import matplotlib

Result = dict[str, Any]
GIB = 2**30
LEVELS = {"L2, 512 KiB": 512 << 10, "L3, 32 MiB": 32 << 20}  # of a core and of the machine that docs/scale.md is of
TLB_BYTES = 2048 * 4096  # what the second-level TLB of such a core reaches with pages of 4 KiB


def markdown(result: dict[str, Result]) -> str:
    makers = {"size": _size, "modelled": _modelled, "ranks": _ranks}
    return "\n".join(line for name, make in makers.items() if name in result for line in make(result[name]))


def of_pages(rows: list[Result], huge: bool) -> list[Result]:
    return [r for r in rows if r["huge"] == huge]


def explained(base: Result, r: Result) -> tuple[float, float]:
    """Seconds by which a step is longer than at the smallest size, and by which reading its rows twice, for the lookup and for the
    update, and its accumulators once is.
    """
    reads = [2 * p["gather_rows_s"] + p["gather_state_s"] for p in (base, r)]
    return r["step_s"] - base["step_s"], reads[1] - reads[0]


def _where(m: Result) -> str:
    return f"{m['device']}, {m['date']}, load {m['load']}"


def _size(part: Result) -> list[str]:
    lines = [
        "## Rows",
        "",
        f"{_where(part['machine'])}. One rank, one thread, CPU seconds; in brackets the quartiles of steps. Left out: {'; '.join(part['left_out']) or 'none'}.",
        "",
        "| rows | tables and accumulators, GiB | pages | examples/s | step, ms | lookup | dense forward | backward, updates | longer than the smallest by, ms | reading the same rows and accumulators at random: longer by, ms | page faults of a step |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for huge in (False, True):
        own = of_pages(part["rows"], huge)
        for r in own:
            grown, read = explained(own[0], r)
            size = (r["bytes"]["tables"] + r["bytes"]["accumulators"]) / GIB
            speeds = f"{r['examples_per_s']:,.0f} [{r['batch'] / r['step_high_s']:,.0f}, {r['batch'] / r['step_low_s']:,.0f}]"
            times = " | ".join(f"{1000 * r[k]:.1f}" for k in ("step_s", "tables_s", "dense_s", "backward_s"))
            lines.append(
                f"| {r['rows']:.0e} | {size:.3f} | {'2 MiB' if huge else '4 KiB'} | {speeds} | {times} | {1000 * grown:.1f} | {1000 * read:.1f} | "
                f"{r['faults_per_step']:,.0f} |"
            )
    return [*lines, ""]


def _modelled(part: Result) -> list[str]:
    first = part["rows"][0]
    lines = [
        "## Ranks beyond this machine (modelled)",
        "",
        f"{_where(part['machine'])}. {first['rows']:.0e} rows, {first['batch']:,} examples a rank. The slowest rank's step is real (CPU seconds, among loopback "
        "peers); communication is modelled and nothing overlaps.",
        "",
        "| ranks | sharding types | step here, ms | tables sent (modelled), ms | dense gradients sent (modelled), ms | examples/s of all (modelled) | of linear |",
        "|---|---|---|---|---|---|---|",
    ]
    alone = first["modelled_examples_per_s"] / first["ranks"]
    for r in part["rows"]:
        times = " | ".join(f"{1000 * r[k]:.1f}" for k in ("step_s", "table_comms_s", "dense_comms_s"))
        total = r["modelled_examples_per_s"]
        lines.append(
            f"| {r['ranks']} | {', '.join(r['kinds'])} | {times} | {total:,.0f} | {total / r['ranks'] / alone:.2f} |"
        )
    return [*lines, "", f"Linear: {first['ranks']} rank(s) of this table.", ""]


def _ranks(part: Result) -> list[str]:
    lines = [
        "## Ranks on this machine",
        "",
        f"{_where(part['machine'])}. The trainer on gloo, wall seconds between slices' ends. CPU us: of all ranks, for one example. Cores had: CPU seconds of all ranks "
        "by wall seconds: what the machine gave them.",
        "",
        "| scaling | ranks | global batch | examples/s | CPU us an example | cores had | CPU work by that of one rank |",
        "|---|---|---|---|---|---|---|",
    ]
    one = next((r for r in part["rows"] if r["ranks"] == 1), None)
    for r in part["rows"]:
        note = " (oversubscribed)" if r["oversubscribed"] else ""
        work = f"{r['cpu_us_per_example'] / one['cpu_us_per_example']:.2f}" if one else ""
        lines.append(
            f"| {r['kind']} | {r['ranks']}{note} | {r['global_batch']:,} | {r['examples_per_s']:,.0f} | {r['cpu_us_per_example']:.0f} | "
            f"{r['cores_had']:.2f} | {work} |"
        )
    return [*lines, ""]


def figure(result: dict[str, Result], path: Path) -> None:
    """Examples per second against rows, with where caches end, and against ranks."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "scale"}):
        fig, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8))
        if "size" in result:
            _draw_size(left, result["size"])
        if "modelled" in result or "ranks" in result:
            _draw_ranks(right, result)
        fig.tight_layout()
        fig.savefig(path, metadata={"Date": None})
        plt.close(fig)


def _draw_size(axes: Any, part: Result) -> None:
    for huge, style in ((False, "o-"), (True, "s--")):
        own = of_pages(part["rows"], huge)
        if not own:
            continue
        rows = [r["rows"] for r in own]
        axes.plot(rows, [r["examples_per_s"] for r in own], style, label=f"pages of {'2 MiB' if huge else '4 KiB'}")
        high = [[r["examples_per_s"] - r["batch"] / r["step_high_s"] for r in own]]
        low = [[r["batch"] / r["step_low_s"] - r["examples_per_s"] for r in own]]
        axes.errorbar(rows, [r["examples_per_s"] for r in own], yerr=high + low, fmt="none", color="gray", alpha=0.6)
    first = part["rows"][0]
    each = (first["bytes"]["tables"] + first["bytes"]["accumulators"]) / first["rows"]
    top = max(r["batch"] / r["step_low_s"] for r in part["rows"])
    places = LEVELS | {"TLB, 4 KiB pages": TLB_BYTES}
    for name, size in places.items():
        axes.axvline(size / each, color="gray", lw=0.8, ls=":")
        axes.text(size / each, 0.03 * top, f" {name}", rotation=90, va="bottom", ha="right", fontsize="small")
    axes.set(xscale="log", ylim=(0, 1.1 * top), xlabel=f"table rows ({each:.0f} bytes each, accumulator included)")
    axes.set(ylabel="examples/s, one rank, one thread", title="one rank: rows")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="upper right")


def _draw_ranks(axes: Any, result: dict[str, Result]) -> None:
    """Each against its own single rank: the two are of different models."""
    if "modelled" in result:
        rows = result["modelled"]["rows"]
        alone = rows[0]["batch"] / rows[0]["step_s"]
        ranks = [r["ranks"] for r in rows]
        axes.plot(
            ranks, [r["modelled_examples_per_s"] / alone for r in rows], "o-", label="modelled: step and communication"
        )
        axes.plot(ranks, [n * r["batch"] / r["step_s"] / alone for n, r in zip(ranks, rows, strict=True)], "^--", label="the step alone, among loopback peers")  # fmt: skip
        axes.plot(ranks, ranks, ":", color="gray", label="linear")
    one = [r for r in result.get("ranks", {}).get("rows", []) if r["ranks"] == 1]
    for kind, style in (("strong", "x"), ("weak", "+")):
        own = [r for r in result.get("ranks", {}).get("rows", []) if r["kind"] == kind]
        if own and one:
            # by CPU work: what the ranks would do if each had a core
            speed = [r["ranks"] * one[0]["cpu_us_per_example"] / r["cpu_us_per_example"] for r in own]
            axes.plot([r["ranks"] for r in own], speed, style, ms=9, label=f"measured on gloo, {kind}: CPU work")
    axes.set(xscale="log", yscale="log", xlabel="ranks", ylabel="times one rank", title="ranks (beyond 4: modelled)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="upper left")

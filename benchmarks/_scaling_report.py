"""The results of `exfm bench scaling` as Markdown and as a figure."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from benchmarks._scaling_fit import Law

Result = dict[str, Any]
NAMES = {"wukong": "Wukong", "dlrm": "DLRM", "dcnv2": "DCN-V2"}
COLOURS = {"wukong": "#3a8fd0", "dlrm": "#e69f00", "dcnv2": "#009e73"}
MARKERS = {"wukong": "o", "dlrm": "s", "dcnv2": "^"}
FORM_NAMES = {"offset": "power with an offset", "paper": "the paper's, no offset"}


def architectures(result: Result) -> list[str]:
    return list(result["laws"])


def cells(result: Result, architecture: str) -> Iterator[tuple[Result, list[float]]]:
    """(a run, NE of all seeds) of every size, the smallest first."""
    own = [r for r in result["rows"] if r["architecture"] == architecture]
    for rung in sorted({r["rung"] for r in own}):
        runs = [r for r in own if r["rung"] == rung]
        yield runs[0], [r["ne"] for r in runs]


def markdown(result: Result) -> str:
    rows, bayes = result["rows"], result["bayes_ne"]
    seeds = len({r["seed"] for r in rows})
    floor = "the stream does not say the lowest reachable NE" if bayes is None else f"lowest reachable NE {bayes:.4f}"
    lines = [
        f"{result['date']}: {result['stream']}, one pass, task {result['task']}; NE over the last {rows[0]['evaluated']:,.0f} examples, {floor}. "
        f"{seeds} seed(s), fp32, {result['threads']} thread(s), torch {result['torch']}, {result['cpu_seconds'] / 60:.1f} CPU minutes with the search for learning rates.",
        "",
        *_sizes(result),
        "",
        *_laws(result),
        "",
        *_rates(result),
    ]
    return "\n".join([*lines, ""])


def _sizes(result: Result) -> list[str]:
    found = architectures(result)
    head = " | ".join(f"{NAMES[a]} | NE" for a in found)
    lines = [f"| MFLOP per example, training | {head} |", "|---" * (1 + 2 * len(found)) + "|"]
    for group in zip(*(cells(result, a) for a in found), strict=True):
        best = min(np.mean(ne) for _, ne in group)
        parts = [f"{run['label']} | {_ne(ne, best)}" for run, ne in group]
        lines.append(f"| {group[0][0]['flops'] / 1e6:.3f} | {' | '.join(parts)} |")
    return lines


def _ne(ne: list[float], best: float) -> str:
    mean = f"{np.mean(ne):.4f}"
    mean = f"**{mean}**" if np.mean(ne) == best else mean
    return mean if len(ne) == 1 else f"{mean} ± {np.std(ne, ddof=1):.4f}"


def _laws(result: Result) -> list[str]:
    lines = [
        "| architecture | form | fitted without the largest, x = MFLOP | rms of residuals | largest: predicted [95%] | measured | measured - predicted |",
        "|---|---|---|---|---|---|---|",
    ]
    for a in architectures(result):
        for form, p in result["laws"][a].items():
            law = Law(**p["law"])
            scale = law.scale * (1e6 / law.reference) ** -law.exponent
            offset = f"{law.offset:.4f} + " if form == "offset" else ""
            low, high = p["interval"]
            lines.append(
                f"| {NAMES[a]} | {FORM_NAMES[form]} | {offset}{scale:.4f} x^-{law.exponent:.3g} | {law.rms:.4f} | {p['predicted']:.4f} [{low:.4f}, {high:.4f}] "
                f"| {p['measured']:.4f} | {p['measured'] - p['predicted']:+.4f} |"
            )
    return lines


def _rates(result: Result) -> list[str]:
    lines = [
        "| architecture | tables | dense, by size | trials (seed not reported) |",
        "|---|---|---|---|",
    ]
    for a in architectures(result):
        used = [f"{run['lr_dense']:.3g}" for run, _ in cells(result, a)]
        t = result["tuned"][a]
        lines.append(f"| {NAMES[a]} | {t['tables']:g} | {', '.join(used)} | {len(t['trials'])} |")
    return lines


def figure(result: Result, path: Path) -> None:
    """NE against training FLOPs per example, with the laws and what they predict for the size held out."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    bayes = result["bayes_ne"]
    with plt.rc_context({"svg.hashsalt": "scaling"}):
        # the lowest reachable NE is far below: it has a short axis of its own
        strips = {"height_ratios": [1] if bayes is None else [9, 1], "hspace": 0.08}
        fig, found = plt.subplots(
            1 if bayes is None else 2, figsize=(10, 5.5), sharex=True, squeeze=False, gridspec_kw=strips
        )
        axes, lowest = found[0, 0], found[-1, 0]
        for place, a in enumerate(architectures(result)):
            _draw(axes, a, list(cells(result, a)), result["laws"][a]["offset"], 1.03 ** (place - 1))
        if bayes is not None:
            lowest.axhline(bayes, color="#888888", ls="--", lw=1)
            lowest.set(yticks=[bayes], yticklabels=[f"{bayes:.4f}\nBayes"], ylim=(bayes - 0.005, bayes + 0.005))
            lowest.spines.top.set_visible(False)
            axes.spines.bottom.set_visible(False)
            axes.tick_params(axis="x", which="both", length=0)
        axes.set(xscale="log", ylabel="NE, progressive, end of one pass")
        lowest.set(xlabel="training FLOPs per example")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
        fig.savefig(path, metadata={"Date": None}, bbox_inches="tight")
        plt.close(fig)


def _draw(axes: Any, architecture: str, own: list[tuple[Result, list[float]]], law: Result, aside: float) -> None:
    """aside: factor on FLOPs that keeps the marks of architectures apart."""
    name, colour, marker = NAMES[architecture], COLOURS[architecture], MARKERS[architecture]
    x = np.array([run["flops"] for run, _ in own], np.float64)
    mean = np.array([np.mean(ne) for _, ne in own])
    spread = np.array([[m - min(ne), max(ne) - m] for m, (_, ne) in zip(mean, own, strict=True)]).T
    style = {"color": colour, "ls": "none", "capsize": 3, "marker": marker}
    axes.errorbar(aside * x[:-1], mean[:-1], spread[:, :-1], label=f"{name}: mean of seeds, range", **style)
    along = np.geomspace(x[0], x[-1], 100)
    fitted = "law" if law["law"]["scale"] else "no law (level)"
    axes.plot(
        along, Law(**law["law"]).at(along), color=colour, lw=1.2, label=f"{name}: {fitted}, fitted without the largest"
    )
    axes.errorbar(aside * x[-1:], mean[-1:], spread[:, -1:], mfc="white", ms=8, label=f"{name}, held out", **style)
    low, high = law["interval"]
    below, above = max(0.0, law["predicted"] - low), max(0.0, high - law["predicted"])
    axes.errorbar([1.25 * aside**2 * x[-1]], [law["predicted"]], [[below], [above]], **style | {"marker": "x"}, lw=1, label=f"{name}: predicted for it, 95%")  # fmt: skip

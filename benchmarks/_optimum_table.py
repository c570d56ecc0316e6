"""What `exfm bench optimum` says: paired statistics over seeds, a table, a figure."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

LEVEL = 0.95
PAIRS = (
    ("single head", "undistilled"),
    ("AH", "single head"),
    ("AH+SA", "AH"),
    ("AH+SA", "AH twice"),
)  # better by how much: the first of the pair over the second


def t_quantile(p: float, dof: int) -> float:
    """Quantile p > 1/2 of Student's t distribution."""
    constant = math.exp(math.lgamma((dof + 1) / 2) - math.lgamma(dof / 2)) / math.sqrt(dof * math.pi)

    def below(t: float) -> float:
        x = np.linspace(0.0, t, 4001)
        return 0.5 + float(np.trapezoid(constant * (1 + x * x / dof) ** (-(dof + 1) / 2), x))

    low, high = 0.0, 1.0
    while below(high) < p:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < p else (low, middle)
    return high


def paired(a: list[float], b: list[float], comparisons: int) -> dict[str, Any]:
    """a - b over seeds: mean, deviation, 95% t-interval; whether it excludes 0, and also among so many comparisons."""
    difference = np.array(a) - np.array(b)
    mean, sd, n = float(difference.mean()), float(difference.std(ddof=1)), len(difference)
    half = sd / math.sqrt(n)
    return {
        "mean": mean,
        "sd": sd,
        "interval": [mean - t_quantile(0.5 + LEVEL / 2, n - 1) * half, mean + t_quantile(0.5 + LEVEL / 2, n - 1) * half],
        "t": mean / half if half else float("nan"),
        "resolved": abs(mean) > t_quantile(0.5 + LEVEL / 2, n - 1) * half,
        "resolved_among_all": abs(mean) > t_quantile(1 - (1 - LEVEL) / 2 / comparisons, n - 1) * half,
        "seeds_ahead": int((difference > 0).sum()),
    }  # fmt: skip


def summarise(
    rows: list[dict[str, Any]],
    weights: Mapping[str, Sequence[float]],
    tuned_on: Sequence[int],
    seeds: int,
    seconds: float,
) -> dict[str, Any]:
    """Per condition: each arm's mean and deviation, and the paired gains of PAIRS in NE x 1000."""
    comparisons = len(rows) * len(PAIRS)
    conditions = []
    for row in rows:
        ne = {arm: [1000 * r["excess"] for r in runs] for arm, runs in row["runs"].items()}
        arms = {
            arm: {
                "excess": float(np.mean(ne[arm])),
                "excess_sd": float(np.std(ne[arm], ddof=1)),
                "calibration": float(np.mean([r["calibration"] for r in runs])),
                "loss_weight": row["best"][arm],
            }
            for arm, runs in row["runs"].items()
        }
        teacher = {k: float(np.mean([t[k] for t in row["teachers"]])) for k in ("excess", "calibration")}
        others = {arm: [1000 * r["excess"] for r in runs] for arm, runs in row["runs_others"].items()}
        gains, by_others = (
            {f"{a} over {b}": paired(scores[b], scores[a], comparisons) for a, b in PAIRS} for scores in (ne, others)
        )
        conditions.append(
            {
                "condition": row["condition"],
                "examples": float(np.mean([r["examples"] for r in row["runs"]["undistilled"]])),
                "teacher": teacher | {"excess": 1000 * teacher["excess"]},
                "arms": arms,
                "gains": gains,
                "gains_tuned_on_the_other_seeds": by_others,
                "by_seed": ne,
                "every_weight": row["every_weight"],
            }
        )
    return {
        "unit": "NE x 1000",
        "seeds": seeds,
        "comparisons": comparisons,
        "budget": {
            "trials_per_arm_and_condition": {arm: len(tried) * len(tuned_on) for arm, tried in weights.items()},
            "loss_weights": {arm: list(tried) for arm, tried in weights.items()},
            "tuning_seeds": list(tuned_on),
            "seconds": seconds,
        },
        "conditions": conditions,
    }


def _gain(g: dict[str, Any]) -> str:
    low, high = g["interval"]
    mark = "**" if g["resolved_among_all"] else ""
    return f"{mark}{g['mean']:+.1f}{mark} ± {g['sd']:.1f} [{low:+.1f}, {high:+.1f}]"


def _weights(budget: dict[str, Any], arm: str) -> str:
    return ", ".join(f"{w:g}" for w in budget["loss_weights"][arm])


def markdown(r: dict[str, Any]) -> str:
    """The table of docs/."""
    b = r["budget"]
    arms = list(r["conditions"][0]["arms"])
    lines = [
        f"NE x 1000 above the best reachable one, expected under the true probabilities: means over {r['seeds']} seeds (in brackets "
        "the loss weight), then gains of one arm over another, paired by seed: mean ± standard deviation over seeds [95% "
        f"t-interval]. Positive: the first is better; bold: resolved among all {r['comparisons']} comparisons (Bonferroni). "
        f"Budget: trials a condition on seed {', '.join(map(str, b['tuning_seeds']))}, which is not reported: "
        + "; ".join(f"{arm} {n} ({_weights(b, arm)})" for arm, n in b["trials_per_arm_and_condition"].items())
        + ".",
        "",
        f"| condition | teacher (calibration) | {' | '.join(arms)} | {' | '.join(f'{a} over {c}' for a, c in PAIRS)} |",
        "|" + "---|" * (2 + len(arms) + len(PAIRS)),
    ]
    family = ""
    for c in r["conditions"]:
        if c["condition"]["family"] != family:
            family = c["condition"]["family"]
            lines.append(f"| **{family}** |" + " |" * (1 + len(arms) + len(PAIRS)))
        cells = [f"{c['teacher']['excess']:.0f} ({c['teacher']['calibration']:.2f})"]
        for a in c["arms"].values():
            cells.append(f"{a['excess']:.1f}" + (f" ({a['loss_weight']:g})" if a["loss_weight"] else ""))
        cells += [_gain(g) for g in c["gains"].values()]
        lines.append(f"| {c['condition']['name']} | {' | '.join(cells)} |")
    lines += ["", *_others(r)]
    return "\n".join(lines) + "\n"


def _others(r: dict[str, Any]) -> list[str]:
    """The gains with less chance in the choice of weights."""
    lines = [
        "The same gains where each seed's loss weights are those that were best on the mean of the other seeds:",
        "",
        f"| condition | {' | '.join(f'{a} over {b}' for a, b in PAIRS)} |",
        "|" + "---|" * (1 + len(PAIRS)),
    ]
    for c in r["conditions"]:
        gains = " | ".join(_gain(g) for g in c["gains_tuned_on_the_other_seeds"].values())
        lines.append(f"| {c['condition']['family']}, {c['condition']['name']} | {gains} |")
    return lines


# ---------------------------------------------------------------- the figure

LEFT, WIDTH, GAP, ROW, TOP = 250, 250, 40, 20, 64
COLOURS = {1: "#1a7f37", -1: "#b3261e", 0: "#6b7280"}


def svg(r: dict[str, Any]) -> str:
    """The second table: a panel per pair, in it a dot and an interval per condition; coloured: resolved, filled: among all."""
    body: list[str] = []
    height = TOP + ROW * (len(r["conditions"]) + len({c["condition"]["family"] for c in r["conditions"]})) + 40
    panels = [LEFT + i * (WIDTH + GAP) for i in range(len(PAIRS))]
    scales = [_scale([c["gains_tuned_on_the_other_seeds"][f"{a} over {b}"] for c in r["conditions"]]) for a, b in PAIRS]
    for left, (a, b), limit in zip(panels, PAIRS, scales, strict=True):
        _text(body, left + WIDTH / 2, 22, f"{a} over {b}", "middle", bold=True)
        _text(body, left + WIDTH / 2, 38, f"NE x 1000, right is better; marks to ± {limit:g}", "middle", "#6b7280")
        for share in (0, 0.5, 1):
            x = left + WIDTH * share
            body.append(f'<line x1="{x}" x2="{x}" y1="48" y2="{height - 30}" stroke="#d1d5db"/>')
            _text(body, x, height - 14, f"{limit * (2 * share - 1):+g}" if share != 0.5 else "0", "middle", "#6b7280")
    y, family = TOP, ""
    for c in r["conditions"]:
        if c["condition"]["family"] != family:
            family = c["condition"]["family"]
            _text(body, 10, y + 4, family, bold=True)
            y += ROW
        _text(body, 22, y + 4, c["condition"]["name"])
        for left, (a, b), limit in zip(panels, PAIRS, scales, strict=True):
            _dot(body, left, y, limit, c["gains_tuned_on_the_other_seeds"][f"{a} over {b}"])
        y += ROW
    width = panels[-1] + WIDTH + 30
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>{"".join(body)}</svg>\n'
    )


def _scale(gains: list[dict[str, Any]]) -> float:
    """A round half-width that holds all but the widest few; what lies outside is drawn at the edge with its number."""
    reach = sorted(max(abs(v) for v in g["interval"]) for g in gains)
    wanted = reach[max(0, math.ceil(0.8 * len(reach)) - 1)]
    return next(step * 10**e for e in range(-1, 6) for step in (1, 2, 5) if step * 10**e >= wanted)


def _dot(body: list[str], left: float, y: float, limit: float, g: dict[str, Any]) -> None:
    colour = COLOURS[(1 if g["mean"] > 0 else -1) if g["resolved"] else 0]

    def x(value: float) -> float:
        return left + WIDTH / 2 * (1 + max(-1.0, min(1.0, value / limit)))

    low, high = g["interval"]
    body.append(f'<line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>')
    filled = colour if g["resolved_among_all"] else "white"
    body.append(f'<circle cx="{x(g["mean"]):.1f}" cy="{y}" r="4" fill="{filled}" stroke="{colour}" stroke-width="2"/>')
    if abs(g["mean"]) > limit:
        right = g["mean"] > 0
        _text(body, left + WIDTH - 8 if right else left + 8, y + 4, f"{g['mean']:+.0f}", "end" if right else "start")


def _text(
    body: list[str], x: float, y: float, text: str, anchor: str = "start", colour: str = "#111827", bold: bool = False
) -> None:
    weight = ' font-weight="bold"' if bold else ""
    body.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{colour}"{weight}>{escape(text)}</text>')

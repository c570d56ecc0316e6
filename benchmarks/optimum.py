"""When separate heads and the student adapter pay, where the truth is known: `exfm bench optimum`.

Each seed has its own synthetic stream. The teacher of all traffic knows the true logits, so that what is wrong with it is
what a condition says: another level or scale, blindness to the domain, preferences of some slices ago under drift. Students
of one domain are measured by the expected NE of what they served under the true probabilities, which is free of label noise,
from their second slice on. Every arm has the same number of trials of the loss weight. Writes optimum.md, .json and .svg;
what has been run is not run again.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks._optimum_runs import ARMS, UNDISTILLED, Bench, Results
from benchmarks._optimum_table import markdown, summarise, svg
from benchmarks._optimum_worlds import Condition, users
from exfm.data.errors import UserError

TUNING_SEEDS = (1000,)
DRIFT = {"drift": 0.2}
LEVEL, SCALE, BLIND, STALE, SMALL = (
    "teacher of another level",
    "teacher of another scale",
    "teacher that cannot see the domain",
    "stale teacher under drift",
    "small domain",
)
CONDITIONS = (
    Condition(LEVEL, "right"),
    *(Condition(LEVEL, f"logit {b:+g}", shift=b) for b in (1.0, 2.0, -2.0)),
    *(Condition(SCALE, f"logit x {a:g}", scale=a) for a in (0.25, 3.0)),
    Condition(BLIND, "knows the rest", blind=True),
    *(Condition(STALE, f"{k} slices old", DRIFT, lag=k) for k in (0, 4, 8)),
    *(Condition(SMALL, f"1/32 of users{f', logit {b:+g}' if b else ''}", domain=users(32), shift=b) for b in (0.0, 1.0)),
)  # fmt: skip
console = Console(stderr=True)


def main(args: list[str], data_dir: str | None = None) -> int:
    parser = argparse.ArgumentParser(prog="exfm bench optimum", description=__doc__)
    parser.add_argument("--seeds", type=int, default=10, help="number of seeds, at least 2")
    parser.add_argument("--only", default="", help="conditions whose family begins so")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/optimum"))
    options = parser.parse_args(args)
    if options.seeds < 2:
        raise UserError(f"--seeds is {options.seeds}; a deviation needs at least 2")
    conditions = [c for c in CONDITIONS if c.family.startswith(options.only)]
    if not conditions:
        families = dict.fromkeys(c.family for c in CONDITIONS)
        raise UserError(f"--only is '{options.only}'; the families are: {', '.join(families)}")
    result = run(Bench(options.out), conditions, range(options.seeds))
    (options.out / "optimum.json").write_text(json.dumps(result, indent=1))
    (options.out / "optimum.md").write_text(markdown(result))
    (options.out / "optimum.svg").write_text(svg(result))
    print(markdown(result))
    return 0


def run(bench: Bench, conditions: list[Condition], seeds: range) -> dict[str, Any]:
    """All conditions with all seeds, one group of the same examples after the other."""
    torch.set_num_threads(1)
    begun = time.monotonic()
    results: dict[int, Results] = {}
    for seed in (*TUNING_SEEDS, *seeds):
        results[seed] = {}
        for group in dict.fromkeys(c.group for c in conditions):
            results[seed] |= bench.results([c for c in conditions if c.group == group], seed)
        console.print(f"seed {seed}: {time.monotonic() - begun:.0f} s", highlight=False)
    rows = []
    for c in conditions:
        best = tune([results[seed][c.key] for seed in TUNING_SEEDS])
        own = [results[seed][c.key] for seed in seeds]
        every = {name: 1000 * float(np.mean([r[name]["excess"] for r in own])) for name in own[0] if name != "teacher"}
        rows.append(
            {
                "condition": asdict(c),
                "best": best,
                "runs": chosen(own, [best] * len(own)),
                # all weights have been run: less chance in the choice, and still none of a seed's own results in it
                "runs_others": chosen(own, [tune([r for r in own if r is not left_out]) for left_out in own]),
                "teachers": [r["teacher"] for r in own],
                "every_weight": every,
            }
        )
    budget = {arm: weights for arm, (*_, weights) in ARMS.items()}
    return summarise(rows, budget, TUNING_SEEDS, len(seeds), time.monotonic() - begun)


def tune(trials: list[dict[str, dict[str, float]]]) -> dict[str, float]:
    """Every arm's loss weight of the lowest mean NE over the tuning seeds; 0 where there is none."""
    mean = {name: float(np.mean([t[name]["ne"] for t in trials])) for name in trials[0]}
    return {UNDISTILLED: 0.0} | {
        arm: min(weights, key=lambda w: mean[f"{arm} {w:g}"]) for arm, (*_, weights) in ARMS.items()
    }


def chosen(
    own: list[dict[str, dict[str, float]]], weights: list[dict[str, float]]
) -> dict[str, list[dict[str, float]]]:
    """Scores of every arm by seed, each with that seed's loss weights."""
    names = ([f"{arm} {w:g}" if arm in ARMS else arm for arm, w in best.items()] for best in weights)
    scores = [[r[name] for name in found] for r, found in zip(own, names, strict=True)]
    return {arm: [by_arm[i] for by_arm in scores] for i, arm in enumerate(weights[0])}

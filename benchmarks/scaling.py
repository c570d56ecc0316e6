"""Wukong's claim, the scaling law: `exfm bench scaling [--quick] [--stream DIR --config FILE]`.

Sizes of Wukong over two decades of training FLOPs per example, and DLRM and DCN-V2 of equal FLOPs, each for one pass over the
synthetic stream (whose lowest reachable NE is known) or over a prepared stream of the user's (Criteo, say) with the features and
tables of a config. NE is progressive, over the last slices. The law is fitted without the largest size, which it then predicts.
Learning rates are searched for per architecture at two smaller sizes, on another seed; larger ones take those of the upper one.
Writes scaling.json, .md and .svg under --out; what has been run is not run again.
"""

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._distill_runs import say
from benchmarks._scaling_fit import FORMS, MIN_SIZES, predict
from benchmarks._scaling_report import figure, markdown
from benchmarks._scaling_runs import Rates, Runner, bayes, given, synthetic
from benchmarks._scaling_sizes import CONFIGS, Raw, Size, ladder
from exfm.data.errors import UserError

EVALUATED = 0.5
TUNING_SEED = 1000
DENSE_LOW, DENSE_HIGH, TABLES = (0.002, 0.004, 0.008), (0.001, 0.002, 0.004), (0.1, 0.2, 0.4)
QUICK: Raw = {"num_slices": 4, "rows_per_slice": 10_000}


def main(args: list[str], data_dir: str | None = None) -> int:
    options = parse(args)
    if options.stream:
        study = given(options.stream, options.config, EVALUATED)
    else:
        study = synthetic(options.out, EVALUATED, **(QUICK if options.quick else {}))
    result = run(
        Runner(options.out, study, options.threads), options.architectures, options.sizes, range(options.seeds)
    )
    (options.out / "scaling.json").write_text(json.dumps(result, indent=1))
    (options.out / "scaling.md").write_text(text := markdown(result))
    figure(result, options.out / "scaling.svg")
    print(text)
    return 0


def parse(args: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="exfm bench scaling", description=__doc__)
    parser.add_argument("--architectures", default=",".join(CONFIGS), help="of " + ", ".join(CONFIGS))
    parser.add_argument(
        "--sizes", type=int, help="rungs of the ladder, the largest of which is held out; default 7, quick 4"
    )
    parser.add_argument("--seeds", type=int, help="default 2, quick 1")
    parser.add_argument("--quick", action="store_true", help="a short stream")
    parser.add_argument("--stream", default="", help="a prepared stream in place of the synthetic one; needs --config")
    parser.add_argument("--config", type=Path, help="its features, tables and task; the model is the bench's")
    parser.add_argument("--threads", type=int, default=1, help="of torch; 1 leaves the other cores alone")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/scaling"))
    options = parser.parse_args(args)
    options.sizes = options.sizes if options.sizes is not None else 4 if options.quick else 7
    options.seeds = options.seeds if options.seeds is not None else 1 if options.quick else 2
    options.architectures = list(dict.fromkeys(a for a in options.architectures.split(",") if a))
    check(options)
    return options


def check(options: argparse.Namespace) -> None:
    """UserError for what cannot be run, before anything is."""
    if unknown := [a for a in options.architectures if a not in CONFIGS]:
        raise UserError(f"--architectures names {', '.join(unknown)}; there are: {', '.join(CONFIGS)}")
    if not options.architectures:
        raise UserError(f"--architectures is empty; there are: {', '.join(CONFIGS)}")
    if options.sizes < MIN_SIZES + 1:
        raise UserError(
            f"--sizes is {options.sizes}; the largest is held out and a law needs {MIN_SIZES} others: at least {MIN_SIZES + 1}"
        )
    if options.seeds < 1 or options.threads < 1:
        raise UserError(f"--seeds is {options.seeds} and --threads {options.threads}; both are at least 1")
    if bool(options.stream) != bool(options.config):
        raise UserError("--stream and --config go together: the stream, and its features, tables and task")
    if options.quick and options.stream:
        raise UserError("--quick shortens the synthetic stream; of your own, set stream.last in the config")


def run(runner: Runner, architectures: list[str], num: int, seeds: range) -> dict[str, Any]:
    """All sizes, seed after seed, each architecture with learning rates of its own."""
    study = runner.study
    ladders = {a: ladder(a, study.inputs, study.width, num) for a in architectures}
    tuned = {a: tune(runner, sizes) for a, sizes in ladders.items()}
    rows = []
    for seed in seeds:
        for rung in range(num):
            for a in architectures:
                rows.append(runner.run(ladders[a][rung], rates_of(tuned[a], rung), seed))
                say(
                    f"{a}, {rows[-1]['label']}, seed {seed}: {rows[-1]['flops'] / 1e6:.3f} MFLOP, NE {rows[-1]['ne']:.4f}"
                )
    best = bayes(study, rows[0]["evaluated_from"])
    laws = {a: laws_of([r for r in rows if r["architecture"] == a], best) for a in architectures}
    return {
        "stream": study.title, "task": study.task, "date": datetime.now(UTC).strftime("%Y-%m-%d"), "threads": runner.threads,
        "torch": torch.__version__, "bayes_ne": best, "tuned": tuned, "rows": rows, "laws": laws,
        "cpu_seconds": sum(r["cpu_seconds"] for r in rows) + sum(t["cpu_seconds"] for t in tuned.values()),
    }  # fmt: skip


def tune(runner: Runner, sizes: list[Size]) -> dict[str, Any]:
    """Dense rates that were best at two rungs, and the rate of tables, best at the lower one: the whole pass, another seed."""
    low, high = len(sizes) // 6, len(sizes) // 2
    trials: dict[tuple[int, Rates], Raw] = {}

    def best(rung: int, rates: list[Rates]) -> Rates:
        found = {(rung, r): runner.run(sizes[rung], r, TUNING_SEED) for r in rates}
        trials.update(found)
        return min(found, key=lambda key: found[key]["ne"])[1]

    first = best(low, [Rates(d, TABLES[1]) for d in DENSE_LOW])
    at_low = best(low, [Rates(first.dense, t) for t in TABLES])
    at_high = best(high, [Rates(d, at_low.tables) for d in DENSE_HIGH])
    say(f"{sizes[0].architecture}: {at_low} at rung {low}, {at_high} at rung {high}")
    return {
        "rungs": [low, high], "dense": [at_low.dense, at_high.dense], "tables": at_low.tables,
        "cpu_seconds": sum(t["cpu_seconds"] for t in trials.values()),
        "trials": [[rung, r.dense, r.tables, t["ne"]] for (rung, r), t in trials.items()],
    }  # fmt: skip


def rates_of(tuned: dict[str, Any], rung: int) -> Rates:
    """The dense rate on the line, on logarithmic axes, between the two that were tuned; outside, the nearer of them."""
    (low, high), (a, b) = tuned["rungs"], np.log(tuned["dense"])
    share = float(np.clip((rung - low) / (high - low), 0.0, 1.0))
    return Rates(float(f"{np.exp(a + (b - a) * share):.4g}"), tuned["tables"])


def laws_of(rows: list[Raw], floor: float | None) -> dict[str, Any]:
    """By form: the law of all sizes but the largest, and its prediction beside what was measured."""
    largest = max(r["flops"] for r in rows)
    fitted = [r for r in rows if r["flops"] < largest]
    measured = [r["ne"] for r in rows if r["flops"] == largest]
    x, y = [float(r["flops"]) for r in fitted], [float(r["ne"]) for r in fitted]
    return {
        form: predict(x, y, float(largest), form, floor or 0.0) | {"at": largest, "measured": float(np.mean(measured))}
        for form in FORMS
    }

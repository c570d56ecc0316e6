"""What distillation buys, and what it costs: `exfm bench distill [--quick] [--parts table,staleness,...]`.

table: MovieLens-1M, four domains x six methods x seeds. staleness: predictions 0 to 8 slices old, the teacher's data volume held
constant. sizes: three sizes of students and of teachers. renttherunway: the table on a second stream, and Open Bandit as a
smoke test. cost: what a student's step, reading, logging and scoring cost. Every arm is tuned with the same number of
trials on a domain that is not reported. One pass in order of time, progressive NE over the last 80%. Runs are kept under
--out and never repeated. Writes distill.md, distill.json, distill.html.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks._distill_cost import cost
from benchmarks._distill_figures import write_page
from benchmarks._distill_report import markdown
from benchmarks._distill_runs import ARMS, UNDISTILLED, Runner, say
from benchmarks._distill_streams import movielens, open_bandit, renttherunway
from benchmarks._distill_sweeps import SWEEP_ARMS, sizes, staleness
from benchmarks._distill_table import settings, smoke, table
from exfm.data.errors import UserError
from exfm.data.manifest import open_stream

Result = dict[str, Any]
TRIALS = 12  # per arm: all of the undistilled grid, or as many draws from grid x loss weight


SWEEP_SEEDS = 3


def part_table(o: argparse.Namespace, data_dir: str | None) -> Result:
    return table(Runner(o.out, movielens(o.out, data_dir)), o.seeds, o.trials, o.tuned)


def part_renttherunway(o: argparse.Namespace, data_dir: str | None) -> Result:
    return table(Runner(o.out, renttherunway(o.out, data_dir)), o.seeds, o.trials, o.tuned)


def part_staleness(o: argparse.Namespace, data_dir: str | None) -> Result:
    runner = Runner(o.out, movielens(o.out, data_dir))
    num_slices = open_stream(str(runner.study.stream)).info.num_slices
    assert num_slices is not None
    return staleness(runner, min(o.seeds, SWEEP_SEEDS), settings(runner, o.trials, SWEEP_ARMS, o.tuned), num_slices)


def part_sizes(o: argparse.Namespace, data_dir: str | None) -> Result:
    runner = Runner(o.out, movielens(o.out, data_dir))
    tuned = settings(runner, o.trials, ARMS, o.tuned)
    best = min((arm for arm in tuned if arm != UNDISTILLED), key=lambda arm: tuned[arm].ne)
    return sizes(runner, min(o.seeds, SWEEP_SEEDS), tuned, [best])


def part_cost(o: argparse.Namespace, data_dir: str | None) -> Result:
    return cost(Runner(o.out, movielens(o.out, data_dir)))


def part_open_bandit(o: argparse.Namespace, data_dir: str | None) -> Result:
    return smoke(Runner(o.out, open_bandit(o.out, data_dir)))


PARTS: dict[str, Callable[[argparse.Namespace, str | None], Result]] = {
    "table": part_table,
    "renttherunway": part_renttherunway,
    "open_bandit": part_open_bandit,
    "staleness": part_staleness,
    "sizes": part_sizes,
    "cost": part_cost,
}


def main(args: list[str], data_dir: str | None = None) -> int:
    o = options_of(args)
    o.out.mkdir(parents=True, exist_ok=True)
    path = o.out / "distill.json"
    result: dict[str, Result] = json.loads(path.read_text()) if path.exists() else {}
    for name in o.parts:
        begun = time.monotonic()
        result[name] = PARTS[name](o, data_dir) | {"part_seconds": time.monotonic() - begun}
        path.write_text(json.dumps(result, indent=1))
        (o.out / "distill.md").write_text(markdown(result))
        write_page(result, o.out / "distill.html")
        say(f"{name}: {time.monotonic() - begun:.0f} s")
    print(markdown({name: result[name] for name in o.parts}))
    say(f"written to {o.out}: distill.md, distill.json, distill.html")
    return 0


def options_of(args: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="exfm bench distill", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2 seeds, 4 trials, parts table and cost")
    parser.add_argument("--seeds", type=int, help="number of seeds, at least 2 (default 5)")
    parser.add_argument("--trials", type=int, help=f"tuning trials per arm (default {TRIALS})")
    parser.add_argument(
        "--tuned", type=Path, help="distill.json of an earlier run, to take its settings and not tune again"
    )
    parser.add_argument("--parts", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/distill"))
    o = parser.parse_args(args)
    o.seeds = o.seeds or (2 if o.quick else 5)
    o.trials = o.trials or (4 if o.quick else TRIALS)
    if o.seeds < 2:
        raise UserError(f"--seeds is {o.seeds}; a deviation needs at least 2")
    o.parts = o.parts.split(",") if o.parts else ["table", "cost"] if o.quick else list(PARTS)
    if wrong := [p for p in o.parts if p not in PARTS]:
        raise UserError(f"--parts names {', '.join(wrong)}; there are: {', '.join(PARTS)}")
    return o

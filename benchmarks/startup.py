"""From `exfm train` to the first step, itemised: `exfm bench startup [--ranks 1,2] [--config FILE] [--turns N]`.

The launcher, torchrun and the ranks follow one another: launcher (interpreter, imports, checks), torchrun (imports, until it starts ranks),
rank (imports, planning, joining the others, building and filling tables, dense part, rehearsal, restoring, first batch, first step). The
slowest rank counts. Every item in seconds of the wall and, as far as it is this process's work, CPU seconds, which hardly depend on what
else the machine does. Bound: `import torch, torchrec` alone in a fresh interpreter, in turns with the jobs: no trainer of this kind starts
faster. Without --config a small teacher on a synthetic stream. Writes startup.json and startup.md under --out.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks._turns import machine
from benchmarks.plan import say
from exfm.data.errors import UserError
from exfm.data.synth import synth

ROOT = Path(__file__).parents[1]
Result = dict[str, Any]
BARE = "import torch, torchrec"
Items = dict[str, tuple[float, float]]


def bare() -> tuple[float, float]:
    """Wall and CPU seconds of the bound."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    subprocess.run([sys.executable, "-c", BARE], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.time() - begun, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def start(config: Path, sets: list[str], ranks: int, folder: Path) -> Items:
    """Item -> wall and CPU seconds of one job from the command to the first step of its slowest rank."""
    settings = [f"run.folder={folder}", *sets]
    options = [part for item in settings for part in ("--set", item)]
    command = [sys.executable, "-m", "benchmarks._startup_marks", "train", str(config), "--nproc", str(ranks)]
    begun = time.time()
    done = subprocess.run([*command, "--max-restarts", "0", *options], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the job ended with {done.returncode}: {done.stderr[-2000:]}")
    launcher = json.loads((folder / "startup-launcher.json").read_text())
    own = [json.loads((folder / f"startup-rank-{n}.json").read_text()) for n in range(ranks)]
    return itemised(begun, launcher, max(own, key=lambda r: r["ended"]))


def itemised(begun: float, launcher: Result, rank: Result) -> Items:
    """Items that add up to the time from `begun` to the rank's first step."""
    items: Items = {}
    for process, found in (("launcher", launcher), ("rank", rank)):
        stages = dict(found["stages"])
        if process == "launcher":
            wall, cpu = stages["interpreter"]
            stages["interpreter"] = wall + found["began"] - begun, cpu
        for name, (wall, cpu) in stages.items():
            items[f"{process}: {name}"] = wall, cpu
        rest = found["ended"] - found["began"] - sum(wall for wall, _ in found["stages"].values())
        items[f"{process}: rest"] = rest, found["cpu"] - sum(cpu for _, cpu in found["stages"].values())
        if process == "launcher":
            items["torchrun: until it starts a rank"] = rank["began"] - launcher["ended"], float("nan")
    return items


def medians(runs: list[Items]) -> Items:
    names = list(dict.fromkeys(name for run in runs for name in run))
    return {n: tuple(statistics.median(r.get(n, (0.0, 0.0))[i] for r in runs) for i in (0, 1)) for n in names}  # type: ignore[misc]


def markdown(result: Result) -> str:
    m = result["machine"]
    counts = [r["ranks"] for r in result["rows"]]
    bound = result["bound_s"], result["bound_cpu_s"]
    lines = [
        f"{m['device']}, {m['date']}, load {m['load']}; medians of {result['turns']} starts; seconds of the wall, CPU seconds in brackets. "
        f"Bound, `{BARE}`: {bound[0]:.1f} ({bound[1]:.1f}).",
        "",
        "| item | " + " | ".join(f"{n} rank(s)" for n in counts) + " |",
        "|---" * (1 + len(counts)) + "|",
    ]
    names = list(dict.fromkeys(name for r in result["rows"] for name in r["items"]))
    for name in names:
        cells = [_cell(r["items"].get(name, (0.0, 0.0))) for r in result["rows"]]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    totals = [f"**{r['total_s']:.1f}**, {r['total_s'] / bound[0]:.1f} x the bound" for r in result["rows"]]
    return "\n".join([*lines, "| **all** | " + " | ".join(totals) + " |", ""])


def _cell(seconds: tuple[float, float]) -> str:
    wall, cpu = seconds
    return f"{wall:.2f}" if cpu != cpu else f"{wall:.2f} ({cpu:.2f})"


def main(args: list[str], data_dir: str | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="exfm bench startup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--config", type=Path, help="a job's; its folder is not used")
    parser.add_argument("--set", action="append", default=[], dest="sets", help="override a key of the config")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/startup"))
    o = parser.parse_args(args)
    if not all(part.isdigit() and int(part) > 0 for part in o.ranks.split(",")) or o.turns < 1:
        raise UserError(
            f"--ranks is {o.ranks}, --turns {o.turns}; give whole numbers from 1 on, ranks with commas between"
        )
    config, sets, out = o.config, list(o.sets), o.out.resolve()
    if config is None:
        config = ROOT / "configs/synth_teacher.yaml"
        if not (out / "stream/stream.json").exists():
            synth(str(out / "stream"), num_slices=1, rows_per_slice=2048, seed=0)
        sets += [f"stream.path={out / 'stream'}", "evaluation.bootstrap=0"]
    counts = [int(n) for n in o.ranks.split(",")]
    bounds, runs = [], {n: [] for n in counts}  # type: ignore[var-annotated]
    for turn in range(o.turns):
        bounds.append(bare())
        for n in counts:
            runs[n].append(start(config.resolve(), sets, n, out / time.strftime(f"jobs-%Y%m%d-%H%M%S-{n}-{turn}")))
            say(f"{n} rank(s): {sum(wall for wall, _ in runs[n][-1].values()):.1f} s, bound {bounds[-1][0]:.1f} s")
    result: Result = {
        "machine": machine(),
        "turns": o.turns,
        "bound_s": statistics.median(wall for wall, _ in bounds),
        "bound_cpu_s": statistics.median(cpu for _, cpu in bounds),
        "rows": [
            {
                "ranks": n,
                "items": medians(own),
                "total_s": statistics.median(sum(wall for wall, _ in run.values()) for run in own),
            }
            for n, own in runs.items()
        ],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "startup.json").write_text(json.dumps(result, indent=1))
    (out / "startup.md").write_text(text := markdown(result))
    print(text)
    return 0

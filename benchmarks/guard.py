"""A regression guard: `exfm bench guard [--update] [--ratios dense,...]`, `make bench-guard`.

Runs short forms of other benchmarks and compares their ratios, ours by a peer or a bound in the same run, with those of guard.json:
  dense     the step's own matrix products at their shapes by the step (bench dense, criteo)
  reader    rows per second by bare pyarrow decoding of the same columns (bench reader, a small stream made here)
  lookup    bytes per second of TBE forward, and of forward and backward, by plain gathers of the same rows (bench lookup)
  planner   the lower bound by the cost of our plan (bench plan, two cases)
and what the last `exfm bench peers` and `exfm bench step` left here (WRITTEN), where guard.json keeps that. Larger is better in all.
A ratio is lost where it is below the kept one by more than NOISE_TIMES the larger of the kept and the present noise, and by more than
LEAST of it. What seems lost is measured twice more, and the best of three counts: one slow moment of a shared machine is no loss.
--update writes guard.json anew, with noise from --turns repetitions. Exit code 1 on a loss. Writes guard.md under --out.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import torch

from benchmarks._turns import in_turns, machine, ratio
from benchmarks.plan import say
from exfm.data.errors import UserError

KEPT = Path(__file__).parent / "guard.json"
NOISE_TIMES, LEAST = 3.0, 0.03
TRIES = 3
CPU = torch.device("cpu")
Ratio = dict[str, Any]
Ratios = dict[str, float]


def dense(out: Path) -> Ratios:
    from benchmarks import dense

    def median_s(work: Callable[[], object], device: torch.device, repeats: int) -> float:
        return statistics.median(in_turns([work], repeats, device)[0])

    torch.set_num_threads(1)
    with patch.object(dense, "median_s", median_s):  # CPU seconds: others may use the machine
        found = dense.measure("criteo", CPU, torch.float32, False, repeats=5)
    return {"dense: products / step": found["products_s"] / found["step_s"]}


def reader(out: Path) -> Ratios:
    from benchmarks.reader import bare, ours
    from exfm.data.manifest import open_stream
    from exfm.data.synth import synth
    from exfm.trainer.config import JobConfig, load_config

    folder = out / "stream"
    if not (folder / "stream.json").exists():
        synth(str(folder), num_slices=4, rows_per_slice=50_000, seed=0)
    sets = [f"stream.path={folder}", "stream.global_batch=4096", "stream.domains=[]"]
    config = load_config(Path(__file__).parents[1] / "configs/synth_teacher.yaml", sets, JobConfig)
    stream, slices = open_stream(str(folder), "first"), range(4)
    pa.set_cpu_count(1)
    both = in_turns([lambda: ours(config, stream, slices), lambda: bare(config, stream, slices)], 5, CPU)
    return {"reader: rows / bare decoding": ratio(both[1], both[0])["ratio"]}


def lookup(out: Path) -> Ratios:
    from benchmarks.lookup import Shape, make_tables, measure

    torch.set_num_threads(1)
    shape = Shape(2, 1_000_000, 128, 1024, 20, "fp32")
    found = measure(shape, "uniform", make_tables(shape, CPU), CPU, 9, 128 << 20)["of_gather"]
    return {
        "lookup: forward / gather": found["forward"]["ratio"],
        "lookup: forward and backward / gather": found["both"]["ratio"],
    }


def planner(out: Path) -> Ratios:
    from benchmarks.plan import ours

    plans = [ours(tables, 8, 0, tight) for tables, tight in ((10, True), (25, False))]
    return {"planner: bound / cost": statistics.mean(p["bound"] / p["cost"] for p in plans)}


MEASURES: dict[str, Callable[[Path], Ratios]] = {"dense": dense, "reader": reader, "lookup": lookup, "planner": planner}
# Ratios that other benchmarks write into a file `ratios.json` of their own folder, name -> ratio: they need minutes or peers, so the guard
# takes what their last run left.
WRITTEN = {"peers": Path("runs/bench/peers/ratios.json"), "step": Path("runs/bench/step/ratios.json")}


def written(name: str) -> Ratios:
    path = WRITTEN[name]
    if not path.exists():
        raise UserError(f"{path} is not there; run `exfm bench {name}` first, or leave {name} out of --ratios")
    return {f"{name}: {key}": float(value) for key, value in json.loads(path.read_text()).items()}


def once(name: str, out: Path) -> Ratios:
    return MEASURES[name](out) if name in MEASURES else written(name)


def judge(kept: Ratio, found: float, noise: float = 0.0) -> bool:
    """Whether a ratio is not lost. noise: of the present measurement, a standard deviation."""
    return found >= kept["ratio"] - max(NOISE_TIMES * max(kept["noise"], noise), LEAST * kept["ratio"])


def repeated(name: str, out: Path, turns: int) -> dict[str, Ratio]:
    """Median and noise (standard deviation) of every ratio."""
    seen: dict[str, list[float]] = {}
    for _ in range(turns):
        for key, value in once(name, out).items():
            seen.setdefault(key, []).append(value)
    return {key: {"ratio": statistics.median(v), "noise": noise_of(v), "all": v} for key, v in seen.items()}


def noise_of(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def update(names: list[str], out: Path, turns: int, kept: Path) -> int:
    """Other ratios than those named stay as they are."""
    before = json.loads(kept.read_text()) if kept.exists() else {"ratios": {}}
    command = f"exfm bench guard --update --ratios {','.join(names)} --turns {turns}"
    for name in names:
        for key, found in repeated(name, out, turns).items():
            before["ratios"][key] = {"measure": name, **found, **machine(), "command": command}
            say(f"{key}: {found['ratio']:.3f}, noise {found['noise']:.3f}")
    kept.write_text(json.dumps(before, indent=1) + "\n")
    return 0


def compare(kept: dict[str, Ratio], name: str, measure: Callable[[], Ratios]) -> list[Ratio]:
    """Rows of all kept ratios of one measure; the best of up to TRIES measurements counts."""
    own = {key: r for key, r in kept.items() if r["measure"] == name}
    best: Ratios = {}
    for _ in range(TRIES if name in MEASURES else 1):
        for key, value in measure().items():
            best[key] = max(value, best.get(key, value))
        if all(key in best and judge(r, best[key]) for key, r in own.items()):
            break
    if gone := sorted(set(own) - set(best)):
        raise UserError(f"{name} no longer measures {', '.join(gone)}; write guard.json anew with --update")
    return [{"name": key, "kept": r, "found": best[key], "holds": judge(r, best[key])} for key, r in own.items()]


def markdown(rows: list[Ratio], seconds: float) -> str:
    m = machine()
    lines = [
        f"{m['device']}, {m['date']}, load {m['load']}, {seconds:.0f} s. A loss is more than {NOISE_TIMES:g} times the noise and {LEAST:.0%}.",
        "",
        "| ratio | kept | noise | now | verdict | kept of |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        kept = r["kept"]
        lines.append(
            f"| {r['name']} | {kept['ratio']:.3f} | {kept['noise']:.3f} | {r['found']:.3f} | {'holds' if r['holds'] else 'LOST'} | "
            f"{kept['date']}, {kept['device']} |"
        )
    return "\n".join([*lines, ""])


def main(args: list[str], data_dir: str | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="exfm bench guard", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--update", action="store_true", help="write the kept ratios anew")
    parser.add_argument(
        "--ratios",
        help="of " + ", ".join([*MEASURES, *WRITTEN]) + "; default: all, of the last two those that were written here",
    )
    parser.add_argument("--turns", type=int, default=5, help="of --update")
    parser.add_argument("--kept", type=Path, default=KEPT)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/guard"))
    o = parser.parse_args(args)
    begun = time.monotonic()
    names = o.ratios.split(",") if o.ratios else [*MEASURES, *(n for n, path in WRITTEN.items() if path.exists())]
    if wrong := [n for n in names if n not in MEASURES and n not in WRITTEN]:
        raise UserError(f"--ratios names {', '.join(wrong)}; there are: {', '.join([*MEASURES, *WRITTEN])}")
    o.out.mkdir(parents=True, exist_ok=True)
    if o.update:
        names = names if o.ratios else list(MEASURES)
        return update(names, o.out, o.turns, o.kept)
    if not o.kept.exists():
        raise UserError(f"{o.kept} is not there; write it with `exfm bench guard --update`")
    kept = json.loads(o.kept.read_text())["ratios"]
    there = {r["measure"] for r in kept.values()}
    if o.ratios and (missing := [n for n in names if n not in there]):
        raise UserError(f"{o.kept} keeps nothing of {', '.join(missing)}; write it with --update --ratios {o.ratios}")
    rows = [row for n in names if n in there for row in compare(kept, n, lambda n=n: once(n, o.out))]  # type: ignore[misc]
    (o.out / "guard.md").write_text(text := markdown(rows, time.monotonic() - begun))
    print(text)
    lost = [r["name"] for r in rows if not r["holds"]]
    if lost:
        say(f"lost beyond noise: {', '.join(lost)}")
    return 1 if lost else 0

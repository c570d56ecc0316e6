"""Cost against size: `exfm bench scale [--parts ranks,size,modelled] [--quick]`.

ranks: jobs of 1 to N ranks through the real trainer on gloo, strong (the global batch stays) and weak (it grows with the ranks); more
ranks than cores are marked oversubscribed. size: one rank, total rows from 1e5 as far as memory allows, pages of 4 KiB and of 2 MiB;
beside every step what reading the same rows and accumulators at random takes. modelled: the slowest rank of 2 to 512, built and stepped
among loopback peers, plus what its communication takes by TorchRec's perf model under the CPU topology (sharding/topology.py) and a
ring all-reduce of dense gradients: not measured, marked so. CPU seconds of one thread in size and modelled, wall seconds in ranks.
Writes scale.json, scale.md and scale.svg under --out.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import _scale_ranks
from benchmarks._scale_point import NODE, TABLES, WIDTH, Point
from benchmarks._scale_point import run as run_points
from benchmarks._scale_report import figure, markdown
from benchmarks._turns import machine
from benchmarks.plan import say
from exfm.data.errors import UserError
from exfm.sharding.topology import Topology, cpu_topology
from exfm.trainer.peak import available_bytes

Result = dict[str, Any]
ROW_BYTES = 2 * WIDTH + 4  # fp16 and the accumulator
GIB = 2**30


def part_ranks(o: argparse.Namespace) -> Result:
    stream = _scale_ranks.make_stream(o.out / f"stream-{o.examples}", o.examples)
    rows: list[Result] = []
    for run in _scale_ranks.runs(numbers(o.ranks, "--ranks"), o.batch):
        turns = [_scale_ranks.measure(run, stream, o.out / "jobs") for _ in range(o.turns)]
        middle = sorted(turns, key=lambda t: t["examples_per_s"])[len(turns) // 2]
        rows.append(middle | {"all": [t["examples_per_s"] for t in turns]})
        say(f"{run}: {middle['examples_per_s']:,.0f} examples/s, {middle['cpu_us_per_example']:.0f} CPU us each")
    return {"rows": rows, "machine": machine()}


def part_size(o: argparse.Namespace) -> Result:
    sizes: list[int] = []
    left_out: list[str] = []
    free = min(o.most_gib * GIB, 0.5 * available_bytes(torch.device("cpu")))
    for size in numbers(o.rows, "--rows"):
        if size * ROW_BYTES <= free:
            sizes.append(size)
        else:
            left_out.append(f"{size:.0e} rows: {size * ROW_BYTES / GIB:.1f} GiB needed, {free / GIB:.1f} GiB allowed")
    rows: list[Result] = []
    for found in run_points([Point(size, steps=o.steps, huge=huge) for huge in (False, True) for size in sizes]):
        rows.append(found)
        pages = "2 MiB" if found["huge"] else "4 KiB"
        say(f"{found['rows']:.0e} rows, {pages} pages: {found['examples_per_s']:,.0f} examples/s")
    return {"rows": rows, "left_out": left_out, "machine": machine()}


def part_modelled(o: argparse.Namespace) -> Result:
    total, steps = int(float(o.modelled_rows)), max(4, o.steps // 3)
    rows: list[Result] = []
    for found in run_points([Point(total, n, steps) for n in numbers(o.modelled_ranks, "--modelled-ranks")]):
        rows.append(found | modelled(found, cpu_topology(found["ranks"], min(NODE, found["ranks"]))))
        say(f"{found['ranks']} ranks, modelled: {rows[-1]['modelled_examples_per_s']:,.0f} examples/s")
    return {"rows": rows, "machine": machine()}


def modelled(found: Result, topology: Topology) -> Result:
    """Examples per second of all ranks, were nothing overlapped: the step measured here, then what is sent."""
    ranks = topology.world_size
    slowest = min(topology.nvlink_bytes_per_s, topology.network_bytes_per_s if topology.nodes > 1 else float("inf"))
    dense_s = 2 * (ranks - 1) / ranks * found["bytes"]["dense"] / slowest
    ms = found["modelled_ms"]
    tables_s = (ms["fwd_comms"] + ms["bwd_comms"] + ms["input_dist_comms"]) / 1000 if ranks > 1 else 0.0
    seconds = found["step_s"] + dense_s + tables_s
    return {
        "dense_comms_s": dense_s,
        "table_comms_s": tables_s,
        "modelled_step_s": seconds,
        "modelled_examples_per_s": ranks * found["batch"] / seconds,
    }


PARTS: dict[str, Callable[[argparse.Namespace], Result]] = {
    "size": part_size,
    "modelled": part_modelled,
    "ranks": part_ranks,
}


def numbers(text: str, option: str) -> list[int]:
    """Whole numbers in order, `1e6` too. UserError for others."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} is '{text}'; give numbers with commas between, for instance 1,2") from None
    if bad := [n for n in found if n < 1 or n != int(n)]:
        raise UserError(f"{option} names {', '.join(f'{n:g}' for n in bad)}; use whole numbers from 1 on")
    return sorted({int(n) for n in found})


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="exfm bench scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two sizes, two modelled ranks, few steps")
    parser.add_argument("--parts", default=",".join(PARTS), help="of " + ", ".join(PARTS))
    parser.add_argument("--ranks", default="1,2,4", help="of real jobs")
    parser.add_argument("--turns", type=int, default=1, help="of every real job; the middle one counts")
    parser.add_argument("--batch", type=int, default=1024, help="of a real job's rank alone")
    parser.add_argument("--examples", type=int, default=20_000, help="of a slice of real jobs")
    parser.add_argument(
        "--rows", default="1e5,1e6,1e7,3e7,1e8,3e8,1e9", help=f"in {TABLES} tables of width {WIDTH}, fp16"
    )
    parser.add_argument("--most-gib", type=float, default=4.0, help="of tables; larger sizes are left out and named")
    parser.add_argument("--modelled-rows", default="1e8")
    parser.add_argument("--modelled-ranks", default="2,8,32,128,512")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/scale"))
    return parser  # fmt: skip


def main(args: list[str], data_dir: str | None = None) -> int:
    o = options().parse_args(args)
    if wrong := [p for p in o.parts.split(",") if p not in PARTS]:
        raise UserError(f"--parts names {', '.join(wrong)}; there are: {', '.join(PARTS)}")
    if o.quick:
        o.rows, o.modelled_ranks, o.modelled_rows, o.steps, o.ranks = "1e5,1e7", "2,8", "1e6", 6, "1,2"
    o.out.mkdir(parents=True, exist_ok=True)
    path = o.out / "scale.json"
    result: dict[str, Result] = json.loads(path.read_text()) if path.exists() else {}
    for name in o.parts.split(","):
        result[name] = PARTS[name](o)
        path.write_text(json.dumps(result, indent=1))
    figure(result, o.out / "scale.svg")
    (o.out / "scale.md").write_text(text := markdown(result))
    print(text)
    return 0

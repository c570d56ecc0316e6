"""A model of 100 billion parameters on one card: `exfm bench card [--parameters 1e11] [--width 128] [--steps 20]`.

26 fp16 tables of Criteo's proportions with that many parameters, split by the planner over the card's memory and, with a cache on the card, the
host's; a job trains them for some steps as `exfm train` would, without a commit. Says what lies where, how long it took to have the tables, and
examples/s. What fits nowhere is refused by the plan, with the bytes. On a CPU all tables lie in host memory. Writes card.json and card.md under --out.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks._peers_data import criteo, job_of
from benchmarks._peers_run import speeds, train_exfm
from benchmarks._turns import machine
from exfm.data.errors import UserError
from exfm.sharding.plan import Plan
from exfm.trainer.config import JobConfig
from exfm.trainer.env import RankEnv, pick_device
from exfm.trainer.planning import plan_here

GIB = 2**30


def config_of(o: argparse.Namespace) -> JobConfig:
    world = criteo(o.out.absolute(), o.steps * o.batch, round(o.parameters / o.width), "small", o.batch)
    raw, cuda = world.job, o.device == "cuda"
    tables = {name: table | {"width": o.width, "dtype": "fp16"} for name, table in raw["tables"].items()}
    kernels = ["fused", "fused_uvm_caching"] if cuda else ["fused"]
    sets = {
        "run": raw["run"] | {"name": "card", "device": o.device, "pipeline": "sparse_dist" if cuda else "base"},
        "tables": tables,
        "model": raw["model"] | {"width": o.width},
        "sharding": {"allowed": ["table_wise"], "kernels": kernels, "reserved": o.reserved},
        "precision": {"dense": "bf16" if cuda else "fp32"},
        "checkpoint": {"staging": "bounded"},  # another copy of the tables has no room
    }
    return job_of(world, sets)


def placed(plan: Plan, width: int) -> dict[str, dict[str, float]]:
    """Kernel -> its tables, their GiB of weights, and the GiB that its caches have on the card."""
    found: dict[str, dict[str, float]] = {}
    for table in plan.tables:
        own = found.setdefault(table.kernel, {"tables": 0, "gib": 0.0, "cached_gib": 0.0})
        size = 2 * table.rows * width / GIB
        own["tables"] += 1
        own["gib"] += size
        own["cached_gib"] += size * (table.cache_load or 0.0)
    return found


def markdown(result: dict[str, Any]) -> str:
    m = machine()
    lines = [
        f"{result['parameters']:,} parameters, fp16, width {result['width']}, batch {result['batch']:,} on {m['device']} (torch {m['torch']}, {m['date']})",
        "",
        "| kernel | tables | weights, GiB | of them cached on the card, GiB |",
        "|---|---|---|---|",
        *(
            f"| {k} | {own['tables']} | {own['gib']:.1f} | {own['cached_gib']:.1f} |"
            for k, own in result["placed"].items()
        ),
        "",
        f"Tables made and filled, and {result['steps']} steps, in {result['seconds']:.0f} s; {result['examples_per_s']:,.0f} examples/s; "
        f"at most {result['peak_gib']:.1f} GiB of the card's memory by PyTorch.",
        "",
    ]
    return "\n".join(lines)


def main(args: list[str], data_dir: str | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="exfm bench card", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", type=float, default=1e11, help="of the tables")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--reserved", type=float, default=0.15, help="sharding.reserved")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/card"))
    o = parser.parse_args(args)
    if o.steps < 3:
        raise UserError(f"--steps is {o.steps}; speed needs at least 3")
    pick_device(o.device, RankEnv())  # before a stream is made for nothing
    config = config_of(o)
    plan, _ = plan_here(config, o.device, 1, 1, None)
    begun = time.monotonic()
    found = train_exfm({"examples": o.steps * o.batch}, config, None)
    result = {
        "parameters": sum(t.rows * t.width for t in config.tables.values()),
        "width": o.width,
        "batch": o.batch,
        "steps": o.steps,
        "placed": placed(plan, o.width),
        "seconds": time.monotonic() - begun,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB if o.device == "cuda" else 0.0,
        **speeds(found["marks"]),
    }
    (o.out / "card.json").write_text(json.dumps(result, indent=1))
    (o.out / "card.md").write_text(text := markdown(result))
    print(text)
    return 0

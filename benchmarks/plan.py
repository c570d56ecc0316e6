"""The planner beside TorchRec's, and on models of a trillion parameters: `exfm bench plan [--quick] [--parts grid,models,...]`.

grid: 10, 25, 50 tables x 4, 8, 16 ranks x seeds, tight and loose memory: cost by TorchRec's perf model under one topology, and seconds.
TorchRec's planner gets 5 minutes a case, in a process of its own. models: configs/fm_1t.yaml and fm_3t.yaml on 32 to 1,024 H100:
seconds of one core, peak memory, distance from the lower bound. scale: seconds against tables x ranks up to 4,096 ranks. dryrun: five
ranks each of fm_1t and fm_3t built and stepped here. Every planner has made a small plan before its time is taken, so that none pays
for imports. Writes plan.json, plan.md and planning.svg under --out.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from benchmarks._plan_dryrun import dry_runs
from benchmarks._plan_report import LIMIT_S, Result, figure, markdown
from exfm.data.errors import UserError
from exfm.launch.planning import Planned, plan_config
from exfm.sharding.fast_planner import TableSharder, plan_model
from exfm.sharding.plan import Plan
from exfm.sharding.topology import Topology, gpu_topology

BATCH, WIDTH, NARROWEST = 512, 64, 32
MODELS = (("fm_1t", 32), ("fm_1t", 1024), ("fm_3t", 96), ("fm_3t", 128))
ROOT = Path(__file__).parents[1]
console = Console(stderr=True)


def case(
    tables: int, ranks: int, seed: int, tight: bool
) -> tuple[nn.Module, dict[str, ParameterConstraints], Topology]:
    """Rows log-uniform from 1e4 to 1e8, lognormal ids per example. tight: the rows fill 75% of all device memory."""
    rng = np.random.default_rng(seed)
    rows = np.exp(rng.uniform(np.log(1e4), np.log(1e8), tables)).astype(int).tolist()
    pooling = np.clip(rng.lognormal(1, 1, tables), 1, 100).tolist()
    configs = [
        EmbeddingBagConfig(
            name=f"t{i}", num_embeddings=n, embedding_dim=WIDTH, feature_names=[f"f{i}"], data_type=DataType.FP16
        )
        for i, n in enumerate(rows)
    ]
    module = nn.ModuleDict({"tables": EmbeddingBagCollection(tables=configs, device=torch.device("meta"))})
    constraints = {
        f"t{i}": ParameterConstraints(
            pooling_factors=[p],
            sharding_types=[
                kind.value for kind in ShardingType
            ],  # TorchRec's planner tries grid_shard only where it is named
            compute_kernels=["fused", "dense"],
            min_partition=NARROWEST,
        )
        for i, p in enumerate(pooling)
    }
    need = sum(rows) * WIDTH * 2
    hbm = int(need / 0.75 / ranks) if tight else 80_000_000_000
    return module, constraints, gpu_topology("h100", ranks, min(ranks, 8), hbm_bytes=hbm)


SMALL = 4, 2, 0, False  # a case to warm up with


def ours(tables: int, ranks: int, seed: int, tight: bool) -> Result:
    return _ours(*SMALL) and _ours(tables, ranks, seed, tight)


def theirs(tables: int, ranks: int, seed: int, tight: bool) -> Result:
    return _theirs(*SMALL) and _theirs(tables, ranks, seed, tight)


def _ours(tables: int, ranks: int, seed: int, tight: bool) -> Result:
    module, constraints, topology = case(tables, ranks, seed, tight)
    begun = time.perf_counter()
    try:
        plan: Plan = plan_model(module, [TableSharder()], topology, BATCH, constraints)  # type: ignore[list-item]
    except UserError:
        return {"cost": None, "seconds": time.perf_counter() - begun}
    return {"cost": plan.cost, "bound": plan.bound_ms, "seconds": time.perf_counter() - begun}


def _theirs(tables: int, ranks: int, seed: int, tight: bool) -> Result:
    module, constraints, topology = case(tables, ranks, seed, tight)
    planner = EmbeddingShardingPlanner(
        topology=topology.torchrec(),
        batch_size=BATCH,
        constraints=constraints,
        storage_reservation=FixedPercentageStorageReservation(percentage=0.0),
    )
    begun = time.perf_counter()
    try:
        planner.plan(module, [TableSharder()])  # type: ignore[list-item]
    except PlannerError:
        return {"cost": None, "seconds": time.perf_counter() - begun}
    seconds = time.perf_counter() - begun
    loads = np.zeros(ranks)
    for option in planner._best_plan:
        for shard in option.shards:
            loads[shard.rank] += shard.perf.total
    return {"cost": float(loads.max()), "seconds": seconds}


def alone(work: Callable[..., Result], *args: Any) -> Result:
    """In a process of its own, for at most LIMIT_S; {"cost": None, "late": True} after that."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        asked = pool.apply_async(work, args)
        try:
            return asked.get(LIMIT_S)
        except multiprocessing.TimeoutError:
            return {"cost": None, "late": True, "seconds": LIMIT_S}


def part_grid(o: argparse.Namespace) -> Result:
    sizes = [(10, 4), (10, 8), (25, 4)] if o.quick else list(product((10, 25, 50), (4, 8, 16)))
    rows = []
    for (tables, ranks), seed, tight in product(sizes, range(1 if o.quick else 3), (True, False)):
        args = tables, ranks, seed, tight
        row = {
            "tables": tables,
            "ranks": ranks,
            "seed": seed,
            "tight": tight,
            "ours": alone(ours, *args),
            "torchrec": alone(theirs, *args),
        }
        rows.append(row)
        say(f"{tables} tables, {ranks} ranks, seed {seed}, {'tight' if tight else 'loose'}: {_ratio(row)}")
    both = [r["ours"]["cost"] / r["torchrec"]["cost"] for r in rows if r["torchrec"]["cost"] and r["ours"]["cost"]]
    lost = sum(1 for r in rows if r["torchrec"]["cost"] and not r["ours"]["cost"])
    return {
        "rows": rows,
        "median_ratio": statistics.median(both) if both else None,
        "worst_ratio": max(both, default=None),
        "infeasible_where_torchrec_is_not": lost,
        "late": sum(1 for r in rows if r["torchrec"].get("late")),
    }


def _ratio(row: Result) -> str:
    a, b = row["ours"], row["torchrec"]
    cost = (
        f"cost {a['cost'] / b['cost']:.4f} of TorchRec's"
        if a["cost"] and b["cost"]
        else f"ours {a['cost']}, TorchRec's {b['cost']}"
    )
    return f"{cost}, {a['seconds']:.2f} s and {b['seconds']:.1f} s"


def planned_model(name: str, ranks: int) -> Planned:
    stats = f"sharding.stats={ROOT}/configs/fm_stats.yaml"
    return plan_config(ROOT / f"configs/{name}.yaml", [stats], ranks, 8, "h100", local_batch=BATCH)


def model(name: str, ranks: int) -> Result:
    begun = time.process_time()
    plan = planned_model(name, ranks).plan
    return {
        "cost": plan.cost,
        "bound": plan.bound_ms,
        "ratio": plan.cost / plan.bound_ms,
        "seconds": time.process_time() - begun,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "fullest_gib": float(plan.by_rank("hbm").max()) / 2**30,
    }


def part_models(o: argparse.Namespace) -> Result:
    rows = []
    for name, ranks in MODELS:
        rows.append({"model": name, "ranks": ranks} | alone(model, name, ranks))
        say(
            f"{name} on {ranks}: {rows[-1]['ratio']:.4f} of the bound, {rows[-1]['seconds']:.1f} CPU s, {rows[-1]['peak_gib']:.2f} GiB"
        )
    return {"rows": rows}


def part_scale(o: argparse.Namespace) -> Result:
    """TorchRec's planner is not tried again with so many tables once it was late with fewer ranks."""
    rows: list[Result] = []
    for tables in (50, 200, 720):
        late = False
        for ranks in (16, 64, 256) if o.quick else (16, 64, 256, 1024, 4096):
            args = tables, ranks, 0, False
            row = {"tables": tables, "ranks": ranks, "ours": alone(ours, *args)}
            row["torchrec"] = {"cost": None, "late": True, "seconds": LIMIT_S} if late else alone(theirs, *args)
            late = bool(row["torchrec"].get("late"))
            rows.append(row)
            say(
                f"{tables} tables on {ranks} ranks: {row['ours']['seconds']:.2f} s, TorchRec's {row['torchrec']['seconds']:.1f} s"
            )
    figure(rows, o.out / "planning.svg")
    return {"rows": rows}


def part_dryrun(o: argparse.Namespace) -> Result:
    rows = []
    for name in ("fm_1t", "fm_3t"):
        for found in dry_runs(planned_model(name, 1024), 2 if o.quick else 5, 1 if o.quick else 3):
            rows.append({"model": name, "ranks": 1024} | found)
            say(
                f"{name}, rank {found['rank']}: {found['measured_bytes'] / 2**30:.2f} GiB, {found['ratio']:.3f} of the estimate"
            )
    return {"rows": rows}


PARTS: dict[str, Callable[[argparse.Namespace], Result]] = {
    "grid": part_grid,
    "models": part_models,
    "scale": part_scale,
    "dryrun": part_dryrun,
}


def say(text: str) -> None:
    console.print(f"{time.strftime('%H:%M:%S')} {text}", highlight=False, soft_wrap=True)


def main(args: list[str], data_dir: str | None = None) -> int:
    parser = argparse.ArgumentParser(prog="exfm bench plan", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="3 sizes and 1 seed in the grid, up to 256 ranks in scale")
    parser.add_argument("--parts", default=",".join(PARTS), help="of " + ", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=Path("runs/bench/plan"))
    o = parser.parse_args(args)
    parts = o.parts.split(",")
    if wrong := [p for p in parts if p not in PARTS]:
        raise UserError(f"--parts names {', '.join(wrong)}; there are: {', '.join(PARTS)}")
    o.out.mkdir(parents=True, exist_ok=True)
    path = o.out / "plan.json"
    result: dict[str, Result] = json.loads(path.read_text()) if path.exists() else {}
    for name in parts:
        result[name] = PARTS[name](o)
        path.write_text(json.dumps(result, indent=1))
        (o.out / "plan.md").write_text(markdown(result))
    print(markdown(result))
    return 0

"""One rank of a job with so many table rows, stepped among loopback peers in a process of its own: `python -m benchmarks._scale_point`.

Real: memory, lookups, dense part, updates, and with more than one rank the bytes that it would send and receive. Not real: the sending.
Ids are uniform, and every step has a batch of its own until more rows have been touched than caches hold.
"""

import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from exfm.data.batch import Batch
from exfm.sharding.loopback import loopback_group
from exfm.sharding.plan import TIMES
from exfm.sharding.shards import Shard
from exfm.sharding.topology import cpu_topology
from exfm.trainer.config import JobConfig
from exfm.trainer.dryrun import Clock, build_rank
from exfm.trainer.made import made_batch
from exfm.trainer.planning import plan_on
from exfm.trainer.request import Request
from exfm.trainer.steps import PIPELINES

TABLES, WIDTH, POOLING, BATCH, NODE = 32, 16, 2.0, 1024, 8
CACHE_BYTES = 64 << 20  # twice the last cache: of rows and accumulators until a batch comes again
LINE = 64  # bytes of a cache line
HUGE = "THP_MEM_ALLOC_ENABLE"  # torch asks for pages of 2 MiB


@dataclass(frozen=True)
class Point:
    """rows: of all tables together, fp16 rows of WIDTH. huge: pages of 2 MiB instead of 4 KiB."""

    rows: int
    ranks: int = 1
    steps: int = 24
    huge: bool = False
    batch: int = BATCH


class CpuClock(Clock):
    """CPU seconds: one thread that waits for nobody."""

    def mark(self) -> None:
        self.marks.append(time.process_time())


def job_of(point: Point) -> JobConfig:
    names = [f"t{i}" for i in range(TABLES)]
    return JobConfig.model_validate(
        {
            "run": {"name": "scale", "folder": "runs/bench/scale/none", "device": "cpu"},
            "stream": {"path": "none", "global_batch": point.batch * point.ranks},
            "features": {"dense": ["x"], "sparse": [{"name": n, "table": n, "ids": "identity"} for n in names]},
            "tables": {n: {"rows": max(1, point.rows // TABLES), "width": WIDTH, "dtype": "fp16"} for n in names},
            "model": {"kind": "wukong", "width": WIDTH, "layers": 1, "num_fmb": 8, "num_lcb": 8, "rank": 8, "fmb_mlp": [128], "final_mlp": [64], "dense_mlp": [32]},
            "heads": {"tasks": ["click"]},
            "sharding": {"allowed": ["table_wise", "row_wise", "table_row_wise"]},
        }
    )  # fmt: skip


def run(points: Sequence[Point]) -> Iterator[dict[str, Any]]:
    """One result after the other, in the order of pages and else as given; every point in a process of its own."""
    for huge in (False, True):
        own = [asdict(p) for p in points if p.huge == huge]
        if not own:
            continue
        # torch reads the variable as it starts
        env = {**os.environ, "OMP_NUM_THREADS": "1"} | ({HUGE: "1"} if huge else {})
        command = [sys.executable, "-m", "benchmarks._scale_point", json.dumps(own)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, env=env, cwd=Path(__file__).parents[1], **pipes) as process:
            assert process.stdout is not None and process.stderr is not None
            for line in process.stdout:
                if line.startswith("{"):
                    yield json.loads(line)
            said = process.stderr.read()
        if process.returncode:
            raise RuntimeError(f"a point of {own} ended with {process.returncode}: {said[-2000:]}")


# ---------------------------------------------------------------- in the processes of their own


def here(point: Point) -> dict[str, Any]:
    torch.set_num_threads(1)
    config = job_of(point)
    plan = plan_on(config, cpu_topology(point.ranks, min(NODE, point.ranks)))
    rank = plan.worst
    features = [f.name for f in config.features.sparse]
    pooling, zipf = dict.fromkeys(features, POOLING), dict.fromkeys(features, 0.0)
    device = torch.device("cpu")
    request = Request(
        config, plan.torchrec(), rank, point.ranks, plan.group_node, point.batch, point.steps, pooling, zipf, device
    )  # fmt: skip
    per_step = 2 * LINE * TABLES * POOLING * point.batch
    fresh = min(point.steps + 2, max(2, int(CACHE_BYTES / per_step) + 1))
    made = [made_batch(config, point.batch, pooling, zipf, (0, rank, i)) for i in range(fresh)]
    with loopback_group(rank, point.ranks, plan.group_node):
        model, optimizers, shards = build_rank(request)
        clock = CpuClock(device, model.module.objective)
        pipeline = PIPELINES["base"](model, optimizers, device)
        faults = step(pipeline, cycle(made), clock, point.steps)
        total, tables, dense, backward = clock.medians()
        steps = sorted(sum(s) for s in clock.steps)
        bounds = bounds_of(shards, int(TABLES * POOLING * point.batch))
        weights = sum(p.numel() * p.element_size() for p in model.module.objective.parameters())
    bytes_of = {
        "tables": sum(s.weight.numel() * s.weight.element_size() for s in shards),
        "accumulators": sum(s.accumulator.numel() * 4 for s in shards if s.accumulator is not None),
        "dense": weights,
    }
    return {
        **asdict(point),
        "rank": rank,
        "ids": int(TABLES * POOLING * point.batch),
        "step_s": total,
        "step_low_s": steps[len(steps) // 4],
        "step_high_s": steps[3 * len(steps) // 4],
        "tables_s": tables,
        "dense_s": dense,
        "backward_s": backward,
        "examples_per_s": point.batch / total,
        "bytes": bytes_of,
        "faults_per_step": faults / point.steps,
        "huge_bytes": huge_bytes(),
        **bounds,
        "modelled_ms": {part: float(plan.by_rank(part)[rank]) for part in TIMES},
        "kinds": sorted({t.sharding_type for t in plan.tables}),
    }


def step(pipeline: Any, batches: Iterator[Batch], clock: Clock, steps: int) -> int:
    """Minor page faults of the counted steps."""
    for number in range(2 + steps):
        if number == 2:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        clock.start()
        pipeline.progress(batches)
        clock.stop(count=number >= 2)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def bounds_of(shards: list[Shard], ids: int) -> dict[str, float]:
    """Seconds of reading as many random rows, and random accumulators, of the same shards, nothing else being done; shards without
    accumulators (data-parallel) count as if they had none.
    """
    generator = torch.Generator().manual_seed(1)
    each = max(1, ids // len(shards))
    rows: list[float] = []
    state: list[float] = []
    for _ in range(6):
        chosen = [torch.randint(0, len(s.weight), (each,), generator=generator) for s in shards]
        begun = time.process_time()
        for shard, own in zip(shards, chosen, strict=True):
            torch.index_select(shard.weight, 0, own)
        rows.append(time.process_time() - begun)
        begun = time.process_time()
        for shard, own in zip(shards, chosen, strict=True):
            if shard.accumulator is not None:
                torch.index_select(shard.accumulator, 0, own.flip(0))
        state.append(time.process_time() - begun)
    return {"gather_rows_s": statistics.median(rows[1:]), "gather_state_s": statistics.median(state[1:])}


def huge_bytes() -> int:
    """Of this process's memory, in pages of 2 MiB."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("AnonHugePages:"))


def main(asked: str) -> None:
    """Forks, so that libraries are imported once; nothing has made threads before."""
    for fields in json.loads(asked):
        with multiprocessing.get_context("fork").Pool(1) as pool:
            print(json.dumps(pool.apply(here, (Point(**fields),))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

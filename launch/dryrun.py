"""`exfm plan --dry-run-rank`: one rank of a plan, built and stepped for real on this machine, beside what was estimated of it."""

from typing import Any

import torch

from exfm.data.errors import UserError
from exfm.data.stats import StreamStats, read_stats
from exfm.launch.planning import GIB, Planned
from exfm.sharding.plan import TIMES
from exfm.trainer.dryrun import dry_run, estimate
from exfm.trainer.request import Request

ON_CPU = ("fused", "dense")
WORST = "worst"
PART_BYTES = ("tables_bytes", "table_state_bytes", "dense_bytes", "activations_bytes", "input_bytes", "output_bytes")


def check(which: str, steps: int, ranks: int) -> None:
    """UserError for a rank that is not among so many, and for no steps."""
    if which != WORST and (not which.isdigit() or int(which) >= ranks):
        raise UserError(f"--dry-run-rank is {which}; give a rank from 0 to {ranks - 1}, or {WORST}")
    if steps < 1:
        raise UserError(f"--steps is {steps}; use 1 or more")


def request_of(planned: Planned, which: str, steps: int) -> Request:
    """which: a rank's number, or `worst`: the one with the most bytes of tables and their buffers. UserError for one that is not there."""
    job, plan = planned.job, planned.plan
    size = plan.topology.group_size
    check(which, steps, size)
    rank = int((plan.by_rank("hbm") + plan.by_rank("host")).argmax()) if which == WORST else int(which)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    other = sorted({t.kernel for t, _ in plan.on_rank(rank)} - set(ON_CPU))
    if other and device.type == "cpu":
        raise UserError(
            f"rank {rank} has tables under {', '.join(other)}, which a CPU has not; choose another rank or a machine with a GPU"
        )
    stats = read_stats(job.sharding.stats) if job.sharding.stats else None
    pooling = {f.name: _of(stats, f.source, "pooling", 1.0) for f in job.features.sparse}
    zipf = {f.name: _of(stats, f.source, "zipf", 0.0) for f in job.features.sparse}
    return Request(
        job, plan.torchrec(), rank, size, plan.group_node, plan.batch, steps, pooling, zipf, device
    )  # fmt: skip


def _of(stats: StreamStats | None, column: str, what: str, otherwise: float) -> float:
    return float(getattr(stats.columns[column], what)) if stats is not None and column in stats.columns else otherwise


def dry_run_rank(planned: Planned, which: str, steps: int) -> dict[str, Any]:
    """What was estimated and what was measured. UserError, before anything is allocated, where the machine is too small."""
    request = request_of(planned, which, steps)
    expected = estimate(request)
    found = dry_run(request)
    plan, rank = planned.plan, request.rank
    return {
        "rank": rank,
        "device": request.device.type,
        "estimated_bytes": expected.total,
        "estimated": {part: getattr(expected, part) for part in PART_BYTES} | {"when": expected.when},
        "measured_bytes": found.peak_bytes,
        "ratio": found.peak_bytes / expected.total,
        "weights_bytes": found.weights_bytes,
        "steps": found.steps,
        "step_s": found.step_seconds,
        "tables_s": found.tables_seconds,
        "dense_s": found.dense_seconds,
        "backward_s": found.backward_seconds,
        "modelled_ms": {part: float(plan.by_rank(part)[rank]) for part in TIMES},
    }


def lines(planned: Planned, found: dict[str, Any]) -> list[str]:
    """For people."""
    parts = ", ".join(
        f"{k.removesuffix('_bytes').replace('_', ' ')} {v / GIB:.2f}"
        for k, v in found["estimated"].items()
        if k != "when"
    )
    modelled = ", ".join(f"{part.replace('_', ' ')} {ms:.2f}" for part, ms in found["modelled_ms"].items() if ms)
    where = planned.plan.topology.name
    return [
        f"dry run of rank {found['rank']} on this machine's {found['device']}, {found['steps']} steps among loopback peers:",
        f"  peak memory {found['measured_bytes'] / GIB:.2f} GiB measured, {found['estimated_bytes'] / GIB:.2f} GiB estimated (x {found['ratio']:.3f}; "
        f"{parts}; during {found['estimated']['when']})",
        f"  step {found['step_s']:.2f} s here: tables and their buffers {found['tables_s']:.2f}, dense forward {found['dense_s']:.2f}, backward and "
        f"optimisers {found['backward_s']:.2f}",
        f"  on {where}, modelled, ms: {modelled}",
    ]

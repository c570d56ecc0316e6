"""Ranks of fm_1t and fm_3t built and stepped on this machine: measured peak memory beside the plan's estimate."""

from typing import Any

import numpy as np
import torch

from exfm.launch.dryrun import dry_run_rank
from exfm.launch.planning import Planned
from exfm.trainer.peak import available_bytes

GIB = 2**30
OTHERS = 0.7  # of the memory that is available here, for tables and their buffers: the rest is for the dense part


def ranks_of(planned: Planned, wanted: int, available: int) -> list[int]:
    """As many ranks as wanted, spread evenly over the bytes that ranks hold, from the emptiest to the fullest that this machine has
    memory for.
    """
    size = planned.plan.by_rank("hbm") + planned.plan.by_rank("host")
    order = np.argsort(size, kind="stable")
    order = order[size[order] <= OTHERS * available]
    chosen: list[int] = []
    for target in np.linspace(size[order[0]], size[order[-1]], wanted):
        left = order[~np.isin(order, chosen)]
        chosen.append(int(left[np.abs(size[left] - target).argmin()]))
    return chosen


def dry_runs(planned: Planned, wanted: int, steps: int) -> list[dict[str, Any]]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for rank in ranks_of(planned, wanted, available_bytes(device)):
        found = dry_run_rank(planned, str(rank), steps)
        kinds = sorted({table.sharding_type for table, _ in planned.plan.on_rank(rank)})
        rows.append(found | {"sharding_types": kinds})
    return rows


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    """rows: of dry_runs, each with `model` and `ranks`."""
    worst = max(abs(r["ratio"] - 1) for r in rows)
    lines = [
        "## Ranks built and stepped",
        "",
        f"Peak memory of {len(rows)} ranks, measured by the estimate: at most {100 * worst:.1f}% away.",
        "",
        "| model | ranks | rank | sharding types on it | weights, GiB | measured, GiB | estimated, GiB | measured / estimated | peak during | step here, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        sizes = " | ".join(f"{r[key] / GIB:.2f}" for key in ("weights_bytes", "measured_bytes", "estimated_bytes"))
        lines.append(
            f"| {r['model']} | {r['ranks']} | {r['rank']} | {', '.join(r['sharding_types'])} | {sizes} | {r['ratio']:.3f} | "
            f"{r['estimated']['when']} | {r['step_s']:.1f} |"
        )
    return [*lines, ""]

"""`exfm plan`: where the tables of a model go on a cluster, whether they fit and what a step costs; no GPU, no process group."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from exfm.data.errors import UserError
from exfm.embeddings.config import check_features
from exfm.sharding.limits import GIB, gib
from exfm.sharding.plan import TIMES, Plan, TablePlan
from exfm.sharding.planner import topology_of
from exfm.trainer.config import JobConfig, check_ranks, load_config
from exfm.trainer.planning import plan_on

SHOWN = 10  # costliest tables
BYTES_PER_ID = 8


@dataclass(frozen=True)
class Planned:
    """A plan, its job and the seconds that it took."""

    job: JobConfig
    plan: Plan
    seconds: float


def plan_config(
    config: Path,
    sets: Sequence[str],
    world_size: int,
    ranks_per_node: int,
    gpu: str = "",
    device: str = "cuda",
    replicas: int | None = None,
    local_batch: int | None = None,
) -> Planned:
    """local_batch: examples of a rank and step; default: the config's global batch over the ranks. gpu: a GPU's name or a topology's YAML file, "" for the config's. UserError where no plan is possible."""
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device is '{device}'; use cpu or cuda")
    if ranks_per_node < 1 or world_size < 1 or (world_size > ranks_per_node and world_size % ranks_per_node):
        less = max(world_size, 1) // max(ranks_per_node, 1) * ranks_per_node
        raise UserError(
            f"--world-size {world_size} is not a whole number of nodes of {ranks_per_node} ranks (--gpus-per-node); use "
            f"{f'{less} or ' if less else ''}{less + ranks_per_node}"
            if ranks_per_node > 0
            else f"--gpus-per-node is {ranks_per_node}; use 1 or more"
        )
    job = load_config(config, list(sets), JobConfig)
    own: dict[str, Any] = {}
    if gpu or (device == "cuda" and not job.sharding.topology):
        own["topology"] = gpu or "h100"
    if replicas is not None:
        own["replicas"] = replicas
    job = job.model_copy(update={"sharding": job.sharding.model_copy(update=own)})
    if local_batch is not None:
        if local_batch < 1:
            raise UserError(f"--local-batch is {local_batch}; use 1 or more examples")
        job = job.model_copy(
            update={"stream": job.stream.model_copy(update={"global_batch": local_batch * world_size})}
        )
    check_features(job.features, job.tables)
    check_ranks(job, world_size)
    topology = topology_of(job.sharding, device, world_size, min(ranks_per_node, world_size))
    begun = time.monotonic()
    return Planned(job, plan_on(job, topology), time.monotonic() - begun)


def summary(planned: Planned) -> dict[str, Any]:
    """For machines: what `render` shows."""
    plan, ms = planned.plan, planned.plan.ms
    hbm, host = plan.by_rank("hbm"), plan.by_rank("host")
    worst = plan.worst
    split = {part: float(plan.by_rank(part)[worst]) for part in TIMES}
    return {
        "topology": plan.topology.model_dump(mode="json"),
        "fits": True,
        "seconds": planned.seconds,
        "ms": {"worst": plan.cost, "mean": float(ms.mean()), "best": float(ms.min()), "bound": plan.bound_ms},
        "worst_rank": worst,
        "worst_rank_ms": split,
        "hbm_gib": {"worst": hbm.max() / GIB, "mean": hbm.mean() / GIB, "best": hbm.min() / GIB, "reserved": plan.reserved_hbm / GIB},
        "host_gib": {"worst": host.max() / GIB, "mean": host.mean() / GIB, "best": host.min() / GIB, "reserved": plan.reserved_host / GIB},
        "input_bytes_per_s": input_bytes_per_s(planned),
        "tables": [row(t) for t in sorted(plan.tables, key=lambda t: -t.total("ms"))],
    }  # fmt: skip


def row(table: TablePlan) -> dict[str, Any]:
    return {
        "table": table.table,
        "rows": table.rows,
        "width": table.width,
        "sharding_type": table.sharding_type,
        "kernel": table.kernel,
        "column_width": table.column_width,
        "where": list(table.where),
        "ms": table.total("ms"),
        "slowest_shard_ms": max(run.ms for run in table.runs),
        "gib": (table.total("hbm") + table.total("host")) / GIB,
    }


def input_bytes_per_s(planned: Planned) -> float:
    """What the reader of one node must deliver, were a step as long as its slowest rank's embedding time: ids, lengths, dense features
    and labels, uncompressed. A bound from above, because a step also has its dense part.
    """
    job, plan = planned.job, planned.plan
    ids = sum(_pooling(job).values())
    per_example = ids * BYTES_PER_ID + 4 * (len(job.features.sparse) + len(job.features.dense) + len(job.heads.tasks))
    return per_example * plan.batch * plan.topology.ranks_per_node / (plan.cost / 1000)


def _pooling(job: JobConfig) -> dict[str, float]:
    from exfm.data.stats import read_stats

    columns = read_stats(job.sharding.stats).columns if job.sharding.stats else {}
    return {f.name: columns[f.source].pooling if f.source in columns else 1.0 for f in job.features.sparse}


def render(planned: Planned) -> RenderableType:
    s, plan, t = summary(planned), planned.plan, planned.plan.topology
    ms = s["ms"]
    parameters = sum(table.rows * table.width for table in plan.tables)
    head = Text(
        f"fits: {parameters:,} table parameters in {len(plan.tables)} tables on {t.world_size} ranks ({t.nodes} nodes of {t.ranks_per_node}, "
        f"{t.name}"
        + (f", {t.replicas} replicas" if t.replicas > 1 else "")
        + f"), {plan.batch:,} examples a rank; planned in {s['seconds']:.1f} s"
    )
    over = max(0.0, 100 * (plan.cost / plan.bound_ms - 1)) if plan.bound_ms else 0.0
    cost = Text(
        f"embedding step by TorchRec's perf model: slowest rank {ms['worst']:.2f} ms, mean {ms['mean']:.2f}, fastest {ms['best']:.2f}; no plan is "
        f"below {ms['bound']:.2f} ms, so this one is at most {over:.1f}% above the best"
    )
    lines = [head, cost]
    for name, key in (("device", "hbm_gib"), ("host", "host_gib")):
        m = s[key]
        if m["worst"]:
            total = (t.hbm_bytes if key == "hbm_gib" else t.host_bytes) / GIB
            lines.append(
                Text(
                    f"{name} memory for tables and their buffers: fullest rank {m['worst']:.1f} GiB, mean {m['mean']:.1f}, emptiest {m['best']:.1f}; "
                    f"{m['reserved']:.1f} of {total:.1f} GiB are kept for everything else"
                )
            )
    parts = ", ".join(f"{part.replace('_', ' ')} {value:.2f}" for part, value in s["worst_rank_ms"].items() if value)
    lines.append(Text(f"slowest rank {s['worst_rank']}, ms: {parts}"))
    lines.append(
        Text(
            f"input: at most {s['input_bytes_per_s'] / 1e9:.2f} GB/s for each node, were there nothing but embeddings to wait for"
        )
    )
    table = Table(
        title=f"the {min(SHOWN, len(plan.tables))} costliest tables, ms summed over ranks", title_justify="left"
    )
    for column in ("table", "rows", "sharding", "kernel", "where", "ms", "slowest shard", "memory"):
        left = column in ("table", "sharding", "kernel", "where")
        table.add_column(column, justify="left" if left else "right", no_wrap=column in ("table", "rows", "memory"))
    for own in s["tables"][:SHOWN]:
        cut = f" by {own['column_width']}" if own["column_width"] != own["width"] else ""
        table.add_row(
            own["table"], f"{own['rows']:,}", own["sharding_type"] + cut, own["kernel"], _places(own), f"{own['ms']:.2f}",
            f"{own['slowest_shard_ms']:.2f}", gib(own["gib"] * GIB),
        )  # fmt: skip
    return Group(*lines, table)


def _places(own: dict[str, Any]) -> str:
    where = own["where"]
    if not where:
        return "all ranks"
    what = "node" if own["sharding_type"] in ("table_row_wise", "grid_shard") else "rank"
    return f"{what} " + ", ".join(map(str, where[:6])) + (", ..." if len(where) > 6 else "")

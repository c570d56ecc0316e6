"""`exfm plan`: a plan without GPUs and without a process group."""

from pathlib import Path
from typing import Any

from torch import nn

from exfm.data.errors import UserError
from exfm.embeddings.config import check_features
from exfm.embeddings.tables import build_collection
from exfm.sharding.planner import describe, plan_table, plan_tables
from exfm.trainer.config import JobConfig, check_ranks, load_config


def plan_config(
    config: Path, sets: list[str], world_size: int, gpus_per_node: int, device: str
) -> tuple[list[dict[str, Any]], list[str]]:
    """(plan rows, text lines) of a job's tables on world_size ranks. UserError where no plan is possible."""
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device is '{device}'; use cpu or cuda")
    if gpus_per_node < 1 or world_size < 1 or (world_size > gpus_per_node and world_size % gpus_per_node):
        raise UserError(f"--world-size {world_size} is not a whole number of nodes of {gpus_per_node} ranks")
    job = load_config(config, sets, JobConfig)
    check_features(job.features, job.tables)
    check_ranks(job, world_size)
    collections = [build_collection(job.features, job.tables, weighted) for weighted in (False, True)]
    module = nn.ModuleList(c for c in collections if c is not None)
    local = min(gpus_per_node, world_size)
    local_batch = -(-job.stream.global_batch // world_size)
    rows = describe(plan_tables(module, job.sharding, device, world_size, local, local_batch))
    return rows, plan_table(rows, job.tables)

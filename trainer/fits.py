"""Whether a step of a job fits into a rank's memory, asked before any rank joins, and what the job needs of the machines."""

from dataclasses import dataclass

import numpy as np

from exfm.data.errors import UserError
from exfm.sharding.candidates import BY_COLUMN
from exfm.sharding.kinds import FLOAT, ROW
from exfm.sharding.plan import Plan
from exfm.trainer.config import JobConfig
from exfm.trainer.dense_memory import dense_memory
from exfm.trainer.planning import served_on_meta

GIB = 2**30


@dataclass(frozen=True)
class Needs:
    """Bytes by rank of device and of host memory, and of one full checkpoint."""

    device_bytes: tuple[int, ...]
    host_bytes: tuple[int, ...]
    checkpoint_bytes: int


def check_batch(config: JobConfig, plan: Plan, world_size: int) -> Needs:
    """UserError with the bytes that a rank's piece of a global batch needs beside tables and weights, and those that there are.

    The planner has made the tables fit and kept a share free; only the traced dense part says whether its activations stay inside.
    """
    topology = plan.topology
    cuda = topology.device == "cuda"
    batch = -(-config.stream.global_batch // world_size)
    dense = dense_memory(config, batch, world_size)
    by_rank = plan.by_rank("hbm" if cuda else "host")
    tables = int(by_rank.max(initial=0.0))
    weights = dense.weights + dense.gradients + dense.optimiser
    # what is traced is fp32; under bf16 the largest are half of it
    activations = max(dense.forward, dense.backward) // (2 if config.precision.dense == "bf16" else 1)
    available = topology.hbm_bytes if cuda else topology.host_bytes
    if tables + weights + activations <= available:
        computing = _of_all(by_rank + weights + activations, plan)
        others = _of_all(plan.by_rank("host"), plan) if cuda else computing
        return Needs(computing if cuda else (0,) * len(others), others, checkpoint_bytes(config, plan))
    # a little of it does not shrink with the batch
    most = int(0.95 * batch * max(0, available - tables - weights) / max(activations, 1)) * world_size
    remedy = (
        f"set stream.global_batch to {most} or less, use more ranks" if most >= world_size else "use a smaller model"
    )
    raise UserError(
        f"a step of {batch} examples a rank does not fit: {activations / GIB:.1f} GiB of activations beside {tables / GIB:.1f} GiB of "
        f"tables and {weights / GIB:.1f} GiB of dense weights and Adam's state, {available / GIB:.1f} GiB available; {remedy}, or "
        "precision.dense: bf16, or dense_engine.activation_checkpointing: true (Wukong)"
    )


def _of_all(by_rank: np.ndarray, plan: Plan) -> tuple[int, ...]:
    """Of every rank of the job, from those of one sharding group."""
    return tuple(int(n) for n in np.tile(by_rank, plan.topology.replicas))


def checkpoint_bytes(config: JobConfig, plan: Plan) -> int:
    """Of the canonical state: rows with an accumulator for each of their column shards, the dense part with Adam's two moments."""
    total = 3 * FLOAT * sum(p.numel() for p in served_on_meta(config).parameters())
    for table in plan.tables:
        segments = table.width // table.column_width if table.sharding_type in BY_COLUMN else 1
        total += table.rows * (table.width * ROW[config.tables[table.table].dtype] + FLOAT * segments)
    return total

"""Whether a step of a job fits into a rank's memory, asked before any rank joins."""

from exfm.data.errors import UserError
from exfm.sharding.plan import Plan
from exfm.trainer.config import JobConfig
from exfm.trainer.dense_memory import dense_memory

GIB = 2**30


def check_batch(config: JobConfig, plan: Plan, world_size: int) -> None:
    """UserError with the bytes that a rank's piece of a global batch needs beside tables and weights, and those that there are.

    The planner has made the tables fit and kept a share free; only the traced dense part says whether its activations stay inside.
    """
    topology = plan.topology
    cuda = topology.device == "cuda"
    batch = -(-config.stream.global_batch // world_size)
    dense = dense_memory(config, batch, world_size)
    tables = int(plan.by_rank("hbm" if cuda else "host").max(initial=0.0))
    weights = dense.weights + dense.gradients + dense.optimiser
    # what is traced is fp32; under bf16 the largest are half of it
    activations = max(dense.forward, dense.backward) // (2 if config.precision.dense == "bf16" else 1)
    available = topology.hbm_bytes if cuda else topology.host_bytes
    if tables + weights + activations <= available:
        return
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

"""Where a step of the job goes: time by kind of work, from torch's profiler, and the model's products timed alone in the same run."""

import contextlib
import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.dense import Products, median_s, operands
from exfm.trainer.loop import Job

# first match counts; names of operators as the profiler has them
KINDS: dict[str, tuple[str, ...]] = {
    "products": ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"),
    "table lookup and update": ("fbgemm", "embedding", "RowWiseAdagrad", "splits_dist", "CppNode", "lookup"),
    "norms": ("layer_norm",),
    "activations": ("clamp_min", "relu", "threshold", "sigmoid", "softplus"),
    "copies and sums of gradients": ("aten::cat", "aten::copy_", "aten::add", "aten::fill_", "aten::sum", "aten::clone", "aten::zero_"),
    "dense optimiser": ("_fused_adam", "Optimizer"),
    "collectives": ("c10d", "DistributedDataParallel", "reducer", "gloo"),
    "autograd and calls": ("autograd", "Backward", "aten::"),
}  # fmt: skip


def itemised(job: Job, found: dict[str, Any]) -> None:
    """Train under the profiler; into `found`: microseconds per example by kind, and of the products alone."""
    batch = next(iter(_first(job)))
    with Products() as products, contextlib.suppress(StopIteration):
        loss, _ = job.built.objective(batch, torch.randn(len(batch), _pooled(job), requires_grad=True))
        loss.backward()
    job.built.optimizers.zero_grad()
    alone = sum(
        count * median_s(lambda a=a, b=b: a @ b, torch.device("cpu"), 5)  # type: ignore[misc]
        for (a, b), count in (
            (operands(shape, torch.float32, torch.device("cpu")), n) for shape, n in products.seen.items()
        )
    )
    begun = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        try:
            job.train()
        finally:
            whole = time.perf_counter() - begun
            examples = max(job.progress.examples, 1)
    spent = dict.fromkeys(KINDS, 0.0)
    for event in profiled.key_averages():
        kind = next((k for k, parts in KINDS.items() if any(part in event.key for part in parts)), None)
        if kind:
            spent[kind] += event.self_cpu_time_total
    spent["host: reader, metrics, log, Python"] = 1e6 * whole - sum(spent.values())
    found["items_us"] = {kind: us / examples for kind, us in spent.items()}
    found["products_alone_us"] = 1e6 * alone / len(batch)


def _first(job: Job) -> Any:
    reader = job.open(job.slices.start)
    assert reader is not None
    return reader.batches()


def _pooled(job: Job) -> int:
    return sum(job.config.tables[f.table].width for f in job.config.features.sparse)

"""One rank of a large plan on this machine: its real tables, dense part and batches, stepped among loopback peers.

Memory and compute are measured; communication is not: see exfm.sharding.loopback.
"""

import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingEnv
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from exfm.data.batch import Batch
from exfm.data.errors import UserError
from exfm.embeddings.tables import build_collection, mean_features
from exfm.sharding.loopback import loopback_group
from exfm.sharding.memory import BATCHES, RankMemory, rank_memory
from exfm.sharding.planner import TableSharder
from exfm.sharding.shards import Shard, local_kernels
from exfm.trainer.build import build_dense
from exfm.trainer.dense_memory import dense_memory
from exfm.trainer.engines import compiled, ddp
from exfm.trainer.env import RankEnv
from exfm.trainer.made import made_batch
from exfm.trainer.objective import Objective, StepOutput, TrainModule
from exfm.trainer.optim import Optimizers
from exfm.trainer.peak import USUAL, available_bytes, give_back, peak_bytes, reset_peak
from exfm.trainer.request import Request
from exfm.trainer.steps import PIPELINES
from exfm.trainer.zero import Zero, deepspeed_here

GIB = 2**30
INITIAL = 0.01  # of every row: only that its pages are written matters
FIRST_STEPS = 2  # in which the peak is found: the first one makes the optimiser's state
OBJECTS = 100 << 20  # bytes of Python's objects, at most


@dataclass(frozen=True)
class DryRun:
    """What one rank's steps took. peak_bytes: above what the process held before it built anything; weights_bytes: of its shards
    of tables and its dense part; seconds: median of a step and of its parts: tables with their input and output distribution, the
    dense forward pass, the backward pass with all updates; losses: of all steps, the two before the timed ones too.
    """

    peak_bytes: int
    weights_bytes: int
    step_seconds: float
    tables_seconds: float
    dense_seconds: float
    backward_seconds: float
    steps: int
    losses: tuple[float, ...]


def estimate(r: Request) -> RankMemory:
    """What the dry run will find, without running it."""
    dense = dense_memory(r.config, r.local_batch, r.world_size)
    data = r.config.features, r.config.tables
    ranks = r.local_batch, r.world_size, r.ranks_per_node
    return rank_memory(r.plan, r.rank, *data, *ranks, r.pooling, dense, r.config.run.pipeline)


def dry_run(request: Request) -> DryRun:
    """Run it in a process of its own, whose memory is then the rank's alone.

    UserError, before anything is allocated, where the machine has less memory available than estimated; RuntimeError where the
    process fails.
    """
    if request.config.dense_engine.stage == 3 and request.rank:
        raise UserError(
            f"rank {request.rank} has no dry run under deepspeed's stage 3: its ranks compare notes with rank 0, which is not there; "
            "dry-run rank 0, whose dense part is as large"
        )
    check_memory(estimate(request).total + OBJECTS, available_bytes(request.device))
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder, "request.json"), Path(folder, "answer.json")
        asked.write_text(request.to_json())
        command = [sys.executable, "-m", "exfm.trainer.dryrun", str(asked), str(answer)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == -signal.SIGKILL:
            raise UserError(
                f"rank {request.rank}'s dry run was killed, most likely because this machine's memory ran out: other processes took "
                "what was available; choose a rank with less, a smaller local batch, or a larger machine"
            )
        if done.returncode:
            raise RuntimeError(f"rank {request.rank}'s dry run ended with {done.returncode}: {done.stderr[-2000:]}")
        fields = json.loads(answer.read_text())
    return DryRun(**{**fields, "losses": tuple(fields["losses"])})


def check_memory(needed_bytes: int, available: int) -> None:
    if needed_bytes > available:
        raise UserError(
            f"the dry run needs {needed_bytes / GIB:.1f} GiB, but {available / GIB:.1f} GiB are available here; choose a rank "
            "with less, a smaller local batch, or a larger machine"
        )


# ---------------------------------------------------------------- in the process of its own


def run_here(request: Request) -> DryRun:
    """The dry run in this process, which must not have a process group."""
    torch.set_num_threads(request.config.run.threads_per_rank)
    with loopback_group(request.rank, request.world_size, request.ranks_per_node):
        if request.config.dense_engine.kind == "deepspeed":
            # what modules take is no rank's share
            deepspeed_here(request.device, RankEnv())
            import_module("deepspeed.runtime.engine")
            import_module("torch._inductor.compile_fx")
        give_back()
        baseline = reset_peak(request.device)
        model, optimizers, shards = build_rank(request)
        clock = Clock(request.device, model.module.objective)
        pipeline = PIPELINES[request.config.run.pipeline](model, optimizers, request.device)
        batches, losses = endless(request), []
        for step in range(FIRST_STEPS + request.steps):
            if step == FIRST_STEPS:
                peak = peak_bytes(request.device) - baseline
                give_back(*USUAL)
            clock.start()
            output: StepOutput = pipeline.progress(batches)
            clock.stop(count=step >= FIRST_STEPS)
            losses.append(float(output.loss))
    weights = [s.weight for s in shards] + [p for p in model.module.objective.parameters()]
    size = sum(w.numel() * w.element_size() for w in weights)
    return DryRun(peak, size, *clock.medians(), request.steps, tuple(losses))


def build_rank(request: Request) -> tuple[Any, Optimizers, list[Shard]]:
    """What exfm.trainer.build makes, by the given plan, with constant rows."""
    config, device = request.config, request.device
    served, heads, adapter = build_dense(config, device, in_pieces=config.dense_engine.kind == "fsdp")
    objective = Objective(
        served, heads, adapter, config.distillation.learn, (0.0,) * len(config.heads.tasks), config.precision.computing
    )
    module = TrainModule(
        build_collection(config.features, config.tables, weighted=False),
        build_collection(config.features, config.tables, weighted=True),
        objective.to(device),
        tuple(f.name for f in config.features.sparse),
        mean_features(config.features, config.tables),
    )
    for collection in (module.tables, module.weighted):
        if collection is not None:
            kwargs = {"lr": config.optim.tables.lr, "eps": config.optim.tables.eps}
            apply_optimizer_in_backward(RowWiseAdagrad, collection.parameters(), kwargs)
    pg = torch.distributed.group.WORLD
    assert pg is not None
    model = DistributedModelParallel(
        module,
        env=ShardingEnv.from_process_group(pg),
        device=device,
        plan=request.plan,
        sharders=[TableSharder(None, config.precision.codecs(device.type))],  # type: ignore[list-item]
        init_data_parallel=False,
    )
    shards = [shard for kernel in local_kernels(model) for shard in kernel.shards]
    for shard in shards:
        shard.weight.fill_(INITIAL)
        if shard.accumulator is not None:
            shard.accumulator.fill_(0.0)
    if config.dense_engine.compile:
        compiled(served)
    zero = None
    groups: list[nn.Module] = [served]
    if config.dense_engine.kind == "ddp":
        objective.served = ddp(served, device)
    elif config.dense_engine.kind == "deepspeed":
        zero = Zero(config.dense_engine, config.optim.dense, config.precision, served, RankEnv(), device)
        objective.served, groups = zero.engine, []
    if heads is not None:
        objective.heads = ddp(heads, device)
        groups.append(heads)
    return model, Optimizers(config.optim, groups, shards, zero), shards


def endless(r: Request) -> Iterator[Batch]:
    """As many different batches as a pipeline has in memory, in turn."""
    seeds = [(r.config.run.seed, r.rank, i) for i in range(BATCHES[r.config.run.pipeline])]
    made = [made_batch(r.config, r.local_batch, r.pooling, r.zipf, seed) for seed in seeds]
    while True:
        yield from made


class Clock:
    """Seconds of a step: up to the dense part, in its forward pass, and after it."""

    def __init__(self, device: torch.device, dense: nn.Module) -> None:
        self.wait: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self.marks: list[float] = []
        self.steps: list[list[float]] = []
        dense.register_forward_pre_hook(lambda *_: self.mark())
        dense.register_forward_hook(lambda *_: self.mark())

    def mark(self) -> None:
        self.wait()
        self.marks.append(time.perf_counter())

    def start(self) -> None:
        self.marks = []
        self.mark()

    def stop(self, count: bool) -> None:
        self.mark()
        if count:
            self.steps.append([b - a for a, b in pairwise(self.marks)])

    def medians(self) -> tuple[float, float, float, float]:
        """Of the whole and of the three parts."""
        tables, dense, backward = (statistics.median(times) for times in zip(*self.steps, strict=True))
        return statistics.median(map(sum, self.steps)), tables, dense, backward


def main(asked: str, answer: str) -> None:
    request = Request.from_json(Path(asked).read_text())
    Path(answer).write_text(json.dumps(asdict(run_here(request))))


if __name__ == "__main__":
    main(*sys.argv[1:])

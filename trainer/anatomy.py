"""Where a job's time goes: one gapless row of stages from its beginning on, kept over restarts.

A mark says what begins; the stage before it ends there. On CUDA marks are events on the main stream, read some steps later: a stage
then lasts as long as that stream worked or waited in it, so what overlaps counts once, and only where it is exposed.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter, time
from typing import Any

import torch
from torch import nn

from exfm.sharding.topology import gpu_here, gpu_topology, preset_of
from exfm.trainer.precision import PrecisionConfig

STARTING, WAITING, READING = "starting", "waiting", "reading"
LOOKUP, FORWARD, BACKWARD, OPTIMIZER, PIPELINE = "lookup", "forward", "backward", "optimizer", "pipeline"
BOOKKEEPING, COMMITTING = "bookkeeping", "committing"
LOST = "lost"  # to restarts: down time, start-up before the ranks joined, steps done again
STAGES = {
    STARTING: "building, planning, restoring",
    WAITING: "for slices and supervision",
    READING: "the training thread waits for the reader",
    LOOKUP: "ids to their ranks, table rows, pooled embeddings back",
    FORWARD: "dense part and loss",
    BACKWARD: "gradients of dense part and tables, table updates, all-reduce",
    OPTIMIZER: "of the dense part",
    PIPELINE: "batches to the device, exchanges started ahead",
    BOOKKEEPING: "metrics, supervision to publish, log",
    COMMITTING: "training stands still for checkpoints, published slices, agreement of ranks",
}
IN_STEP = (LOOKUP, FORWARD, BACKWARD, OPTIMIZER, PIPELINE)
BEHIND = 256  # marks that a device may be behind before the host looks


class Anatomy:
    """Seconds per stage of this rank. `kept` is what a checkpoint keeps: work that is done again after a restart counts once."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self.kept = dict.fromkeys(STAGES, 0.0)
        self.begun_at = time()  # of the job's first attempt
        self.stage = STARTING
        self.annotate = False
        self.heard: Callable[[str, float], None] = lambda stage, seconds: None  # told of every stage that has ended
        self._range: Any = None
        self._marks: deque[tuple[str, Any]] = deque()  # (stage, event at its beginning)
        self._last: Any = self._now()

    def mark(self, stage: str) -> None:
        """From here on it is `stage`."""
        now = self._now()
        if self.stream is None:
            self._count(self.stage, now - self._last)
        else:
            self._marks.append((self.stage, self._last))
            if len(self._marks) > BEHIND:
                self._read(now, wait=False)
        self.stage, self._last = stage, now
        if self.annotate:
            self.end_range()
            self._range = torch.profiler.record_function(f"exfm:{stage}")
            self._range.__enter__()

    @contextmanager
    def inside(self, stage: str) -> Iterator[None]:
        """A stage within another one, which then goes on."""
        outer = self.stage
        self.mark(stage)
        try:
            yield
        finally:
            self.mark(outer)

    def seconds(self, wait: bool = True) -> dict[str, float]:
        """Kept seconds per stage, up to now, or to where the device is without waiting for it."""
        self.mark(self.stage)
        if self.stream is not None:
            self._read(self._last, wait)
        return dict(self.kept)

    def goodput(self, seconds: dict[str, float]) -> float:
        """Share of all time since the job first began in which steps that count were made: not waits, start-up, saves or restarts."""
        return sum(seconds[s] for s in IN_STEP) / max(time() - self.begun_at, 1e-9)

    def state(self) -> dict[str, Any]:
        return {"begun_at": self.begun_at, "seconds": self.seconds()}

    def load(self, state: dict[str, Any]) -> None:
        """Continue a job's."""
        self.kept = {stage: float(state["seconds"][stage]) for stage in STAGES}
        self.begun_at, self._last = float(state["begun_at"]), self._now()
        self._marks.clear()

    def watch(self, model: nn.Module, objective: nn.Module) -> None:
        """Mark what the pipeline does with a model whose `objective` takes pooled embeddings to a loss."""
        model.register_forward_pre_hook(lambda *_: self.mark(LOOKUP))
        objective.register_forward_pre_hook(lambda *_: self.mark(FORWARD))
        objective.register_forward_hook(lambda *_: self.mark(BACKWARD))

    def end_range(self) -> None:
        """Of the stage, in a profiler's timeline; the next mark begins one."""
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None

    def _now(self) -> Any:
        if self.stream is None:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self.stream)
        return event

    def _read(self, end: Any, wait: bool) -> None:
        """Count the stages that the device has left behind; end: event at the end of the last one."""
        ends = [event for _, event in list(self._marks)[1:]] + [end]
        for event in ends:
            if wait:
                event.synchronize()
            elif not event.query():
                return
            stage, begin = self._marks.popleft()
            self._count(stage, begin.elapsed_time(event) / 1000)

    def _count(self, stage: str, seconds: float) -> None:
        self.kept[stage] += seconds
        self.heard(stage, seconds)


class Pace:
    """What a rank reached between two lines of the log. flops: of one example's training, matrix products alone (3 x forward);
    examples: of the job so far, those before a restart among them.
    """

    def __init__(self, anatomy: Anatomy, flops: float, peak: float | None, world_size: int, examples: int = 0) -> None:
        self.anatomy, self.flops, self.peak, self.world_size = anatomy, flops, peak, world_size
        self.seconds, self.examples = anatomy.seconds(), examples

    def since(self, examples: int) -> dict[str, Any]:
        """Since the last call: seconds per stage, FLOP/s of a rank and, where its device's peak is known, MFU. examples: of the job."""
        now = self.anatomy.seconds(wait=False)
        stages = {stage: now[stage] - self.seconds[stage] for stage in STAGES}
        done, self.seconds, self.examples = examples - self.examples, now, examples
        reached = self.flops * done / self.world_size / max(sum(stages.values()), 1e-9)
        return {"stages": stages, "flops_per_s": reached, "goodput": self.anatomy.goodput(now)} | self._mfu(reached)

    def whole(self, examples: int) -> dict[str, Any]:
        """Of the whole job, restarts among it."""
        seconds = self.anatomy.seconds()
        elapsed = max(time() - self.anatomy.begun_at, 1e-9)
        reached = self.flops * examples / self.world_size / elapsed
        lost = {LOST: max(0.0, elapsed - sum(seconds.values()))}
        return {"stages": seconds | lost, "flops_per_s": reached, "goodput": self.anatomy.goodput(seconds)} | self._mfu(
            reached
        )

    def _mfu(self, reached: float) -> dict[str, float]:
        return {} if self.peak is None else {"mfu": reached / self.peak}


# what to change where a stage takes most
REMEDIES = {
    STARTING: "the job is short; nothing to change for a longer one",
    WAITING: "training is ahead of its data or its teacher; nothing to change here, or fewer ranks",
    READING: "raise stream.prefetch, write larger row groups, drop unused columns, or give the reader a core of its own (run.threads_per_rank)",
    LOOKUP: "run.pipeline: sparse_dist hides the exchange of ids; precision.embeddings_forward: fp16 halves what returns; exfm plan shows which rank is slowest",
    FORWARD: "dense products: precision.dense: bf16 (tf32) on a GPU, dense_engine.compile: true, more threads per rank on a CPU, or a smaller model",
    BACKWARD: "dense products and table updates: precision.dense: bf16 (tf32) on a GPU, dense_engine.compile: true, precision.gradients: bf16 where the all-reduce is slow",
    OPTIMIZER: "dense_engine.kind: fsdp cuts it over ranks; a larger stream.global_batch takes fewer steps",
    PIPELINE: "copies to the device are exposed: run.pipeline: sparse_dist copies ahead",
    BOOKKEEPING: "lower evaluation.bootstrap, raise stream.global_batch",
    COMMITTING: "commit more rarely (checkpoint.every_slices), or checkpoint.staging: copy_on_write; docs/checkpoints.md",
    LOST: "restarts cost most: commit more often, see exit.json and logs",
}


def verdict(stages: dict[str, float]) -> str:
    """One sentence: the stage that takes most of all seconds, and what to change."""
    stage, seconds = max(stages.items(), key=lambda item: item[1])
    word = STAGES.get(stage, "down time and steps done again")
    return (
        f"bottleneck: {stage} ({word}), {seconds / max(sum(stages.values()), 1e-9):.0%} of the time; {REMEDIES[stage]}"
    )


def peak_flops(device: torch.device, precision: PrecisionConfig) -> float | None:
    """Dense peak of a rank's device by its data sheet; None where it has none or is not known."""
    if device.type != "cuda" or (preset := preset_of(gpu_here()[0])) is None:
        return None
    rates = gpu_topology(preset, 1)
    return rates.bf16_flops if precision.dense == "bf16" else rates.fp32_flops

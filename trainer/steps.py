"""Stepping a pipeline over one segment of a slice: feeding it, and getting outputs to the host without stalling the GPU."""

from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.train_pipeline import (
    EvalPipelineSparseDist,
    PrefetchTrainPipelineSparseDist,
    TrainPipelineBase,
    TrainPipelineSparseDist,
)

from exfm.data.batch import Batch
from exfm.data.errors import UserError
from exfm.trainer.anatomy import BOOKKEEPING, OPTIMIZER, PIPELINE, READING, Anatomy
from exfm.trainer.build import Built
from exfm.trainer.objective import StepOutput
from exfm.trainer.watch import Doing

COPIES_IN_FLIGHT = 2
PIPELINES: dict[str, Any] = {
    "base": TrainPipelineBase,
    "sparse_dist": TrainPipelineSparseDist,
    "prefetch": PrefetchTrainPipelineSparseDist,
}


def check_pipeline(kind: str, device: torch.device) -> None:
    """UserError for a pipeline that the device has not: TorchRec's would fail in its first step."""
    if kind == "prefetch" and device.type != "cuda":
        raise UserError(
            "run.pipeline is prefetch, which fetches rows from host memory into a GPU's cache; on CPU use sparse_dist or base"
        )


class EvalPipelineBase:
    """A forward pass at a time; TorchRec's base pipeline has no form without an optimiser."""

    def __init__(self, model: nn.Module, optimizer: None, device: torch.device) -> None:
        self.model, self.device = model, device

    def progress(self, batches: Iterator[Batch]) -> StepOutput:
        _, output = self.model(next(batches).to(self.device, non_blocking=True))
        return output  # type: ignore[no-any-return]

    def reset(self) -> None:
        """Nothing is in flight."""


EVAL_PIPELINES: dict[str, Any] = {"base": EvalPipelineBase, "sparse_dist": EvalPipelineSparseDist}


class Feed(Iterator[Batch]):
    """Hands batches to a pipeline, keeps those in flight, and can be ended early: the pipeline then drains."""

    def __init__(self, batches: Iterator[Batch], doing: Doing | None = None, anatomy: Anatomy | None = None) -> None:
        self.batches, self.doing = batches, doing or Doing()
        self.reading = nullcontext if anatomy is None else partial(anatomy.inside, READING)
        self.in_flight: deque[Batch] = deque()
        self.ended = False

    def __next__(self) -> Batch:
        if self.ended:
            raise StopIteration
        self.doing.phase = "reading a batch"
        with self.reading():
            batch = next(self.batches)
        self.doing.phase = "training step"
        self.in_flight.append(batch)
        return batch

    def close(self) -> None:
        close = getattr(self.batches, "close", None)
        if close:
            close()


class Marked:
    """Optimisers as a pipeline calls them, marking when."""

    def __init__(self, built: Built, anatomy: Anatomy) -> None:
        self.built, self.anatomy = built, anatomy
        self.zero_grad = built.optimizers.zero_grad

    def step(self) -> None:
        self.anatomy.mark(OPTIMIZER)
        self.built.optimizers.step()
        self.built.replicas.after_step()
        self.anatomy.mark(PIPELINE)


class Pipeline:
    """TorchRec's train pipeline by name; one call per segment, drained at its end."""

    def __init__(self, kind: str, built: Built, device: torch.device, anatomy: Anatomy) -> None:
        self.kind, self.built, self.device, self.anatomy = kind, built, device, anatomy
        # the base pipeline holds nothing from one segment to the next, and could not go on after its feed has ended
        self._kept: Any = None if kind == "base" else self._make(PIPELINES[kind])

    def _make(self, kind: Any) -> Any:
        return kind(self.built.model, Marked(self.built, self.anatomy), self.device)

    def run(self, feed: Feed) -> Iterator[tuple[Batch, StepOutput]]:
        """(batch on the host, output) of every step until the feed ends."""
        pipeline = self._kept or self._make(TrainPipelineBase)
        batches = iter(feed)
        while True:
            self.anatomy.mark(PIPELINE)
            try:
                output = pipeline.progress(batches)
            except StopIteration:
                return
            finally:
                self.anatomy.mark(BOOKKEEPING)
            yield feed.in_flight.popleft(), output


@dataclass
class _Copy:
    batch: Batch
    logits: Tensor
    loss: Tensor
    event: Any


class HostCopies:
    """Outputs on their way to the host: pinned copies on a side stream, read some steps later; on CPU at once."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.cuda else None
        self.waiting: deque[_Copy] = deque()

    def put(self, batch: Batch, output: StepOutput) -> None:
        if not self.cuda:
            self.waiting.append(_Copy(batch, output.logits, output.loss, None))
            return
        assert self.stream is not None
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            logits = torch.empty(output.logits.shape, dtype=output.logits.dtype, pin_memory=True)
            loss = torch.empty(output.loss.shape, dtype=output.loss.dtype, pin_memory=True)
            logits.copy_(output.logits, non_blocking=True)
            loss.copy_(output.loss, non_blocking=True)
            output.logits.record_stream(self.stream)
            output.loss.record_stream(self.stream)
            event = torch.cuda.Event()
            event.record(self.stream)
        self.waiting.append(_Copy(batch, logits, loss, event))

    def ready(self, drain: bool = False) -> Iterator[tuple[Batch, Tensor, float]]:
        """(batch, logits [b, t], loss) of outputs old enough not to wait for, or of all."""
        keep = 0 if drain or not self.cuda else COPIES_IN_FLIGHT
        while len(self.waiting) > keep:
            copy = self.waiting.popleft()
            if copy.event is not None:
                copy.event.synchronize()
            yield copy.batch, copy.logits, float(copy.loss)

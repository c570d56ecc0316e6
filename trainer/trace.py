"""A timeline of some steps: torch.profiler's Chrome trace of every rank, with the stages of anatomy.py as ranges."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from exfm.trainer.anatomy import Anatomy
from exfm.trainer.config import TraceConfig


def trace_path(folder: Path, rank: int) -> Path:
    return folder / "logs" / f"trace-rank{rank}.json.gz"


class Tracer:
    """Follows the steps that a config names, from the end of one to the end of the last; a range `exfm:step` is around each."""

    def __init__(self, config: TraceConfig | None, folder: Path, rank: int, anatomy: Anatomy) -> None:
        self.config, self.path, self.anatomy = config, trace_path(folder, rank), anatomy
        self.steps = 0
        self.profiler: profile | None = None
        self._step: record_function | None = None

    def step(self) -> None:
        """Called after every step."""
        self.steps += 1
        if self.config is None:
            return
        if self.steps == self.config.first:
            self._begin()
        elif self.profiler is not None:
            self._end_step()
            if self.steps == self.config.first + self.config.steps:
                self.close()
            else:
                self._begin_step()

    def _begin(self) -> None:
        cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self.profiler = profile(activities=[ProfilerActivity.CPU, *cuda], record_shapes=True)
        self.profiler.start()
        self.anatomy.annotate = True
        self._begin_step()

    def _begin_step(self) -> None:
        self._step = record_function("exfm:step")
        self._step.__enter__()
        self.anatomy.mark(self.anatomy.stage)

    def _end_step(self) -> None:
        self.anatomy.end_range()
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None

    def close(self) -> None:
        """End the timeline and write it, as far as it went."""
        if self.profiler is None:
            return
        self._end_step()
        self.anatomy.annotate = False
        self.profiler.stop()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.profiler.export_chrome_trace(str(self.path))
        self.profiler = None

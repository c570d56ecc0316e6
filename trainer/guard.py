"""What is done about a bad loss, alike on all ranks: noticed late, answered by the last commit, its examples left out if so configured."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from exfm.trainer.loop import Job

Position = tuple[int, int]  # slice, examples of it consumed
MEMORY, WARM_UP = 100, 20  # global batches


class BadLoss(RuntimeError):
    """The loss cannot be trusted; tables have changed since, so only the last commit is good. position: where it was noticed."""

    def __init__(self, message: str, position: Position = (0, 0)) -> None:
        super().__init__(message)
        self.position = position


class NonFiniteLoss(BadLoss):
    """The loss became NaN or infinite."""


class LossSpike(BadLoss):
    """The loss of a global batch is far above those before it."""


@dataclass(frozen=True)
class Check:
    """Ranks on their way to agree. positions: of the batches whose losses are under way."""

    flags: torch.Tensor
    work: Any
    positions: list[Position]


class LossGuard:
    """Judges losses. A spike is the loss of a whole global batch above `factor` (0: off) times the mean of those before.

    The mean is plain over the first MEMORY batches, then exponential with that memory; it judges from WARM_UP batches on. It
    travels with checkpoints (`state`), so that a resumed job judges as the undisturbed one.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.bad = False
        self.mean, self.count = 0.0, 0
        self.shares: list[tuple[Position, float]] = []

    def see(self, share: float, position: Position, whole: bool) -> None:
        """share: this rank's loss of a global batch, scaled by W. whole: a batch of full size; others are too noisy to judge."""
        self.bad |= not np.isfinite(share)
        if self.factor and whole:
            self.shares.append((position, share))

    def ask(self, stop: bool) -> Check:
        """Start agreeing over ranks on (loss not finite, stop asked for, losses since the last question)."""
        flags = torch.tensor([float(self.bad), float(stop), *(share for _, share in self.shares)], dtype=torch.float64)
        positions = [position for position, _ in self.shares]
        self.shares = []
        return Check(flags, dist.all_reduce(flags, async_op=True), positions)

    def answer(self, check: Check, here: Position) -> bool:
        """Whether any rank was asked to stop. BadLoss, the same on every rank; here: the present position."""
        check.work.wait()
        bad, stop, *losses = check.flags.tolist()
        if bad:
            raise NonFiniteLoss(f"the loss became NaN or infinite in slice {here[0]} before example {here[1]}", here)
        for position, total in zip(check.positions, losses, strict=True):
            self._judge(total / dist.get_world_size(), position, here)
        return bool(stop)

    def _judge(self, loss: float, position: Position, here: Position) -> None:
        if self.count >= WARM_UP and loss > self.factor * self.mean:
            raise LossSpike(
                f"the loss rose to {loss:.4g} in slice {position[0]} at example {position[1]}, more than run.spike_factor "
                f"{self.factor:g} times its running mean {self.mean:.4g}",
                here,
            )
        if loss > 0:  # a batch whose examples all weigh nothing says nothing
            self.count = min(self.count + 1, MEMORY)
            self.mean += (loss - self.mean) / self.count

    def state(self) -> list[float]:
        return [self.mean, self.count]

    def load(self, state: list[float]) -> None:
        self.mean, self.count = float(state[0]), int(state[1])


def recover(job: "Job", seen: str, noticed: Position, resumed: bool) -> None:
    """After the restore: say what was seen and where the job goes on; with on_bad_loss "skip" the window up to `noticed` is left out."""
    p = job.progress
    restored = (p.slice, p.consumed)
    skips = job.config.run.on_bad_loss == "skip"
    if skips:
        job.skip_to = noticed
    source = f"the commit of step {p.step}" if resumed else "the start, as there is no commit yet"
    then = f"skipping the examples from there to {_spoken(noticed)}" if skips else "training them again"
    job.log.say(f"{seen}; restored {source} at {_spoken(restored)}; {then}")
    values = {"seen": seen, "noticed": list(noticed), "restored": list(restored), "restored_step": p.step}
    job.log.record("bad_loss", p.step, {**values, "skipped": [list(restored), list(noticed)] if skips else None})


def _spoken(position: Position) -> str:
    return f"slice {position[0]} example {position[1]}"

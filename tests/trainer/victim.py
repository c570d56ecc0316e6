"""A rank process that takes its time and, on one rank, goes wrong in a chosen way: `torchrun -m tests.trainer.victim CONFIG FAULT RANK`."""

import itertools
import sys
import time
from collections.abc import Iterator
from typing import Any

from exfm.data.batch import Batch
from exfm.data.reader import SliceReader
from exfm.trainer import __main__ as rank
from exfm.trainer.commits import Commits
from exfm.trainer.env import rank_env
from exfm.trainer.watch import SAVING

STEP_S, FAULT_AT = 0.02, 40


def slow_reader(fault: str) -> None:
    """Every batch takes STEP_S, or (slow) three times that; the FAULT_AT-th one never comes (stuck) or is an error (raise)."""
    read, count = SliceReader.batches, itertools.count(1)

    def batches(self: SliceReader, *args: Any, **named: Any) -> Iterator[Batch]:
        for batch in read(self, *args, **named):
            time.sleep(STEP_S * (3 if fault == "slow" else 1))
            number = next(count)
            if number == FAULT_AT and fault == "stuck":
                time.sleep(1000)
            if number == FAULT_AT and fault == "raise":
                raise ValueError("this rank cannot go on")
            yield batch

    SliceReader.batches = batches  # type: ignore[method-assign]


def slow_commit(seconds: float) -> None:
    begin = Commits.begin

    def late(self: Commits, *args: Any) -> None:
        self.job.doing.phase = SAVING
        time.sleep(seconds)
        begin(self, *args)

    Commits.begin = late  # type: ignore[method-assign]


if __name__ == "__main__":
    config, fault, number = sys.argv[1:]
    chosen = rank_env().rank == int(number)
    slow_reader(fault if chosen else "")
    if fault == "slow commit" and chosen:
        slow_commit(6.0)
    sys.argv = ["victim", config]
    rank.leave(rank.main())

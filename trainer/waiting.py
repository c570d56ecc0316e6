"""Waiting for a slice or its supervision: rank 0 looks, all ranks learn its verdict together and stay able to stop."""

import time
from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist

from exfm.data.manifest import wait_for

ROUND_S = 1.0  # ranks meet this often, far below any collective's time-out
NOT_YET, READY, LATE = 0.0, 1.0, 2.0


def wait_together(
    ready: Callable[[], bool], wait_s: float, should_stop: Callable[[], bool]
) -> Literal["ready", "late", "stop"]:
    """Wait up to wait_s seconds for `ready` (asked on rank 0 alone); the same answer on every rank.

    "stop" where any rank was asked to stop, unless what is waited for is there.
    """
    deadline = time.monotonic() + wait_s
    while True:
        word = torch.zeros(2)
        if dist.get_rank() == 0:
            pause = max(0.0, min(ROUND_S, deadline - time.monotonic()))
            wait_for(lambda: True if ready() or should_stop() else None, pause)
            word[0] = READY if ready() else LATE if time.monotonic() >= deadline else NOT_YET
        word[1] = float(should_stop())
        dist.all_reduce(word, op=dist.ReduceOp.MAX)
        if word[0] == READY:
            return "ready"
        if word[1]:
            return "stop"
        if word[0] == LATE:
            return "late"

"""Heartbeats of the ranks of a job, and what they say together: who died, who hangs, who waits for whom."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Beat:
    """One rank's heartbeat. number: grows with every beat; at: its wall clock; last: its word if it has ended.

    window, p50_ms, p95_ms, steps: its own time a step, see stragglers.py; window counts them from 1, 0: none yet.
    """

    rank: int
    host: str = "unknown"
    pid: int = 0
    number: int = 0
    at: float = 0.0
    phase: str = ""
    step: int = 0
    collectives: int = 0
    last: str = ""
    moved: int = 0
    window: int = 0
    p50_ms: float = 0.0
    p95_ms: float = 0.0
    steps: int = 0

    def who(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    def where(self) -> str:
        return f"in '{self.phase}' after step {self.step}, collective {self.collectives}"


def read_beats(store: Any, world_size: int, absent: str) -> list[Beat]:
    """The newest heartbeat of every rank; where there is none yet, or no store, one with the phase `absent`."""
    keys = [str(rank) for rank in range(world_size)]
    if store is not None and store.check(keys):  # one question for all
        return [Beat(**json.loads(word)) for word in store.multi_get(keys)]
    there = [store is not None and store.check([key]) for key in keys]
    return [
        Beat(**json.loads(store.get(key))) if known else Beat(int(key), phase=absent)
        for key, known in zip(keys, there, strict=True)
    ]


def silent_ranks(before: Sequence[Beat], after: Sequence[Beat], me: int) -> list[Beat]:
    """Whose heartbeat stood still between two moments, though they have not said that they end."""
    return [b for a, b in zip(before, after, strict=True) if a.number == b.number and not b.last and b.rank != me]


def judge(before: Sequence[Beat], after: Sequence[Beat], me: int, still_s: float, died: bool) -> str:
    """Who holds up rank `me`, from all heartbeats at two moments LOOK_S apart. died: a connection to a peer was closed."""
    own = after[me]
    here = f"rank {me} was {own.where()}"
    if silent := silent_ranks(before, after, me):
        now = time.time()
        words = [
            f"{b.who()} {'died' if died else f'has not been heard of for {now - b.at:.0f} s:'} {b.where()}"
            for b in silent
        ]
        return f"{'; '.join(words)}; {here}"
    if ended := sorted((b for b in after if b.last and b.rank != me), key=lambda b: b.at):
        return f"{ended[0].who()} ended {ended[0].where()}: {ended[0].last}; {here}"
    fewest, most = min(b.collectives for b in after), max(b.collectives for b in after)
    late = [b for b in after if b.collectives == fewest]
    if len(after) > 1 and fewest == most:
        words = [f"rank {b.rank} in '{b.phase}'" for b in after[:8]]
        return f"all ranks have issued collective {most} and none moves since {still_s:.0f} s: {', '.join(words)}"
    verdict = "; ".join(f"{b.who()} hangs {b.where()}" for b in late[:8])
    if fewest == most or own in late:
        return f"{verdict}, since {still_s:.0f} s"
    return f"{verdict}; rank {me} waits for it in collective {own.collectives} since {still_s:.0f} s"

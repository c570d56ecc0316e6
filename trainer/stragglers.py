"""Ranks that hold up all others, named while it happens.

A synchronous step takes equally long on every rank: who is fast waits for who is slow. So each rank measures the time of a step
that is its own, and the heartbeats carry its percentiles; no collective, and nothing that a GPU would have to be waited for.

What is a rank's own:
- In stages without collectives (reading, and the dense part's forward pass unless its weights are gathered there) all wall time:
  it also holds a slow disk, a throttled GPU and a core that another process takes away.
- In all other stages of a CPU rank the time that its main thread ran: gloo waits for peers asleep, so waiting costs no CPU time,
  but larger shards, hotter tables and slower cores do. Where the kernel tells (schedstat), also the time it wanted a core.
- In all other stages of a GPU rank nothing: there a kernel that waits for peers looks like one that works, and the host spins.
"""

import os
import statistics
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from exfm.trainer.anatomy import BACKWARD, BOOKKEEPING, FORWARD, LOOKUP, OPTIMIZER, PIPELINE, READING, Anatomy
from exfm.trainer.beats import Beat
from exfm.trainer.config import JobConfig
from exfm.trainer.env import RankEnv
from exfm.trainer.log import RunLog
from exfm.trainer.watch import BEAT_S, Doing

SLOW, INTERVALS = 1.3, 2  # so many times the others' median, in so many intervals in a row
NOISE_MS = 1.0  # a smaller difference is not worth a word
STEPS = 20  # an interval is longer where it had fewer: their median would be noise
FEW, NAMED = 16, 5  # up to FEW ranks metrics.jsonl has all, else the NAMED slowest
IN_STEP = {READING, LOOKUP, FORWARD, BACKWARD, OPTIMIZER, PIPELINE, BOOKKEEPING}


class OwnTime:
    """Measures this rank's own time of every step; on rank 0 it also says which rank is slow. Off in a job of one rank."""

    def __init__(self, config: JobConfig, env: RankEnv, anatomy: Anatomy, doing: Doing) -> None:
        engine = config.dense_engine
        gathers = engine.kind == "fsdp" or engine.stage == 3
        self.whole = {READING} if gathers else {READING, FORWARD}
        self.every_s, self.doing, self.speaks = max(config.run.log_every_s, BEAT_S), doing, env.rank == 0
        self.cpu = ThreadTime() if anatomy.stream is None else None
        self.step_s, self.window = 0.0, 0
        self.steps_s: list[float] = []
        self.begun, self.cpu_s = time.monotonic(), 0.0
        self.ranks = Ranks()
        self.seen: list[Beat] = []
        if env.world_size > 1:
            anatomy.heard = self.heard

    def heard(self, stage: str, seconds: float) -> None:
        """A stage has ended; called by the main thread, on a GPU some steps late."""
        ran = 0.0
        if self.cpu is not None:
            now = self.cpu.seconds()
            ran, self.cpu_s = now - self.cpu_s, now
        if stage in IN_STEP:
            self.step_s += seconds if stage in self.whole else ran
        if stage == OPTIMIZER:  # the last one of a step
            self.steps_s.append(self.step_s)
            self.step_s = 0.0
            if len(self.steps_s) >= STEPS and (now := time.monotonic()) - self.begun >= self.every_s:
                self.begun = now
                self._tell()

    def _tell(self) -> None:
        """The window that has ended, with the next heartbeat."""
        p50, p95 = np.percentile(self.steps_s, (50, 95)) * 1000
        self.window += 1
        facts = {"p50_ms": round(float(p50), 3), "p95_ms": round(float(p95), 3), "steps": len(self.steps_s)}
        self.doing.own = {"window": self.window, **facts}
        self.steps_s = []

    def report(self, log: RunLog, step: int) -> None:
        """Where the watch has read new heartbeats: a record `ranks`, and a line for each rank that has become slow."""
        if self.doing.ranks is self.seen:
            return
        self.seen = self.doing.ranks
        record, words = self.ranks.see(self.seen)
        if record:
            log.record("ranks", step, record)
        for word in words:
            log.say(word)


class Ranks:
    """Who is slow, from the heartbeats of all ranks, interval by interval."""

    def __init__(self) -> None:
        self.windows: dict[int, int] = {}
        self.late: dict[int, int] = {}  # intervals in a row

    def see(self, beats: Sequence[Beat]) -> tuple[dict[str, Any], list[str]]:
        """(what metrics.jsonl gets, or nothing before all ranks have a window; sentences)."""
        if not beats or not all(b.window for b in beats):
            return {}, []
        words = []
        ordered = sorted(b.p50_ms for b in beats)
        for beat in beats:
            if self.windows.get(beat.rank) == beat.window:
                continue  # the same as last time
            self.windows[beat.rank] = beat.window
            others = _median_without(ordered, beat.p50_ms)
            late = beat.p50_ms > SLOW * others and beat.p50_ms - others > NOISE_MS
            self.late[beat.rank] = self.late.get(beat.rank, 0) + 1 if late else 0
            if self.late[beat.rank] == INTERVALS:
                words.append(
                    f"rank {beat.rank} (host {beat.host}) is slow: {beat.p50_ms:.0f} ms a step of its own, "
                    f"median of the others {others:.0f} ms"
                )
        return self._record(beats, ordered), words

    def _record(self, beats: Sequence[Beat], ordered: list[float]) -> dict[str, Any]:
        slowest = sorted(beats, key=lambda b: -b.p50_ms)[:NAMED]
        record: dict[str, Any] = {
            "own_ms": {"min": ordered[0], "median": statistics.median(ordered), "max": ordered[-1]},
            "slowest": [_facts(b) | {"rank": b.rank, "host": b.host} for b in slowest],
            "slow": [b.rank for b in beats if self.late.get(b.rank, 0) >= INTERVALS],
        }
        return record | ({"ranks": {str(b.rank): _facts(b) for b in beats}} if len(beats) <= FEW else {})


def _facts(beat: Beat) -> dict[str, Any]:
    return {"p50_ms": beat.p50_ms, "p95_ms": beat.p95_ms, "steps": beat.steps}


def _median_without(ordered: list[float], value: float) -> float:
    """The median of sorted values without one of them."""
    index = int(np.searchsorted(ordered, value))
    rest = len(ordered) - 1
    picks = [i + (i >= index) for i in ((rest - 1) // 2, rest // 2)]
    return (ordered[picks[0]] + ordered[picks[1]]) / 2


class ThreadTime:
    """Seconds that the thread which made it has run or, where the kernel counts that, wanted to run."""

    def __init__(self) -> None:
        try:
            self.file: int | None = os.open(f"/proc/self/task/{threading.get_native_id()}/schedstat", os.O_RDONLY)
        except OSError:
            self.file = None

    def seconds(self) -> float:
        if self.file is None:
            return time.thread_time()
        ran, waited, _ = os.pread(self.file, 128, 0).split()
        return (int(ran) + int(waited)) / 1e9

    def __del__(self) -> None:
        if self.file is not None:
            os.close(self.file)

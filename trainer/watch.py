"""Watching over the ranks of a job: heartbeats through the process group's store, and a verdict on who holds up the others.

A daemon thread of every rank publishes, once a second, what its main thread is doing and how many collectives of the default
group it has issued. Others read that only in need. The rank with the fewest collectives is the one that the others wait for.
"""

import json
import os
import re
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_group, _get_default_store

from exfm.data.errors import UserError
from exfm.trainer.beats import Beat, judge, read_beats, silent_ranks
from exfm.trainer.config import RunConfig
from exfm.trainer.env import RankEnv
from exfm.trainer.stacks import ANSWER_S, Stacks, here

BEAT_S = 1.0
LOOK_S = 3.0  # a rank whose heartbeat does not move for so long is silent
STUCK_S = 5.0  # asked to stop and still for so long, with a silent peer: nothing more will come
LOOK_AGAIN_S, STORE_S = 10.0, 5.0

JOINING, BUILDING, RESTORING, SAVING = "joining the other ranks", "building the model", "restoring", "saving"
# phases that begin so may take long between two collectives: run.timeout_s is their limit, not run.hang_s
SLOW = (JOINING, BUILDING, RESTORING, SAVING, "opening slice", "ending slice")

# what gloo and NCCL say when a peer has gone, and when it does not answer
GONE = re.compile(
    r"closed by (remote )?peer|connection reset|broken pipe|connection refused|remote process exited", re.I
)
LATE = re.compile(r"timed? ?out", re.I)


class RankLost(RuntimeError):
    """Another rank died, failed or hangs; the message names it."""


class Doing:
    """What this rank's main thread is doing: set by the loop, read by the watch. `ranks` is set by the watch of rank 0."""

    def __init__(self) -> None:
        self.phase, self.step = "starting", 0
        self.moved: Callable[[], int] = lambda: 0  # bytes of checkpoints read and written
        self.failed: tuple[str, int] | None = None
        self.own: dict[str, Any] = {}  # window, p50_ms, p95_ms and steps of Beat
        self.ranks: list[Beat] = []

    def closing(self) -> None:
        """What runs is ended in order; where an error ends it, the place of that error is kept."""
        if sys.exc_info()[0] is not None:
            self.failed = self.phase, self.step
        self.phase = SAVING

    def where(self) -> tuple[str, int]:
        """Phase and step: now, or of the error that ends this rank."""
        return self.failed or (self.phase, self.step)


class Watch:
    """The watch of one rank. speak: called with the message of a rank that is ended here, before it ends."""

    def __init__(self, config: RunConfig, env: RankEnv, speak: Callable[[str], None]) -> None:
        self.config, self.env, self.speak = config, env, speak
        self.doing = Doing()
        self.store: Any = None
        self.backends: list[Any] = []
        self.number, self.last, self.asked = 0, "", False
        self.state: tuple[str, int, int, int] = ("", 0, 0, 0)
        self.since, self.look_at = time.monotonic(), 0.0
        self.stacks, self.ranks_at = Stacks(Path(config.folder), env.rank), 0.0
        self._lock = threading.Lock()

    @contextmanager
    def running(self) -> Iterator["Watch"]:
        """Watch from here on; called by the main thread, whose signals are then seen even where it is stuck in native code."""
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        thread = threading.Thread(target=self._run, args=(ours,), name="exfm-watch", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            signal.set_wakeup_fd(before)
            theirs.close()
            thread.join()
            ours.close()

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Publish while the default process group exists. RankLost instead of the error that a lost peer caused."""
        group = _get_default_group()
        devices = [d for d in group._device_types if d.type in ("cpu", "cuda")]
        self.backends = list({id(b): b for b in (group._get_backend(d) for d in devices)}.values())
        # a connection of its own: the main thread may block on the other
        default: Any = _get_default_store()
        store = dist.PrefixStore("exfm-watch", default.clone())
        store.set_timeout(timedelta(seconds=STORE_S))
        self.store = store
        self._publish()
        try:
            yield
            self.leave("done")
        except UserError as error:
            self.leave(str(error))
            raise
        except Exception as error:
            lost = self._explain(str(error))
            self.leave(lost or str(error))
            if lost:
                raise RankLost(lost) from error
            raise
        finally:
            with self._lock:
                self.store, self.backends = None, []

    def leave(self, last: str) -> None:
        """Tell the others why this rank ends."""
        self.last = last or "failed"
        self._publish()

    # ---------------------------------------------------------------- the thread

    def _run(self, signals: socket.socket) -> None:
        while True:
            readable, _, _ = select.select([signals], [], [], BEAT_S)
            if readable:
                if not signals.recv(64):
                    return
                self.asked = True
            self._tick()

    def _tick(self) -> None:
        now = time.monotonic()
        state = self._state()
        if state != self.state:
            self.state, self.since = state, now
        self._publish()
        still = now - self.since
        if self.asked and still > STUCK_S and state[0] == JOINING and self.store is None:
            self._end(f"rank {self.env.rank} was asked to stop while it waited for the other ranks", spoken=False)
        if self.store is None or self.last:
            return
        with suppress(RuntimeError):
            self._serve(now)
        if now < self.look_at:
            return
        patience = self.config.timeout_s if state[0].startswith(SLOW) else self.config.hang_s
        if still < patience and not (self.asked and still > STUCK_S):
            return
        verdict = self._verdict(still, still >= patience)
        # while it looked, things may have moved, or the main thread may have found out by itself
        if verdict and state == self._state() and not self.last:
            self._save_stacks()
            if state == self._state() and not self.last:
                self._end(verdict)
        self.look_at = time.monotonic() + LOOK_AGAIN_S

    def _state(self) -> tuple[str, int, int, int]:
        """What moves while this rank gets on."""
        return self.doing.phase, self.doing.step, self._collectives(), self.doing.moved()

    def _verdict(self, still: float, hangs: bool) -> str:
        """Why to end this rank now, or "". hangs: its patience is over; else a silent peer is the only reason."""
        try:
            before, after = self._look()
        except RuntimeError as error:
            return self._deaf(error)
        me = self.env.rank
        if any(a.moved != b.moved for a, b in zip(before, after, strict=True)) and not silent_ranks(before, after, me):
            return ""  # a large checkpoint takes its time
        fewest = min(b.collectives for b in after)
        slow = any(b.phase.startswith(SLOW) for b in after if b.collectives == fewest)
        if silent_ranks(before, after, me) or (hangs and not (slow and still < self.config.timeout_s)):
            return judge(before, after, me, still, died=False)
        return ""

    def _deaf(self, error: Exception) -> str:
        return (
            f"the ranks' store does not answer ({error}): its process, torchrun of the first host or rank 0, is gone or hangs; "
            f"rank {self.env.rank} was {self._own().where()}"
        )

    def _serve(self, now: float) -> None:
        """What the other ranks want: a look at a process of this host, and at rank 0 all heartbeats for the loop."""
        if now > self.stacks.spy_at:
            self._spy()
        if self.env.rank == 0 and self.env.world_size > 1 and now >= self.ranks_at:
            self.ranks_at = now + max(self.config.log_every_s, BEAT_S)
            self.doing.ranks = self._read()

    def _save_stacks(self) -> None:
        """Of all ranks, before this one ends."""
        try:
            with self._lock:
                if self.store is not None:
                    self.stacks.ask(self.store)
            end = time.monotonic() + ANSWER_S
            while time.monotonic() < end and self._missing():
                time.sleep(BEAT_S / 4)
                self._publish()
            self._spy()
        except RuntimeError:  # the store does not answer
            self.stacks.write(self._own())

    def _missing(self) -> list[int]:
        with self._lock:
            return [] if self.store is None else self.stacks.missing(self.store, self.env.world_size)

    def _spy(self) -> None:
        """Look at the processes of this host that have not answered."""
        silent = self._missing()
        beats = self._read() if silent else []
        with self._lock:
            mine = [] if self.store is None else self.stacks.claimed(self.store, here(beats, silent))
        for rank in mine:
            self.stacks.spy(beats[rank])

    def _end(self, message: str, spoken: bool = True) -> None:
        """End the process: the main thread is stuck where no exception reaches it."""
        if spoken:
            self.speak(message)
        self.leave(message)
        print(f"exfm: {message}", file=sys.stderr, flush=True)
        os._exit(1)

    # ---------------------------------------------------------------- heartbeats

    def _collectives(self) -> int:
        with self._lock:
            return sum(b._get_sequence_number_for_group() for b in self.backends)

    def _own(self) -> Beat:
        env, doing = self.env, self.doing
        return Beat(
            env.rank, socket.gethostname(), os.getpid(), self.number, time.time(), *doing.where(),
            self._collectives(), self.last, doing.moved(), **doing.own,
        )  # fmt: skip

    def _publish(self) -> None:
        """Also answers who asks for stacks. A store that does not answer is told where heartbeats are read."""
        beat = self._own()
        with self._lock:
            self.number += 1
            if self.store is None:
                return
            with suppress(RuntimeError):
                self.store.set(str(beat.rank), json.dumps(asdict(beat)))
                if self.stacks.asked(self.store):
                    self.stacks.write(beat)
                    self.stacks.answered(self.store)

    def _read(self) -> list[Beat]:
        with self._lock:
            return read_beats(self.store, self.env.world_size, JOINING)

    def _look(self) -> tuple[list[Beat], list[Beat]]:
        """All heartbeats now and LOOK_S later; this rank's own go on."""
        before = self._read()
        end = time.monotonic() + LOOK_S
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, BEAT_S))
            self._publish()
        return before, self._read()

    def _explain(self, error: str) -> str:
        """The verdict where an error of the main thread comes from a peer, else "": storage may be out of reach too."""
        died, me = bool(GONE.search(error)), self.env.rank
        if self.env.world_size == 1 or not (died or LATE.search(error)):
            return ""
        still = time.monotonic() - self.since
        try:
            before, after = self._look()
        except RuntimeError as deaf:
            return self._deaf(deaf)
        ended = any(b.last for b in after if b.rank != me)
        waits = not died and after[me].collectives > min(b.collectives for b in after)
        if not (silent_ranks(before, after, me) or ended or waits):
            return ""
        return f"{judge(before, after, me, still, died)} ({_short(error)})"


def _short(error: str) -> str:
    """The first sentence of gloo's or NCCL's message, without the path of its source."""
    return re.split(r"\.(?=\s|$)", re.sub(r"^\[.*?\] ", "", error.strip().splitlines()[0]))[0][:200]

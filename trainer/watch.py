"""Watching over the ranks of a job: heartbeats through the process group's store, and a verdict on who holds up the others.

A daemon thread of every rank publishes, once a second, what its main thread is doing and how many collectives of the default
group it has issued. Others read that only in need. The rank with the fewest collectives is the one that the others wait for.
"""

import faulthandler
import json
import os
import re
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_group, _get_default_store

from exfm.data.errors import UserError
from exfm.trainer.config import RunConfig
from exfm.trainer.env import RankEnv

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
    """What this rank's main thread is doing: set by the loop, read by the watch."""

    def __init__(self) -> None:
        self.phase, self.step = "starting", 0
        self.moved: Callable[[], int] = lambda: 0  # bytes of checkpoints read and written


@dataclass(frozen=True)
class Beat:
    """One rank's heartbeat. number: grows with every beat; at: its wall clock; last: its word if it has ended."""

    rank: int
    host: str = "unknown"
    pid: int = 0
    number: int = 0
    at: float = 0.0
    phase: str = JOINING
    step: int = 0
    collectives: int = 0
    last: str = ""
    moved: int = 0

    def who(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    def where(self) -> str:
        return f"in '{self.phase}' after step {self.step}, collective {self.collectives}"


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


class Watch:
    """The watch of one rank. speak: called with the message of a rank that is ended here, before it ends."""

    def __init__(self, config: RunConfig, env: RankEnv, speak: Callable[[str], None]) -> None:
        self.config, self.env, self.speak = config, env, speak
        self.doing = Doing()
        self.store: Any = None
        self.backends: list[Any] = []
        self.number, self.last, self.asked = 0, "", False
        self.state: tuple[str, int, int, int] = ("", 0, 0, 0)
        self.since = time.monotonic()
        self.look_at = 0.0
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
        if self.store is None or self.last or now < self.look_at:
            return
        patience = self.config.timeout_s if state[0].startswith(SLOW) else self.config.hang_s
        if still < patience and not (self.asked and still > STUCK_S):
            return
        verdict = self._verdict(still, still >= patience)
        # while it looked, things may have moved, or the main thread may have found out by itself
        if verdict and state == self._state() and not self.last:
            self._dump()
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

    def _dump(self) -> None:
        path = Path(self.config.folder) / "logs" / f"hang-rank-{self.env.rank}.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            print(f"exfm: cannot write {path}: {error}", file=sys.stderr, flush=True)

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
            env.rank, socket.gethostname(), os.getpid(), self.number, time.time(), doing.phase, doing.step,
            self._collectives(), self.last, doing.moved(),
        )  # fmt: skip

    def _publish(self) -> None:
        """A store that does not answer is told where heartbeats are read."""
        beat = self._own()
        with self._lock:
            self.number += 1
            if self.store is None:
                return
            with suppress(RuntimeError):
                self.store.set(str(beat.rank), json.dumps(asdict(beat)))

    def _read(self) -> list[Beat]:
        beats = []
        for rank in range(self.env.world_size):
            with self._lock:
                known = self.store is not None and self.store.check([str(rank)])
                beats.append(Beat(**json.loads(self.store.get(str(rank)))) if known else Beat(rank))
        return beats

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
    """The last sentence of gloo's or NCCL's message, without the path of its source."""
    return re.sub(r"^\[.*?\] ", "", error.strip().splitlines()[0])[:200]

"""`exfm data join`: run a joiner in this process until it is done, or asked to stop."""

import fcntl
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from exfm.data.clock import open_clock
from exfm.data.commit import open_folder
from exfm.data.errors import UserError
from exfm.data.inbox import replay
from exfm.data.join import Joiner
from exfm.data.join_config import JoinConfig
from exfm.data.manifest import open_stream
from exfm.trainer.config import load_config

DONE, STOPPED = 0, 75


def run_join(path: Path, sets: list[str], follow: bool, console: Console) -> tuple[int, dict[str, Any]]:
    """Join until nothing is due, or with `follow` until all slices are labelled; the exit code and what has been counted.

    SIGTERM, SIGUSR1 and SIGINT end it between two steps, with exit code 75: start it again.
    """
    config = load_config(path, sets, JoinConfig)
    with _only_one(config.out), _signals() as stop:
        joiner = Joiner(config, open_clock(config.clock, config.out))
        said = 0.0
        while not stop.is_set():
            lines = joiner.step()
            if lines and (time.monotonic() - said >= config.log_every_s or joiner.finished):
                said = time.monotonic()
                console.print(_line(joiner, lines[-1]), highlight=False, markup=False)
            if joiner.finished or not (lines or follow):
                break
            if not lines:
                stop.wait(config.poll_s)
        code = STOPPED if stop.is_set() and not joiner.finished else DONE
        return code, {"slices": joiner.next, "finished": joiner.finished, **joiner.totals()}


def run_replay(stream: Path, inbox: Path, delays: list[str]) -> None:
    """UserError for a delay that is not TASK=SECONDS."""
    opened = open_stream(str(stream))
    delays_s = {}
    for item in delays:
        task, _, seconds = item.partition("=")
        if task not in opened.schema.labels or not seconds.isdigit():
            raise UserError(f"--delay {item} is not TASK=SECONDS with a task of {', '.join(opened.schema.labels)}")
        delays_s[task] = int(seconds)
    replay(opened, str(inbox), delays_s)


def _line(joiner: Joiner, last: dict[str, Any]) -> str:
    late = ", ".join(f"{task} {n:,}" for task, n in joiner.counts["late"].items())
    return (
        f"join: {last['stage']} of slice {last['slice']}, {last['rows']:,} examples, {last['lag_s']:.1f} s after it was due; "
        f"late labels: {late}; unknown: {sum(joiner.counts['unknown'].values()):,}; late examples: {joiner.late_features:,}"
    )


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """An event that is set when the process is asked to stop."""
    stop, numbers = threading.Event(), (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _only_one(out: str) -> Iterator[None]:
    """Hold <out>/join.lock, on a local disk. UserError where another joiner does."""
    fs, root = open_folder(out)
    if "file" not in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)):
        yield
        return
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
        lock = open(f"{root}/join.lock", "w")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{root} is not writable ({error}); choose another `out`") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another joiner writes to {root}; stop it, or choose another `out`") from None
        yield

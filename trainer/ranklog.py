"""A log per rank: what a rank's Python prints goes to the common log, as ever, and to <run>/logs/rank-00003.log.

In the common log the lines of all ranks are mixed, and a crash of one is followed by the screens of all others.
"""

import faulthandler
import logging
import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from exfm.trainer.env import RankEnv


def rank_log(folder: Path, rank: int) -> Path:
    return folder / "logs" / f"rank-{rank:05}.log"


class Tee:
    """A text stream that also writes to `log`; all else is the stream's. A log that can no longer be written is left alone."""

    def __init__(self, stream: Any, log: IO[str]) -> None:
        self.stream, self.log = stream, log

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):  # a full disk, or closed: the common log has it
            self.log.write(text)
        return int(self.stream.write(text))

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self.log.flush()
        self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def keep_log(folder: Path, env: RankEnv) -> Path | None:
    """From here on to the end of this process; the stack of a fatal signal goes there too. None where it cannot be written."""
    path = rank_log(folder, env.rank)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = path.open("a", buffering=1, errors="backslashreplace")
        log.write(
            f"---- {time.strftime('%FT%T%z')} rank {env.rank} of {env.world_size}, host {socket.gethostname()}, "
            f"pid {os.getpid()}, attempt {env.attempt}, run {env.run_id}\n"
        )
    except OSError as error:
        print(f"exfm: no log of rank {env.rank}'s own: cannot write {path}: {error}", file=sys.stderr, flush=True)
        return None
    faulthandler.enable(log)
    before = {id(sys.stdout): Tee(sys.stdout, log), id(sys.stderr): Tee(sys.stderr, log)}
    sys.stdout, sys.stderr = before[id(sys.stdout)], before[id(sys.stderr)]  # type: ignore[assignment]
    # handlers hold the stream that there was when they were made: those of torch, since its import
    for logger in [logging.root, *logging.root.manager.loggerDict.values()]:
        for handler in getattr(logger, "handlers", []):
            if isinstance(handler, logging.StreamHandler) and id(handler.stream) in before:
                handler.setStream(before[id(handler.stream)])
    return path

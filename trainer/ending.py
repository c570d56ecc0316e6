"""exit.json: how a launch of a job ended, in the words of the first rank that failed. torchrun turns every code into 1."""

import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from exfm.trainer.env import RankEnv
from exfm.trainer.ranklog import rank_log

DONE, FAILED, WRONG_INPUT, STOPPED = 0, 1, 2, 75


def exit_folder(run: Path, preflight_only: bool) -> Path:
    """Where exit.json goes: a preflight alone says nothing about the run."""
    return run / "logs" / "preflight" if preflight_only else run


def write_exit(
    folder: Path, code: int, message: str, env: RankEnv, final: bool = False, where: tuple[str, int] = ("", 0)
) -> None:
    """Whole or not at all. The first rank that fails has its word; later ones fail because of it.

    final: another attempt would end the same way. where: phase and step of this rank when it failed.
    """
    if code in (DONE, STOPPED) and env.rank != 0:
        return
    path, temporary = folder / "exit.json", folder / f"exit.json.{env.rank}"
    word = {
        "exit_code": code,
        "message": message,
        "rank": env.rank,
        "run_id": env.run_id,
        "attempt": env.attempt,
        "final": final,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "phase": where[0],
        "step": where[1],
        "at": time.time(),
        "log": str(rank_log(folder, env.rank)),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if code == FAILED and _spoken(read_exit(folder), env):
            return
        temporary.write_text(json.dumps(word))
        os.replace(temporary, path)
    except OSError:  # a full disk must not hide the message, which is printed too
        with suppress(OSError):  # as on a file system that is read-only
            temporary.unlink()


def read_exit(folder: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads((folder / "exit.json").read_text()))
    except (OSError, ValueError):
        return None


def _spoken(word: dict[str, Any] | None, env: RankEnv) -> bool:
    """Whether a rank of this attempt has said already why it failed."""
    return (
        word is not None
        and word["run_id"] == env.run_id
        and word["attempt"] >= env.attempt
        and word["exit_code"] not in (DONE, STOPPED)
    )


def decided(folder: Path, env: RankEnv) -> int | None:
    """The exit code of an earlier attempt of this launch that another one cannot change; None to go on.

    torchrun restarts ranks whatever their exit code; a genuinely new launch is at attempt 0.
    """
    word = read_exit(folder)
    if word is None or not word["final"] or word["run_id"] != env.run_id or word["attempt"] >= env.attempt:
        return None
    return int(word["exit_code"])

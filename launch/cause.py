"""Why a job that torchrun started on this machine ended badly: the first cause, in at most ten lines, and where to read more."""

import re
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exfm.trainer.ranklog import rank_log

# torchrun's word on a process: in its table at the end, and in its line at every restart
TABLE = re.compile(r"^ *rank +: (\d+).*\n *exitcode +: (-?\d+) \(pid: (\d+)\)", re.M)
RESTART = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+) \(pid: (\d+)\)")
FIRST_SEEN = "Root Cause (first observed failure)"
ERROR = re.compile(r"^(?:\[rank\d+\]: ?)?((?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit)\b.*)$", re.M)
NAMED = re.compile(r"rank (\d+) \(host [^,)]*, pid (\d+)\)")
REASONS = {
    signal.SIGKILL: "killed by SIGKILL (out of memory? see dmesg, and the limit of the container or job)",
    signal.SIGSEGV: "segmentation fault (SIGSEGV); its stack is in its log",
    signal.SIGABRT: "aborted (SIGABRT): native code gave up; its stack is in its log",
    signal.SIGBUS: "bus error (SIGBUS): is /dev/shm or a disk full? Its stack is in its log",
    signal.SIGTERM: "ended by SIGTERM before it could commit",
}
LINES, WIDTH, TAIL = 4, 600, 6


@dataclass(frozen=True)
class Death:
    """How torchrun saw a process end. code: its exit code, negative for a signal."""

    rank: int
    pid: int
    code: int

    def reason(self) -> str:
        if self.code >= 0:
            return f"ended with exit code {self.code}"
        try:
            number = signal.Signals(-self.code)
        except ValueError:
            return f"killed by signal {-self.code}"
        return REASONS.get(number, f"killed by {number.name}")


def deaths(log: str) -> dict[int, Death]:
    """By process id, in the order in which torchrun saw them; log: its output. It runs on one machine: local ranks are ranks."""
    found = [Death(int(rank), int(pid), int(code)) for code, rank, pid in RESTART.findall(log)]
    _, _, last = log.rpartition(FIRST_SEEN)
    found += [Death(int(rank), int(pid), int(code)) for rank, code, pid in [*TABLE.findall(last), *TABLE.findall(log)]]
    return {death.pid: death for death in reversed(found)}


def told(word: Mapping[str, Any], folder: Path, log: str, since: float) -> str:
    """word: exit.json. since: when this launch began, Unix seconds; older hang files are of another one."""
    message = _short(str(word["message"]))
    seen = deaths(log)
    named = [(int(rank), int(pid)) for rank, pid in NAMED.findall(str(word["message"]))]
    for rank, pid in named:
        if pid in seen and seen[pid].code < 0:
            message += f"\n  rank {rank}: {seen[pid].reason()}"
    phase = f" in '{word['phase']}' after step {word['step']}," if word["phase"] else ""
    at = time.strftime("%F %T", time.localtime(word["at"]))
    said = f"  said by rank {word['rank']} (host {word['host']}, pid {word['pid']}),{phase} attempt {word['attempt']}, {at}"
    ranks = list(dict.fromkeys([*(rank for rank, _ in named[:2]), int(word["rank"])]))
    return "\n".join([message, said, *_read_more(folder, ranks, since)])


def guessed(folder: Path, log: str, code: int, since: float) -> str:
    """Where no rank left a word. code: torchrun's exit code."""
    seen = [death for death in deaths(log).values() if death.code != -signal.SIGTERM] or list(deaths(log).values())
    first = next((d for d in reversed(seen) if d.code < 0), seen[-1] if seen else None)
    if first is None:
        tail = "\n".join(f"  {line[:200]}" for line in log.splitlines()[-TAIL:])
        return f"torchrun ended with {code}; end of {folder}/logs/torchrun.log:\n{tail}"
    text = f"rank {first.rank} (pid {first.pid}) left no word: {first.reason()}"
    errors = [error for error in ERROR.findall(log) if "ChildFailedError" not in error]
    if first.code > 0 and errors:
        text += f"\n  the first error: {_short(errors[0])}"
    return "\n".join([text, *_read_more(folder, [first.rank], since)])


def _short(message: str) -> str:
    lines = [line[:WIDTH] for line in message.splitlines()]
    return "\n".join(lines[:LINES]) + (" ..." if len(lines) > LINES else "")


def _read_more(folder: Path, ranks: list[int], since: float) -> list[str]:
    logs = [path for rank in ranks if (path := rank_log(folder, rank)).exists()]
    lines = [f"  read: {', '.join(map(str, [*logs, folder / 'logs' / 'torchrun.log']))}"]
    stacks = sorted(p for p in (folder / "logs").glob("hang-rank-*.txt") if p.stat().st_mtime >= since)
    if stacks:
        numbers = ", ".join(sorted((p.stem.removeprefix("hang-rank-") for p in stacks), key=int))
        lines.append(f"  stacks: {folder / 'logs'}/hang-rank-K.txt of rank(s) {numbers}")
    return lines

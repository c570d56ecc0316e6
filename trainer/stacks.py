"""The stacks of all ranks of a job that hangs, in <run>/logs/hang-rank-K.txt.

One rank asks through the store; the watch thread of every other one answers within a beat, whatever its main thread is stuck
in. A process that does not answer (stopped, or in native code that holds the GIL) is looked at from outside by a rank of its
host, where py-spy is installed.
"""

import faulthandler
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch._C._distributed_c10d as c10d

from exfm.trainer.beats import Beat

ANSWER_S = 3.0  # so long the others have for their stacks: three beats
AGAIN_S = 10.0  # stacks younger than that are not asked for again
SPY_S = 10.0


class Stacks:
    """One rank's part. store: of the watch, given to each call, because it is gone when the process group is."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder / "logs", rank
        self.seen = ""  # name of the request that was answered last
        self.at = self.spy_at = float("inf")  # when it was answered, and when to look who else has

    def path(self, rank: int) -> Path:
        return self.folder / f"hang-rank-{rank}.txt"

    def ask(self, store: Any) -> None:
        """All ranks for their stacks."""
        if not self.seen or time.monotonic() - self.at > AGAIN_S:
            store.set("stacks", f"{self.rank}.{time.time():.3f}")

    def asked(self, store: Any) -> bool:
        """Whether there is a request that this rank has not answered."""
        if not store.check(["stacks"]):
            return False
        request = store.get("stacks").decode()
        if request == self.seen:
            return False
        self.seen, self.at = request, time.monotonic()
        self.spy_at = self.at + ANSWER_S
        return True

    def write(self, own: Beat) -> None:
        text = f"{own.who()} {own.where()}, at {time.strftime('%FT%T%z')}\n"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.path(self.rank), "w") as file:
                file.write(text)
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            if torch.cuda.is_initialized():
                self._write_collectives()
        except (OSError, RuntimeError) as error:
            print(f"exfm: cannot write {self.path(self.rank)}: {error}", file=sys.stderr, flush=True)

    def _write_collectives(self) -> None:
        """NCCL's flight recorder: what this rank's last collectives were and which has not ended."""
        dump = getattr(c10d, "_dump_nccl_trace_json", None)
        if dump is not None:
            (self.folder / f"nccl-trace-rank-{self.rank}.json").write_bytes(dump())

    def answered(self, store: Any) -> None:
        store.set(f"stacks/{self.seen}/{self.rank}", "")

    def missing(self, store: Any, world_size: int) -> list[int]:
        keys = [f"stacks/{self.seen}/{rank}" for rank in range(world_size)]
        if store.check(keys):
            return []
        return [rank for rank, key in enumerate(keys) if not store.check([key])]

    def claimed(self, store: Any, ranks: Sequence[int]) -> list[int]:
        """Those ranks that no other one of this host looks at."""
        self.spy_at = float("inf")
        return [rank for rank in ranks if store.add(f"spied/{self.seen}/{rank}", 1) == 1]

    def spy(self, beat: Beat) -> None:
        """Save the stacks of another process of this host."""
        word = _spy(beat.pid)
        text = f"{beat.who()} {beat.where()}, at {time.strftime('%FT%T%z')}, did not answer; {word}\n"
        with suppress(OSError):
            self.path(beat.rank).write_text(text)
        print(f"exfm: {text.splitlines()[0]}", file=sys.stderr, flush=True)


def _spy(pid: int) -> str:
    """py-spy's word on a process, or why there is none."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[-1].split()[0]
    except OSError:
        return "its process is gone"
    return _run_spy(pid, "its process is stopped (SIGSTOP or a debugger)" if state in "tT" else "its process lives")


def _run_spy(pid: int, state: str) -> str:
    program = shutil.which("py-spy") or shutil.which("py-spy", path=str(Path(sys.executable).parent))
    if program is None:
        return f"{state}; py-spy, if it were installed, would show its stacks"
    try:
        # a process that hangs does not move: there is no need to stop it, and one that is stopped would never answer
        done = subprocess.run(
            [program, "dump", "--nonblocking", "--pid", str(pid)],
            capture_output=True, text=True, errors="replace", timeout=SPY_S, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{state}; py-spy failed: {error}"
    if done.returncode:
        return f"{state}; py-spy failed: {done.stderr.strip().partition(chr(10))[0]}"
    return f"{state}; py-spy says:\n{done.stdout}"


def here(beats: Sequence[Beat], ranks: Sequence[int]) -> list[int]:
    """Those of the ranks that are processes of this host."""
    host = socket.gethostname()
    return [rank for rank in ranks if beats[rank].host == host and beats[rank].pid]

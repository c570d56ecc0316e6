"""Running jobs on this machine through torchrun, watching them and saying how they ended."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from exfm.checkpoints.commits import committed
from exfm.checkpoints.storage import Storage
from exfm.checkpoints.warm import warm_source
from exfm.data.commit import nan_for_null
from exfm.data.errors import UserError
from exfm.data.manifest import open_stream
from exfm.launch.cause import guessed, told
from exfm.trainer.config import check_against_stream, check_ranks
from exfm.trainer.ending import FAILED, exit_folder, read_exit
from exfm.trainer.learning import check_beginning
from exfm.trainer.score_config import ScoreConfig, check_scorer, load_any
from exfm.trainer.state import check_identity


@dataclass
class LocalJob:
    """One job: its config file, overrides, number of ranks on this machine and restarts after a rank has failed.

    follow: of a scorer: wait for slices and snapshots that are not there yet. preflight_only: only look whether it could start.
    """

    config: Path
    nproc: int = 1
    sets: tuple[str, ...] = ()
    max_restarts: int = 3
    follow: bool = False
    preflight_only: bool = False
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    asked: bool = False
    settled: bool = False
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex, repr=False)
    _read: int = 0
    _log_read: int = 0
    _begun: float = 0.0
    last: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.job = load_any(self.config, list(self.sets))
        self.folder = Path(self.job.run.folder)

    @property
    def _exits(self) -> Path:
        return exit_folder(self.folder, self.preflight_only)

    @property
    def name(self) -> str:
        return self.job.run.name

    def check(self) -> None:
        """UserError for all that can be known to be wrong before a rank starts."""
        if self.nproc < 1:
            raise UserError(f"--nproc is {self.nproc}; use 1 or more ranks")
        if self.max_restarts < 0:
            raise UserError(f"--max-restarts is {self.max_restarts}; use 0 or more")
        job = self.job
        if isinstance(job, ScoreConfig):
            check_scorer(job, self.nproc, self.follow)
            return
        check_ranks(job, self.nproc)
        job.dense_engine.check_machine("cuda" if job.run.device != "cpu" and torch.cuda.is_available() else "cpu")
        stream = open_stream(job.stream.path, job.stream.labels)
        check_against_stream(job, stream)
        Storage(job.checkpoint_folder, job.checkpoint.retries).check()
        if job.distillation.publish is not None:
            Storage(self.folder / "supervision").check()
        if found := committed(job.checkpoint_folder):
            check_identity(found[-1], job)
        elif job.teaches and (warm := job.checkpoint.warm_start) is not None:
            check_beginning(stream, job.stream.first, warm_source(warm)[-1])

    def start(self, environment: Mapping[str, str]) -> None:
        """Start torchrun; its output goes to <run>/logs/torchrun.log."""
        logs = self.folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        (self._exits / "exit.json").unlink(missing_ok=True)
        metrics = self.folder / "metrics.jsonl"
        self._read = metrics.stat().st_size if metrics.exists() else 0
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(self.nproc)]
        # as --standalone does it, but with a name that is known here
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--rdzv-id", self.run_id]
        command += ["--max-restarts", str(self.max_restarts)]
        command += [
            "-m",
            "exfm.trainer",
            str(self.config),
            *["--follow"] * (self.follow and isinstance(self.job, ScoreConfig)),
            *["--preflight-only"] * self.preflight_only,
        ]
        for item in self.sets:
            command += ["--set", item]
        # one thread per rank unless the user says otherwise: ranks share the cores
        env = {"OMP_NUM_THREADS": str(self.job.run.threads_per_rank), **environment}
        with open(logs / "torchrun.log", "ab") as log:
            self._log_read, self._begun = log.tell(), time.time()
            # a session of its own: Ctrl-C reaches the launcher alone, which asks the ranks to commit
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def stop(self) -> None:
        """Ask the ranks to commit and stop."""
        if self.process is not None and self.running():
            self.asked = True
            self.process.terminate()

    def settle(self) -> None:
        """Keep torchrun from starting ranks again that have said their last word."""
        word = self._word() if self.running() and not self.settled else None
        if word is not None and word["final"]:
            self.settled = True
            self.stop()

    def kill(self) -> None:
        """End torchrun and its ranks at once; what was committed stays."""
        if self.process is not None and self.running():
            # torchrun gives every rank a session of its own: killing its group would leave them behind
            for pid in [self.process.pid, *descendants(self.process.pid)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def refresh(self) -> dict[str, Any] | None:
        """The newest line of metrics.jsonl since the last call, or None."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return None
        with open(path, "rb") as f:
            f.seek(self._read)
            text = f.read()
        end = text.rfind(b"\n") + 1
        self._read += end
        lines = text[:end].splitlines()
        if not lines:
            return None
        self.last = nan_for_null(json.loads(lines[-1]))
        return self.last

    def _word(self) -> dict[str, Any] | None:
        """exit.json of this launch: another one that was kept out of the folder has left its word there too."""
        word = read_exit(self._exits)
        return word if word is not None and word["run_id"] == self.run_id else None

    def outcome(self) -> tuple[int, str]:
        """(exit code, message) of an ended job: the first cause, from exit.json and from what torchrun saw of its processes."""
        assert self.process is not None
        word = self._word()
        if word is not None and word["exit_code"] != FAILED:
            return int(word["exit_code"]), str(word["message"])
        if word is None and self.process.returncode == 0:
            return 0, ""
        if word is None and self.asked:  # stopped before a rank had begun: nothing was trained, nothing is lost
            return 75, ""
        with open(self.folder / "logs" / "torchrun.log", "rb") as file:
            file.seek(self._log_read)
            log = file.read().decode(errors="replace")
        if word is None:
            return FAILED, guessed(self.folder, log, self.process.returncode, self._begun)
        return FAILED, told(word, self.folder, log, self._begun)


def descendants(pid: int) -> list[int]:
    """Processes started by a process, and by those, at this moment (Linux)."""
    try:
        tasks = [f.read_text().split() for f in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:  # it has ended
        return []
    children = [int(child) for task in tasks for child in task]
    return [*children, *(d for child in children for d in descendants(child))]


def run_jobs(jobs: Sequence[LocalJob], environment: Mapping[str, str], view: Any, poll_s: float = 0.2) -> int:
    """Run jobs side by side to their end; the first failure stops the others. view: see launch/progress.py.

    Returns 0, or 75 where one stopped early with everything committed. UserError or RuntimeError with the first cause.
    """
    for job in jobs:
        job.check()
    failed: list[tuple[LocalJob, int, str]] = []
    codes: list[int] = []
    waiting: list[LocalJob] = []
    with _stop_on_signal(jobs):
        try:
            for job in jobs:
                job.start(environment)
                waiting.append(job)
            while waiting:
                time.sleep(poll_s)
                for job in list(waiting):
                    if line := job.refresh():
                        view.update(job, line)
                    job.settle()
                    if job.running():
                        continue
                    waiting.remove(job)
                    code, message = job.outcome()
                    view.ended(job, code)
                    codes.append(code)
                    if code not in (0, 75):
                        failed.append((job, code, message))
                        for other in waiting:
                            other.stop()
        finally:  # whatever happens here, no job is left behind
            for job in waiting:
                job.stop()
            for job in waiting:
                assert job.process is not None
                job.process.wait()
    if failed:
        job, code, message = failed[0]
        text = f"{job.name}: {message}"
        raise UserError(text) if code == 2 else RuntimeError(text)
    return 75 if 75 in codes else 0


@contextmanager
def _stop_on_signal(jobs: Sequence[LocalJob]) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP ask all jobs to commit and stop; a second one ends them at once."""
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        asked.append(number)
        for job in jobs:
            if len(asked) > 1:
                job.kill()
            else:
                job.stop()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, ask) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)

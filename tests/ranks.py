"""`on_ranks(n, fn, *args)`: a module-level function on n gloo ranks, in processes that live as long as the test session.

Every call makes a process group of its own through a file. Importing torchrec takes seconds, so a server that has done it forks
the processes, and they are kept; they are killed, and started anew, only where a call hangs or dies.
"""

import faulthandler
import importlib
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

EAGER_RANKS = 3  # a fourth is started by the first call that wants it
TIMEOUT_S = 60.0
GRACE_S = 10.0
READY_S = 120.0


class RankFailed(AssertionError):
    """A rank raised, died or hung. errors: the exception of every rank that raised one, by rank."""

    def __init__(self, message: str, errors: dict[int, BaseException]) -> None:
        super().__init__(message)
        self.errors = errors


def forking() -> Any:
    """The context of processes that are forked from a server which has imported what takes long."""
    context = multiprocessing.get_context("forkserver")
    # for the server alone: it must have no threads when it forks, and BLAS would start some
    os.putenv("OMP_NUM_THREADS", "1")
    context.set_forkserver_preload(
        [
            "exfm.trainer.run",
            "exfm.launch.local",
            "exfm.launch.cli",
            "torch.distributed.run",
            "torch.distributed.optim",
            "tests.preloaded",
        ]
    )
    return context


def _serve(pipe: Connection, stacks: str) -> None:
    """A rank process: import what takes long, then answer calls until the pipe closes."""
    with open(stacks, "w") as file:
        faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)
        import exfm.trainer.run  # noqa: F401

        pipe.send_bytes(b"ready")
        while True:
            try:
                call = pipe.recv_bytes()
            except EOFError:
                return
            pipe.send_bytes(_answer(call))


def _answer(call: bytes) -> bytes:
    module, name, args, rank, world_size, store = pickle.loads(call)
    try:
        result = _in_group(getattr(importlib.import_module(module), name), args, rank, world_size, store)
        return pickle.dumps((True, result, ""))
    except BaseException as error:
        text = traceback.format_exc()
        try:
            return pickle.dumps((False, error, text))
        except Exception:
            return pickle.dumps((False, RuntimeError(str(error)), text))


def local_ranks(world_size: int) -> int:
    """Ranks per node: four ranks stand for two nodes of two."""
    return 2 if world_size == 4 else world_size


def _in_group(fn: Callable[..., Any], args: tuple[Any, ...], rank: int, world_size: int, store: str) -> Any:
    import torch.distributed as dist
    from torchrec.distributed import collective_utils, comm

    # TorchRec asks rank 0 once per process; ranks that were in different calls would disagree whether to ask
    collective_utils._INITIALIZED = False
    # groups of nodes that it keeps are those of a call that is over
    comm._INTRA_PG = comm._CROSS_PG = None
    os.environ["LOCAL_WORLD_SIZE"] = str(local_ranks(world_size))
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT_S / 3),
    )
    try:
        return fn(*args)
    finally:
        # also where fn raised: peers that wait for this rank then fail at once
        dist.destroy_process_group()


class RankPool:
    """Rank processes, EAGER_RANKS of them started at once, used by one call at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls = 0
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        self._start()

    def _start(self) -> None:
        self.pipes, self.processes, self.ready = [], [], 0
        self._grow(EAGER_RANKS)

    def _grow(self, n: int) -> None:
        context = forking()
        for rank in range(len(self.pipes), n):
            own, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, str(self._stacks(rank))), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(own)
            self.processes.append(process)

    def _wait(self, n: int) -> None:
        """Until the first n ranks have imported what they need: that counts for no call's time."""
        self._grow(n)
        while self.ready < n:
            assert self.pipes[self.ready].poll(READY_S), f"rank {self.ready} did not start within {READY_S:g} s"
            self.pipes[self.ready].recv_bytes()
            self.ready += 1

    def _stacks(self, rank: int) -> Path:
        return self.folder / f"stacks-{rank}.txt"

    def __call__(self, n: int, fn: Callable[..., Any], *args: Any, timeout_s: float = TIMEOUT_S) -> list[Any]:
        """fn(*args) on n ranks; their results in order. RankFailed where a rank raises, dies or hangs."""
        self._wait(n)
        self.calls += 1
        store = str(self.folder / f"store-{self.calls}")
        for rank, pipe in enumerate(self.pipes[:n]):
            pipe.send_bytes(pickle.dumps((fn.__module__, fn.__qualname__, args, rank, n, store)))
        answers = self._collect(n, timeout_s)
        failed = {r: a for r, a in answers.items() if not a[0]}
        if len(answers) < n:
            lost = sorted(set(range(n)) - set(answers))
            stacks = self._dump(lost)
            self.restart()
            texts = [f"rank {r} raised:\n{a[2]}" for r, a in failed.items()]
            raise RankFailed("\n".join([f"rank(s) {lost} died or hung\n{stacks}", *texts]), self._errors(failed))
        if failed:
            raise RankFailed("\n".join(f"rank {r} raised:\n{a[2]}" for r, a in failed.items()), self._errors(failed))
        return [answers[rank][1] for rank in range(n)]

    @staticmethod
    def _errors(failed: dict[int, Any]) -> dict[int, BaseException]:
        return {rank: answer[1] for rank, answer in failed.items()}

    def _collect(self, n: int, timeout_s: float) -> dict[int, Any]:
        """Answers by rank, until all are there, one died, or the time is over; after a failure only GRACE_S more."""
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        while len(answers) < n and (left := deadline - time.monotonic()) > 0:
            waiting = {self.pipes[r]: r for r in range(n) if r not in answers}
            for pipe in wait(list(waiting), timeout=left):
                rank = waiting[pipe]  # type: ignore[index]
                try:
                    answers[rank] = pickle.loads(self.pipes[rank].recv_bytes())
                except (EOFError, OSError):
                    return answers
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        return answers

    def _dump(self, ranks: list[int]) -> str:
        """The stacks of ranks that do not answer."""
        for rank in ranks:
            if self.processes[rank].is_alive():
                os.kill(self.processes[rank].pid, signal.SIGUSR2)
        time.sleep(0.5)
        return "\n".join(f"rank {r}:\n{self._stacks(r).read_text()}" for r in ranks if self._stacks(r).exists())

    def restart(self) -> None:
        self._kill()
        self._start()

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(5)
        self._kill()

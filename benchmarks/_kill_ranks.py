"""Ranks that can be killed: forked from a server that has imported everything, or started, and started again, by torchrun.

Both offer: ranks() -> living processes in the order of their ranks; ended(); settle(): wait until nothing of the life that was
hit is left; succeeded(); revive(): the next life; codes(); close().
"""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml

from exfm.launch.local import LocalJob, descendants
from exfm.trainer.config import JobConfig, parse_config
from exfm.trainer.env import RankEnv
from exfm.trainer.run import rank_main
from exfm.trainer.score_config import ScoreConfig

GRACE_S = 4.0  # between SIGTERM and SIGKILL for ranks whose peer died
COLLECTIVE_S = 60.0
SERVER = multiprocessing.get_context("forkserver")

Raw = dict[str, Any]


def warm_up() -> None:
    """Start the server that forks ranks; it imports in the background."""
    from multiprocessing import forkserver

    # for the server alone: it must have no threads when it forks, and BLAS would start some
    os.putenv("OMP_NUM_THREADS", "1")
    # what is installed: the server does not know this process's sys.path
    # torch.distributed.optim: TorchRec imports it late, and it compiles for half a second
    SERVER.set_forkserver_preload(["exfm.trainer.run", "exfm.launch.cli", "torch.distributed.optim"])
    forkserver.ensure_running()


def _be_rank(
    raw: Raw, rank: int, world_size: int, life: int, store: str, log: str, prepare: Callable[[], None] | None
) -> None:
    """One rank, to the end of its process."""
    code = 1
    with open(log, "a") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    try:
        if prepare is not None:
            prepare()
        kind: Any = ScoreConfig if "score" in raw else JobConfig
        config = parse_config(raw, "the campaign's job", kind)
        timeout = timedelta(seconds=COLLECTIVE_S)
        group = dist.FileStore(store, world_size)
        dist.init_process_group("gloo", timeout=timeout, store=group, rank=rank, world_size=world_size)
        code = rank_main(config, RankEnv(rank, world_size, rank, world_size, life, True, f"life-{life}"), follow=True)
        dist.destroy_process_group()
    except Exception:
        traceback.print_exc()
        code = code or 1
    finally:
        os._exit(code)


class Forked:
    """Ranks forked from the server: a new one is there in milliseconds."""

    life_begins_with = None  # a life's clock starts when it is started

    def __init__(self, raw: Raw, world_size: int, prepare: Callable[[], None] | None = None) -> None:
        self.raw, self.world_size, self.prepare = raw, world_size, prepare
        self.run = Path(raw["run"]["folder"])
        self.folder = self.run / "logs"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.life, self.forced = -1, 0
        self.processes: list[Any] = []
        self.revive()

    def revive(self) -> None:
        self.life += 1
        store, log = str(self.folder / f"store-{self.life}"), str(self.folder / "ranks.log")
        self.processes = [
            SERVER.Process(
                target=_be_rank,
                args=(self.raw, rank, self.world_size, self.life, store, log, self.prepare),
                daemon=True,
            )
            for rank in range(self.world_size)
        ]
        for process in self.processes:
            process.start()

    def ranks(self) -> list[int]:
        return [p.pid for p in self.processes if p.exitcode is None]

    def begun(self) -> bool:
        return True

    def ended(self) -> bool:
        return not self.ranks()

    def settle(self) -> None:
        """As torchrun does it: the others get SIGTERM, and SIGKILL after a grace. forced: how many needed the latter."""
        for pid in self.ranks():
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        while self.ranks() and time.monotonic() < deadline:
            time.sleep(0.01)
        for process in self.processes:
            if process.exitcode is None:
                self.forced += 1
                process.kill()
            process.join()

    def kill(self) -> None:
        for pid in self.ranks():
            os.kill(pid, signal.SIGKILL)

    def succeeded(self) -> bool:
        return self.ended() and not any(self.codes())

    def codes(self) -> list[int]:
        return [p.exitcode for p in self.processes]

    def close(self) -> None:
        for process in self.processes:
            if process.exitcode is None:
                process.kill()
            process.join()
            process.close()


class Torchrun:
    """The same ranks under `torchrun --max-restarts`, which starts the next life by itself."""

    life_begins_with = "config.yaml"  # rank 0 writes it anew when it begins: importing takes torchrun's ranks long

    def __init__(self, raw: Raw, world_size: int, prepare: Callable[[], None] | None = None) -> None:
        assert prepare is None, "torchrun's ranks run nothing but the product"
        self.folder, self.forced, self.life = Path(raw["run"]["folder"]), 0, 0
        self.hit: list[int] = []
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "job.yaml").write_text(yaml.safe_dump(raw))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "5"]
        command += ["--nproc-per-node", str(world_size), "-m", "exfm.trainer", str(self.folder / "job.yaml")]
        (self.folder / "logs").mkdir(exist_ok=True)
        with open(self.folder / "logs" / "ranks.log", "a") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)

    def ranks(self) -> list[int]:
        try:
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
            commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
        except OSError:
            return []
        self.hit = [pid for pid, command in commands.items() if b"exfm.trainer" in command]
        return self.hit

    def ended(self) -> bool:
        return self.process.poll() is not None

    def settle(self) -> None:
        """Wait until the ranks of this life are gone; those of the next are then still importing."""
        before = set(self.hit)
        while not self.ended() and before & set(self.ranks()):
            time.sleep(0.02)

    def revive(self) -> None:
        self.life += 1

    def succeeded(self) -> bool:
        return self.process.poll() == 0

    def codes(self) -> list[int]:
        return [self.process.returncode]

    def close(self) -> None:
        if not self.ended():
            # every rank has a session of its own and outlives torchrun; a stopped torchrun starts no more of them
            self.process.send_signal(signal.SIGSTOP)
            ranks = self.ranks()
            self.process.kill()
            for pid in ranks:
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


class Launched:
    """A job as `exfm run` launches it: torchrun starts ranks again; a job that was killed whole is launched anew."""

    forced = 0

    def __init__(self, raw: Raw, world_size: int) -> None:
        self.run, self.world_size = Path(raw["run"]["folder"]), world_size
        self.run.mkdir(parents=True, exist_ok=True)
        self.config = self.run / "job.yaml"
        self.config.write_text(yaml.safe_dump(raw))
        self.hit: list[int] = []
        self.launch()

    def launch(self) -> None:
        self.since = time.time()
        self.job = LocalJob(self.config, self.world_size, max_restarts=100, follow=True)
        self.job.check()
        self.job.start({"PATH": os.defpath})

    def begun(self) -> bool:
        """Whether rank 0 of the present life is past importing, building and restoring."""
        config = self.run / "config.yaml"
        return config.exists() and config.stat().st_mtime > self.since

    def ranks(self) -> list[int]:
        assert self.job.process is not None
        commands = {}
        for pid in descendants(self.job.process.pid):
            with contextlib.suppress(OSError):
                commands[pid] = Path(f"/proc/{pid}/cmdline").read_bytes()
        self.hit = [pid for pid, command in commands.items() if b"exfm.trainer" in command]
        return self.hit

    def ended(self) -> bool:
        self.job.settle()
        return not self.job.running()

    def kill(self) -> None:
        """torchrun too."""
        assert self.job.process is not None
        self.job.kill()
        self.job.process.wait()

    def settle(self) -> None:
        """Wait until the ranks of this life are gone."""
        wait_gone(self.hit, self.ended)

    def revive(self) -> None:
        self.since = time.time()
        if self.ended():
            self.launch()

    def succeeded(self) -> bool:
        return self.ended() and self.codes() == [0]

    def codes(self) -> list[int]:
        return [self.job.outcome()[0]]

    def close(self) -> None:
        self.kill()


def wait_gone(pids: list[int], ended: Callable[[], bool]) -> None:
    """Until none of the processes is there any more (a zombie is not), or all has ended."""
    while not ended() and any(_alive(pid) for pid in pids):
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False

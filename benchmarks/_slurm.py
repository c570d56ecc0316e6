"""A real SLURM of several nodes on this machine, and looking at the jobs that run on it."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from exfm.launch.slurm import cluster as queue
from exfm.launch.slurm.cluster import Queued

SCRIPT = Path(__file__).resolve().with_name("slurm_cluster.sh")


class SlurmCluster:
    """Nodes n1..nN; nothing outside `state` is touched. Its commands need `SLURM_CONF`, which is set while it runs."""

    def __init__(self, state: Path, nodes: int) -> None:
        self.state, self.nodes = state, nodes
        self("start", NODES=str(nodes))
        os.environ["SLURM_CONF"] = str(state / "etc/slurm.conf")

    def __call__(self, *command: str, **variables: str) -> None:
        done = subprocess.run(
            [str(SCRIPT), *command, str(self.state)], capture_output=True, text=True, env=os.environ | variables
        )
        if done.returncode:
            raise RuntimeError(f"{SCRIPT} {' '.join(command)}: {done.stderr}")

    def close(self) -> None:
        self("stop")
        os.environ.pop("SLURM_CONF", None)
        shutil.rmtree(self.state, ignore_errors=True)

    def crash(self, node: str) -> None:
        """At once, with all its processes, as a power cut would."""
        os.kill(int((self.state / f"run/{node}.pid").read_text().split()[0]), signal.SIGKILL)

    def revive(self) -> None:
        """All nodes that are dead."""
        self("start", NODES=str(self.nodes))

    def restart_controller(self) -> None:
        """slurmctld is killed, and started again from its saved state."""
        pid = int((self.state / "run/slurmctld.pid").read_text().split()[0])
        os.kill(pid, signal.SIGKILL)
        wait_until(
            lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split(")")[1][:3]
        )
        self("start", NODES=str(self.nodes))


def look(job_id: str) -> Queued:
    return queue.jobs([job_id])[job_id]


def nodes_of(job_id: str) -> list[str]:
    """In SLURM's order: the first one runs the script."""
    return queue.ask("scontrol", "show", "hostnames", look(job_id).nodes).split()


def records(run: Path) -> list[dict[str, Any]]:
    """How far a job said that it was, line by line."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [x for x in map(json.loads, lines) if x["kind"] in ("progress", "slice")]


def wait_until(condition: Callable[[], object], timeout_s: float = 240.0, every_s: float = 0.2) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"it did not come to that in {timeout_s:g} s")
        time.sleep(every_s)

"""torchrun on several hosts without a scheduler: the command to type on each."""

import shlex
import uuid
from collections.abc import Sequence
from pathlib import Path

from exfm.data.errors import UserError
from exfm.launch.local import LocalJob


def commands(job: LocalJob, hosts: Sequence[str], python: str, port: int) -> list[tuple[str, str]]:
    """(host, its command line). The first host keeps the store of the rendezvous, so it must be reachable from all under that name.

    job: its nproc is of every host. Checked as if all ranks were here; UserError for what cannot work.
    """
    if not hosts or any(not h or h != h.strip() or h.startswith("-") for h in hosts):
        raise UserError(f"--hosts is '{','.join(hosts)}'; give host names with commas between them")
    if twice := sorted({h for h in hosts if hosts.count(h) > 1}):
        raise UserError(
            f"--hosts names {', '.join(twice)} more than once; a host starts all its ranks with one torchrun"
        )
    if not 1024 <= port <= 65535:
        raise UserError(f"--port is {port}; use 1024 to 65535")
    whole = LocalJob(job.config, job.nproc * len(hosts), job.sets, job.max_restarts, job.follow)
    whole.check()
    launch = [python, "-m", "torch.distributed.run", "--nnodes", str(len(hosts)), "--nproc-per-node", str(job.nproc)]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts[0]}:{port}", "--rdzv-id", uuid.uuid4().hex[:12]]
    launch += ["--max-restarts", str(job.max_restarts), "-m", "exfm.trainer", str(job.config.absolute())]
    launch += [part for item in job.sets for part in ("--set", item)] + ["--follow"] * job.follow
    line = f"cd {shlex.quote(str(Path.cwd()))} && OMP_NUM_THREADS={job.job.run.threads_per_rank} {shlex.join(launch)}"
    return [(host, line) for host in hosts]

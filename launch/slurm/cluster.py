"""Asking SLURM with its own commands: what a partition has, sending scripts, what became of jobs."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exfm.data.errors import UserError
from exfm.launch.slurm.job import SlurmJob, seconds_of

# file systems that are of one machine, as mounts name them
LOCAL = (
    "ext2",
    "ext3",
    "ext4",
    "xfs",
    "btrfs",
    "zfs",
    "f2fs",
    "overlay",
    "tmpfs",
    "ramfs",
    "aufs",
    "jfs",
    "reiserfs",
    "vfat",
)
PENDING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "CONFIGURING")


def has_slurm() -> bool:
    return shutil.which("sbatch") is not None


def ask(*command: str) -> str:
    """What a command of SLURM prints. UserError with its own words if it refuses."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not on PATH; run this on a login node of the cluster") from None
    if done.returncode:
        raise UserError(f"{command[0]}: {done.stderr.strip() or f'ended with {done.returncode}'}")
    return done.stdout


def submit(script: Path, dependency: str = "", tasks: Sequence[int | None] | None = None) -> str:
    """Send a script with sbatch; the job's id. tasks: of an array. UserError with sbatch's own words if it refuses."""
    if not has_slurm():
        raise UserError(f"sbatch is not on PATH; on a login node of the cluster: sbatch {shlex.quote(str(script))}")
    options = [f"--dependency={dependency}"] if dependency else []
    if tasks is not None:
        options.append(f"--array={','.join(map(str, tasks))}")
    return ask("sbatch", "--parsable", *options, str(script.absolute())).strip().split(";")[0]


# ------------------------------------------------------------------------------------------------ before submitting


@dataclass(frozen=True)
class Partition:
    """A kind of node of a partition. time_s: the longest a job may take, None for no limit; gpus: of a node."""

    name: str
    default: bool
    up: bool
    nodes: int
    gpus: int
    cpus: int
    time_s: int | None


def partitions() -> list[Partition]:
    """One for every kind of node that a partition has."""
    found = []
    for line in ask("sinfo", "-h", "-o", "%R|%P|%a|%D|%G|%c|%l").splitlines():
        name, starred, available, nodes, gres, cpus, limit = line.split("|")
        gpus = sum(int(n) for n in re.findall(r"gpu:(?:[^:,()]+:)?(\d+)", gres))
        time_s = None if limit in ("infinite", "n/a") else seconds_of(limit)
        own = (name, starred.endswith("*"), available == "up", int(nodes), gpus, int(cpus.rstrip("+")), time_s)
        found.append(Partition(*own))
    return found


def check_cluster(job: SlurmJob) -> None:
    """UserError for what this cluster does not have. What only its database knows is left to sbatch, where there is none."""
    everything = partitions()
    names = sorted({p.name for p in everything})
    if job.partition is not None:
        own = [p for p in everything if p.name in job.partition.split(",")]
        if unknown := [n for n in job.partition.split(",") if n not in names]:
            raise UserError(f"partition '{','.join(unknown)}' does not exist; there are: {', '.join(names)}")
    else:
        own = [p for p in everything if p.default]
        if not own:
            raise UserError(f"this cluster has no default partition; give --partition: {', '.join(names)}")
    where = f"partition '{own[0].name}'"
    if not any(p.up for p in own):
        raise UserError(f"{where} is down")
    if job.gpus_per_node > (most := max(p.gpus for p in own)):
        raise UserError(f"{job.gpus_per_node} GPUs per node asked for; nodes of {where} have at most {most}")
    wanted = job.nproc_per_node * job.cpus_per_rank
    fitting = [p for p in own if p.gpus >= job.gpus_per_node]
    if wanted > (most := max(p.cpus for p in fitting)):
        raise UserError(
            f"{job.nproc_per_node} ranks of {job.cpus_per_rank} cores each want {wanted} cores of a node; nodes of {where} have at "
            f"most {most}: use --cpus-per-rank {max(1, most // job.nproc_per_node)}"
        )
    if job.least_nodes > (most := sum(p.nodes for p in fitting if p.cpus >= wanted)):
        raise UserError(f"{job.least_nodes} nodes asked for; {where} has {most} of that kind")
    limits = [p.time_s for p in own]
    if None not in limits and seconds_of(job.time) > (longest := max(t for t in limits if t is not None)):
        raise UserError(f"time {job.time} is over the limit of {where}, {longest // 60} minutes")
    for kind, value, command in (
        ("account", job.account, ("sacctmgr", "-nP", "show", "assoc", f"user={_user()}", "format=account")),
        ("qos", job.qos, ("sacctmgr", "-nP", "show", "qos", "format=name")),
    ):
        if value is not None and (known := _listed(command)) and value not in known:
            raise UserError(f"{kind} '{value}' does not exist for you; there are: {', '.join(sorted(known))}")


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def _listed(command: Sequence[str]) -> set[str]:
    """Names from SLURM's database; none where it has none."""
    try:
        return set(ask(*command).split())
    except UserError:
        return set()


def check_shared(folder: Path, mounts: Path = Path("/proc/self/mounts")) -> None:
    """UserError for a folder on a file system that no other node sees."""
    at = folder.absolute()
    if not mounts.exists():
        return
    found = ("", "unknown")
    for line in mounts.read_text().splitlines():
        _, place, kind, *_ = line.split(" ")
        place = place.encode().decode("unicode_escape")
        if (at == Path(place) or Path(place) in at.parents) and len(place) >= len(found[0]):
            found = (place, kind)
    if found[1] in LOCAL:
        raise UserError(
            f"run folder {folder} is on {found[0]}, a file system of this machine alone ({found[1]}): other nodes would not see what a "
            "job commits; set run.folder on a shared one, or give --assume-shared if all nodes do see it"
        )


# ------------------------------------------------------------------------------------------------ afterwards


@dataclass(frozen=True)
class Queued:
    """A job as SLURM tells it. seconds, limit_s: of this attempt; None where there is no limit."""

    job_id: str
    state: str
    nodes: str = ""
    seconds: int = 0
    limit_s: int | None = None
    restarts: int = 0
    reason: str = ""

    @property
    def live(self) -> bool:
        return self.state in (*PENDING, "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT")


def jobs(ids: Sequence[str]) -> dict[str, Queued]:
    """By id, of those that SLURM still knows; "4711_2" is a task of an array. UserError where SLURM does not answer."""
    found = {}
    for job_id in ids:
        done = subprocess.run(["scontrol", "show", "job", "-o", job_id], capture_output=True, text=True)
        if done.returncode:
            if "Invalid job id" in done.stderr:
                continue  # longer ago than MinJobAge
            raise UserError(f"scontrol: {done.stderr.strip()}")
        for line in done.stdout.splitlines():
            found[job_id] = _read(job_id, line)
    return found


def _read(job_id: str, line: str) -> Queued:
    def of(key: str) -> str:
        match = re.search(rf"(?:^|\s){key}=(\S*)", line)
        return "" if match is None or match[1] in ("(null)", "None", "N/A") else match[1]

    limit = of("TimeLimit")
    return Queued(
        job_id,
        of("JobState"),
        of("NodeList"),
        seconds_of(of("RunTime") or "0"),
        None if limit in ("", "UNLIMITED", "Partition_Limit") else seconds_of(limit),
        int(of("Restarts") or 0),
        of("Reason"),
    )


def cancel(ids: Sequence[str]) -> None:
    if ids:
        ask("scancel", *ids)

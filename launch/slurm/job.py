"""What to ask of SLURM for one job, or for an array of jobs alike. Every mistake is a UserError, before anything is submitted."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exfm.data.errors import UserError

TIME = re.compile(r"(\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2})")
DEPENDENCY = re.compile(r"(after|afterany|afterok|afternotok|aftercorr|singleton)(:\d+(_\d+)?(\+\d+)?)*")


@dataclass(frozen=True)
class Member:
    """One job of a script; of an array there are several. config, run_folder: on a file system that all nodes share; sets:
    `section.key=value` over the config; follow: of a scorer, see `exfm score`.
    """

    config: Path
    run_folder: Path
    sets: tuple[str, ...] = ()
    follow: bool = False


@dataclass(frozen=True)
class SlurmJob:
    """One script.

    nodes, min_nodes: an attempt starts with as many as are free, min_nodes at least (default: nodes).
    gpus_per_node: 0 trains on CPU. nproc_per_node: ranks per node, at most one per GPU.
    partition, account, qos, constraint: None leaves the choice to the cluster. dependency: as sbatch reads it.
    time: limit of one attempt as sbatch reads it: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS.
    stop_s: seconds before that limit at which the ranks are told to commit and stop.
    max_requeues: attempts after the first one. max_restarts: of the ranks inside one attempt, after one of them has failed.
    container, mounts: image and folders for srun's pyxis plugin (--container-image, --container-mounts).
    env_file: read by bash before the ranks start. extra: further sbatch options, such as "--exclusive".
    logs: folder of the script's and the nodes' output; default: logs/ in the first member's run folder.
    python: the interpreter, by its path, because a job may start without its PATH.
    """

    members: tuple[Member, ...]
    nodes: int = 1
    min_nodes: int | None = None
    gpus_per_node: int = 0
    nproc_per_node: int = 1
    cpus_per_rank: int = 4
    name: str = "exfm"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    dependency: str | None = None
    time: str = "24:00:00"
    stop_s: int = 300
    max_requeues: int = 100
    max_restarts: int = 3
    container: str | None = None
    mounts: str | None = None
    env_file: Path | None = None
    extra: tuple[str, ...] = ()
    logs: Path | None = None
    python: str = "python3"

    @property
    def least_nodes(self) -> int:
        return self.nodes if self.min_nodes is None else self.min_nodes

    @property
    def log_folder(self) -> Path:
        return (self.logs or self.members[0].run_folder / "logs").absolute()

    def __post_init__(self) -> None:
        if not self.members:
            raise UserError("a script needs a job")
        self._check_numbers()
        self._check_texts()
        for member in self.members:
            if not member.config.is_file():
                raise UserError(f"config {str(member.config)!r} is not a file; give the job's YAML file")
        if self.env_file is not None and not self.env_file.is_file():
            raise UserError(f"env_file {str(self.env_file)!r} is not a file; give a file of shell assignments")
        if self.mounts is not None and self.container is None:
            raise UserError(f"mounts {self.mounts!r} are of a container; give its image too (--container)")
        if not TIME.fullmatch(self.time):
            raise UserError(f"time {self.time!r} is not a SLURM time; write for instance 90, 12:00:00 or 2-00:00:00")
        if self.dependency is not None and not all(map(DEPENDENCY.fullmatch, re.split("[,?]", self.dependency))):
            raise UserError(f"dependency {self.dependency!r} is none of SLURM's; write for instance afterok:4711")
        for option in self.extra:
            if not re.match(r"--[a-z][a-z-]*(=|$)", option):
                raise UserError(f"extra option {option!r} is not of the form --name or --name=value")
        # SLURM expands % and reads \ as "expand nothing" in the names of log files.
        for folder in (self.log_folder, *(m.run_folder.absolute() for m in self.members)):
            if "%" in str(folder) or "\\" in str(folder):
                raise UserError(f"folder {str(folder)!r} contains % or \\, which SLURM expands; rename it")

    def _check_numbers(self) -> None:
        least = {
            "nodes": 1,
            "gpus_per_node": 0,
            "nproc_per_node": 1,
            "cpus_per_rank": 1,
            "stop_s": 30,
            "max_requeues": 0,
            "max_restarts": 0,
        }
        for field, limit in least.items():
            value = getattr(self, field)
            if not isinstance(value, int) or value < limit:
                raise UserError(f"{field} is {value!r}; it must be a whole number of at least {limit}")
        if not 1 <= self.least_nodes <= self.nodes:
            raise UserError(f"min_nodes is {self.min_nodes}; use 1 to {self.nodes}, the number of nodes")
        if 0 < self.gpus_per_node < self.nproc_per_node:
            raise UserError(
                f"{self.nproc_per_node} ranks per node but {self.gpus_per_node} GPUs: a rank needs a GPU of its own; "
                f"use nproc_per_node {self.gpus_per_node} or gpus_per_node {self.nproc_per_node}"
            )

    def _check_texts(self) -> None:
        named = (
            "name",
            "partition",
            "account",
            "qos",
            "constraint",
            "container",
            "mounts",
            "env_file",
            "python",
            "logs",
        )
        texts: dict[str, Any] = {name: getattr(self, name) for name in named}
        for i, member in enumerate(self.members):
            of = f" of job {i}" if len(self.members) > 1 else ""
            texts |= {f"config{of}": member.config, f"run_folder{of}": member.run_folder}
            texts |= {f"override {j}{of}": item for j, item in enumerate(member.sets)}
        texts |= {f"extra option {i}": option for i, option in enumerate(self.extra)}
        for field, value in texts.items():
            if value is None:
                continue
            if not (text := str(value)).strip():
                raise UserError(f"{field} is empty")
            if any(ord(c) < 32 or ord(c) == 127 for c in text):
                raise UserError(f"{field} {text!r} contains a line break or another control character; remove it")


def seconds_of(time: str) -> int:
    """Of a SLURM time."""
    days, _, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days:  # D-HH, D-HH:MM, D-HH:MM:SS
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 1:
        hours, minutes, seconds = 0, parts[0], 0
    else:
        hours, minutes, seconds = [0] * (3 - len(parts)) + parts
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds

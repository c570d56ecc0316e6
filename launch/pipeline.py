"""A pipeline file: jobs that run together, on this machine (`exfm stream`) or each with its own nodes (`exfm launch slurm`)."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from exfm.data.errors import UserError
from exfm.launch.local import LocalJob
from exfm.launch.slurm.job import Member, SlurmJob
from exfm.trainer.config import JobConfig, load_config
from exfm.trainer.score_config import load_any


class SlurmNeeds(BaseModel):
    """What one job asks of SLURM; what it leaves out is taken from the command line. Fields as in launch/slurm/job.py."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    nodes: int | None = None
    min_nodes: int | None = None
    gpus_per_node: int | None = None
    nproc_per_node: int | None = None
    cpus_per_rank: int | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str | None = None


class PipelineJob(BaseModel):
    """One job; config is relative to the pipeline file. set: overrides `section.key: value`. after: names of jobs (run.name) that
    must have ended well before SLURM starts this one; without it jobs run together and wait for each other's slices.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    config: str
    nproc: int | None = Field(None, gt=0)
    set: dict[str, object] = Field(default_factory=dict)
    after: tuple[str, ...] = ()
    slurm: SlurmNeeds = SlurmNeeds()

    @property
    def sets(self) -> tuple[str, ...]:
        return tuple(f"{key}={json.dumps(value)}" for key, value in self.set.items())


class PipelineConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    jobs: tuple[PipelineJob, ...] = Field(min_length=1)


def is_pipeline(raw: dict[str, Any]) -> bool:
    return "jobs" in raw and "run" not in raw


def load_pipeline(path: Path, nproc: int) -> list[LocalJob]:
    """The jobs of a pipeline file; nproc: ranks of the first one if it does not say. UserError for two jobs in one folder."""
    jobs = []
    for number, job in enumerate(load_config(path, [], PipelineConfig).jobs):
        # a scorer among other jobs waits for what they have yet to make
        ranks = job.nproc or (nproc if number == 0 else 1)
        jobs.append(LocalJob(path.parent / job.config, ranks, job.sets, follow=True))
    _apart(path, [str(j.folder) for j in jobs])
    return jobs


@dataclass(frozen=True)
class Script:
    """One script of a pipeline. names: of its jobs, in the order of its members; after: names that it waits for."""

    job: SlurmJob
    names: tuple[str, ...]
    after: tuple[str, ...] = ()


def scripts_of(path: Path, common: SlurmJob) -> list[Script]:
    """The scripts of a pipeline file: one for a job, one for all students that ask for the same nodes (an array).

    common: what jobs have that do not say otherwise. UserError for two jobs of one name or folder, and for an `after` that is no job.
    """
    found: list[Script] = []
    students: dict[tuple[SlurmNeeds, tuple[str, ...]], int] = {}
    names: list[str] = []
    folders: list[str] = []
    for own in load_config(path, [], PipelineConfig).jobs:
        config = (path.parent / own.config).absolute()
        job = load_any(config, list(own.sets))
        student = isinstance(job, JobConfig) and job.distillation.learn is not None
        member = Member(config, Path(job.run.folder), own.sets, follow=not isinstance(job, JobConfig))
        names.append(job.run.name)
        folders.append(str(member.run_folder.absolute()))
        key = own.slurm, own.after
        if student and key in students:
            place = students[key]
            before = found[place]
            members = (*before.job.members, member)
            array = replace(before.job, members=members, name=f"{common.name}-students")
            found[place] = replace(before, job=array, names=(*before.names, job.run.name))
            continue
        if student:
            students[key] = len(found)
        changes = {k: v for k, v in own.slurm.model_dump().items() if v is not None}
        if own.slurm.gpus_per_node is not None and own.slurm.nproc_per_node is None:
            changes["nproc_per_node"] = max(own.slurm.gpus_per_node, 1)
        if own.slurm.nodes is not None and own.slurm.min_nodes is None:
            changes["min_nodes"] = None
        name = f"{common.name}-{job.run.name}"
        found.append(Script(replace(common, members=(member,), name=name, **changes), (job.run.name,), own.after))
    _apart(path, folders)
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise UserError(f"{path}: several jobs are named {', '.join(twice)}; set run.name for each")
    for script in found:
        if unknown := [n for n in script.after if n not in names or n in script.names]:
            raise UserError(f"{path}: {script.names[0]} comes after {', '.join(unknown)}; there are: {', '.join(names)}")
    return _ordered(path, found)


def _ordered(path: Path, scripts: list[Script]) -> list[Script]:
    """Each behind those that it waits for: SLURM wants to know a job before another depends on it."""
    placed: list[Script] = []
    while len(placed) < len(scripts):
        known = {n for s in placed for n in s.names}
        ready = [s for s in scripts if s not in placed and known.issuperset(s.after)]
        if not ready:
            waiting = [n for s in scripts if s not in placed for n in s.names]
            raise UserError(f"{path}: {', '.join(waiting)} wait for each other; take one out of `after`")
        placed += ready
    return placed


def _apart(path: Path, folders: list[str]) -> None:
    if twice := {f for f in folders if folders.count(f) > 1}:
        raise UserError(f"{path}: several jobs write to {', '.join(sorted(twice))}; set run.folder for each")

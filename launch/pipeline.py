"""A pipeline file: jobs that run together."""

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from exfm.data.errors import UserError
from exfm.launch.local import LocalJob
from exfm.trainer.config import load_config


class PipelineJob(BaseModel):
    """One job; config is relative to the pipeline file. set: overrides `section.key: value`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    config: str
    nproc: int | None = Field(None, gt=0)
    set: dict[str, object] = Field(default_factory=dict)


class PipelineConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    jobs: tuple[PipelineJob, ...] = Field(min_length=1)


def load_pipeline(path: Path, nproc: int) -> list[LocalJob]:
    """The jobs of a pipeline file; nproc: ranks of the first one if it does not say. UserError for two jobs in one folder."""
    pipeline = load_config(path, [], PipelineConfig)
    jobs = []
    for number, job in enumerate(pipeline.jobs):
        sets = tuple(f"{key}={json.dumps(value)}" for key, value in job.set.items())
        # a scorer among other jobs waits for what they have yet to make
        ranks = job.nproc or (nproc if number == 0 else 1)
        jobs.append(LocalJob(path.parent / job.config, ranks, sets, follow=True))
    folders = [str(j.folder) for j in jobs]
    if twice := {f for f in folders if folders.count(f) > 1}:
        raise UserError(f"{path}: several jobs write to {', '.join(sorted(twice))}; set run.folder for each")
    return jobs

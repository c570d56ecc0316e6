"""A scorer's configuration: which teacher, which slices, how old its snapshots may be."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from exfm.checkpoints.storage import Storage
from exfm.data.errors import UserError
from exfm.data.manifest import Stream, open_stream
from exfm.distillation.version import Identity, Origin
from exfm.sharding.config import ShardingConfig
from exfm.trainer.config import JobConfig, RunConfig, load_config, read_raw


class ScoreSection(BaseModel):
    """Section `score`. Slice t is scored with the snapshot after slice t - 1 - lag, whatever newer one there is.

    teacher: folder of the teacher's run, whose config must publish snapshots (`checkpoint.snapshots`). log: name under
    <run.folder>/supervision; default: the teacher's run name. first: default: the first slice that has such a snapshot.
    hold: so many slices older a snapshot may be where the right one was refused by the publish gate or is not there after
    wait_s. ttl_s: supervision older than this is removed; 0: none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    teacher: str
    log: str = Field("", pattern=r"^[A-Za-z0-9._-]*$")
    lag: int = Field(0, ge=0)
    hold: int = Field(0, ge=0)
    first: int | None = Field(None, ge=0)
    last: int | None = Field(
        None, description="one past the last slice; default: the teacher's, or the end of the stream"
    )
    global_batch: int = Field(8192, gt=0, description="examples per step over all ranks")
    prefetch: int = Field(4, ge=0)
    wait_s: float = Field(
        600.0, ge=0, description="how long a snapshot is waited for before an older one stands in (hold)"
    )
    ttl_s: float = Field(0.0, ge=0)


class ScoreConfig(BaseModel):
    """One scorer. sharding: of the teacher's tables over this job's ranks; default: as the teacher's."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    run: RunConfig
    score: ScoreSection
    sharding: ShardingConfig | None = None

    @property
    def teacher_yaml(self) -> Path:
        return Path(self.score.teacher) / "config.yaml"

    def load_teacher(self) -> JobConfig:
        """The teacher's job. UserError where it has not begun or publishes no snapshots."""
        if not self.teacher_yaml.exists():
            raise UserError(
                f"{self.score.teacher} has no config.yaml; name the folder of a teacher's run that has begun"
            )
        teacher = load_config(self.teacher_yaml, [], JobConfig)
        if teacher.checkpoint.snapshots is None:
            raise UserError(
                f"teacher {self.score.teacher} publishes no snapshots to score with; give its config checkpoint.snapshots"
            )
        return teacher


class Scored:
    """What a scorer works on: the teacher, its stream, and for every slice the snapshot that scores it."""

    def __init__(self, config: ScoreConfig) -> None:
        self.config, self.teacher = config, config.load_teacher()
        assert self.teacher.checkpoint.snapshots is not None
        self.every = self.teacher.checkpoint.snapshots.every_slices
        self.stream: Stream = open_stream(self.teacher.stream.path, self.teacher.stream.labels)
        self.teacher_first = self.teacher.stream.first
        earliest = self.teacher_first + self.every + config.score.lag
        first = config.score.first
        if first is not None and first < earliest:
            raise UserError(
                f"score.first is {first}, but teacher {config.score.teacher} has its first snapshot after slice "
                f"{self.teacher_first + self.every - 1}; with lag {config.score.lag} begin at slice {earliest} or later"
            )
        self.first = earliest if first is None else first
        if self.last is not None and self.first >= self.last:
            raise UserError(
                f"there is nothing to score: slices {self.first}..{self.last} of {self.stream.root} with lag {config.score.lag}"
            )

    @property
    def last(self) -> int | None:
        """One past the last slice; None while the stream grows without an end."""
        ends = (self.config.score.last, self.teacher.stream.last, self.stream.info.num_slices)
        return next((end for end in ends if end is not None), None)

    @property
    def snapshots(self) -> str:
        snapshots = self.teacher.checkpoint.snapshots
        assert snapshots is not None
        return snapshots.folder or str(Path(self.config.score.teacher) / "snapshots")

    @property
    def log_name(self) -> str:
        return self.config.score.log or self.teacher.run.name

    @property
    def log_folder(self) -> str:
        return str(Path(self.config.run.folder) / "supervision" / self.log_name)

    def identity(self, origin: Origin) -> Identity:
        """origin: as the teacher's snapshots say."""
        tasks, labels = self.teacher.heads.tasks, self.teacher.stream.labels
        return Identity(self.log_name, self.teacher.digest(), tasks, self.teacher_first, labels, origin)

    def wanted(self, index: int) -> int:
        """The slice whose snapshot scores slice `index`: the newest on the teacher's schedule at or before index - 1 - lag."""
        newest = index - 1 - self.config.score.lag
        return newest - (newest + 1 - self.teacher_first) % self.every

    def job(self) -> JobConfig:
        """The teacher's job as this scorer runs it: its model and features, this job's ranks, batch and folder."""
        teacher, score = self.teacher, self.config.score
        stream: dict[str, Any] = {"global_batch": score.global_batch, "shuffle_window": 0, "prefetch": score.prefetch}
        return teacher.model_copy(
            update={
                "run": self.config.run,
                "stream": teacher.stream.model_copy(update=stream),
                "sharding": self.config.sharding or teacher.sharding,
            }
        )


def check_scorer(config: ScoreConfig, world_size: int, follow: bool) -> None:
    """UserError for what can be known to be wrong before any rank starts."""
    if world_size > config.score.global_batch:
        raise UserError(
            f"{world_size} ranks share a global batch of {config.score.global_batch} examples; use fewer ranks or raise "
            "score.global_batch"
        )
    if config.teacher_yaml.exists() or not follow:  # a teacher that is followed may begin later
        Storage(Scored(config).log_folder).check()


def load_any(path: str | Path, sets: list[str]) -> JobConfig | ScoreConfig:
    """A job's config, a scorer's where it has a section `score`. UserError as load_config."""
    if "score" in read_raw(path, sets):
        return load_config(path, sets, ScoreConfig)
    return load_config(path, sets, JobConfig)

"""Section `checkpoint`: when a job commits, how much of its memory that takes, where it goes and what is kept."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Band = tuple[float, float]
MIB = 2**20


class GateConfig(BaseModel):
    """Bands of the newest slice's progressive evaluation, over all tasks, in which a snapshot may be published."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    ne: Band = (0.0, 1.0)
    calibration: Band = (0.8, 1.25)


class SnapshotConfig(BaseModel):
    """Weights for scoring, published at slice ends. full_every: of so many, the others hold only rows touched since the one
    before. rows: how table rows are stored. folder: local or an fsspec URL; default: <run.folder>/snapshots."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    every_slices: int = Field(1, gt=0)
    full_every: int = Field(1, gt=0)
    rows: Literal["as_trained", "int8"] = "as_trained"
    folder: str = ""
    gate: GateConfig | None = None
    keep: int = Field(2, gt=0)


class WarmStartConfig(BaseModel):
    """What a job without a commit of its own starts from.

    include: regular expressions of canonical names; rename: pattern -> replacement, applied to this job's names to get the
    checkpoint's. Optimiser state goes with its weights.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: str
    include: tuple[str, ...] = (r"tables\..*", r"dense\..*")
    rename: dict[str, str] = Field(default_factory=dict)


class CheckpointConfig(BaseModel):
    """A commit at every `every_slices`-th slice end, at the end, and inside slices every `every_examples` examples (0: never)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    every_slices: int = Field(1, gt=0)
    every_examples: int = Field(0, ge=0)
    folder: str = Field(
        "", description="local folder or fsspec URL (s3://bucket/path); default: <run.folder>/checkpoints"
    )
    staging: Literal["full", "bounded", "copy_on_write"] = Field(
        "full",
        description="full: a copy in host memory, shortest stall everywhere; bounded: buffers alone, training waits until all is "
        "read; copy_on_write: tables are read while training goes on, rows about to change are copied first",
    )
    buffer_mib: int = Field(64, gt=0, description="of each of four buffers per rank through which the state is written")
    when_busy: Literal["wait", "skip"] = Field("wait", description="at a commit point while the last save still runs")
    full_every: int = Field(
        1, gt=0, description="of so many commits one is full, the others hold only rows touched since"
    )
    compact_after: int = Field(0, ge=0, description="merge a chain of so many deltas into a full one; 0: never")
    keep: int = Field(2, gt=0, description="newest commits kept")
    keep_every: int = Field(0, ge=0, description="also keep the first commit of every so many slices; 0: none")
    retries: int = Field(5, ge=0, description="of a request to an object store")
    warm_start: WarmStartConfig | None = None
    snapshots: SnapshotConfig | None = None

    @model_validator(mode="after")
    def _chains_end(self) -> Self:
        if self.compact_after and self.full_every == 1:
            raise ValueError(
                "compact_after merges deltas, but full_every: 1 makes none; set full_every above it or leave it out"
            )
        if self.compact_after >= self.full_every > 1:
            raise ValueError(
                f"compact_after is never reached: every {self.full_every}th commit is full; set it below full_every"
            )
        return self

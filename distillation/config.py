"""Section `distillation`: a teacher publishes its predictions, a student learns from them."""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class PublishConfig(BaseModel):
    """Log the forward pass before each update as supervision (mode forward) under <run>/supervision/<teacher>."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    teacher: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    mode: Literal["forward"] = "forward"
    ttl_s: float = Field(0.0, ge=0, description="supervision committed longer ago is removed; 0: none")


class AdapterConfig(BaseModel):
    """Student adapter: an MLP from the teacher's logit to a corrected logit, fitted on labels by its own Adam.

    fit: `current` follows ExFM's Algorithm 1 (fit on this batch, then use); `previous` uses the adapter as the earlier
    batches left it, so that this batch's labels cannot reach its own targets.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    hidden: tuple[int, ...] = (8,)
    lr: float = Field(0.01, gt=0)
    fit: Literal["current", "previous"] = "current"


class LogConfig(BaseModel):
    """A teacher's log, and the first slice for which it is read: a later one in the list takes over there."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: str = Field(description="folder of a log: <run>/supervision/<teacher>")
    first: int = Field(0, ge=0)


class TeacherConfig(BaseModel):
    """One teacher of a student, which gets distillation heads of its own.

    logs: in order of their first slice; more than one where a new teacher took over. tasks: the student's task -> the
    teacher's, or null for none; a task that is not named has the same name. weight: factor of its losses.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    logs: tuple[LogConfig, ...] = Field(min_length=1)
    tasks: dict[str, str | None] = Field(default_factory=dict)
    weight: float = Field(1.0, ge=0)

    @field_validator("logs")
    @classmethod
    def _in_order(cls, logs: tuple[LogConfig, ...]) -> tuple[LogConfig, ...]:
        first = [log.first for log in logs]
        if first != sorted(set(first)):
            raise ValueError(f"logs begin with slices {first}; give them in order, each with its own first slice")
        return logs

    def task(self, name: str) -> str | None:
        """The teacher's task for a task of the student."""
        return self.tasks.get(name, name)

    def log(self, index: int) -> str | None:
        """The log that is read for a slice; None before the first one begins."""
        return next((log.path for log in reversed(self.logs) if log.first <= index), None)


class LearnConfig(BaseModel):
    """How a student learns from teachers' supervision logs (ExFM equations 2 to 7).

    loss_weight w, label_scale alpha and gradient_scale beta are ExFM's three scalings; w applies to every distillation
    loss. hidden: hidden layers of each distillation head. auxiliary_labels: y^D learns labels, with weight 1, as well as
    predictions (Rec-Distill). warmup_slices: w grows linearly from the first slice on. staleness_half_life: slices of
    staleness after which a prediction counts half; max_staleness: above it, it counts as missing. on_missing: what a missing
    prediction is to a teacher whose log has begun.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    supervision: str = Field("", description="the log of an only teacher: <teacher's run>/supervision/<teacher>")
    teachers: tuple[TeacherConfig, ...] = Field((), description="instead of `supervision`: several, or with options")
    method: Literal["single_head", "auxiliary_head", "student_adapter"] = "student_adapter"
    loss_weight: float = Field(1.0, ge=0)
    label_scale: float = Field(1.0, gt=0)
    gradient_scale: float = Field(1.0, ge=0)
    hidden: tuple[int, ...] = ()
    auxiliary_labels: bool = False
    adapter: AdapterConfig = AdapterConfig()
    warmup_slices: int = Field(0, ge=0)
    staleness_half_life: float | None = Field(None, gt=0)
    max_staleness: int | None = Field(None, ge=0)
    wait_s: float = Field(600.0, ge=0, description="how long a slice's supervision is waited for")
    on_missing: Literal["label_only", "fail"] = "fail"

    @model_validator(mode="after")
    def _has_teachers(self) -> Self:
        if bool(self.supervision) == bool(self.teachers):
            raise ValueError("name either one log (supervision) or teachers")
        names = [t.name for t in self.teachers]
        if len(set(names)) < len(names):
            raise ValueError(f"teachers are named {', '.join(names)}; give each its own name")
        if self.auxiliary_labels and self.method == "single_head":
            raise ValueError(
                "auxiliary_labels needs an auxiliary head; choose method auxiliary_head or student_adapter"
            )
        return self

    @property
    def all_teachers(self) -> tuple[TeacherConfig, ...]:
        return self.teachers or (TeacherConfig(name="teacher", logs=(LogConfig(path=self.supervision),)),)

    def identity(self) -> dict[str, Any]:
        """What decides weights: not where a log lies, nor how long it is waited for."""
        keep = self.model_dump(mode="json", exclude={"supervision", "teachers", "wait_s", "on_missing"})
        keep["teachers"] = [t.model_dump(mode="json", exclude={"logs"}) for t in self.all_teachers]
        return keep


class DistillationConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    publish: PublishConfig | None = None
    learn: LearnConfig | None = None

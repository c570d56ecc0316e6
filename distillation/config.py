"""Section `distillation`: a teacher publishes its predictions, a student learns from them."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class PublishConfig(BaseModel):
    """Log the forward pass before each update as supervision (mode forward) under <run>/supervision/<teacher>."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    teacher: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    mode: Literal["forward"] = "forward"


class AdapterConfig(BaseModel):
    """Student adapter: an MLP from the teacher's logit to a corrected logit, fitted on labels by its own Adam.

    fit: `current` follows ExFM's Algorithm 1 (fit on this batch, then use); `previous` uses the adapter as the earlier
    batches left it, so that this batch's labels cannot reach its own targets.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    hidden: tuple[int, ...] = (8,)
    lr: float = Field(0.01, gt=0)
    fit: Literal["current", "previous"] = "current"


class LearnConfig(BaseModel):
    """How a student learns from a teacher's supervision log (ExFM equations 2 to 7).

    loss_weight w, label_scale alpha and gradient_scale beta are ExFM's three scalings; w applies to every distillation
    loss. hidden: hidden layers of each distillation head.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    supervision: str = Field(description="folder of the teacher's log: <teacher's run>/supervision/<teacher>")
    method: Literal["single_head", "auxiliary_head", "student_adapter"] = "student_adapter"
    loss_weight: float = Field(1.0, ge=0)
    label_scale: float = Field(1.0, gt=0)
    gradient_scale: float = Field(1.0, ge=0)
    hidden: tuple[int, ...] = ()
    adapter: AdapterConfig = AdapterConfig()
    wait_s: float = Field(600.0, ge=0, description="how long a slice's supervision is waited for")
    on_missing: Literal["label_only", "fail"] = "fail"


class DistillationConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    publish: PublishConfig | None = None
    learn: LearnConfig | None = None

"""Configuration and saved state of a joiner: from an inbox of feature rows and label events to a stream of slices."""

from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from exfm.data.clock import ClockConfig
from exfm.data.errors import UserError
from exfm.data.manifest import AMENDED
from exfm.data.schema import Schema, load_schema


@dataclass(frozen=True)
class Stage:
    """One kind of label files: due after_s seconds after the slice's end, from events up to after_s after the example."""

    kind: str
    tasks: tuple[str, ...]
    after_s: int


class State(BaseModel):
    """join.json. first: the slices before it are over and forgotten. features, labels: files taken and still needed, in the
    order of taking. settled_before: label events before it are counted. counts: of label events by task, and of late rows.
    at: the time of this commit."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    first: int = 0
    features: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    settled_before: int = 0
    counts: dict[str, dict[str, int]] = Field(default_factory=dict)
    late_features: int = 0
    at: float = 0.0


class JoinConfig(BaseModel):
    """The file of `exfm data join`. Times are in seconds, by `clock`.

    label_windows and negative_rates replace the schema's. start: where slice 0 begins (default: the first example's time, rounded
    down to whole slices). slices: how many to make; the stream is sealed with the last one's features (default: no end).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    inbox: str
    out: str = Field(description="folder of the stream")
    schema_file: str = Field(description="YAML of the schema")
    slice_s: int = Field(gt=0, description="event time of one slice")
    start: int | None = None
    slices: int | None = Field(None, gt=0)
    features_delay_s: float = Field(0.0, ge=0, description="how long after a slice's end its features are committed")
    label_windows: dict[str, int] | None = None
    negative_rates: dict[str, float] | None = None
    late_labels: Literal["drop", "amend"] = "drop"
    amend_s: int = Field(0, ge=0, description="with late_labels: amend, how long after the window labels are amended")
    late_features: Literal["drop", "refuse"] = Field("drop", description="rows older than the open slice")
    remember_s: int = Field(
        3_600, ge=0, description="how long late labels and repeated rows are told from unknown ones"
    )
    clock: ClockConfig = "real"
    poll_s: float = Field(1.0, gt=0, description="real seconds between looks into the inbox")
    log_every_s: float = Field(5.0, gt=0, description="real seconds between lines of progress")

    @model_validator(mode="after")
    def _amends_within_a_bound(self) -> Self:
        if (self.late_labels == "amend") != (self.amend_s > 0):
            raise ValueError(
                f"late_labels is {self.late_labels} and amend_s is {self.amend_s}; amending needs a bound above 0, dropping has none"
            )
        return self

    def schema_of(self) -> Schema:
        """The stream's schema. UserError where it is missing or wrong."""
        raw = load_schema(self.schema_file).model_dump()
        raw |= {key: value for key in ("label_windows", "negative_rates") if (value := getattr(self, key)) is not None}
        try:
            return Schema.model_validate(raw)
        except ValidationError as error:
            why = "; ".join(e["msg"] for e in error.errors())
            raise UserError(f"label_windows or negative_rates do not fit {self.schema_file}: {why}") from None

    def facts(self, start: int) -> dict[str, Any]:
        """What stream.json says of how the stream is made; equal for every start of the joiner."""
        return {"start": start, "slice_s": self.slice_s, "amend_s": self.amend_s}

    def stages(self, schema: Schema) -> tuple[list[Stage], list[Stage]]:
        """The label files of a slice: the first ones, and those that late labels amend."""
        files = schema.label_files().items()
        first = [Stage(kind, tasks, schema.label_window_s(tasks[0])) for kind, tasks in files]
        amended = [Stage(s.kind + AMENDED, s.tasks, s.after_s + self.amend_s) for s in first]
        return first, amended if self.amend_s else []

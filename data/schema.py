"""What an example is: the columns of a stream and their types."""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import pyarrow as pa
import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from exfm.data.errors import UserError


class SparseColumn(BaseModel):
    """An id column (int64) or, with `list`, a column of id lists; `weights` names a parallel list<float> column."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    list: bool = False
    weights: str | None = None


class Schema(BaseModel):
    """Columns of a stream.

    labels: float32 columns with values 0, 1 or null (not observed). user: the column by which the bootstrap clusters
    (default: every example is its own cluster). weight: optional float32 column of example weights. negative_rates: of
    each down-sampled task, the share of its negatives that was kept. label_windows: of each task, the seconds after an
    example at which its label is settled (default 0: with the features).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    id: str = "example_id"
    timestamp: str = "timestamp"
    user: str | None = None
    weight: str | None = None
    labels: tuple[str, ...]
    dense: tuple[str, ...] = ()
    sparse: tuple[SparseColumn, ...] = ()
    negative_rates: dict[str, float] = Field(default_factory=dict)
    label_windows: dict[str, int] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = list(self.feature_types()) + list(self.labels)
        twice = sorted({n for n in names if names.count(n) > 1 and n != self.user})
        if twice:
            raise ValueError(f"column(s) {', '.join(twice)} are named twice in the schema")
        if not self.labels:
            raise ValueError("a schema needs at least one label column")
        for task, rate in self.negative_rates.items():
            if task not in self.labels or not 0 < rate <= 1:
                raise ValueError(f"negative_rates {task}: {rate} is no label's rate above 0 and at most 1")
        for task, window_s in self.label_windows.items():
            if task not in self.labels or window_s < 0:
                raise ValueError(f"label_windows {task}: {window_s} is no label's window of at least 0 seconds")
        return self

    def feature_types(self) -> dict[str, pa.DataType]:
        """Arrow type of every column of the features files, in file order."""
        types: dict[str, pa.DataType] = {self.id: pa.int64(), self.timestamp: pa.int64()}
        if self.user:
            types[self.user] = pa.int64()
        if self.weight:
            types[self.weight] = pa.float32()
        for column in self.sparse:
            types[column.name] = pa.list_(pa.int64()) if column.list else pa.int64()
            if column.weights:
                types[column.weights] = pa.list_(pa.float32())
        return types | {name: pa.float32() for name in self.dense}

    def label_types(self) -> dict[str, pa.DataType]:
        return {name: pa.float32() for name in self.labels}

    def label_window_s(self, task: str) -> int:
        return self.label_windows.get(task, 0)

    def label_files(self) -> dict[str, tuple[str, ...]]:
        """The kinds of label files and the tasks in each: one kind per window, by rising window; "labels" if there is one."""
        windows = sorted({self.label_window_s(task) for task in self.labels})
        if len(windows) == 1:
            return {"labels": self.labels}
        return {f"labels.{w}s": tuple(t for t in self.labels if self.label_window_s(t) == w) for w in windows}

    def logit_offsets(self, tasks: Sequence[str]) -> tuple[float, ...]:
        """What is added to true logits to get those of the down-sampled data: -log(rate) for every task."""
        return tuple(-math.log(self.negative_rates.get(task, 1.0)) + 0.0 for task in tasks)

    def sparse_column(self, name: str) -> SparseColumn:
        """The sparse column of that name. UserError if there is none."""
        for column in self.sparse:
            if column.name == name:
                return column
        raise UserError(
            f"stream '{self.name}' has no sparse column '{name}'; it has {', '.join(c.name for c in self.sparse)}"
        )

    def digest(self) -> str:
        """Hash of the whole schema: two streams with equal digests have interchangeable slices."""
        return hashlib.sha256(json.dumps(self.model_dump(exclude_defaults=True), sort_keys=True).encode()).hexdigest()[
            :16
        ]


def load_schema(path: str | Path) -> Schema:
    """Read a schema from a YAML file. UserError if it is missing or wrong."""
    try:
        return Schema.model_validate(yaml.safe_load(Path(path).read_text()))
    except FileNotFoundError:
        raise UserError(f"schema file {path} does not exist; name one with --schema FILE") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"schema file {path}: {error}") from None


def check_types(actual: pa.Schema, wanted: dict[str, pa.DataType], where: str) -> None:
    """Compare a file's columns with the schema's.

    UserError names every missing or extra column and every wrong type. Nullability and field metadata do not count.
    """
    missing = [n for n in wanted if n not in actual.names]
    extra = [n for n in actual.names if n not in wanted]
    if missing or extra:
        parts = [f"lacks column(s) {', '.join(missing)}"] * bool(missing)
        parts += [f"has column(s) {', '.join(extra)} that the schema does not name"] * bool(extra)
        raise UserError(f"{where} {' and '.join(parts)}; mend the file or the schema and prepare the slice again")
    for name, kind in wanted.items():
        if not _same_type(actual.field(name).type, kind):
            raise UserError(f"{where}: column '{name}' is {actual.field(name).type}, the schema says {kind}")


def _same_type(actual: pa.DataType, wanted: pa.DataType) -> bool:
    if pa.types.is_list(wanted):
        return pa.types.is_list(actual) and actual.value_type == wanted.value_type
    return actual == wanted

"""Arrow columns to a Block or a Batch, without per-row Python."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from exfm.data.batch import Batch
from exfm.data.block import Block, Lists, first_with_list
from exfm.data.errors import UserError
from exfm.data.manifest import column_array
from exfm.data.schema import Schema
from exfm.data.writer import check_labels

# (ids [n], lengths [b], example ids [b]) -> table rows [n]; may raise UserError
ToRows = Callable[[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]], NDArray[np.int64]]


class Domain(BaseModel):
    """A named part of the traffic: examples whose `column` (an integer column), taken modulo `modulo`, is one of `values`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    column: str
    values: tuple[int, ...] = Field(min_length=1)
    modulo: int | None = Field(None, gt=0)

    def mask(self, column: np.ndarray) -> NDArray[np.bool_]:
        if self.modulo is not None:
            column = column - column // self.modulo * self.modulo  # the remainder, by NumPy's faster division
        return column == self.values[0] if len(self.values) == 1 else np.isin(column, self.values)


@dataclass(frozen=True)
class SparseInput:
    """A feature that a model looks up: its name, its column and the mapping of raw ids to table rows. once: a user's repeated list is
    left out of a batch, see Batch.repeats; not with weights."""

    name: str
    column: str
    to_rows: ToRows
    weights: str | None = None
    once: bool = False


@dataclass(frozen=True)
class BatchColumns:
    """What a job wants of every example. dense: (column, log1p?) in order; supervision: [s][t] column names, None for a
    task that a teacher does not have."""

    schema: Schema
    dense: tuple[tuple[str, bool], ...]
    sparse: tuple[SparseInput, ...]
    labels: tuple[str, ...]
    domains: tuple[Domain, ...] = ()
    supervision: tuple[tuple[str | None, ...], ...] = ()
    own_domain: str | None = None

    def of_features(self) -> tuple[str, ...]:
        """Columns to decode from the features files (the projection)."""
        names = [self.schema.id, self.schema.timestamp, self.schema.user, self.schema.weight]
        names += [name for name, _ in self.dense] + [f.column for f in self.sparse] + [f.weights for f in self.sparse]
        names += [d.column for d in self.domains]
        return tuple(dict.fromkeys(n for n in names if n))


def make_batch(
    table: pa.Table, rows: np.ndarray, size: int, want: BatchColumns, where: str, pinned: bool = False
) -> Batch:
    """A Batch of the table's rows, padded to `size`. rows: row numbers in the slice. UserError for bad labels or ids."""
    return convert(table, rows, want, where).batch(0, len(rows), size, pinned)


def padding(want: BatchColumns, size: int) -> Batch:
    """A Batch of `size` padding rows."""
    types = want.schema.feature_types() | want.schema.label_types()
    table = pa.table({name: pa.array([], type=kind) for name, kind in types.items()})
    return make_batch(table, np.empty(0, np.int64), size, want, "padding")


def convert(table: pa.Table, rows: np.ndarray, want: BatchColumns, where: str) -> Block:
    """The table's rows as a block. rows: their row numbers in the slice. UserError for bad labels, predictions or ids."""
    n, schema = table.num_rows, want.schema
    ids = table.column(schema.id).to_numpy()
    check_labels(table, want.labels, ids, where)
    columns = {
        "ids": ids,
        "timestamps": table.column(schema.timestamp).to_numpy(),
        "users": table.column(schema.user).to_numpy() if schema.user else ids,
        "rows": rows,
        "dense": _dense(table, want.dense),
        "labels": np.empty((n, len(want.labels)), np.float32),
        "weights": table.column(schema.weight).to_numpy() if schema.weight else np.ones(n, np.float32),
        "domain": _domains(table, want),
    }
    for i, name in enumerate(want.labels):
        columns["labels"][:, i] = table.column(name).to_numpy()
    if want.supervision:
        columns["supervision"], columns["supervision_mask"] = _supervision(table, want.supervision, ids, where)
    plain = [f for f in want.sparse if f.weights is None]
    weighted = [f for f in want.sparse if f.weights is not None]
    users = columns["users"]
    return Block(columns, _lists(table, plain, ids, users), _lists(table, weighted, ids, users) if weighted else None)


def _domains(table: pa.Table, want: BatchColumns) -> NDArray[np.int32]:
    """Every example's domain [n], -1 for none: the job's own where it is one of several, else the first match."""
    domain = np.full(table.num_rows, -1, np.int32)
    last_to_first = sorted(reversed(range(len(want.domains))), key=lambda i: want.domains[i].name == want.own_domain)
    for index in last_to_first:
        domain[want.domains[index].mask(table.column(want.domains[index].column).to_numpy())] = index
    return domain


def _dense(table: pa.Table, columns: Sequence[tuple[str, bool]]) -> NDArray[np.float32]:
    """Dense columns [n, d], missing values as 0; log1p keeps the sign: sign(x) log(1 + |x|)."""
    out = np.empty((table.num_rows, len(columns)), np.float32)
    for i, (name, log1p) in enumerate(columns):
        values = table.column(name).to_numpy()
        if not np.isfinite(values).all():
            values = np.nan_to_num(values, nan=0.0)
        out[:, i] = np.copysign(np.log1p(np.abs(values)), values) if log1p else values
    return out


def _lists(table: pa.Table, features: Sequence[SparseInput], ids: np.ndarray, users: np.ndarray) -> Lists:
    one_each = np.arange(len(ids) + 1)
    values, ends, weights = [], [], []
    lengths = np.empty((len(features), len(ids)), np.int32)
    for i, feature in enumerate(features):
        array = column_array(table, feature.column)
        is_list = pa.types.is_list(array.type)
        if array.null_count:
            counts = pc.list_value_length(array).fill_null(0) if is_list else array.is_valid().cast(pa.int32())
            own_ends = np.concatenate([[0], np.cumsum(counts.to_numpy())])
        else:
            own_ends = array.offsets.to_numpy() - array.offsets[0].as_py() if is_list else one_each
        raw = array.flatten() if is_list else array.drop_null() if array.null_count else array
        np.subtract(own_ends[1:], own_ends[:-1], out=lengths[i])
        ends.append(own_ends)
        values.append(feature.to_rows(raw.to_numpy(zero_copy_only=False), lengths[i], ids))
        if feature.weights:
            weights.append(column_array(table, feature.weights).flatten().to_numpy(zero_copy_only=False))
    once = {i: first_with_list(users, values[i], ends[i]) for i, f in enumerate(features) if f.once}
    return Lists([f.name for f in features], values, ends, lengths, weights or None, once)


def _supervision(
    table: pa.Table, columns: tuple[tuple[str | None, ...], ...], ids: np.ndarray, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """Logits and mask [n, s, t]; a missing column or a null is a missing prediction."""
    shape = len(ids), len(columns), len(columns[0])
    logits, mask = np.zeros(shape, np.float32), np.zeros(shape, bool)
    for s, names in enumerate(columns):
        for t, name in enumerate(names):
            if name is None or (number := table.schema.get_field_index(name)) < 0:
                continue
            column = table.column(number)
            values = column.to_numpy()  # null as NaN
            there = np.isfinite(values)
            if not there.all():
                _check_nulls(column, there, f"{where}: the teacher's '{name.split('/', 1)[-1]}'", ids)
                values = np.where(there, values, 0.0)
            logits[:, s, t], mask[:, s, t] = values, there
    return logits, mask


def _check_nulls(column: pa.ChunkedArray, finite: np.ndarray, what: str, ids: np.ndarray) -> None:
    """UserError where a prediction is NaN or infinite instead of null."""
    bad = ~finite & column.is_valid().to_numpy()
    if bad.any():
        row = int(np.argmax(bad))
        raise UserError(
            f"{what} of example {ids[row]} is {column[row].as_py()}; predictions are finite, or null where there is none; score "
            "the slice again"
        )

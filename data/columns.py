"""Arrow columns to a Batch, without per-row Python."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from exfm.data.batch import Batch
from exfm.data.errors import UserError
from exfm.data.manifest import column_array
from exfm.data.schema import Schema
from exfm.data.writer import check_labels

# (ids [n], lengths [b], example ids [b]) -> table rows [n]; may raise UserError
ToRows = Callable[[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]], NDArray[np.int64]]


class Domain(BaseModel):
    """A named part of the traffic: examples whose `column` (an integer column), taken modulo `modulo`, is one of `values`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    column: str
    values: tuple[int, ...] = Field(min_length=1)
    modulo: int | None = Field(None, gt=0)

    def mask(self, column: np.ndarray) -> NDArray[np.bool_]:
        return np.isin(column if self.modulo is None else column % self.modulo, self.values)


@dataclass(frozen=True)
class SparseInput:
    """A feature that a model looks up: its name, its column and the mapping of raw ids to table rows."""

    name: str
    column: str
    to_rows: ToRows
    weights: str | None = None


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


def make_batch(table: pa.Table, rows: np.ndarray, size: int, want: BatchColumns, where: str) -> Batch:
    """A Batch of the table's rows, padded to `size`. rows: row numbers in the slice. UserError for bad labels or ids."""
    n = table.num_rows
    ids = table.column(want.schema.id).to_numpy()
    check_labels(table, want.labels, ids, where)
    users = table.column(want.schema.user).to_numpy() if want.schema.user else ids
    weights = table.column(want.schema.weight).to_numpy() if want.schema.weight else np.ones(n, np.float32)
    domain = np.full(n, -1, np.int32)
    for index in _last_to_first(want):
        domain[want.domains[index].mask(table.column(want.domains[index].column).to_numpy())] = index
    plain = [f for f in want.sparse if f.weights is None]
    weighted = [f for f in want.sparse if f.weights is not None]
    supervision, mask = _supervision(table, size, want.supervision, ids, where)
    return Batch(
        dense=_matrix([_dense(table, name, log) for name, log in want.dense], size, 0.0),
        sparse=_jagged(table, plain, ids, size),
        weighted=_jagged(table, weighted, ids, size) if weighted else None,
        labels=_matrix([table.column(name).to_numpy() for name in want.labels], size, np.nan),
        weights=_padded(weights, size, 0.0),
        ids=_padded(ids, size, -1),
        timestamps=_padded(table.column(want.schema.timestamp).to_numpy(), size, 0),
        users=_padded(users, size, -1),
        rows=_padded(rows, size, -1),
        domain=_padded(domain, size, -1),
        supervision=supervision,
        supervision_mask=mask,
    )


def padding(want: BatchColumns, size: int) -> Batch:
    """A Batch of `size` padding rows."""
    types = want.schema.feature_types() | want.schema.label_types()
    table = pa.table({name: pa.array([], type=kind) for name, kind in types.items()})
    return make_batch(table, np.empty(0, np.int64), size, want, "padding")


def _last_to_first(want: BatchColumns) -> list[int]:
    """Indexes of the domains, the one that counts last: the job's own, else the first match."""
    order = list(reversed(range(len(want.domains))))
    return sorted(order, key=lambda i: want.domains[i].name == want.own_domain)


def _padded(values: np.ndarray, size: int, fill: float) -> torch.Tensor:
    out = np.full(size, fill, values.dtype)
    out[: len(values)] = values
    return torch.from_numpy(out)


def _matrix(columns: Sequence[np.ndarray], size: int, fill: float) -> torch.Tensor:
    out = np.full((size, len(columns)), fill, np.float32)
    for i, column in enumerate(columns):
        out[: len(column), i] = column
    return torch.from_numpy(out)


def _dense(table: pa.Table, name: str, log1p: bool) -> np.ndarray:
    """A dense column, missing values as 0; log1p keeps the sign: sign(x) log(1 + |x|)."""
    values = np.nan_to_num(table.column(name).to_numpy(), nan=0.0)
    return np.sign(values) * np.log1p(np.abs(values)) if log1p else values


def _jagged(table: pa.Table, features: Sequence[SparseInput], ids: np.ndarray, size: int) -> KeyedJaggedTensor:
    values, lengths, weights = [], np.zeros((len(features), size), np.int32), []
    for i, feature in enumerate(features):
        array = column_array(table, feature.column)
        if pa.types.is_list(array.type):
            counts = pc.list_value_length(array).fill_null(0).to_numpy().astype(np.int64)
            raw = array.flatten().to_numpy(zero_copy_only=False)
        else:
            counts = array.is_valid().to_numpy(zero_copy_only=False).astype(np.int64)
            raw = (array.drop_null() if array.null_count else array).to_numpy()
        values.append(feature.to_rows(raw, counts, ids))
        lengths[i, : len(counts)] = counts
        if feature.weights:
            weights.append(column_array(table, feature.weights).flatten().to_numpy(zero_copy_only=False))
    return KeyedJaggedTensor(
        keys=[f.name for f in features],
        values=torch.from_numpy(np.concatenate(values) if values else np.empty(0, np.int64)),
        lengths=torch.from_numpy(lengths.reshape(-1)),
        weights=torch.from_numpy(np.concatenate(weights)) if weights else None,
        stride=size,
    )


def _supervision(
    table: pa.Table, size: int, columns: tuple[tuple[str | None, ...], ...], ids: np.ndarray, where: str
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Logits and mask [b, s, t]; a missing column or a null is a missing prediction."""
    if not columns:
        return None, None
    shape = size, len(columns), len(columns[0])
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
            logits[: len(values), s, t], mask[: len(values), s, t] = values, there
    return torch.from_numpy(logits), torch.from_numpy(mask)


def _check_nulls(column: pa.ChunkedArray, finite: np.ndarray, what: str, ids: np.ndarray) -> None:
    """UserError where a prediction is NaN or infinite instead of null."""
    bad = ~finite & column.is_valid().to_numpy()
    if bad.any():
        row = int(np.argmax(bad))
        raise UserError(
            f"{what} of example {ids[row]} is {column[row].as_py()}; predictions are finite, or null where there is none; score "
            "the slice again"
        )

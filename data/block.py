"""Many examples converted once: NumPy columns of which batches are slices.

n examples of the block, b of a batch with its padding, f features, o of them looked up once per batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from exfm.data.batch import Batch
from exfm.data.packed import Room, Shape

# what padding has in a field of Batch
FILL = {
    "dense": 0.0, "labels": np.nan, "weights": 0.0, "ids": -1, "timestamps": 0, "users": -1, "rows": -1, "domain": -1,
    "supervision": 0.0, "supervision_mask": False,
}  # fmt: skip
_LENGTHS, _ROWS, _WEIGHTS = np.dtype(np.int32), np.dtype(np.int64), np.dtype(np.float32)


@dataclass(frozen=True)
class Chosen:
    """The lists of a batch's examples before they are laid in its buffer. values, weights [f]; repeats [o, n]."""

    values: list[NDArray[np.int64]]
    lengths: NDArray[np.int32]
    weights: list[NDArray[np.float32]] | None
    repeats: NDArray[np.int64] | None

    def fill(self, arrays: Sequence[np.ndarray], tensors: Sequence[Tensor], keys: list[str]) -> KeyedJaggedTensor:
        """Copied into lengths [f, b], values and weights."""
        n = self.lengths.shape[1]
        arrays[0][:, :n] = self.lengths
        arrays[0][:, n:] = 0
        if keys:
            np.concatenate(self.values, out=arrays[1])
        if self.weights is not None:
            np.concatenate(self.weights, out=arrays[2])
        lengths, weights = tensors[0], tensors[2] if self.weights is not None else None
        return KeyedJaggedTensor(keys, tensors[1], weights, lengths.view(-1), stride=lengths.shape[1])


@dataclass(frozen=True)
class Lists:
    """Ids of features. values [f]: all of a feature, one example after the other, as table rows; ends [f][n + 1]: where in them
    example i begins and i + 1 does; lengths [f, n]; weights [f]: one for every id, or None; once: feature -> first [n], the example
    of the block that had the same list before, of those that are looked up once per batch."""

    keys: list[str]
    values: Sequence[NDArray[np.int64]]
    ends: Sequence[NDArray[np.integer]]
    lengths: NDArray[np.int32]
    weights: Sequence[NDArray[np.float32]] | None
    once: dict[int, NDArray[np.int64]] = field(default_factory=dict)

    @property
    def dtypes(self) -> list[np.dtype]:
        """Of a batch's lengths, values and weights."""
        return [_LENGTHS, _ROWS] if self.weights is None else [_LENGTHS, _ROWS, _WEIGHTS]

    def choose(self, start: int, stop: int) -> Chosen:
        """The lists of the examples [start, stop); those of `once` only at the first of the examples that have the same."""
        spans = [slice(own.item(start), own.item(stop)) for own in self.ends]
        values = [own[span] for own, span in zip(self.values, spans, strict=True)]
        lengths = self.lengths[:, start:stop]
        weights = None
        if self.weights is not None:
            weights = [own[span] for own, span in zip(self.weights, spans, strict=True)]
        if not self.once:
            return Chosen(values, lengths, weights, None)
        lengths, repeats = lengths.copy(), np.empty((len(self.once), stop - start), np.int64)
        for own, (i, first) in zip(repeats, self.once.items(), strict=True):
            _, holders, which = np.unique(first[start:stop], return_index=True, return_inverse=True)
            own[:] = holders[which]
            holds = own == np.arange(stop - start)
            values[i] = values[i][np.repeat(holds, lengths[i])]
            lengths[i] *= holds
        return Chosen(values, lengths, weights, repeats)


def first_with_list(
    users: NDArray[np.int64], values: NDArray[np.int64], ends: NDArray[np.integer]
) -> NDArray[np.int64]:
    """For every example the first of its user's examples up to it between which the list stayed the same [n]."""
    lengths, n = np.diff(ends), len(users)
    order = np.argsort(users, kind="stable")
    before, own = order[:-1], order[1:]
    alike = (users[before] == users[own]) & (lengths[before] == lengths[own])
    before, own = before[alike], own[alike]
    counts = lengths[own]
    stops = np.cumsum(counts)
    place = np.arange(stops[-1] if len(stops) else 0) - np.repeat(stops - counts, counts)
    other = values[np.repeat(ends[own], counts) + place] != values[np.repeat(ends[before], counts) + place]
    differing = np.concatenate([[0], np.cumsum(other)])
    repeated = np.zeros(n, bool)
    repeated[own] = differing[stops] == differing[stops - counts]
    first = np.empty(n, np.int64)
    first[order] = order[np.maximum.accumulate(np.where(repeated[order], 0, np.arange(n)))]
    return first


@dataclass(frozen=True)
class Block:
    """Converted examples. columns: field of Batch -> array [n, ...]."""

    columns: dict[str, np.ndarray]
    sparse: Lists
    weighted: Lists | None

    @cached_property
    def dtypes(self) -> list[np.dtype]:
        own = [column.dtype for column in self.columns.values()] + self.sparse.dtypes
        return own if self.weighted is None else own + self.weighted.dtypes

    def batch(self, start: int, stop: int, size: int, pinned: bool = False) -> Batch:
        """A Batch of the examples [start, stop), padded to `size` rows. All its tensors lie in one buffer, pinned if asked."""
        n = stop - start
        lists = [self.sparse] if self.weighted is None else [self.sparse, self.weighted]
        chosen = [own.choose(start, stop) for own in lists]
        shapes: list[Shape] = [(size, *column.shape[1:]) for column in self.columns.values()]
        for own, picked in zip(lists, chosen, strict=True):
            count = sum(map(len, picked.values))
            shapes += [(len(own.keys), size)] + [(count,)] * (len(own.dtypes) - 1)
        repeats, dtypes = chosen[0].repeats, self.dtypes
        if repeats is not None:
            shapes, dtypes = [*shapes, (len(repeats), size)], [*dtypes, _ROWS]
        room = Room(shapes, dtypes, pinned)
        fields = dict(zip(self.columns, room.tensors, strict=False))
        for (name, column), to in zip(self.columns.items(), room.arrays, strict=False):
            to[:n] = column[start:stop]
            if n < size:
                to[n:] = FILL[name]
        if repeats is not None:
            room.arrays[-1][:] = np.arange(size)
            room.arrays[-1][:, :n] = repeats
            fields["repeats"] = room.tensors[-1]
        jagged, place = [], len(self.columns)
        for own, picked in zip(lists, chosen, strict=True):
            upto = place + len(own.dtypes)
            jagged.append(picked.fill(room.arrays[place:upto], room.tensors[place:upto], own.keys))
            place = upto
        weighted = jagged[1] if self.weighted is not None else None
        return Batch(**fields, sparse=jagged[0], weighted=weighted, buffer=room.buffer)

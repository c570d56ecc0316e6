"""Many examples converted once: NumPy columns of which batches are slices.

n examples of the block, b of a batch with its padding, f features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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
class Lists:
    """Ids of features. values [f]: all of a feature, one example after the other, as table rows; ends [f][n + 1]: where in them
    example i begins and i + 1 does; lengths [f, n]; weights [f]: one for every id, or None."""

    keys: list[str]
    values: Sequence[NDArray[np.int64]]
    ends: Sequence[NDArray[np.integer]]
    lengths: NDArray[np.int32]
    weights: Sequence[NDArray[np.float32]] | None

    @property
    def dtypes(self) -> list[np.dtype]:
        """Of a batch's lengths, values and weights."""
        return [_LENGTHS, _ROWS] if self.weights is None else [_LENGTHS, _ROWS, _WEIGHTS]

    def spans(self, start: int, stop: int) -> list[slice]:
        """Where every feature's ids of the examples [start, stop) lie."""
        return [slice(own.item(start), own.item(stop)) for own in self.ends]

    def fill(
        self, start: int, stop: int, spans: Sequence[slice], arrays: Sequence[np.ndarray], tensors: Sequence[Tensor]
    ) -> KeyedJaggedTensor:
        """The lists of examples [start, stop), copied into lengths [f, b], values and weights."""
        arrays[0][:, : stop - start] = self.lengths[:, start:stop]
        arrays[0][:, stop - start :] = 0
        if self.keys:
            np.concatenate([own[span] for own, span in zip(self.values, spans, strict=True)], out=arrays[1])
        if self.weights is not None:
            np.concatenate([own[span] for own, span in zip(self.weights, spans, strict=True)], out=arrays[2])
        lengths, weights = tensors[0], tensors[2] if self.weights is not None else None
        return KeyedJaggedTensor(self.keys, tensors[1], weights, lengths.view(-1), stride=lengths.shape[1])


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
        shapes: list[Shape] = [(size, *column.shape[1:]) for column in self.columns.values()]
        spans = [own.spans(start, stop) for own in lists]
        for own, of_own in zip(lists, spans, strict=True):
            count = sum(span.stop - span.start for span in of_own)
            shapes += [(len(own.keys), size)] + [(count,)] * (len(own.dtypes) - 1)
        room = Room(shapes, self.dtypes, pinned)
        fields = dict(zip(self.columns, room.tensors, strict=False))
        for (name, column), to in zip(self.columns.items(), room.arrays, strict=False):
            to[:n] = column[start:stop]
            if n < size:
                to[n:] = FILL[name]
        jagged, place = [], len(self.columns)
        for own, of_own in zip(lists, spans, strict=True):
            upto = place + len(own.dtypes)
            jagged.append(own.fill(start, stop, of_own, room.arrays[place:upto], room.tensors[place:upto]))
            place = upto
        weighted = jagged[1] if self.weighted is not None else None
        return Batch(**fields, sparse=jagged[0], weighted=weighted, buffer=room.buffer)

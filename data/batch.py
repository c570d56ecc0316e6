"""One rank's piece of a global batch.

b examples (padding included), f features, d dense features, s teachers, t tasks.
"""

from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable


@dataclass(frozen=True)
class Batch(Pipelineable):
    """A frozen batch. Padding rows: weight 0, id -1, domain -1, row -1, empty lists, labels NaN.

    dense [b, d] f32 (missing = 0); sparse: table rows per feature, [f x b] lists; weighted: the same for features with
    per-id weights, or None; labels [b, t] f32, NaN = not observed; weights [b] f32; ids, timestamps, users, rows [b] i64
    (rows: row number in the slice); domain [b] i32, -1 = none; supervision [b, s, t] f32 raw logits and
    supervision_mask [b, s, t] bool, or None.
    """

    dense: Tensor
    sparse: KeyedJaggedTensor
    weighted: KeyedJaggedTensor | None
    labels: Tensor
    weights: Tensor
    ids: Tensor
    timestamps: Tensor
    users: Tensor
    rows: Tensor
    domain: Tensor
    supervision: Tensor | None = None
    supervision_mask: Tensor | None = None

    def __len__(self) -> int:
        return self.ids.shape[0]

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        return self._each(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        return self._each(lambda x: x.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                value.record_stream(stream)

    def _each(self, change) -> Self:  # type: ignore[no-untyped-def]
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: change(value) for name, value in values.items() if value is not None})

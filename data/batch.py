"""One rank's piece of a global batch.

b examples (padding included), f features, d dense features, s teachers, t tasks.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from exfm.data.packed import changed


@dataclass(frozen=True)
class Batch(Pipelineable):
    """A frozen batch. Padding rows: weight 0, id -1, domain -1, row -1, empty lists, labels NaN.

    dense [b, d] f32 (missing = 0); sparse: table rows per feature, [f x b] lists; weighted: the same for features with
    per-id weights, or None; labels [b, t] f32, NaN = not observed; weights [b] f32; ids, timestamps, users, rows [b] i64
    (rows: row number in the slice); domain [b] i32, -1 = none; supervision [b, s, t] f32 raw logits and
    supervision_mask [b, s, t] bool, or None. repeats [o, b] i64: of each feature whose repeated lists are left out of `sparse`, the row
    that has the list; None if there is no such feature. buffer: the memory (u8) in which all of them lie, where one was made for them.
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
    repeats: Tensor | None = None
    buffer: Tensor | None = None

    def __len__(self) -> int:
        return self.ids.shape[0]

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        if device == self.ids.device:
            return self
        return self._each(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        return self._each(lambda x: x.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        for tensor in self.tensors().values():
            tensor.record_stream(stream)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its field and, of the sparse ones, part."""
        found: dict[str, Tensor] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, KeyedJaggedTensor):
                parts = {"values": value.values(), "lengths": value.lengths(), "weights": value.weights_or_none()}
                found |= {f"{field.name}.{part}": tensor for part, tensor in parts.items() if tensor is not None}
            elif value is not None and field.name != "buffer":
                found[field.name] = value
        return found

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """`change`, a copy to another memory, of all tensors: one copy where they lie in one buffer."""
        old = self.tensors()
        copies, buffer = changed(list(old.values()), self.buffer, change)
        new = dict(zip(old, copies, strict=True))
        values: dict[str, Any] = {name: tensor for name, tensor in new.items() if "." not in name} | {"buffer": buffer}
        for name in ("sparse", "weighted"):
            own: KeyedJaggedTensor | None = getattr(self, name)
            if own is not None:
                parts = (new.get(f"{name}.{part}") for part in ("values", "weights", "lengths"))
                values[name] = KeyedJaggedTensor(own.keys(), *parts, stride=own.stride())
        return replace(self, **values)

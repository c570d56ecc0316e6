"""Several tensors in one buffer, so that a batch moves to a device in one copy."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

ALIGN_BYTES = 64

Shape = tuple[int, ...]


class Room:
    """Memory for tensors of the given shapes and types in one buffer; arrays and tensors are the same memory."""

    def __init__(self, shapes: Sequence[Shape], dtypes: Sequence[np.dtype], pinned: bool = False) -> None:
        places, end = [], 0
        for shape, dtype in zip(shapes, dtypes, strict=True):
            places.append(end)
            end += -(-math.prod(shape) * dtype.itemsize // ALIGN_BYTES) * ALIGN_BYTES
        self.buffer = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
        memory = self.buffer.numpy()
        self.arrays = [
            np.ndarray(shape, dtype, memory, place) for shape, dtype, place in zip(shapes, dtypes, places, strict=True)
        ]
        # cheaper than views of the buffer by torch, which has a dozen small ones to make for every batch
        self.tensors = list(map(torch.from_numpy, self.arrays))


def changed(
    tensors: Sequence[Tensor], buffer: Tensor | None, change: Callable[[Tensor], Tensor]
) -> tuple[list[Tensor], Tensor | None]:
    """`change`, a copy to another memory, of every tensor, and the new buffer: one copy where all lie in the buffer."""
    if buffer is None:
        return [change(t) for t in tensors], None
    places = [t.data_ptr() - buffer.data_ptr() if t.numel() else 0 for t in tensors]  # an empty tensor is nowhere
    if any(place < 0 or place + t.nbytes > buffer.nbytes for t, place in zip(tensors, places, strict=True)):
        return [change(t) for t in tensors], None
    new = change(buffer)
    typed = {dtype: new.view(dtype) for dtype in {t.dtype for t in tensors}}
    there = [
        typed[t.dtype].as_strided(t.shape, t.stride(), p // t.itemsize) for t, p in zip(tensors, places, strict=True)
    ]
    return there, new

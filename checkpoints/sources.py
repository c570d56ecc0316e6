"""Where the bytes of a save come from: a copy, live memory, live memory that training goes on to change, or another file.

A Source hands out its rows in order, as contiguous CPU tensors of a bounded size. Tensors of fewer than two dimensions count as
one column. Buffers are reused: a part is good until BUFFERS - 1 further parts were taken.
"""

import mmap
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

BUFFERS = 4
HUGE_PAGE_BYTES = 2**21
SCALE_BYTES = 8  # scale and bias of an 8-bit row


class Source(Protocol):
    dtype: torch.dtype
    shape: torch.Size

    def parts(self, buffers: "Buffers") -> Iterator[Tensor]: ...


def host_memory(num_bytes: int, pinned: bool) -> Tensor:
    """Host bytes, pinned for copies from a GPU, else on huge pages: faulting small ones in takes longer than the copy itself."""
    if pinned or num_bytes < HUGE_PAGE_BYTES:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned)
    memory = mmap.mmap(-1, num_bytes)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


class Buffers:
    """A ring of host buffers of part_bytes each, made when first used."""

    def __init__(self, part_bytes: int, pinned: bool = False) -> None:
        self.part_bytes, self.pinned = part_bytes, pinned
        self._ring: list[Tensor] = []
        self._next = 0

    def rows_of(self, row_bytes: int) -> int:
        """Rows that fit into a part, at least one."""
        return max(1, self.part_bytes // max(row_bytes, 1))

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        num_bytes = dtype.itemsize * torch.Size(shape).numel()
        if len(self._ring) < BUFFERS:
            self._ring.append(host_memory(max(self.part_bytes, num_bytes), self.pinned))
        self._next = (self._next + 1) % len(self._ring)
        if self._ring[self._next].numel() < num_bytes:
            self._ring[self._next] = host_memory(num_bytes, self.pinned)
        return self._ring[self._next][:num_bytes].view(dtype).view(shape)


def steps(rows: int, at_once: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + at_once, rows)) for start in range(0, rows, at_once))


def _row_bytes(tensor: Tensor) -> int:
    return tensor.dtype.itemsize * (tensor.shape[1:].numel() if tensor.dim() else 1)


@dataclass
class Memory:
    """A tensor that nobody changes while it is saved."""

    tensor: Tensor

    def __post_init__(self) -> None:
        self.dtype, self.shape = self.tensor.dtype, self.tensor.shape

    def parts(self, buffers: Buffers) -> Iterator[Tensor]:
        whole = self.tensor.detach().cpu().contiguous()
        if whole.dim() == 0:
            yield whole
            return
        for start, stop in steps(len(whole), buffers.rows_of(_row_bytes(whole))):
            yield whole[start:stop]


@dataclass
class Live:
    """A live tensor, or its given rows, read part by part while training waits. rows [n] i64 on the tensor's device."""

    tensor: Tensor
    rows: Tensor | None = None

    def __post_init__(self) -> None:
        self.dtype = self.tensor.dtype
        self.shape = self.tensor.shape if self.rows is None else torch.Size((len(self.rows), *self.tensor.shape[1:]))

    def parts(self, buffers: Buffers) -> Iterator[Tensor]:
        tensor = self.tensor.detach()
        if tensor.dim() == 0:
            yield tensor.cpu().clone()
            return
        for start, stop in steps(self.shape[0], buffers.rows_of(_row_bytes(tensor))):
            part = buffers.take((stop - start, *self.shape[1:]), self.dtype)
            if self.rows is None:
                part.copy_(tensor[start:stop])
            elif tensor.device.type == "cpu":
                torch.index_select(tensor, 0, self.rows[start:stop], out=part)
            else:
                part.copy_(tensor.index_select(0, self.rows[start:stop]))
            yield part


class Guard:
    """Lets a shard be read row by row while training changes it: rows about to change are copied out first.

    The training thread calls `before_update`, the saving thread reads through `Guarded`. A part may be torn where rows changed
    while it was read; exactly those rows were copied before they changed, so putting the copies over it makes it whole.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        rows = len(next(iter(tensors.values())))
        self.done = dict.fromkeys(tensors, 0)  # rows below are read
        self.kept = torch.zeros(rows, dtype=torch.bool, device=next(iter(tensors.values())).device)
        self.copies: list[tuple[Tensor, dict[str, Tensor], object]] = []
        self.lock = threading.Lock()
        self.rows = rows
        self.copied_bytes = 0

    @property
    def finished(self) -> bool:
        return min(self.done.values()) >= self.rows

    def release(self) -> None:
        """The save is over, whether it succeeded or not."""
        self.done = dict.fromkeys(self.tensors, self.rows)
        self.copies = []

    def before_update(self, rows: Tensor) -> None:
        """Keep what rows [n] i64 (repeats allowed) hold now."""
        if self.finished:
            return
        rows = torch.unique(rows[~self.kept[rows] & (rows >= min(self.done.values()))])
        if not len(rows):
            return
        self.kept[rows] = True
        copy = {name: t.index_select(0, rows) for name, t in self.tensors.items()}
        event = None
        if rows.is_cuda:
            event = torch.cuda.Event()
            event.record()
        self.copied_bytes += sum(c.numel() * c.element_size() for c in copy.values())
        with self.lock:
            self.copies.append((rows, copy, event))

    def read(self, name: str, start: int, stop: int, part: Tensor) -> None:
        """Rows [start, stop) of tensor `name` as they were when the save began, into `part`. Rows go up from call to call."""
        part.copy_(self.tensors[name][start:stop])
        with self.lock:
            copies, self.done[name] = list(self.copies), stop
        for rows, copy, event in copies:
            if isinstance(event, torch.cuda.Event):
                event.synchronize()
            first, last = torch.searchsorted(rows, torch.tensor([start, stop], device=rows.device)).tolist()
            if first < last:
                part[(rows[first:last] - start).cpu()] = copy[name][first:last].to(part.device)
        with self.lock:  # what lies behind has been written: its memory is training's again
            behind = min(self.done.values())
            self.copies = [c for c in self.copies if int(c[0][-1]) >= behind] if behind < self.rows else []


@dataclass
class Guarded:
    """Tensor `name` of a Guard."""

    guard: Guard
    name: str

    def __post_init__(self) -> None:
        tensor = self.guard.tensors[self.name]
        self.dtype, self.shape = tensor.dtype, tensor.shape

    def parts(self, buffers: Buffers) -> Iterator[Tensor]:
        for start, stop in steps(self.shape[0], buffers.rows_of(_row_bytes(self.guard.tensors[self.name]))):
            part = buffers.take((stop - start, *self.shape[1:]), self.dtype)
            self.guard.read(self.name, start, stop, part)
            yield part


@dataclass
class Quantised:
    """Rows [n, w] as FBGEMM's 8-bit rows [n, w + 8]: w codes, then scale and bias in fp32. Reads another source."""

    source: Source
    dtype: torch.dtype = field(default=torch.uint8, init=False)

    def __post_init__(self) -> None:
        self.shape = torch.Size((self.source.shape[0], self.source.shape[1] + SCALE_BYTES))

    def parts(self, buffers: Buffers) -> Iterator[Tensor]:
        for part in self.source.parts(buffers):
            yield torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(part.float())


class NotFinite(RuntimeError):
    """A tensor that must be finite is not."""


@dataclass
class Finite:
    """A source that refuses NaN and infinity on the way."""

    source: Source
    name: str

    def __post_init__(self) -> None:
        self.dtype, self.shape = self.source.dtype, self.source.shape

    def parts(self, buffers: Buffers) -> Iterator[Tensor]:
        for part in self.source.parts(buffers):
            if not bool(part.isfinite().all()):
                raise NotFinite(f"{self.name} has values that are not finite")
            yield part


class Copies:
    """Host copies of a whole state, for `staging: full`. The memory is taken once and reused by every later save."""

    def __init__(self, pinned: bool) -> None:
        self.pinned = pinned
        self._memory: dict[object, Tensor] = {}

    def take(self, key: object, tensor: Tensor) -> Memory:
        """A copy of `tensor`, good until the next one under the same key. Asynchronous on a GPU: synchronise after the last."""
        return Memory(self._room(key, tensor.shape, tensor.dtype).copy_(tensor.detach(), non_blocking=True))

    def reserve(self, wanted: Sequence[tuple[object, Tensor]]) -> None:
        """Take the memory of copies of (key, tensor). Touching it here is what takes long, not the copy itself."""
        for key, tensor in wanted:
            self._room(key, tensor.shape, tensor.dtype).view(-1).view(torch.uint8)[:: mmap.PAGESIZE] = 0

    def gather(self, key: object, tensor: Tensor, rows: Tensor) -> Memory:
        """A copy of some rows [n] i64 of `tensor`."""
        room = self._room(key, torch.Size((len(rows), *tensor.shape[1:])), tensor.dtype)
        if tensor.device.type == "cpu":
            return Memory(torch.index_select(tensor.detach(), 0, rows, out=room))
        return Memory(room.copy_(tensor.detach().index_select(0, rows), non_blocking=True))

    def _room(self, key: object, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        num_bytes = shape.numel() * dtype.itemsize
        held = self._memory[key].numel() if key in self._memory else 0
        if key not in self._memory or held < num_bytes:
            # a delta has other rows every time: grow by more than it asks for
            self._memory[key] = host_memory(max(num_bytes, held * 3 // 2, 1), self.pinned)
        return self._memory[key][:num_bytes].view(dtype).view(shape)

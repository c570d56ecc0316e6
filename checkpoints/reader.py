"""Reading a committed folder: every byte is checked against its block's checksum before it is used."""

import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import LoadPlan, LoadPlanner, StorageReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType
from torch.futures import Future

from exfm.checkpoints.layout import (
    BLOCK_BYTES,
    SUM_DIGITS,
    Chunk,
    Damaged,
    Entry,
    FileRecord,
    block_sum,
    bytes_of,
    parse_index,
    records,
)
from exfm.checkpoints.sources import steps
from exfm.checkpoints.storage import Storage

PART_BYTES = 2**26
THREADS = 2  # one reads while the other checks
CACHED_BLOCKS = 2
OPEN_FILES = 8  # each with its blocks; a folder may have thousands


class CheckedFile:
    """Byte ranges of one data file. Damaged where the file is missing, has another size or differs from a checksum."""

    def __init__(self, storage: Storage, folder: str, record: FileRecord) -> None:
        self.storage, self.path, self.record = storage, f"{folder}/{record.path}", record
        self.shown = f"{storage.url}/{self.path}"
        self._blocks: OrderedDict[int, memoryview] = OrderedDict()
        self._lock = threading.Lock()
        try:
            size = storage.size(self.path)
        except FileNotFoundError:
            raise Damaged(f"checkpoint file {self.shown} is missing") from None
        if size != record.bytes:
            raise Damaged(f"checkpoint file {self.shown} has {size} bytes, {record.bytes} were committed")

    def read_into(self, start: int, target: memoryview) -> None:
        """Fill target from byte `start`. Whole blocks go straight into it, others through a small cache."""
        position, stop = start, start + len(target)
        while position < stop:
            number = position // BLOCK_BYTES
            first, last = number * BLOCK_BYTES, min((number + 1) * BLOCK_BYTES, self.record.bytes)
            upto = min(stop, last)
            room = target[position - start : upto - start]
            if position == first and upto == last:
                self._read(first, room)
                self._check(number, room)
            else:
                with self._lock:
                    room[:] = self._block(number, first, last)[position - first : upto - first]
            position = upto

    def _block(self, number: int, first: int, last: int) -> memoryview:
        if number not in self._blocks:
            block = memoryview(bytearray(last - first))
            self._read(first, block)
            self._check(number, block)
            self._blocks[number] = block
            while len(self._blocks) > CACHED_BLOCKS:
                self._blocks.popitem(last=False)
        return self._blocks[number]

    def _read(self, start: int, room: memoryview) -> None:
        try:
            self.storage.read_into(self.path, start, room)
        except FileNotFoundError:
            raise Damaged(f"checkpoint file {self.shown} is missing") from None

    def _check(self, number: int, block: memoryview) -> None:
        if block_sum(block) != self.record.sums[number * SUM_DIGITS : (number + 1) * SUM_DIGITS]:
            raise Damaged(
                f"checkpoint file {self.shown} differs from its checksum in bytes {number * BLOCK_BYTES} to "
                f"{number * BLOCK_BYTES + len(block)}"
            )

    def check(self, progress: Callable[[int], None] = lambda num_bytes: None) -> None:
        """Read all of it."""
        room = memoryview(bytearray(min(BLOCK_BYTES, max(self.record.bytes, 1))))
        for first, last in steps(self.record.bytes, BLOCK_BYTES):
            self._read(first, room[: last - first])
            self._check(first // BLOCK_BYTES, room[: last - first])
            progress(last - first)


class Folder:
    """The tensors of one committed folder."""

    def __init__(self, storage: Storage, folder: str, manifest: dict[str, Any]) -> None:
        self.storage, self.folder, self.manifest = storage, folder, manifest
        *self._records, index = records(manifest)
        self._files: dict[int, CheckedFile] = {}
        file = CheckedFile(storage, folder, index)
        text = memoryview(bytearray(index.bytes))
        file.read_into(0, text)
        self.index = parse_index(bytes(text), self._records, file.shown)

    def file(self, number: int) -> CheckedFile:
        if number not in self._files:
            while len(self._files) >= OPEN_FILES:
                del self._files[next(iter(self._files))]
            self._files[number] = CheckedFile(self.storage, self.folder, self._records[number])
        return self._files[number]

    def box(self, entry: Entry, chunk: Chunk, first: int, rows: int) -> Tensor:
        """`rows` rows of a chunk from its row `first`, all its columns; 0-dimensional ones whole."""
        shape = (rows, *chunk.sizes[1:]) if chunk.sizes else ()
        row_bytes = math.prod(shape[1:]) * entry.dtype.itemsize
        out = torch.empty(shape, dtype=entry.dtype)
        self.file(chunk.file).read_into(chunk.start + first * row_bytes, bytes_of(out))
        return out

    def tensor(self, name: str) -> Tensor:
        """A tensor whole, in new memory."""
        entry = self.index[name]
        whole = torch.empty(entry.shape, dtype=entry.dtype)
        for chunk in entry.chunks:
            where = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[where] = self.box(entry, chunk, 0, chunk.sizes[0] if chunk.sizes else 1)
        return whole

    def check(self, progress: Callable[[int], None] = lambda num_bytes: None) -> None:
        """Read every byte. Damaged names the first file that differs. progress: told of every few MiB, from any thread."""
        files = [CheckedFile(self.storage, self.folder, record) for record in self._records]
        with ThreadPoolExecutor(THREADS, thread_name_prefix="checkpoint-check") as pool:
            for _ in pool.map(lambda file: file.check(progress), files):
                pass


def copy_rows(folder: Folder, entry: Entry, chunk: Chunk, offsets: tuple[int, ...], target: Tensor) -> None:
    """Fill `target` from the box of its shape at `offsets` in a chunk; straight into its memory where that is possible."""
    if not chunk.sizes:
        target.copy_(folder.box(entry, chunk, 0, 1))
        return
    whole_rows = tuple(target.shape[1:]) == chunk.sizes[1:]
    row_bytes = math.prod(chunk.sizes[1:]) * entry.dtype.itemsize
    straight = whole_rows and target.dtype == entry.dtype and target.device.type == "cpu" and target.is_contiguous()

    def copy(rows: tuple[int, int]) -> None:
        first, last = rows
        if straight:
            start = chunk.start + (offsets[0] + first) * row_bytes
            folder.file(chunk.file).read_into(start, bytes_of(target[first:last]))
            return
        part = folder.box(entry, chunk, offsets[0] + first, last - first)
        for dim in range(1, part.dim()):
            part = part.narrow(dim, offsets[dim], target.shape[dim])
        target[first:last].copy_(part)

    ranges = list(steps(target.shape[0], max(1, PART_BYTES // max(row_bytes, 1))))
    folder.file(chunk.file)  # opened once
    if len(ranges) == 1:
        copy(ranges[0])
        return
    with ThreadPoolExecutor(THREADS, thread_name_prefix="checkpoint-load") as pool:
        for _ in pool.map(copy, ranges):
            pass


class ShardReader(StorageReader):
    """DCP's storage side of a load: it finds which saved boxes meet which local ones."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._chunks = {
            (name, chunk.offsets): (entry, chunk) for name, entry in folder.index.items() for chunk in entry.chunks
        }

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self) -> Metadata:
        described: dict[str, Any] = {
            name: TensorStorageMetadata(
                TensorProperties(dtype=entry.dtype),
                torch.Size(entry.shape),
                [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in entry.chunks],
            )
            for name, entry in self.folder.index.items()
        }
        return Metadata(described, storage_meta=StorageMeta())

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        def position(item: Any) -> tuple[int, int]:
            chunk = self._chunk(item.storage_index)[1]
            return chunk.file, chunk.start

        for item in sorted(plan.items, key=position):  # blocks are read once
            assert item.type == LoadItemType.TENSOR
            entry, chunk = self._chunk(item.storage_index)
            target = planner.resolve_tensor(item).detach()
            copy_rows(self.folder, entry, chunk, tuple(item.storage_offsets), target)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _chunk(self, index: MetadataIndex) -> tuple[Entry, Chunk]:
        assert index.offset is not None
        return self._chunks[index.fqn, tuple(index.offset)]

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

"""Writing one checkpoint folder: torch.distributed.checkpoint plans who writes what, this writes it and commits."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import SavePlan, SavePlanner, StorageWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from exfm.checkpoints.layout import (
    INDEX,
    MANIFEST,
    BlockSums,
    Chunk,
    Entry,
    FileRecord,
    bytes_of,
    header,
    index_bytes,
    manifest_bytes,
    sums_of,
)
from exfm.checkpoints.sources import Buffers, Source
from exfm.checkpoints.storage import Storage

Key = tuple[str, tuple[int, ...]]
Sources = Mapping[Key, Source]


@dataclass(frozen=True)
class Item:
    """A box of a tensor that this rank writes. shape: of the whole tensor; offsets: of the box."""

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    source: Source


@dataclass(frozen=True)
class Written:
    """Where an item ended up."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class RankFile:
    record: FileRecord
    items: tuple[Written, ...]


class Progress:
    """Bytes written so far by this rank; read by whoever reports."""

    def __init__(self) -> None:
        self.bytes = self.total = 0
        self.begun = time.monotonic()


def write_file(
    storage: Storage, folder: str, name: str, items: Sequence[Item], buffers: Buffers, p: Progress
) -> RankFile:
    """Write the items into one durable safetensors file. Sources are read in this thread, the file is written in another."""
    # the largest element first keeps every tensor aligned to its elements
    items = sorted(items, key=lambda i: -i.source.dtype.itemsize)
    names = [f"{i.name}@{','.join(map(str, i.offsets))}" for i in items]
    head, starts = header([(n, i.source.dtype, tuple(i.source.shape)) for n, i in zip(names, items, strict=True)])
    p.total += len(head) + sum(i.source.shape.numel() * i.source.dtype.itemsize for i in items)
    sums = BlockSums()

    def parts() -> Iterator[memoryview]:
        yield memoryview(head)
        for item in items:
            for part in item.source.parts(buffers):
                yield bytes_of(part)

    def summed() -> Iterator[memoryview]:
        for part in parts():
            sums.update(part)
            p.bytes += len(part)
            yield part

    storage.write(f"{folder}/{name}", ahead(summed()))
    written = tuple(
        Written(i.name, i.source.dtype, i.shape, i.offsets, tuple(i.source.shape), start)
        for i, start in zip(items, starts, strict=True)
    )
    return RankFile(sums.record(name), written)


def ahead(parts: Iterator[memoryview]) -> Iterator[memoryview]:
    """The same parts, made in another thread while the one before is used: at most one waits, one is made, one is used."""
    ready: queue.Queue[Any] = queue.Queue(maxsize=1)
    over = threading.Event()

    def put(thing: Any) -> bool:
        while not over.is_set():
            try:
                ready.put(thing, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def run() -> None:
        try:
            for part in parts:
                if not put(part):
                    return
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=run, name="checkpoint-read", daemon=True)
    thread.start()
    try:
        while (thing := ready.get()) is not None:
            if isinstance(thing, BaseException):
                raise thing
            yield thing
    finally:
        over.set()
        thread.join()


def commit_folder(storage: Storage, folder: str, files: Sequence[RankFile], manifest: dict[str, Any]) -> None:
    """The one commit point: every data file is durable; index, names, then the manifest that makes it all exist."""
    storage.sync(folder)
    index: dict[str, Entry] = {}
    for number, file in enumerate(files):
        for w in file.items:
            chunk = Chunk(w.offsets, w.sizes, number, w.start)
            before = index[w.name].chunks if w.name in index else ()
            index[w.name] = Entry(w.dtype, w.shape, (*before, chunk))
    text = index_bytes(index)
    storage.write(f"{folder}/{INDEX}", [memoryview(text)])
    storage.sync(folder)
    storage.sync("")  # the folder's own name
    records = [f.record for f in files] + [sums_of([memoryview(text)], INDEX)]
    storage.commit(f"{folder}/{MANIFEST}", manifest_bytes(manifest | {"files": [r.as_dict() for r in records]}))


class ShardWriter(StorageWriter):
    """DCP's storage side of a save. sources: what to write for every (name, offsets) of this rank's state.

    before_commit runs on the coordinator when all files are durable and before the manifest is.
    """

    def __init__(
        self,
        storage: Storage,
        folder: str,
        sources: Sources,
        manifest: dict[str, Any],
        buffers: Buffers,
        progress: Progress,
        after_read: Callable[[], None],
        before_commit: Callable[[], None],
    ) -> None:
        self.storage, self.folder, self.sources, self.manifest = storage, folder, sources, manifest
        self.buffers, self.progress = buffers, progress
        self.after_read, self.before_commit = after_read, before_commit

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        items = []
        for item in plan.items:
            assert item.tensor_data is not None, f"{item.index.fqn} is no tensor"
            offsets = tuple(item.tensor_data.chunk.offsets)
            if 0 in item.tensor_data.chunk.sizes and (item.index.fqn, offsets) not in self.sources:
                continue  # more ranks than rows: DCP plans an empty piece for those that have none
            items.append(
                Item(item.index.fqn, tuple(item.tensor_data.size), offsets, self.sources[item.index.fqn, offsets])
            )
        name = f"rank-{dist.get_rank():05d}.safetensors"
        file = write_file(self.storage, self.folder, name, items, self.buffers, self.progress)
        self.after_read()
        done: Future[list[WriteResult]] = Future()
        # one result for the file: finish makes the index from what is in it
        done.set_result([WriteResult(MetadataIndex(name), file.record.bytes, file)])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        files = [result.storage_data for share in results for result in share]
        self.before_commit()
        commit_folder(self.storage, self.folder, files, self.manifest)

    def storage_meta(self) -> StorageMeta | None:
        return None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def placeholder(source: Source) -> Tensor:
    """A tensor of a source's shape without memory, for planning."""
    return torch.empty(source.shape, dtype=source.dtype, device="meta")

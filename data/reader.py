"""The reader: batches of one slice for one rank, from any position, decoded ahead in a thread."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from exfm.data.batch import Batch
from exfm.data.columns import BatchColumns, Domain, convert, make_batch
from exfm.data.errors import UserError
from exfm.data.manifest import Generation, SliceManifest, Stream, slice_folder
from exfm.data.order import Piece, Rows, SliceOrder, pieces
from exfm.data.source import AlignedFiles, SliceSource

T = TypeVar("T")


class StreamConfig(BaseModel):
    """Section `stream`: where examples come from, in which order and how many at a time."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: str
    first: int = Field(0, ge=0, description="first slice")
    last: int | None = Field(None, description="one past the last slice; default: all of a sealed stream")
    global_batch: int = Field(1024, gt=0, description="examples per step over all ranks")
    shuffle_window: int = Field(0, ge=0, description="rows permuted together; 0 keeps the order of time")
    domains: tuple[Domain, ...] = Field((), description="named parts of the traffic, the first match counts")
    domain: str | None = Field(None, description="train only on this domain")
    labels: Generation = Field("first", description="labels as the window closed, or amended by late ones")
    on_missing: Literal["wait", "refuse"] = "refuse"
    wait_s: float = Field(600.0, ge=0, description="how long a missing slice is waited for with on_missing: wait")
    once: tuple[str, ...] = Field(
        (), description="features whose list, where a user's is as before, is looked up once per batch"
    )
    prefetch: int = Field(4, ge=0, description="batches decoded ahead; 0 decodes in the training thread")

    def own_domain(self) -> Domain | None:
        if self.domain is None:
            return None
        for domain in self.domains:
            if domain.name == self.domain:
                return domain
        raise UserError(f"stream.domain '{self.domain}' is not among stream.domains ({[d.name for d in self.domains]})")


@dataclass(frozen=True)
class SliceReader:
    """Batches of one slice. examples: how many take part (a domain's, or all)."""

    source: SliceSource
    order: SliceOrder
    columns: BatchColumns
    global_batch: int
    rank: int
    world_size: int

    @property
    def examples(self) -> int:
        return len(self.order)

    def batches(
        self, start: int = 0, stop: int | None = None, prefetch: int = 0, pinned: bool = False
    ) -> Iterator[Batch]:
        """This rank's pieces of the global batches at positions [start, stop), in order; pinned: in memory that a GPU copies from."""
        own = pieces(len(self.order), start, stop, self.global_batch, self.rank, self.world_size)
        work = (batch for block in self._blocks(own) for batch in self._of_block(block, pinned))
        return ahead(work, prefetch) if prefetch else work

    def _blocks(self, own: Iterator[Piece]) -> Iterator[list[tuple[Piece, Rows]]]:
        """Pieces and their rows, those of one row group together; a piece of several groups is alone."""
        block: list[tuple[Piece, Rows]] = []
        of_block: range | None = None
        for piece in own:
            rows = self.order.rows(piece.start, piece.stop)
            groups = self.source.groups(rows)
            if block and (groups != of_block or len(groups) > 1):
                yield block
                block = []
            block.append((piece, rows))
            of_block = groups
        if block:
            yield block

    def _of_block(self, block: Sequence[tuple[Piece, Rows]], pinned: bool) -> Iterator[Batch]:
        """The batches of some pieces, converted together; one by one where that fails, so that the piece to blame raises."""
        rows = np.concatenate([own for _, own in block])
        table = self.source.take(rows) if len(rows) else self.source.empty()
        ends = np.cumsum([0, *(len(own) for _, own in block)]).tolist()
        try:
            whole = convert(table, rows, self.columns, "")
        except UserError:
            for (p, own), first in zip(block, ends, strict=False):
                where = f"{self.source.files[0].folder} rows {p.start}..{p.stop}"
                yield make_batch(table.slice(first, len(own)), own, p.size, self.columns, where, pinned)
        else:
            for (p, own), first in zip(block, ends, strict=False):
                yield whole.batch(first, first + len(own), p.size, pinned)


def open_slice(
    stream: Stream,
    config: StreamConfig,
    columns: BatchColumns,
    index: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    sidecars: Callable[[SliceManifest], Sequence[AlignedFiles]] | None = None,
) -> SliceReader:
    """Open one slice for reading. sidecars: called with the features manifest, gives further row-aligned files.

    UserError where the slice is missing (after waiting, as configured), damaged or of another schema.
    """
    wait_s = config.wait_s if config.on_missing == "wait" else 0.0
    features = stream.wait(index, "features", wait_s)
    files = [_files(stream, features, columns.of_features())]
    for kind in stream.label_kinds(columns.labels):
        own = [task for task in columns.labels if task in stream.types(kind)]
        files.append(_files(stream, stream.wait(index, kind, wait_s), own))
    if sidecars:
        files += sidecars(features)
    source = SliceSource(files, stream.schema.id)
    domain = config.own_domain()
    selected = None if domain is None else np.flatnonzero(domain.mask(source.column(domain.column)))
    order = SliceOrder(source.num_rows, selected, config.shuffle_window, seed, index)
    return SliceReader(source, order, columns, config.global_batch, rank, world_size)


def _files(stream: Stream, manifest: SliceManifest, columns: Sequence[str]) -> AlignedFiles:
    folder = f"{slice_folder(stream.root, manifest.slice)}/{manifest.kind}"
    return AlignedFiles(stream.fs, folder, manifest, tuple(columns), stream.types(manifest.kind))


def slices_of(stream: Stream, config: StreamConfig) -> range:
    """The slices a job trains on. UserError where the end is unknown or beyond a sealed stream."""
    sealed = stream.info.num_slices
    last = sealed if config.last is None else config.last
    if last is None:
        raise UserError(f"{stream.root} is still growing and stream.last is not set; set stream.last")
    if config.first >= last or (sealed is not None and last > sealed):
        raise UserError(f"stream.first..last is {config.first}..{last}, but {stream.root} has slices 0..{sealed}")
    return range(config.first, last)


def ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """Iterate `items` in a thread, up to `depth` ahead; errors arrive in order, and closing ends the thread."""
    done = threading.Event()
    ready: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(maxsize=depth)

    def offer(kind: str, value: T | BaseException | None) -> None:
        while not done.is_set():
            try:
                return ready.put((kind, value), timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                offer("item", item)
                if done.is_set():
                    return
            offer("end", None)
        except BaseException as error:
            offer("error", error)

    thread = threading.Thread(target=work, name="exfm-reader", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                assert isinstance(value, BaseException)
                raise value
            yield value  # type: ignore[misc]
    finally:
        done.set()
        thread.join()

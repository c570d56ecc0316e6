"""Folders made from committed ones, file to file, in the background: compacted chains and snapshots for scoring.

Training does not wait for them: nothing here looks at live memory. Every rank takes its share of the boxes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from exfm.checkpoints.commits import Committed
from exfm.checkpoints.deltas import Patch, delta_name, patches
from exfm.checkpoints.layout import Chunk, Entry
from exfm.checkpoints.reader import Folder
from exfm.checkpoints.sources import SCALE_BYTES, Buffers, Finite, Memory, Quantised, Source, steps
from exfm.checkpoints.storage import Storage
from exfm.checkpoints.store import Group, agreed, from_rank_0, make_new
from exfm.checkpoints.writer import Item, Progress, RankFile, commit_folder, write_file


@dataclass
class Merged:
    """A saved box of a table with the rows of later deltas over it. kind: weight or adagrad_sum."""

    folder: Folder
    entry: Entry
    chunk: Chunk
    kind: str
    patches: Sequence[Patch]

    def __post_init__(self) -> None:
        self.dtype, self.shape = self.entry.dtype, torch.Size(self.chunk.sizes)

    def parts(self, buffers: Buffers) -> Iterator[Tensor]:
        row_bytes = self.dtype.itemsize * (self.shape[1:].numel() if self.shape else 1)
        for start, stop in steps(self.shape[0] if self.shape else 1, buffers.rows_of(row_bytes)):
            part = self.folder.box(self.entry, self.chunk, start, stop - start)
            for patch in self.patches:
                row, column = self.chunk.offsets
                patch.lay_over(self.kind, row + start, column, part)
            yield part


@dataclass
class Latest:
    """Of the given rows of a table's columns, the newest values in deltas."""

    found: Sequence[Patch]
    rows: Tensor
    kind: str

    def __post_init__(self) -> None:
        entry = self.found[-1].folder.index[f"{self.found[-1].name}.{self.kind}"]
        self.dtype, self.shape = entry.dtype, torch.Size((len(self.rows), entry.shape[1]))

    def parts(self, buffers: Buffers) -> Iterator[Tensor]:
        for start, stop in steps(len(self.rows), buffers.rows_of(self.dtype.itemsize * self.shape[1])):
            rows = self.rows[start:stop]
            part = torch.empty((stop - start, self.shape[1]), dtype=self.dtype)
            for patch in self.found:  # later ones win
                first, last = torch.searchsorted(patch.rows, torch.stack([rows[0], rows[-1] + 1])).tolist()
                if first < last:
                    where = torch.searchsorted(rows, patch.rows[first:last])
                    part[where] = patch.values(self.kind, first, last)
            yield part


def merged_items(folders: Sequence[Folder], share: Callable[[int], bool]) -> Iterator[Item]:
    """Everything of a chain as one full state. share: whether this rank writes box number n."""
    first, last = folders[0], folders[-1]
    later = [p for folder in folders[1:] for p in patches(folder, first)]
    number = 0
    for name, entry in first.index.items():
        if not name.startswith("tables."):
            continue
        table, kind = name.removeprefix("tables.").rsplit(".", 1)
        own = [p for p in later if p.table == table]
        for chunk in entry.chunks:
            number += 1
            if share(number):
                yield Item(name, entry.shape, chunk.offsets, Merged(first, entry, chunk, kind, own))
    for name, entry in last.index.items():
        if name.startswith(("tables.", "delta.")):
            continue
        for chunk in entry.chunks:
            number += 1
            if share(number):
                yield Item(name, entry.shape, chunk.offsets, Merged(last, entry, chunk, "", ()))


def snapshot_items(folders: Sequence[Folder], full: bool, int8: bool, share: Callable[[int], bool]) -> Iterator[Item]:
    """Weights alone of a chain, finite or NotFinite while read; only the rows of the deltas in `folders` where not full.

    int8: rows as FBGEMM's 8-bit rows, `.int8` [rows, (width + 8) x column shards] in place of `.weight`.
    """
    if not full:
        yield from _touched_items(folders, int8, share)
    for item in merged_items(folders if full else folders[-1:], share):
        name = item.name
        if name.startswith("dense.served."):
            yield Item(name, item.shape, item.offsets, Finite(item.source, name) if _real(item.source) else item.source)
        elif full and name.startswith("tables.") and name.endswith(".weight"):
            yield _weights(item, folders[0].index[name], int8)


def _real(source: Source) -> bool:
    return source.dtype.is_floating_point


def _weights(item: Item, entry: Entry, int8: bool) -> Item:
    source = Finite(item.source, item.name)
    if not int8:
        return Item(item.name, item.shape, item.offsets, source)
    # every column shard's rows are longer by their scale and bias
    shape = (item.shape[0], item.shape[1] + SCALE_BYTES * len(entry.columns))
    column = item.offsets[1] + SCALE_BYTES * entry.columns.index(item.offsets[1])
    return Item(item.name.removesuffix("weight") + "int8", shape, (item.offsets[0], column), Quantised(source))


def _touched_items(folders: Sequence[Folder], int8: bool, share: Callable[[int], bool]) -> Iterator[Item]:
    by_box: dict[tuple[str, int, int, int], list[Patch]] = {}
    for folder in folders:
        for patch in patches(folder, None):
            by_box.setdefault((patch.table, patch.row, patch.column, patch.segment), []).append(patch)
    for number, (box, found) in enumerate(sorted(by_box.items())):
        if not share(number):
            continue
        rows = torch.unique(torch.cat([p.rows for p in found]))
        name = delta_name(*box)
        weights: Source = Finite(Latest(found, rows, "weight"), name)
        kind = "weight"
        if int8:
            weights, kind = Quantised(weights), "int8"
        for suffix, source in (("rows", Memory(rows)), (kind, weights)):
            yield Item(f"{name}.{suffix}", tuple(source.shape), (0,) * len(source.shape), source)


def write_items(
    storage: Storage, name: str, items: Callable[[], Iterator[Item]], manifest: dict[str, Any], group: Group
) -> int:
    """Write and commit a folder from every rank's items; its bytes. All ranks call; a failure is everybody's."""
    from_rank_0(lambda: make_new(storage, name), group)
    file_name = f"rank-{dist.get_rank(group):05d}.safetensors"
    try:
        file: RankFile = agreed(
            lambda: write_file(storage, name, file_name, list(items()), Buffers(2**26), Progress()), group
        )
    except Exception:
        from_rank_0(lambda: storage.remove(name), group)  # what was not committed may not fill the disk
        raise
    files: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(files, file, group=group)
    from_rank_0(lambda: commit_folder(storage, name, files, manifest), group)
    return sum(f.record.bytes for f in files)


def compact(links: Sequence[Committed], name: str, group: Group) -> int:
    """Write a chain's state as one full commit `name`, the same position as its last delta; its bytes. All ranks call."""
    storage, newest = links[-1].storage, links[-1]
    folders = agreed(lambda: [c.open() for c in links], group)
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    own = {"kind": "full", "base": None, "compacted": [c.name for c in links]}
    manifest = {k: v for k, v in newest.manifest.items() if k not in ("files", "sum")} | own
    return write_items(storage, name, lambda: merged_items(folders, lambda n: n % world == rank), manifest, group)

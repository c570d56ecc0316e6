"""Snapshots: weights alone, for scoring. Made from a commit's files while training goes on, and committed like one.

    snapshots/slice=000017/{rank-*.safetensors, index.json, manifest.json}

The manifest points to the commit (`of`) and, where the snapshot holds only rows touched since the one before, to that (`base`).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from exfm.checkpoints.canonical import boxes
from exfm.checkpoints.commits import Committed, chain, committed, listing, nonsense
from exfm.checkpoints.config import SnapshotConfig
from exfm.checkpoints.deltas import patches
from exfm.checkpoints.derive import snapshot_items, write_items
from exfm.checkpoints.holding import reading
from exfm.checkpoints.keeping import clean
from exfm.checkpoints.layout import FORMAT, Damaged
from exfm.checkpoints.reader import Folder
from exfm.checkpoints.sources import steps
from exfm.checkpoints.storage import Storage
from exfm.checkpoints.store import Group, agreed, from_rank_0
from exfm.data.errors import UserError

AT_ONCE = 2**18


def published(storage: Storage) -> list[Committed]:
    """Committed snapshots with a good manifest, oldest first."""
    return committed(storage)


def snapshot_name(index: int) -> str:
    return f"slice={index:06d}"


def publish(
    storage: Storage, commit: Committed, config: SnapshotConfig, index: int, word: dict[str, Any], group: Group
) -> str:
    """Publish slice `index`'s snapshot from a commit; one line about it. word: what else its manifest says. All ranks call.

    NotFinite where a weight is NaN or infinite: nothing is published then.
    """
    links, before = from_rank_0(lambda: (chain(commit, listing(commit.storage)), published(storage)), group)
    name = snapshot_name(index)
    before = [s for s in before if s.step < index]
    base = _base(links, before, config)
    if base is not None:
        names = [c.name for c in links]
        links = links[names.index(base.manifest["of"]["name"]) + 1 :]
    folders = agreed(lambda: [c.open() for c in links], group)
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    manifest = word | {
        "format": FORMAT,
        "kind": "snapshot" if base is None else "snapshot delta",
        "slice": index,
        "rows": config.rows,
        "of": {"folder": commit.folder, "name": commit.name, "sum": commit.manifest["sum"]},
        "base": {"name": base.name, "sum": base.manifest["sum"]} if base else None,
    }
    size = write_items(
        storage,
        name,
        lambda: snapshot_items(folders, base is None, config.rows == "int8", lambda n: n % world == rank),
        manifest,
        group,
    )
    from_rank_0(lambda: clean(storage, config.keep, 0), group)
    return f"published snapshot {name} ({'delta' if base else 'full'}, {config.rows}, {size / 2**20:,.1f} MiB) of {commit.name}"


def _base(links: Sequence[Committed], before: Sequence[Committed], config: SnapshotConfig) -> Committed | None:
    """The snapshot that the new one may be a delta of: made from a commit that the new one's rests on."""
    if not before or before[-1].manifest["rows"] != config.rows:
        return None
    length = 1
    for snapshot in reversed(before):
        if snapshot.base is None:
            break
        length += 1
    of = before[-1].manifest["of"]
    behind = [i for i, c in enumerate(links[:-1]) if c.name == of["name"] and c.manifest["sum"] == of["sum"]]
    if not behind or length >= config.full_every:
        return None
    # rows of commits under different plans may lie in several boxes, of which none says which is the newest
    since = links[behind[0] + 1 :]
    alike = all(c.manifest.get("plan") == since[-1].manifest.get("plan") for c in since)
    return before[-1] if alike else None


def load_snapshot(storage: Storage, name: str, state: dict[str, Tensor]) -> dict[str, Any]:
    """Read a snapshot, and those it rests on, into live `tables.<n>.weight` and `dense.served.*`; its manifest.

    UserError for tensors that it lacks or has otherwise; Damaged for files that are not what was published.
    """
    everything = listing(storage)
    found = next((s for s in everything if s.name == name), None)
    if found is None:
        known = ", ".join(s.name for s in everything) or "none"
        raise UserError(f"{storage.url} has no snapshot {name}; it has {known}")
    with reading(storage, name), nonsense(found):
        _load([s.open() for s in chain(found, everything)], found.manifest["rows"] == "int8", state)
    return found.manifest


def _load(folders: Sequence[Folder], int8: bool, state: dict[str, Tensor]) -> None:
    for key, tensor in state.items():
        if not key.startswith("tables."):
            _read_dense(folders[-1], key, tensor)
            continue
        _read_table(folders[0], key.removesuffix(".weight"), tensor)
    for folder in folders[1:]:
        for patch in patches(folder, folders[0], ("int8",) if int8 else ("weight",)):
            live = state.get(f"tables.{patch.table}.weight")
            if live is not None:
                name_of = patch.name + (".int8" if int8 else ".weight")
                _overlay(folder, name_of, patch.rows, patch.column, patch.width, live)


def _read_dense(folder: Folder, key: str, tensor: Tensor) -> None:
    if key not in folder.index or folder.index[key].shape != tuple(tensor.shape):
        raise UserError(f"snapshot {folder.storage.url}/{folder.folder} has no {key} of shape {tuple(tensor.shape)}")
    tensor.copy_(folder.tensor(key))


def _read_table(folder: Folder, table: str, tensor: Tensor) -> None:
    int8 = f"{table}.int8" in folder.index
    name = f"{table}.int8" if int8 else f"{table}.weight"
    if name not in folder.index or len(folder.index[name].shape) != 2 or folder.index[name].shape[0] != tensor.shape[0]:
        raise UserError(f"snapshot {folder.storage.url}/{folder.folder} has no {table} of {tensor.shape[0]} rows")
    entry = folder.index[name]
    columns = sorted({c.offsets[1] for c in entry.chunks})
    width = entry.shape[1] - (8 * len(columns) if int8 else 0)
    if (
        width != tensor.shape[1]
        or (int8 and entry.dtype != torch.uint8)
        or (int8 and min(c.sizes[1] for c in entry.chunks) <= 8)
    ):
        raise UserError(
            f"snapshot {folder.storage.url}/{folder.folder} has {name} of width {width}, the model wants {tensor.shape[1]}"
        )
    for chunk in entry.chunks:
        column = chunk.offsets[1] - (8 * columns.index(chunk.offsets[1]) if int8 else 0)
        width = chunk.sizes[1] - (8 if int8 else 0)
        rows = torch.arange(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0])
        _overlay(folder, name, rows, column, width, tensor, chunk.offsets)


def _overlay(
    folder: Folder, name: str, rows: Tensor, column: int, width: int, tensor: Tensor, at: tuple[int, ...] = (0, 0)
) -> None:
    """Put a saved box, whose rows are the table's `rows`, over what this rank holds of the table."""
    entry = folder.index[name]
    chunk = next((c for c in entry.chunks if c.offsets == at), None)
    if chunk is None:
        raise Damaged(f"{folder.storage.url}/{folder.folder} lacks a box of {name}")
    for offsets, box in boxes(tensor):
        left, right = max(column, offsets[1]), min(column + width, offsets[1] + box.shape[1])
        first, last = torch.searchsorted(rows, torch.tensor([offsets[0], offsets[0] + len(box)])).tolist()
        if left >= right:
            continue
        for start, stop in steps(last - first, AT_ONCE):
            values = folder.box(entry, chunk, first + start, stop - start)
            if name.endswith(".int8"):
                values = torch.ops.fbgemm.Fused8BitRowwiseQuantizedToFloat(values)
            where = (rows[first + start : first + stop] - offsets[0]).to(box.device)
            box[where, left - offsets[1] : right - offsets[1]] = values[:, left - column : right - column].to(box)

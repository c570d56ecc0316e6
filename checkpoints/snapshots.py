"""Snapshots: weights alone, for scoring. Made from a commit's files while training goes on, and committed like one.

    snapshots/slice=000017/{rank-*.safetensors, index.json, manifest.json}

The manifest points to the commit (`of`) and, where the snapshot holds only rows touched since the one before, to that (`base`).
"""

import json
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from exfm.checkpoints.canonical import boxes
from exfm.checkpoints.commits import Committed, chain, committed, listing, nonsense
from exfm.checkpoints.config import SnapshotConfig
from exfm.checkpoints.derive import snapshot_items, write_items
from exfm.checkpoints.holding import reading
from exfm.checkpoints.keeping import clean
from exfm.checkpoints.layout import FORMAT
from exfm.checkpoints.storage import Storage
from exfm.checkpoints.store import Group, agreed, from_rank_0
from exfm.checkpoints.view import View
from exfm.data.errors import UserError


def snapshot_name(index: int) -> str:
    return f"slice={index:06d}"


def refuse(storage: Storage, index: int, why: str) -> None:
    """Leave word that slice `index` gets no snapshot, so that nobody waits for it."""
    storage.make()
    storage.commit(f"{snapshot_name(index)}.refused.json", json.dumps({"why": why}).encode())


def refused(storage: Storage, index: int) -> str:
    """Why slice `index` got no snapshot; "" where that is not known."""
    path = f"{snapshot_name(index)}.refused.json"
    return str(json.loads(storage.read(path))["why"]) if storage.exists(path) else ""


def publish(
    storage: Storage, commit: Committed, config: SnapshotConfig, index: int, word: dict[str, Any], group: Group
) -> str:
    """Publish slice `index`'s snapshot from a commit; one line about it. word: what else its manifest says. All ranks call.

    NotFinite where a weight is NaN or infinite: nothing is published then.
    """
    links, before = from_rank_0(lambda: (chain(commit, listing(commit.storage)), committed(storage)), group)
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


def load_snapshot(storage: Storage, name: str, state: dict[str, Tensor], held: Committed | None = None) -> Committed:
    """Read a snapshot, and those it rests on, into live `tables.<n>.weight` and `dense.served.*`, in place.

    held: the snapshot that `state` holds; where the new one rests on it, only what changed since is read. UserError for
    tensors that it lacks or has otherwise; Damaged for files that are not what was published.
    """
    everything = listing(storage)
    found = next((s for s in everything if s.name == name), None)
    if found is None:
        known = ", ".join(s.name for s in everything) or "none"
        raise UserError(f"{storage.url} has no snapshot {name}; it has {known}")
    with reading(storage, name), nonsense(found):
        links = chain(found, everything)
        known_sums = [c.manifest["sum"] for c in links]
        if held is not None and held.manifest["sum"] in known_sums:
            newer = links[known_sums.index(held.manifest["sum"]) + 1 :]
            _advance(View([c.open() for c in (links[0], *newer)]), found.folder, state)
        else:
            _load(View([c.open() for c in links]), found.folder, state)
    return found


def _advance(view: View, where: str, state: dict[str, Tensor]) -> None:
    """Put the rows of a view's deltas over live tables, and read the dense part anew."""
    dense = {name: tensor for name, tensor in state.items() if not name.startswith("tables.")}
    _load(view, where, dense)
    for name, tensor in state.items():
        if name not in dense:
            for (row, column), box in boxes(tensor):
                view.lay_over(name, row, column, box)


def _load(view: View, where: str, state: dict[str, Tensor]) -> None:
    for name, tensor in state.items():
        shape, wanted = view.shape(name) if name in view.names else None, tuple(tensor.shape)
        if shape is None or shape[0:1] != wanted[0:1] or (shape != wanted and not name.startswith("tables.")):
            raise UserError(f"snapshot {where} has no {name} of shape {wanted}")
        if shape != wanted:
            raise UserError(f"snapshot {where} has {name} of width {shape[1]}, the model wants {wanted[1]}")
        if not shape:
            tensor.copy_(view.rows(name, 0, 1))
            continue
        for (row, *inner), box in boxes(tensor):
            columns = tuple(slice(o, o + s) for o, s in zip(inner, box.shape[1:], strict=True))
            for first, last in view.parts(name):
                low, high = max(first, row), min(last, row + len(box))
                if low < high:
                    box[low - row : high - row].copy_(view.rows(name, low, high)[(slice(None), *columns)])

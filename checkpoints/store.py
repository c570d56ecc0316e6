"""The commits of a job: listing them, chains of deltas, loading one into a live model, keeping and removing.

    <checkpoint.folder>/step=00001234[-k]/{rank-*.safetensors, index.json, manifest.json}

A folder without a manifest does not exist: it is never resumed from and the next save removes it.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from exfm.checkpoints.canonical import boxes, convert_segments, like
from exfm.checkpoints.deltas import apply_delta
from exfm.checkpoints.layout import MANIFEST, PINNED, Damaged, read_manifest
from exfm.checkpoints.reader import Folder, ShardReader
from exfm.checkpoints.sources import NotFinite
from exfm.checkpoints.storage import Storage
from exfm.data.errors import UserError

NAME = re.compile(r"step=(\d{8,})(?:-(\d+))?")
SET_ASIDE = "manifest.damaged.json"
Partials = dict[str, np.ndarray]
Group = dist.ProcessGroup | None


@dataclass(frozen=True)
class Committed:
    """A committed folder. manifest: {} where it cannot be read, and `problem` says why."""

    storage: Storage
    name: str
    manifest: dict[str, Any]
    problem: str = ""

    @property
    def folder(self) -> str:
        return f"{self.storage.url}/{self.name}"

    @property
    def step(self) -> int:
        return order(self.name)[0]

    @property
    def kind(self) -> str:
        return str(self.manifest.get("kind", "?"))

    @property
    def base(self) -> str | None:
        """Name of the commit that a delta is relative to."""
        return str(self.manifest["base"]["name"]) if self.manifest.get("base") else None

    def open(self) -> Folder:
        return Folder(self.storage, self.name, self.manifest)


def order(name: str) -> tuple[int, int]:
    """Sorts step=00000007, step=00000007-1 (committed later at the same step), step=00000012."""
    found = NAME.fullmatch(name)
    assert found is not None, name
    return int(found[1]), int(found[2] or 0)


def listing(storage: Storage) -> list[Committed]:
    """Everything that was committed, oldest first, unreadable manifests included."""
    found = []
    for name in sorted((n for n in storage.names() if NAME.fullmatch(n)), key=order):
        if storage.exists(f"{name}/{MANIFEST}"):
            try:
                found.append(Committed(storage, name, read_manifest(storage, name)))
            except Damaged as error:
                found.append(Committed(storage, name, {}, str(error)))
    return found


def committed(root: Any) -> list[Committed]:
    """Committed checkpoints with a good manifest, oldest first. root: a folder or URL."""
    return [c for c in listing(root if isinstance(root, Storage) else Storage(root)) if not c.problem]


def chain(found: Committed, everything: Sequence[Committed]) -> list[Committed]:
    """The full commit that `found` rests on, the deltas after it, `found` last. Damaged where one is missing or exchanged."""
    if found.problem:
        raise Damaged(found.problem)
    by_name = {c.name: c for c in everything}
    links = [found]
    while (base := links[0].base) is not None:
        before = by_name.get(base)
        if before is None or before.problem or len(links) > len(by_name):
            raise Damaged(f"{links[0].folder} holds rows changed since {base}, which is missing or damaged")
        if before.manifest["sum"] != links[0].manifest["base"]["sum"]:
            raise Damaged(f"{before.folder} is not the commit that {links[0].folder} was made from")
        links.insert(0, before)
    return links


# ------------------------------------------------------------------------------------------------ loading


def restore_newest(
    storage: Storage, load_it: Callable[[list[Committed]], None], say: Callable[[str], None], group: Group = None
) -> Committed | None:
    """Load the newest commit that is undamaged; None where there is none at all. All ranks call.

    Every damaged one is named and set aside. UserError where all of them are.
    """
    everything = from_rank_0(lambda: listing(storage), group)
    problem = ""
    for found in reversed(everything):
        try:
            load_it(chain(found, everything))
            return found
        except Damaged as error:
            problem = str(error)
            say(f"{problem}; it is set aside, going back to the commit before it")
            from_rank_0(lambda name=found.name: set_aside(storage, name), group)  # type: ignore[misc]
    if problem:
        raise UserError(
            f"no undamaged commit is left in {storage.url} ({problem}); choose another run.folder to start anew"
        )
    return None


def set_aside(storage: Storage, name: str) -> None:
    """Take a damaged commit out of the list; its files stay until the next save."""
    storage.write(f"{name}/{SET_ASIDE}", [memoryview(storage.read(f"{name}/{MANIFEST}"))])
    storage.remove(f"{name}/{MANIFEST}")


def load(links: Sequence[Committed], state: dict[str, Tensor], group: Group = None) -> bool:
    """Read a chain into the live tensors of `state`, whatever plan, row type and number of ranks wrote it. All ranks call.

    True if the live state is now exactly what was saved; False where something had to be converted (rows of another
    type, more rows than were saved, row-wise Adagrad sums of another number of column shards).
    Damaged names a file that is not what was committed; UserError a tensor that the checkpoint lacks or has otherwise.
    """
    return load_from(agreed(lambda: [c.open() for c in links], group), state, group)


def load_from(folders: Sequence[Folder], state: dict[str, Tensor], group: Group = None) -> bool:
    """`load` of an opened chain."""
    target, converted = {}, []
    for name, tensor in state.items():
        holder = folders[0] if name.startswith("tables.") else folders[-1]
        target[name] = _target(holder, name, tensor)
        if target[name] is not tensor or holder.index[name].dtype != tensor.dtype:
            converted.append(name)
    tables = {n: t for n, t in target.items() if n.startswith("tables.")}
    rest = {n: t for n, t in target.items() if n not in tables}
    if len(folders) == 1:
        tables, rest = target, {}
    for folder, part in ((folders[0], tables), (folders[-1], rest)):
        if part or folder is folders[0]:
            _dcp_load(part, folder, group)

    def apply_deltas() -> None:
        for folder in folders[1:]:
            apply_delta(folder, tables)

    agreed(apply_deltas, group)
    for name in converted:
        if name.endswith(".adagrad_sum"):
            _convert(target[name], state[name])
    return not converted


def _dcp_load(part: dict[str, Tensor], folder: Folder, group: Group) -> None:
    try:
        dcp.load(part, storage_reader=ShardReader(folder), process_group=group)
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise type(first)(str(first)) if isinstance(first, UserError | OSError) else error from None


def _target(folder: Folder, name: str, tensor: Tensor) -> Tensor:
    """What to read `name` into: the live tensor itself, its rows that were saved, or new memory for sums to be converted."""
    if name not in folder.index:
        raise UserError(f"checkpoint {folder.storage.url}/{folder.folder} lacks {name}; it is of another model")
    saved, shape = folder.index[name].shape, tuple(tensor.shape)
    is_table = name.startswith("tables.") and len(saved) == 2
    segments = saved[1] if is_table and name.endswith(".adagrad_sum") and saved[1] != shape[1] else None
    if saved == shape:
        return tensor
    if is_table and saved[0] <= shape[0] and (segments is not None or saved[1] == shape[1]):
        return like(tensor, saved[0], segments)
    raise UserError(
        f"checkpoint {folder.storage.url}/{folder.folder} has {name} of shape {saved}, the model wants {shape}"
        + (": a table can grow in rows, not shrink" if is_table and saved[1:] == shape[1:] else "")
    )


def _convert(saved: Tensor, live: Tensor) -> None:
    """Sums read as they were saved into live sums of another number of segments; rows that were not saved stay."""
    if saved.shape[1] == live.shape[1]:
        return
    by_row = {offsets[0]: box for offsets, box in boxes(saved)}
    for (row, *column), box in boxes(live):
        if row in by_row:
            value = convert_segments(by_row[row], live.shape[1])
            first = column[0] if column else 0
            box[: len(value)].copy_(value[:, first : first + box.shape[1]])


def load_partials(found: Committed) -> list[Partials]:
    """This rank's share of the per-rank arrays: its own where the number of ranks is the same, else every W-th."""
    folder = agreed(found.open)

    def read() -> list[Partials]:
        share = []
        for writer in range(int(found.manifest["world_size"])):
            if writer % dist.get_world_size() == dist.get_rank():
                prefix = f"rank.{writer:05d}."
                names = [n for n in folder.index if n.startswith(prefix)]
                share.append({n.removeprefix(prefix): folder.tensor(n).numpy() for n in names})
        return share

    return agreed(read)


# ------------------------------------------------------------------------------------------------ keeping


def clean(storage: Storage, keep: int, keep_every: int, current: str | None = None) -> list[str]:
    """Remove what is not to be kept; the names removed.

    Kept: the newest `keep` commits, the first of every `keep_every` slices, pinned ones, and all that these rest on.
    """
    everything = listing(storage)
    wanted = {c.name for c in everything[-keep:]} | {c.name for c in everything if is_pinned(c)} | {current}
    if keep_every:
        firsts: dict[int, str] = {}
        for c in everything:
            position = c.manifest.get("position")
            if position and position["slice"] >= keep_every:
                firsts.setdefault(position["slice"] // keep_every, c.name)
        wanted |= set(firsts.values())
    for c in reversed(everything):
        if c.name in wanted and c.base:
            wanted.add(c.base)
    removed = [n for n in storage.names() if NAME.fullmatch(n) and n not in wanted]
    for name in removed:
        storage.remove(f"{name}/{MANIFEST}")
        storage.remove(name)
    return removed


def is_pinned(found: Committed) -> bool:
    return found.storage.exists(f"{found.name}/{PINNED}")


# ------------------------------------------------------------------------------------------------ together


def agreed(act: Callable[[], Any], group: Group = None) -> Any:
    """Run on every rank; where it fails on one, the same error on all of them."""
    result, failure = None, None
    try:
        result = act()
    except (UserError, OSError, NotFinite) as error:
        failure = error
    failures: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(failures, failure, group=group)
    if first := next((f for f in failures if f is not None), None):
        raise first
    return result


def new_name(storage: Storage, step: int) -> str:
    """A folder for a commit at `step` that holds none yet: compaction and slices without examples come back to a step."""
    name, again = f"step={step:08d}", 0
    while storage.exists(f"{name}/{MANIFEST}"):
        again += 1
        name = f"step={step:08d}-{again}"
    return name


def make_new(storage: Storage, name: str) -> None:
    """An empty folder, whatever an attempt that was not committed left there."""
    storage.remove(name)
    storage.make(name)


def from_rank_0(act: Callable[[], Any], group: Group = None) -> Any:
    """Run on rank 0; its result, or its error, on all ranks."""
    word: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            word[0] = act()
        except (UserError, OSError) as error:
            word[1] = error
    dist.broadcast_object_list(word, src=0, group=group)
    if word[1] is not None:
        raise word[1]
    return word[0]

"""The commits of a job: loading one into a live model, setting damaged ones aside.

    <checkpoint.folder>/step=00001234[-k]/{rank-*.safetensors, index.json, manifest.json}

A folder without a manifest does not exist: it is never resumed from and the next save removes it.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from exfm.checkpoints.canonical import boxes, convert_segments, like
from exfm.checkpoints.commits import Committed, chain, listing, nonsense
from exfm.checkpoints.deltas import apply_delta
from exfm.checkpoints.holding import reading
from exfm.checkpoints.layout import MANIFEST, Damaged
from exfm.checkpoints.reader import Folder, ShardReader
from exfm.checkpoints.sources import NotFinite
from exfm.checkpoints.storage import Storage
from exfm.checkpoints.strict import MAX_TEXT_BYTES
from exfm.data.errors import UserError

PARTIAL = re.compile(r"rank\.([0-9]{5,9})\.(.+)")
SET_ASIDE = "manifest.damaged.json"
Partials = dict[str, np.ndarray]
Group = dist.ProcessGroup | None


# ------------------------------------------------------------------------------------------------ loading


def restore_newest(
    storage: Storage,
    load_it: Callable[[list[Committed]], None],
    reset: Callable[[], None],
    say: Callable[[str], None],
    group: Group = None,
) -> Committed | None:
    """Load the newest commit that is undamaged; None where there is none at all. All ranks call.

    Every damaged one is named; `reset` undoes what reading it has done to the model; it is set aside once an older one has
    been loaded. UserError where all are damaged, and then all stay: it may be the disk that is gone, not they.
    """
    everything = from_rank_0(lambda: listing(storage), group)
    damaged: dict[str, str] = {}
    for found in reversed(everything):
        try:
            load_it(chain(found, everything))
        except Damaged as error:
            damaged[found.name] = str(error)
            say(f"{error}; going back to the commit before it")
            reset()
            continue
        for name in damaged:
            from_rank_0(lambda name=name: set_aside(storage, name), group)  # type: ignore[misc]
        return found
    if damaged:
        raise UserError(
            f"no undamaged commit is left in {storage.url} ({next(iter(damaged.values()))}); see that its disk is there and whole, "
            "or choose another run.folder to start anew"
        )
    return None


def set_aside(storage: Storage, name: str) -> None:
    """Take a damaged commit out of the list; its files stay until the next save."""
    # one that is too large to be read is kept as far as it would be
    storage.write(f"{name}/{SET_ASIDE}", [memoryview(storage.read(f"{name}/{MANIFEST}", 0, MAX_TEXT_BYTES))])
    storage.remove(f"{name}/{MANIFEST}")


def load(links: Sequence[Committed], state: dict[str, Tensor], group: Group = None) -> bool:
    """Read a chain into the live tensors of `state`, whatever plan, row type and number of ranks wrote it. All ranks call.

    True if the live state is now exactly what was saved; False where something had to be converted (rows of another
    type, more rows than were saved, row-wise Adagrad sums of another number of column shards).
    Damaged names a file that is not what was committed; UserError a tensor that the checkpoint lacks or has otherwise.
    """
    with ExitStack() as stack:
        agreed(lambda: stack.enter_context(reading(links[-1].storage, links[-1].name)), group)
        return load_from(agreed(lambda: [c.open() for c in links], group), state, group)


def load_from(folders: Sequence[Folder], state: dict[str, Tensor], group: Group = None) -> bool:
    """`load` of an opened chain."""
    target, converted = {}, []
    for name, tensor in state.items():
        holder = folders[0] if name.startswith("tables.") else folders[-1]
        target[name] = _target(holder, name, tensor)
        # of the boxes: a DTensor of several says float32 whatever they are
        if target[name] is not tensor or any(b.dtype != holder.index[name].dtype for _, b in boxes(tensor)):
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
            apply_delta(folder, tables, folders[0])

    agreed(apply_deltas, group)
    for name in converted:
        if name.endswith(".adagrad_sum"):
            _convert(target[name], state[name])
    # a rank without rows of a table has nothing to convert
    anywhere: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(anywhere, bool(converted), group=group)
    return not any(anywhere)


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
    saved, shape, dtype = folder.index[name].shape, tuple(tensor.shape), folder.index[name].dtype
    if dtype != tensor.dtype and not (dtype.is_floating_point and tensor.dtype.is_floating_point):
        raise UserError(
            f"checkpoint {folder.storage.url}/{folder.folder} has {name} as {dtype}, the model wants {tensor.dtype}"
        )
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

    @nonsense(found)
    def read() -> list[Partials]:
        by_rank: dict[int, Partials] = {}
        writers = set()
        for name in folder.index:
            if match := PARTIAL.fullmatch(name):
                if (writer := int(match[1])) % dist.get_world_size() == dist.get_rank():
                    by_rank.setdefault(writer, {})[match[2]] = folder.tensor(name).numpy()
                writers.add(writer)
        if writers != set(range(len(writers))) or len(writers) != found.manifest["world_size"]:
            raise Damaged(f"{found.folder} holds arrays of {len(writers)} of its ranks")
        return [by_rank[writer] for writer in sorted(by_rank)]

    return agreed(read)


# ------------------------------------------------------------------------------------------------ together


def agreed(act: Callable[[], Any], group: Group = None) -> Any:
    """Run on every rank; where it fails on one, the same error on all of them."""
    result, failure = None, None
    try:
        result = act()
    except Exception as error:
        failure = portable(error)
    failures: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(failures, failure, group=group)
    if first := next((f for f in failures if f is not None), None):
        raise first
    return result


def portable(error: Exception) -> Exception:
    """An error that can be sent to other ranks: none may wait for one that has failed, whatever the reason."""
    if isinstance(error, UserError | OSError | NotFinite):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")


def new_name(storage: Storage, step: int) -> str:
    """A folder for a commit at `step` that holds none yet: compaction and slices without examples come back to a step."""
    name, again = f"step={step:08d}", 0
    while storage.exists(f"{name}/{MANIFEST}"):
        again += 1
        name = f"step={step:08d}-{again}"
    return name


def make_new(storage: Storage, name: str) -> None:
    """An empty folder, whatever an attempt that was not committed left there."""
    storage.remove(f"{name}/{MANIFEST}")  # first: what is half removed must not look committed
    storage.remove(name)
    storage.make(name)


def from_rank_0(act: Callable[[], Any], group: Group = None) -> Any:
    """Run on rank 0; its result, or its error, on all ranks."""
    word: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            word[0] = act()
        except Exception as error:
            word[1] = portable(error)
    dist.broadcast_object_list(word, src=0, group=group)
    if word[1] is not None:
        raise word[1]
    return word[0]

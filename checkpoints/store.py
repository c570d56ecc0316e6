"""Saving and restoring: every rank writes its shards with torch.distributed.checkpoint, then one manifest commits them.

    checkpoints/step=00001234/{*.distcp, .metadata, rank-00000.npz, manifest.json}

A folder without a manifest does not exist: it is never resumed from and is cleaned up by the next save.
"""

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from exfm.checkpoints.canonical import convert_segments, distributed
from exfm.data.commit import commit_json, open_folder, read_json, sync_folder
from exfm.data.errors import UserError

MANIFEST = "manifest.json"
Partials = dict[str, np.ndarray]


class SaveError(RuntimeError):
    """A checkpoint could not be written; the previous commit is intact."""


@dataclass(frozen=True)
class Committed:
    """A committed checkpoint."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])


def committed(root: Path) -> list[Committed]:
    """Committed checkpoints, oldest first."""
    found = []
    for folder in sorted(root.glob("step=*"), key=_order):
        fs, path = open_folder(folder)
        if fs.exists(f"{path}/{MANIFEST}"):
            found.append(Committed(folder, read_json(fs, f"{path}/{MANIFEST}")))
    return found


def _order(folder: Path) -> tuple[int, int]:
    """Sorts step=00000007, step=00000007-1 (committed later at the same step), step=00000012."""
    step, _, again = folder.name.removeprefix("step=").partition("-")
    return int(step), int(again or 0)


def _new_folder(root: Path, step: int) -> Path:
    """A folder that holds no commit; rank 0 chooses. A slice without examples is committed at the step of the one before."""
    again = [len([c for c in committed(root) if c.step == step]) if dist.get_rank() == 0 else 0]
    dist.broadcast_object_list(again, src=0)
    return root / (f"step={step:08d}" + (f"-{again[0]}" if again[0] else ""))


def save(
    root: Path, step: int, state: Mapping[str, Tensor], partials: Partials, manifest: dict[str, Any], keep: int
) -> None:
    """Write and commit a checkpoint; called by all ranks. partials: this rank's arrays, returned by `load_partials`.

    SaveError on every rank if any rank cannot write; what was committed before stays.
    """
    folder = _new_folder(root, step)
    try:
        _write(folder, step, state, partials, manifest)
    except SaveError:
        # an unfinished checkpoint must not keep the disk full
        on_rank_0(lambda: shutil.rmtree(folder, ignore_errors=True))
        raise
    on_rank_0(lambda: _clean(root, keep))


def _write(folder: Path, step: int, state: Mapping[str, Tensor], partials: Partials, manifest: dict[str, Any]) -> None:
    on_rank_0(lambda: _make_empty(folder))
    _on_all_ranks(folder, lambda: dcp.save(dict(state), storage_writer=dcp.FileSystemWriter(folder, sync_files=True)))
    own = folder / f"rank-{dist.get_rank():05d}.npz"
    files = _on_all_ranks(folder, lambda: _write_partials(folder, own, partials))
    everything: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everything, files)
    on_rank_0(lambda: _commit(folder, step, manifest, [f for part in everything for f in part]))


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _write_partials(folder: Path, path: Path, partials: Partials) -> list[dict[str, Any]]:
    """Write this rank's arrays; size and checksum of all files that this rank wrote."""
    with open(path, "wb") as f:
        np.savez(f, **partials)  # type: ignore[arg-type]
        f.flush()
        os.fsync(f.fileno())
    rank = dist.get_rank()
    mine = [path, *folder.glob(f"__{rank}_*.distcp"), *([folder / ".metadata"] if rank == 0 else [])]
    return [{"path": p.name, "bytes": p.stat().st_size, "sha256": _sha256(p)} for p in mine]


def _commit(folder: Path, step: int, manifest: dict[str, Any], files: list[dict[str, Any]]) -> None:
    sync_folder(str(folder))
    fs, path = open_folder(folder)
    versions = {"torch": torch.__version__, "format": 1}
    full = {**manifest, "step": step, "files": files, "versions": versions, "world_size": dist.get_world_size()}
    commit_json(fs, f"{path}/{MANIFEST}", full)


def _clean(root: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and folders that were never committed."""
    names = [c.folder for c in committed(root)]
    for folder in root.glob("step=*"):
        if folder not in names or folder in names[:-keep]:
            (folder / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)


def load(found: Committed, state: dict[str, Tensor]) -> None:
    """Read a checkpoint into the live tensors of `state`, whatever plan and number of ranks wrote it.

    UserError for a checkpoint that lacks something, has another shape or is damaged.
    """
    check_files(found)
    reader = dcp.FileSystemReader(found.folder)
    saved = reader.read_metadata().state_dict_metadata
    target: dict[str, Tensor] = {}
    converted: list[tuple[str, Tensor]] = []
    for key, tensor in state.items():
        if key not in saved:
            raise UserError(f"checkpoint {found.folder} lacks {key}; it is of another model")
        size = tuple(getattr(saved[key], "size", ()))
        if key.endswith(".adagrad_sum") and size[0] == tensor.shape[0] and size[1] != tensor.shape[1]:
            target[key] = _like_saved(tensor, size[1])
            converted.append((key, tensor))
        elif size != tuple(tensor.shape):
            raise UserError(
                f"checkpoint {found.folder} has {key} of shape {size}, the model wants {tuple(tensor.shape)}"
            )
        else:
            target[key] = tensor
    dcp.load(target, storage_reader=reader)
    for key, tensor in converted:
        for (own, offset), (got, _) in zip(_pieces(tensor), _pieces(target[key]), strict=True):
            value = convert_segments(got, tensor.shape[1], key)
            own.copy_(value[:, offset : offset + 1])


def _pieces(tensor: Tensor) -> list[tuple[Tensor, int]]:
    """Local tensors with their column offsets."""
    if not isinstance(tensor, DTensor):
        return [(tensor, 0)]
    return [(t, column) for t, (_, column) in _local_pieces(tensor)]


def _local_pieces(tensor: DTensor) -> list[tuple[Tensor, tuple[int, ...]]]:
    """(piece, its (row, column)) of this rank. One without pieces has none, though torch keeps an offset (0,) for it."""
    local: Any = tensor.to_local()
    shards = local.local_shards()
    return list(zip(shards, local.local_offsets()[: len(shards)], strict=True))


def _like_saved(tensor: Tensor, segments: int) -> Tensor:
    """Room for all saved segments of this rank's rows."""
    if not isinstance(tensor, DTensor):
        return tensor.new_empty(tensor.shape[0], segments)
    pieces = [(t.new_empty(t.shape[0], segments), (row, 0)) for t, (row, *_) in _local_pieces(tensor)]
    mesh = init_device_mesh(tensor.device_mesh.device_type, (dist.get_world_size(),))
    return distributed(pieces, (tensor.shape[0], segments), mesh)


def load_partials(found: Committed) -> list[Partials]:
    """This rank's share of the per-rank arrays: its own where the number of ranks is the same, else every W-th."""
    share = []
    for writer in range(int(found.manifest["world_size"])):
        if writer % dist.get_world_size() == dist.get_rank():
            with np.load(found.folder / f"rank-{writer:05d}.npz", allow_pickle=False) as arrays:
                share.append(dict(arrays))
    return share


def check_files(found: Committed) -> None:
    """UserError, the same on all ranks, names a file that is missing, truncated or changed. The ranks share the reading."""
    mine = found.manifest["files"][dist.get_rank() :: dist.get_world_size()]
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, next(filter(None, (_problem(found.folder, entry) for entry in mine)), None))
    if first := next(filter(None, problems), None):
        raise UserError(f"checkpoint file {first}; remove {found.folder} to resume from the commit before it")


def _problem(folder: Path, entry: dict[str, Any]) -> str | None:
    path = folder / entry["path"]
    if not path.exists() or path.stat().st_size != entry["bytes"]:
        return f"{path} is missing or truncated"
    return f"{path} differs from its checksum" if _sha256(path) != entry["sha256"] else None


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def on_rank_0(act: Any) -> None:
    """Run on rank 0; where it fails, the same error on all ranks: SaveError if it cannot write. A barrier in effect."""
    error: list[Exception | None] = [None]
    if dist.get_rank() == 0:
        try:
            act()
        except OSError as e:
            error = [SaveError(f"cannot write a checkpoint: {e}; the last commit is intact; free some space")]
        except UserError as e:
            error = [e]
    dist.broadcast_object_list(error, src=0)
    if error[0] is not None:
        raise error[0]


def _on_all_ranks(folder: Path, act: Any) -> Any:
    """Run on every rank; if one fails to write, SaveError on all of them."""
    result, failure = None, None
    try:
        result = act()
    except (OSError, RuntimeError, CheckpointException) as e:
        failure = str(e)
    failures: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    if first := next((f for f in failures if f), None):
        raise SaveError(
            f"cannot write {folder}: {first.strip().splitlines()[-1]}; the last commit is intact; free some space"
        )
    return result

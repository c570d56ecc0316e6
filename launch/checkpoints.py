"""What `exfm checkpoint` does, without its words: find commits, list, show, verify, keep, merge.

A place is PATH or PATH/step=00000012 (PATH/slice=000017 of snapshots); without a name the newest whole commit is meant. PATH
is a run's folder, a folder of checkpoints or snapshots, or such a URL.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
import yaml

from exfm.checkpoints import keeping
from exfm.checkpoints.commits import NAME, Committed, chain, listing
from exfm.checkpoints.deltas import patches
from exfm.checkpoints.derive import compact
from exfm.checkpoints.holding import reading
from exfm.checkpoints.layout import DTYPE_NAMES, NONSENSE, PINNED, Damaged, records
from exfm.checkpoints.reader import Folder
from exfm.checkpoints.storage import Storage
from exfm.checkpoints.store import new_name
from exfm.data.errors import UserError

Progress = Callable[[str, int, int], None]  # message, done, total
GB = 10**9


@dataclass(frozen=True)
class Place:
    """A folder of commits and the name that was asked for, if any."""

    storage: Storage
    name: str | None

    def one(self) -> tuple[Committed, list[Committed]]:
        """The commit that is meant, and everything beside it. UserError where there is none; it may be damaged."""
        everything = listing(self.storage)
        if self.name is not None:
            found = [c for c in everything if c.name == self.name]
        else:
            found = [c for c in everything if keeping.is_whole(c, everything)] or everything
        if not found:
            known = ", ".join(c.name for c in everything[-5:]) or "none"
            raise UserError(f"{self.storage.url} has no commit {self.name or ''}; the newest there: {known}")
        return found[-1], everything

    @contextmanager
    def opened(self) -> Iterator[tuple[Committed, list[Folder]]]:
        """The commit and its chain, kept from being removed meanwhile."""
        found, everything = self.one()
        links = chain(found, everything)
        with reading(self.storage, found.name):
            yield found, [link.open() for link in links]


def place(path: str) -> Place:
    """UserError where no commits are found at a path or URL."""
    root, _, last = path.rstrip("/").rpartition("/")
    name = last if NAME.fullmatch(last) else None
    root = (root or ".") if name else path.rstrip("/") or "/"
    inside = "snapshots" if name and name.startswith("slice=") else "checkpoints"
    for candidate in (root, f"{root}/{inside}", _elsewhere(root)):
        if candidate and any(NAME.fullmatch(n) for n in Storage(candidate).names()):
            return Place(Storage(candidate), name)
    raise UserError(
        f"{root} holds no commits; give a run's folder, its folder of checkpoints or snapshots, or such a URL"
    )


def _elsewhere(root: str) -> str:
    """Where the config of the run in a folder says that its checkpoints are, if it says so."""
    storage = Storage(root)
    if "config.yaml" not in storage.names():
        return ""
    try:
        return str(yaml.safe_load(storage.read("config.yaml"))["checkpoint"]["folder"] or "")
    except (yaml.YAMLError, *NONSENSE):
        return ""


# ------------------------------------------------------------------------------------------------ looking


def summary(found: Committed, everything: Sequence[Committed]) -> dict[str, Any]:
    """One line of a list, from manifests alone."""
    m, problem = found.manifest, found.problem
    if not problem:
        try:
            chain(found, everything)
        except Damaged as error:
            problem = str(error)
    position = m.get("position") or ({"slice": m["slice"], "consumed": None} if "slice" in m else {})
    return {
        "name": found.name,
        "kind": found.kind,
        "base": found.base,
        "slice": position.get("slice"),
        "consumed": position.get("consumed"),
        "examples": m.get("examples"),
        "bytes": sum(r.bytes for r in records(m)) if m else None,
        "ranks": m.get("world_size"),
        "pinned": keeping.is_pinned(found),
        "problem": problem,
    }


def list_all(where: Place) -> list[dict[str, Any]]:
    everything = listing(where.storage)
    return [summary(c, everything) for c in everything]


def show(where: Place) -> dict[str, Any]:
    """A commit's manifest, its files and tensors. Damaged where it cannot be read."""
    found, everything = where.one()
    if found.problem:
        raise Damaged(found.problem)
    with reading(where.storage, found.name):
        folder = found.open()
    m = found.manifest
    tensors = {
        name: {
            "dtype": DTYPE_NAMES[e.dtype],
            "shape": list(e.shape),
            "bytes": sum(_bytes(c.sizes, e.dtype.itemsize) for c in e.chunks),
            "chunks": len(e.chunks),
        }
        for name, e in sorted(folder.index.items())
    }
    keys = ("position", "version", "step", "optimizer_steps", "ledger_entries", "of", "rows", "compacted", "plan")
    return {
        **summary(found, everything),
        "folder": found.folder,
        **{k: m[k] for k in keys if k in m},
        "written_by": m.get("versions", {}),
        "config": _changed(m["config"]) if "config" in m else {},
        "files": [{"path": r.path, "bytes": r.bytes} for r in records(m)],
        "tensors": tensors,
    }


def _bytes(sizes: Sequence[int], itemsize: int) -> int:
    total = itemsize
    for size in sizes:
        total *= size
    return total


def _changed(config: dict[str, Any]) -> Any:
    """What of a job's config is not the default; all of it where this exfm does not know its keys."""
    from exfm.trainer.config import JobConfig

    try:
        return JobConfig.model_validate(config).model_dump(mode="json", exclude_defaults=True)
    except NONSENSE:
        return config


# ------------------------------------------------------------------------------------------------ checking


def verify(where: Place, everything_too: bool, progress: Progress) -> dict[str, Any]:
    """Read every byte of a commit, or of all, and what they rest on; `commits` with their `problem`s, bytes/s."""
    found, everything = where.one()
    wanted = list(everything) if everything_too else [found]
    names = {c.name for c in wanted} | keeping.rested_on([c.name for c in wanted], everything)
    total = sum(r.bytes for c in everything if c.name in names and not c.problem for r in records(c.manifest))
    begun, done, lock = time.monotonic(), [0], threading.Lock()

    def count(num_bytes: int) -> None:
        with lock:
            done[0] += num_bytes
            progress("verifying, bytes", done[0], total)

    problems: dict[str, str] = {}
    for c in (c for c in everything if c.name in names):
        try:
            _verify_one(c, everything, count)
        except Damaged as error:
            problems[c.name] = str(error)
    seconds = time.monotonic() - begun
    commits = []
    for c in wanted:
        links = [c.name, *keeping.rested_on([c.name], everything)]
        first = next((problems[n] for n in links if n in problems), "")
        commits.append({"name": c.name, "kind": c.kind, "rests_on": sorted(links[1:]), "problem": first})
    speed = done[0] / max(seconds, 1e-9) / GB
    return {"commits": commits, "bytes": done[0], "seconds": seconds, "gb_per_s": speed}


def _verify_one(found: Committed, everything: Sequence[Committed], count: Callable[[int], None]) -> None:
    """Damaged names the first file that is not what was committed, or a delta that does not fit what it rests on."""
    links = chain(found, everything)
    with reading(found.storage, found.name):
        try:
            folder = found.open()
            folder.check(count)
            if len(links) > 1:
                kinds = ["weight", "adagrad_sum"]
                if "rows" in found.manifest:
                    kinds = ["int8"] if found.manifest["rows"] == "int8" else ["weight"]
                patches(folder, links[0].open(), kinds)
        except Damaged:
            raise
        except UserError as error:  # a symbolic link in a file's place
            raise Damaged(str(error)) from None


# ------------------------------------------------------------------------------------------------ keeping


def prune(where: Place, keep: int, keep_every: int, dry_run: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Apply retention. Harmless beside a running job: what was never committed may be its save in flight and stays.

    On an object store nobody knows who is reading a commit.
    """
    if where.name is not None:
        raise UserError(f"prune works on a whole folder; leave out {where.name}")
    everything = listing(where.storage)
    if dry_run:
        wanted = keeping.kept(everything, keep, keep_every)
        removed = [c.name for c in everything if c.name not in wanted]
    else:
        removed = keeping.clean(where.storage, keep, keep_every, say=say, uncommitted=False)
    freed = sum(r.bytes for c in everything if c.name in removed and not c.problem for r in records(c.manifest))
    left = [c.name for c in everything if c.name not in removed]
    return {"removed": removed, "kept": left, "bytes": freed, "dry_run": dry_run}


def pin(where: Place, on: bool) -> dict[str, Any]:
    """Keep a commit whatever retention says, or no longer."""
    found, _ = where.one()
    path = f"{found.name}/{PINNED}"
    if on:
        with reading(where.storage, found.name):
            where.storage.write(path, [b"kept whatever retention says\n"])
    else:
        where.storage.remove(path)
    return {"name": found.name, "pinned": on}


def merge(where: Place, timeout_s: float = 3600.0) -> dict[str, Any]:
    """Write a chain as one full commit beside it. UserError while a job runs there: it may write under the same name."""
    with _no_job(where.storage):
        found, everything = where.one()
        links = chain(found, everything)
        if found.name.startswith("slice="):
            raise UserError(f"{found.folder} is a snapshot; only checkpoints are compacted")
        if len(links) == 1:
            raise UserError(f"{found.folder} is full already; there is nothing to compact")
        name = new_name(where.storage, found.step)
        with reading(where.storage, found.name), _one_rank(timeout_s):
            size = compact(links, name, dist.group.WORLD)
    return {"name": name, "of": [c.name for c in links], "bytes": size}


@contextmanager
def _no_job(storage: Storage) -> Iterator[None]:
    """Keep jobs out of a folder of checkpoints and, where it lies inside one, out of the run's folder."""
    owner = "exfm checkpoint compact"
    with ExitStack() as stack:
        run = Storage(os.path.dirname(storage.url) or ".") if storage.local else None
        if run is not None and "lock" in run.names():
            stack.enter_context(run.lock(owner))
        stack.enter_context(storage.lock(owner))
        yield


@contextmanager
def _one_rank(timeout_s: float) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=timeout_s))
    try:
        yield
    finally:
        dist.destroy_process_group()

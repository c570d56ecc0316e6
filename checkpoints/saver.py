"""Saving while training goes on: what to save is fixed on the training thread, one background thread writes and commits it.

At most one save is in flight. Its collectives run in a process group of its own, so they cannot mix with training's.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from exfm.checkpoints.canonical import boxes, column_starts
from exfm.checkpoints.commits import Committed, chain, committed
from exfm.checkpoints.config import MIB, CheckpointConfig
from exfm.checkpoints.deltas import delta_name
from exfm.checkpoints.derive import compact
from exfm.checkpoints.keeping import clean
from exfm.checkpoints.layout import FORMAT, MANIFEST, read_manifest
from exfm.checkpoints.sources import Buffers, Copies, Guard, Guarded, Live, Memory, Source
from exfm.checkpoints.storage import Storage
from exfm.checkpoints.store import Partials, from_rank_0, make_new, new_name
from exfm.checkpoints.touched import Touched
from exfm.checkpoints.writer import Key, Progress, ShardWriter, placeholder
from exfm.sharding.shards import Kernel, Shard

# ranks write for as long as it takes; one that died is noticed at once, one that hangs by the job's watch
PATIENCE = timedelta(days=1)


class SaveError(RuntimeError):
    """A checkpoint could not be written; the previous commit is intact."""


@dataclass
class Request:
    """One commit. manifest: what the job adds to it; before_commit: run on rank 0 once all files are durable;
    after_commit: run on every rank, still in the background, with the new commit."""

    step: int
    state: dict[str, Tensor]
    partials: Partials
    manifest: dict[str, Any]
    before_commit: Callable[[], None] = lambda: None
    after_commit: Callable[[Committed], None] = lambda found: None


@dataclass
class _Staged:
    kind: str
    base: Committed | None
    template: dict[str, Tensor]
    sources: dict[Key, Source]
    read: threading.Event = field(default_factory=threading.Event)
    read_at: float = 0.0  # when training could go on
    guards: list[Guard] = field(default_factory=list)


@dataclass
class Saved:
    """What a save cost on this rank. stall_s: how long training waited for it."""

    name: str
    kind: str
    bytes: int
    seconds: float
    stall_s: float
    copied_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """For metrics.jsonl, whose lines have a `kind` of their own."""
        found = asdict(self)
        return {"commit": found.pop("name"), "commit_kind": found.pop("kind"), **found}


class Saver:
    """Saves one job. kernels, plan: its sharded tables. say: a line for the log."""

    def __init__(
        self,
        storage: Storage,
        config: CheckpointConfig,
        device: torch.device,
        kernels: Sequence[Kernel],
        plan: Sequence[dict[str, Any]],
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.storage, self.config, self.device, self.say = storage, config, device, say
        self.starts = {str(row["table"]): column_starts(row) for row in plan}
        needs_marks = config.full_every > 1 or config.staging == "copy_on_write"
        self.touched = Touched(kernels) if needs_marks else None
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE)
        pinned = device.type == "cuda"
        self.copies = Copies(pinned)
        self.buffers = Buffers(config.buffer_mib * MIB, pinned)
        self.progress = Progress()
        self.base: Committed | None = None  # what the marks are relative to
        self.deltas = 0  # since the last full commit
        self.last: Saved | None = None
        self._ended: list[Saved] = []
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._preparing: threading.Thread | None = None

    # ---------------------------------------------------------------- on the training thread

    def continue_from(self, found: Committed, deltas: int) -> None:
        """The live state is exactly commit `found`: the next one may be a delta of it."""
        self.base, self.deltas = found, deltas
        if self.touched is not None:
            self.touched.clear()

    def prepare(self, state: dict[str, Tensor]) -> None:
        """Take the memory of `staging: full` in the background, so that the first save need not wait for it."""
        if self.config.staging == "full":
            wanted = [((name, offsets), box) for name, tensor in state.items() for offsets, box in boxes(tensor)]
            self._preparing = threading.Thread(
                target=self.copies.reserve, args=(wanted,), name="checkpoint-memory", daemon=True
            )
            self._preparing.start()

    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def save(self, request: Request) -> None:
        """Begin a commit; returns when training may go on. Waits for the save before. All ranks call.

        SaveError on all ranks if the save before could not be written; what was committed stays.
        """
        begun = time.monotonic()
        self.wait()
        if self._preparing is not None:
            self._preparing.join()
            self._preparing = None
        staged = self._stage(request)
        staged.read_at = time.monotonic()
        self.progress = Progress()
        self._thread = threading.Thread(
            target=self._run, args=(request, staged, begun), name="checkpoint-save", daemon=True
        )
        self._thread.start()
        if self.config.staging == "bounded":
            staged.read.wait()

    def wait(self) -> None:
        """Until nothing is in flight. SaveError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def take_ended(self) -> list[Saved]:
        """What was saved since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def progress_line(self) -> str:
        """How far this rank's save is."""
        p = self.progress
        seconds = max(time.monotonic() - p.begun, 1e-9)
        return f"saving: {p.bytes / MIB:,.0f} of {p.total / MIB:,.0f} MiB of this rank, {p.bytes / MIB / seconds:,.0f} MiB/s"

    def close(self) -> None:
        """Let a save in flight end; its failure, if any, has no one left to hear it."""
        with contextlib.suppress(Exception):
            self.wait()
        if self.touched is not None:
            self.touched.close()
        dist.destroy_process_group(self.group)

    # ---------------------------------------------------------------- staging

    def _stage(self, request: Request) -> _Staged:
        rank = dist.get_rank()
        whole = request.state | {
            f"rank.{rank:05d}.{name}": torch.from_numpy(array) for name, array in request.partials.items()
        }
        is_delta = self.base is not None and self.deltas + 1 < self.config.full_every
        staged = _Staged("delta" if is_delta else "full", self.base if is_delta else None, {}, {})
        tables = {n for n in whole if n.startswith("tables.")}
        if is_delta:
            self._stage_rows(staged, request.state)
            whole = {n: t for n, t in whole.items() if n not in tables}
        guarded = self._guards(staged) if self.config.staging == "copy_on_write" and not is_delta else {}
        for name, tensor in whole.items():
            staged.template[name] = tensor
            for offsets, box in boxes(tensor):
                key = (name, offsets)
                if key in guarded:
                    staged.sources[key] = guarded[key]
                elif self.config.staging == "bounded":
                    staged.sources[key] = Live(box)
                else:
                    staged.sources[key] = self.copies.take(key, box)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.touched is not None:
            self.touched.clear()
        return staged

    def _keys(self, shard: Shard) -> tuple[Key, Key, int]:
        """Canonical keys of a sharded table's weight and sums on this rank, and the shard's segment."""
        segment = self.starts[shard.table].index(shard.column)
        weight = (f"tables.{shard.table}.weight", (shard.row, shard.column))
        return weight, (f"tables.{shard.table}.adagrad_sum", (shard.row, segment)), segment

    def _guards(self, staged: _Staged) -> dict[Key, Source]:
        assert self.touched is not None
        found: dict[Key, Source] = {}
        guards: list[Guard | None] = []
        for shard in self.touched.shards:
            if shard.accumulator is None:  # data-parallel: its optimiser changes it as a dense tensor
                guards.append(None)
                continue
            weight, sums, _ = self._keys(shard)
            guard = Guard({"weight": shard.weight, "sums": shard.accumulator.view(-1, 1)})
            found |= {weight: Guarded(guard, "weight"), sums: Guarded(guard, "sums")}
            guards.append(guard)
        self.touched.guard(guards)
        staged.guards = [g for g in guards if g is not None]
        return found

    def _stage_rows(self, staged: _Staged, state: dict[str, Tensor]) -> None:
        """The rows of tables that were touched since the base."""
        assert self.touched is not None
        live = self.config.staging == "bounded"
        names = sorted(self.starts)
        for shard, rows in zip(self.touched.shards, self.touched.rows(), strict=True):
            writer = names.index(shard.table) % dist.get_world_size()
            if not len(rows) or (shard.parameter is not None and dist.get_rank() != writer):
                continue
            # a data-parallel table is plain in the canonical state
            whole = state[f"tables.{shard.table}.adagrad_sum"]
            sums = whole if shard.accumulator is None else shard.accumulator.view(-1, 1)
            name = delta_name(shard.table, shard.row, shard.column, self._keys(shard)[2])
            found: dict[str, Source] = {
                "rows": Memory((rows + shard.row).cpu()),
                "weight": Live(shard.weight, rows)
                if live
                else self.copies.gather((name, "weight"), shard.weight, rows),
                "adagrad_sum": Live(sums, rows) if live else self.copies.gather((name, "adagrad_sum"), sums, rows),
            }
            for kind, source in found.items():
                staged.template[f"{name}.{kind}"] = placeholder(source)
                staged.sources[f"{name}.{kind}", (0,) * len(source.shape)] = source

    # ---------------------------------------------------------------- in the background

    def _run(self, request: Request, staged: _Staged, begun: float) -> None:
        try:
            self._failure = self._write(request, staged, begun)
        finally:
            for guard in staged.guards:
                guard.release()
            staged.read.set()

    def _write(self, request: Request, staged: _Staged, begun: float) -> Exception | None:
        name = ""
        try:
            name = from_rank_0(lambda: self._new_folder(request.step), self.group)
            self._write_folder(name, request, staged)
            found = self._find(name)
            self.base, self.deltas = found, self.deltas + 1 if staged.kind == "delta" else 0
            self._report(found, staged, begun)
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            with contextlib.suppress(Exception):  # an unfinished checkpoint must not keep the disk full
                from_rank_0(lambda: self._abandon(name), self.group)
            where = f"{self.storage.url}/{name}" if name else self.storage.url
            return SaveError(f"cannot write checkpoint {where}: {cause(error)}; the last commit is intact")
        # the commit is made: what fails from here on costs neither it nor the job
        self._aside("its snapshot", lambda: request.after_commit(found))
        if self.config.compact_after and self.deltas >= self.config.compact_after:
            self._aside("merging its deltas", lambda: self._compact(found))
        self.tidy(self.base.name)
        return None

    def tidy(self, current: str) -> None:
        """Remove commits past `checkpoint.keep` and what was never committed. current: a commit that stays. All ranks call."""
        keep, keep_every = self.config.keep, self.config.keep_every
        self._aside(
            "removing old commits",
            lambda: from_rank_0(lambda: clean(self.storage, keep, keep_every, current, self.say), self.group),
        )

    def _aside(self, what: str, act: Callable[[], Any]) -> None:
        """Failures are the same on all ranks, so all go on together."""
        try:
            act()
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            self.say(f"{what} failed: {cause(error)}; training goes on")

    def _new_folder(self, step: int) -> str:
        name = new_name(self.storage, step)
        make_new(self.storage, name)
        return name

    def _compact(self, found: Committed) -> None:
        """Merge a long chain into a full commit of the same state, which the next delta then rests on."""
        begun = time.monotonic()
        links = from_rank_0(lambda: chain(found, committed(self.storage)), self.group)
        name = from_rank_0(lambda: new_name(self.storage, found.step), self.group)
        size = compact(links, name, self.group)
        self.base, self.deltas = self._find(name), 0
        seconds = time.monotonic() - begun
        self.say(f"compacted {len(links) - 1} deltas into {name}: {size / MIB:,.1f} MiB in {seconds:.2f} s")

    def _find(self, name: str) -> Committed:
        manifest = from_rank_0(lambda: read_manifest(self.storage, name), self.group)
        return Committed(self.storage, name, manifest)

    def _abandon(self, name: str) -> None:
        if name and not self.storage.exists(f"{name}/{MANIFEST}"):
            self.storage.remove(name)

    def _write_folder(self, name: str, request: Request, staged: _Staged) -> None:
        base = staged.base
        own = {
            "format": FORMAT,
            "kind": staged.kind,
            "step": request.step,
            "world_size": dist.get_world_size(),
            "base": {"name": base.name, "sum": base.manifest["sum"]} if base else None,
        }
        writer = ShardWriter(
            self.storage,
            name,
            staged.sources,
            request.manifest | own,
            self.buffers,
            self.progress,
            lambda: self._all_read(staged),
            request.before_commit,
        )
        dcp.save(staged.template, storage_writer=writer, process_group=self.group)

    def _all_read(self, staged: _Staged) -> None:
        if self.config.staging == "bounded":
            staged.read_at = time.monotonic()
        staged.read.set()

    def _report(self, found: Committed, staged: _Staged, begun: float) -> None:
        sizes: list[Any] = [None] * dist.get_world_size()
        copied = sum(g.copied_bytes for g in staged.guards)
        dist.all_gather_object(sizes, (self.progress.bytes, staged.read_at - begun, copied), group=self.group)
        total, stall = sum(s[0] for s in sizes), max(s[1] for s in sizes)
        seconds = time.monotonic() - begun
        self.last = Saved(found.name, staged.kind, total, seconds, stall, sum(s[2] for s in sizes))
        self._ended.append(self.last)
        self.say(
            f"committed {found.name} ({staged.kind}): {total / MIB:,.1f} MiB in {seconds:.2f} s, "
            f"{total / MIB / max(seconds, 1e-9):,.0f} MiB/s, training stood still for {stall:.2f} s"
        )


def cause(error: BaseException) -> str:
    """The first thing that went wrong, in one line."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    text = str(error).strip()
    return text.splitlines()[-1] if text else type(error).__name__

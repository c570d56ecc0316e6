"""A teacher's logged predictions of one slice, brought from the ranks that made them to the ranks that write the parts."""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from exfm.data.clock import clock_of
from exfm.data.errors import UserError
from exfm.data.manifest import SliceManifest, Stream
from exfm.distillation.supervision import SupervisionLog, write_supervision_part
from exfm.distillation.version import Identity


class Publisher:
    """Collects logits by row number and commits a slice's supervision. state() travels with mid-slice checkpoints."""

    def __init__(self, log: SupervisionLog, who: Identity, stream: Stream, mode: str = "forward") -> None:
        self.log, self.who, self.stream, self.mode = log, who, stream, mode
        self.clock = clock_of(stream.root)
        self.rows: list[np.ndarray] = []
        self.logits: list[np.ndarray] = []

    def add(self, rows: np.ndarray, logits: np.ndarray) -> None:
        self.rows.append(rows)
        self.logits.append(logits)

    def state(self) -> dict[str, np.ndarray]:
        rows = np.concatenate(self.rows) if self.rows else np.empty(0, np.int64)
        logits = np.concatenate(self.logits) if self.logits else np.empty((0, len(self.who.tasks)), np.float32)
        return {"rows": rows, "logits": logits}

    def publish(self, index: int, scored_by: str, watermark: int) -> None:
        """Commit slice `index` as scored by that version, which had trained up to slice `watermark`. All ranks call."""
        features = self.stream.manifest(index, "features")
        assert features is not None
        existing = self.log.manifest(index)
        pending = self.state()
        self.rows, self.logits = [], []
        if existing is None:
            self._write(features, pending, scored_by, watermark)
        elif existing.extra.get("scored_by") != scored_by:
            raise UserError(
                f"{self.log.folder(index)} already holds supervision of another teacher version; use a new run.folder"
            )  # else committed before a restart; students may have read it

    def expire(self, ttl_s: float) -> None:
        """Remove what was committed more than ttl_s seconds ago; 0: nothing."""
        if ttl_s and dist.get_rank() == 0:
            self.log.expire(self.clock.now() - ttl_s)

    def _write(self, features: SliceManifest, pending: dict[str, np.ndarray], scored_by: str, watermark: int) -> None:
        ends = np.cumsum([part.rows for part in features.parts])
        rows, logits = exchange(pending["rows"], pending["logits"], ends)
        parts: list[Any] = []
        for number, part in enumerate(features.parts):
            if number % dist.get_world_size() == dist.get_rank():
                first = int(ends[number]) - part.rows
                own = (rows >= first) & (rows < ends[number])
                full = np.full((part.rows, len(self.who.tasks)), np.nan, np.float32)
                full[rows[own] - first] = logits[own]
                folder = self.log.folder(features.slice)
                parts.append((number, write_supervision_part(self.log.fs, folder, part, self.who.tasks, full)))
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, parts)
        if dist.get_rank() == 0:
            ordered = tuple(part for _, part in sorted(p for share in gathered for p in share))
            self.log.commit(features, ordered, self.who, self.mode, scored_by, watermark, self.clock.now())
        dist.barrier()


def exchange(rows: np.ndarray, logits: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Send (row, logits) to the rank that writes the row's part (part number modulo W). ends: cumulative rows of the parts."""
    world = dist.get_world_size()
    owner = np.searchsorted(ends, rows, side="right") % world
    order = np.argsort(owner, kind="stable")
    send = np.bincount(owner, minlength=world)
    counts = torch.empty(world, dtype=torch.int64)
    dist.all_to_all_single(counts, torch.from_numpy(send.astype(np.int64)))
    sends, receives = send.tolist(), counts.tolist()
    got_rows = torch.empty(sum(receives), dtype=torch.int64)
    dist.all_to_all_single(got_rows, torch.from_numpy(rows[order].astype(np.int64)), receives, sends)
    got = torch.empty(sum(receives), logits.shape[1], dtype=torch.float32)
    dist.all_to_all_single(got, torch.from_numpy(np.ascontiguousarray(logits[order])), receives, sends)
    return got_rows.numpy(), got.numpy()

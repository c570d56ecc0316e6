"""What a job says while it runs: metrics.jsonl, TensorBoard and one line per interval. Only rank 0 speaks."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from exfm.data.commit import null_for_nan


class RunLog:
    """Writes <run>/metrics.jsonl, <run>/tensorboard and lines to stderr; silent on other ranks."""

    def __init__(self, folder: Path, name: str, speaks: bool, every_s: float) -> None:
        self.name, self.speaks, self.every_s = name, speaks, every_s
        self.last = self.begun = time.monotonic()
        if speaks:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / "metrics.jsonl"
            self.before = path.stat().st_mtime if path.exists() else None  # the last record of an earlier start
            self.file = path.open("a", buffering=1)
            self.board = SummaryWriter(str(folder / "tensorboard"))

    def record(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One JSON line; its numbers also go to TensorBoard under `kind/`. gap_s, of the first progress of a start: since the last record of the one before."""
        if not self.speaks:
            return
        if self.before is not None and kind in ("progress", "slice", "score"):
            values = {**values, "gap_s": time.time() - self.before}
            self.say(f"going again: step {step}, {values['gap_s']:.1f} s after what was last recorded before")
            self.before = None
        line = {"kind": kind, "time": time.time(), "step": step, **values}
        self.file.write(json.dumps(null_for_nan(line)) + "\n")
        for key, value in _flat(values):
            self.board.add_scalar(f"{kind}/{key}", value, step)

    def say(self, text: str) -> None:
        if self.speaks:
            print(f"[{self.name}] {text}", file=sys.stderr, flush=True)

    def due(self) -> bool:
        """True once per interval."""
        if not self.speaks or time.monotonic() - self.last < self.every_s:
            return False
        self.last = time.monotonic()
        return True

    def close(self) -> None:
        if self.speaks:
            self.file.close()
            self.board.close()


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    out: list[tuple[str, float]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            out += _flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            out.append((prefix + key, float(value)))
    return out

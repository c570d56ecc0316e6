"""Jobs of 1 to N ranks through the real trainer on gloo: examples per second between two slices' ends, and CPU seconds of the ranks."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exfm.data.synth import synth
from exfm.launch.local import LocalJob, descendants

ROOT = Path(__file__).parents[1]
TICK = os.sysconf("SC_CLK_TCK")
SKIPPED, SLICES = 1, 4  # the first slice warms up


@dataclass(frozen=True)
class Run:
    """kind: strong: the global batch stays, weak: it grows with the ranks."""

    kind: str
    ranks: int
    global_batch: int


def runs(ranks: list[int], batch: int) -> list[Run]:
    """Ranks alone are strong and weak at once."""
    each = [Run(kind, n, batch * n if kind == "weak" else batch) for kind in ("strong", "weak") for n in ranks if n > 1]
    return [Run("both", 1, batch)] * (1 in ranks) + each


def make_stream(folder: Path, rows: int) -> Path:
    if not (folder / "stream.json").exists():
        synth(str(folder), num_slices=SLICES, rows_per_slice=rows, seed=0)
    return folder


def measure(run: Run, stream: Path, out: Path) -> dict[str, Any]:
    folder = out / f"{run.kind}-{run.ranks}-{time.time_ns()}"
    settings = {
        "run.folder": folder,
        "run.log_every_s": 1000,
        "stream.path": stream,
        "stream.global_batch": run.global_batch,
        "stream.domains": [],
        "evaluation.bootstrap": 0,
        "distillation": {},
        "checkpoint": {"every_slices": 1000},  # only the last slice's end commits, and is not counted
    }
    job = LocalJob(
        ROOT / "configs/synth_teacher.yaml",
        run.ranks,
        tuple(f"{key}={json.dumps(value, default=str)}" for key, value in settings.items()),
        0,
    )
    job.check()
    job.start(os.environ)
    assert job.process is not None
    ends: list[tuple[float, float, int]] = []  # (when, CPU seconds so far, examples so far) at slices' ends
    while job.running():
        time.sleep(0.02)
        for line in fresh_lines(folder / "metrics.jsonl", len(ends)):
            ends.append((line["time"], cpu_seconds(job.process.pid), line["examples"]))
    code, message = job.outcome()
    if code:
        raise RuntimeError(f"{run} ended with {code}: {message}")
    first, last = ends[SKIPPED - 1], ends[-1]
    examples, seconds = last[2] - first[2], last[0] - first[0]
    return {
        "kind": run.kind,
        "ranks": run.ranks,
        "global_batch": run.global_batch,
        "examples": examples,
        "examples_per_s": examples / seconds,
        "cpu_us_per_example": 1e6 * (last[1] - first[1]) / examples,
        "cores_had": (last[1] - first[1]) / seconds,
        "oversubscribed": run.ranks > len(os.sched_getaffinity(0)),
    }


def fresh_lines(path: Path, seen: int) -> list[dict[str, Any]]:
    """Slices' lines after those seen."""
    if not path.exists():
        return []
    text = path.read_text()
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [line for line in lines if line["kind"] == "slice"][seen:]


def cpu_seconds(pid: int) -> float:
    """Of all processes under torchrun that live."""
    total = 0
    for child in descendants(pid):
        try:
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        total += int(fields[11]) + int(fields[12])
    return total / TICK

"""What the kill campaign trains, and how it tells one finished run from another."""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from exfm.checkpoints.commits import Committed, chain, committed
from exfm.checkpoints.derive import merged_items
from exfm.checkpoints.sources import Buffers
from exfm.data.errors import UserError
from exfm.data.manifest import MANIFEST
from exfm.trainer.teachers import LAG

Raw = dict[str, Any]
GLOBAL_BATCH = 32
# every value of every row is drawn equally often; `checkpoint` is the job's section of that name
DRAW: dict[str, list[Any]] = {
    "ranks": [2, 3],
    "role": ["teacher", "student"],
    "sharding": ["table_wise", "row_wise", "column_wise", "data_parallel"],
    "checkpoint": [
        {"every_slices": 1, "every_examples": 160, "keep": 2},
        {"every_slices": 1, "every_examples": 100, "keep": 1, "staging": "bounded", "buffer_mib": 1},
        {"every_slices": 1, "every_examples": 128, "keep": 2, "staging": "copy_on_write", "full_every": 3},
        {"every_slices": 1, "every_examples": 96, "keep": 1, "full_every": 8, "compact_after": 3},
        {"every_slices": 2, "every_examples": 224, "keep": 4, "full_every": 4, "when_busy": "skip"},
    ],
}
# what of a summary depends on examples and weights alone
SCORES = ("slices", "evaluated_from", "examples", "covered", "groups")


@dataclass(frozen=True)
class KillJob:
    """One job of the campaign."""

    number: int
    ranks: int
    role: str
    sharding: str
    checkpoint: dict[str, Any]

    @property
    def name(self) -> str:
        return f"job-{self.number:02d}-{self.role}-{self.ranks}x{self.sharding}"

    def commit_every(self, slices: int, rows: int) -> int:
        """The most steps between two commits of a stream of `slices` slices."""
        inside, every = self.checkpoint.get("every_examples", 0), self.checkpoint["every_slices"]
        steps = -(-rows // GLOBAL_BATCH)
        length = -(-inside // GLOBAL_BATCH) or steps
        within = [n * steps + k for n in range(slices) for k in range(length, steps, length) if inside]
        ends = [n * steps for n in range(slices + 1) if n % every == 0 or n == slices]
        return max(b - a for a, b in pairwise(sorted({*within, *ends})))

    def config(self, folder: Path, stream: str, supervision: Path) -> Raw:
        """The job's configuration. supervision: the log that students learn from."""
        if self.role == "teacher":
            distillation: Raw = {"publish": {"teacher": "fm"}}
        else:
            distillation = {"learn": {"supervision": str(supervision), "method": "student_adapter", "wait_s": 0.0}}
        sharding = {"allowed": [self.sharding], "min_column_shard": 4}
        # a line in metrics.jsonl for every step: they are counted
        run = {"name": self.role, "folder": str(folder), "device": "cpu", "log_every_s": 1e-6, "nan_check_steps": 4}
        varying = {"run": run, "distillation": distillation, "sharding": sharding, "checkpoint": self.checkpoint}
        domains = [{"name": "d1", "column": "domain", "values": [1]}]
        stream_section = {"path": stream, "global_batch": GLOBAL_BATCH, "prefetch": 2, "domains": domains}
        return json.loads(json.dumps(varying | {"stream": stream_section} | MODEL))


MODEL: Raw = {
    "features": {
        "dense": ["context_a", {"name": "user_count", "log1p": True}],
        "sparse": [
            {"name": "user_id", "table": "user", "ids": "hash"},
            {"name": "item_id", "table": "item", "ids": "hash"},
            {"name": "recent_items", "table": "item", "ids": "hash"},
            {"name": "category", "table": "category", "ids": "identity"},
        ],
    },
    "tables": {
        "user": {"rows": 200, "width": 8},
        "item": {"rows": 80, "width": 8},
        "category": {"rows": 20, "width": 8, "pooling": "mean"},
    },
    "model": {"kind": "dcnv2", "cross_layers": 2, "rank": 4, "deep_mlp": [16]},
    "heads": {"tasks": ["click"], "hidden": [8]},
    "optim": {"dense": {"lr": 0.01, "warmup_steps": 20, "clip_norm": 1.0}, "tables": {"lr": 0.1}},
    "evaluation": {"skip": 0.3, "bootstrap": 20},
}


def draw_jobs(count: int, seed: int) -> list[KillJob]:
    """`count` jobs in which the values of every row of DRAW come equally often, in independent random orders."""
    random = Random(f"jobs/{seed}")
    columns = {}
    for key, values in DRAW.items():
        repeated = (values * -(-count // len(values)))[:count]
        columns[key] = random.sample(repeated, count)
    return [KillJob(i, **{key: column[i] for key, column in columns.items()}) for i in range(count)]


def whole_state(found: Committed) -> dict[str, torch.Tensor]:
    """All tensors of a commit, whole, and with it of those that it rests on; every byte is checked on the way."""
    folders = [link.open() for link in chain(found, committed(found.storage))]
    for folder in folders:
        folder.check()
    state: dict[str, torch.Tensor] = {}
    for item in merged_items(folders, lambda number: True):
        whole = state.setdefault(item.name, torch.empty(item.shape, dtype=item.source.dtype))
        box = whole[tuple(slice(o, o + n) for o, n in zip(item.offsets, item.source.shape, strict=True))]
        for part in item.source.parts(Buffers(2**30)):  # one: everything here is small
            box.copy_(part)
    return state


def verify(found: Committed) -> str:
    """What is wrong with a committed checkpoint; empty if its files are what the manifest says and it can be read."""
    try:
        whole_state(found)
    except UserError as error:
        return str(error)
    except Exception as error:  # whatever a damaged file makes its reader say
        return f"{found.folder} cannot be read: {type(error).__name__}: {error}"
    return ""


def differences(run: Path, reference: Path) -> list[str]:
    """What of a finished run is not bitwise that of the reference: the names of tensors, files and numbers."""
    ours, theirs = (committed(folder / "checkpoints")[-1] for folder in (run, reference))
    # the ledger says how often a job was started; random states differ between launchers and decide nothing here
    own = (".ledger", ".random/cpu")
    a, b = ({n: _timeless(n, t) for n, t in whole_state(c).items() if not n.endswith(own)} for c in (ours, theirs))
    found = _differing(a, b, torch.equal)
    keys = ("step", "position", "version", "optimizer_steps", "examples")
    found += [f"manifest {key}" for key in keys if ours.manifest[key] != theirs.manifest[key]]
    one, other = (json.loads((folder / "summary.json").read_text()) for folder in (run, reference))
    found += [f"summary {key}" for key in SCORES if json.dumps(one[key]) != json.dumps(other[key])]
    with np.load(run / "bootstrap.npz") as x, np.load(reference / "bootstrap.npz") as y:
        found += _differing(dict(x), dict(y), lambda p, q: p.tobytes() == q.tobytes())
    return found + differing_logs(run, reference)


def differing_logs(run: Path, reference: Path) -> list[str]:
    """Files of the runs' supervision that are not alike."""
    return _differing(_supervision(run), _supervision(reference), lambda p, q: p == q)


def _timeless(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A student's record of its teachers without how late they were: that depends on the day."""
    if name.endswith(".progress/teachers"):
        tensor[..., LAG] = 0
    return tensor


def _differing(a: dict[str, Any], b: dict[str, Any], equal: Any) -> list[str]:
    return [k for k in sorted({*a, *b}) if k not in a or k not in b or not equal(a[k], b[k])]


def _supervision(run: Path) -> dict[str, Any]:
    """What was logged, without the time of the commits."""
    files: dict[str, Any] = {}
    for path in (p for kind in ("parquet", "json") for p in (run / "supervision").rglob(f"*.{kind}")):
        files[str(path.relative_to(run))] = payload = path.read_bytes()
        if path.name == MANIFEST:
            manifest = json.loads(payload)
            files[str(path.relative_to(run))] = manifest | {"extra": manifest["extra"] | {"at": None}}
    return files


def steps_done(metrics: Path, start: int = 0, stop: int | None = None) -> list[int]:
    """The steps in bytes [start, stop) of metrics.jsonl, in order. A line torn by a kill is left out."""
    if not metrics.exists():
        return []
    lines = metrics.read_bytes()[start:stop].splitlines()
    parsed = [_parsed(line) for line in lines]
    return [line["step"] for line in parsed if line is not None and line["kind"] == "progress"]


def _parsed(line: bytes) -> Raw | None:
    try:
        return json.loads(line)
    except ValueError:
        return None


def gaps(steps: list[int]) -> list[tuple[int, int]]:
    """Neighbours that are not one step apart."""
    return [(a, b) for a, b in pairwise(steps) if b != a + 1]

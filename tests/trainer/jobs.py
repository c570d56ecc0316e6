"""Small streams, small jobs and what they leave behind, for the tests of the training core."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from safetensors import safe_open

from exfm.checkpoints.commits import committed
from exfm.data.cut import Cut, write_stream
from exfm.data.manifest import Stream
from exfm.data.schema import Schema, SparseColumn
from exfm.trainer import loop
from exfm.trainer.config import JobConfig, parse_config
from exfm.trainer.env import RankEnv
from exfm.trainer.run import run_job
from tests.ranks import local_ranks

SCHEMA = Schema(
    name="tiny",
    user="user",
    weight="importance",
    labels=("click", "buy"),
    dense=("price", "age_s"),
    sparse=(
        SparseColumn(name="user"),
        SparseColumn(name="item"),
        SparseColumn(name="recent", list=True),
        SparseColumn(name="viewed", list=True),
        SparseColumn(name="tags", list=True, weights="tag_weights"),
    ),
)
NUM_USERS = 20
# 32 examples a step: the last batch of slice 0 has 1 example, fewer than 2 ranks; 20 steps in all
ROWS = (129, 160, 131, 150)

Raw = dict[str, Any]


def lists(rng: np.random.Generator, n: int, limit: int, longest: int) -> list[list[int]]:
    return [rng.integers(0, limit, k).tolist() for k in rng.integers(0, longest + 1, n)]


def some_rows(n: int, seed: int, first_id: int) -> pa.Table:
    """n examples with empty lists, missing items, missing prices, unequal weights (some 0) and unobserved labels."""
    rng = np.random.default_rng(seed)
    user, tags = rng.integers(0, NUM_USERS, n), lists(rng, n, 1000, 3)
    score = 0.8 * np.sin(user) + rng.normal(size=n)
    columns = {
        "example_id": first_id + 10 * np.arange(n),
        "timestamp": 1_000 + first_id + np.arange(n) // 2,
        "user": user,
        "importance": np.where(rng.random(n) < 0.05, 0.0, rng.uniform(0.5, 3.0, n)).astype(np.float32),
        "item": pa.array(rng.integers(0, 50, n), mask=rng.random(n) < 0.1),
        "recent": lists(rng, n, 50, 4),
        "viewed": lists(rng, n, 30, 5),
        "tags": tags,
        "tag_weights": [rng.uniform(0.2, 2.0, len(t)).astype(np.float32).tolist() for t in tags],
        "price": pa.array(rng.normal(size=n).astype(np.float32), mask=rng.random(n) < 0.2),
        "age_s": rng.exponential(100, n).astype(np.float32),
        "click": (score > 0.5).astype(np.float32),
        "buy": pa.array((score > 1.0).astype(np.float32), mask=rng.random(n) < 0.5),
    }
    types = SCHEMA.feature_types() | SCHEMA.label_types()
    return pa.table({name: pa.array(columns[name], type=kind) for name, kind in types.items()})


def tables_of(rows: tuple[int, ...] = ROWS, seed: int = 0) -> list[pa.Table]:
    """One table per slice."""
    return [some_rows(n, seed + i, 100_000 * i) for i, n in enumerate(rows)]


def make_stream(folder: Path, rows: tuple[int, ...] = ROWS, seed: int = 0) -> Stream:
    edges = np.concatenate([[0], np.cumsum(rows)]).tolist()
    cuts = [Cut(edges[i], edges[i + 1], 1_000 + 100_000 * i, 1_000 + 100_000 * (i + 1)) for i in range(len(rows))]
    return write_stream(str(folder), SCHEMA, pa.concat_tables(tables_of(rows, seed)), cuts)


def job(folder: Path, stream: str | Path, **over: Any) -> Raw:
    """A job that uses everything the tables know. over: `section__key=value` replaces, value DROP removes."""
    raw: Raw = {
        "run": {"name": "job", "folder": str(folder), "device": "cpu", "log_every_s": 1000.0, "nan_check_steps": 1},
        "stream": {"path": str(stream), "global_batch": 32, "prefetch": 0},
        "features": {
            "dense": ["price", {"name": "age_s", "log1p": True}],
            "sparse": [
                {"name": "user", "table": "user", "ids": "identity"},
                {"name": "item", "table": "item", "ids": "hash"},
                {"name": "recent", "table": "item", "ids": "hash"},
                {"name": "viewed", "table": "viewed", "ids": "identity"},
                {"name": "tags", "table": "tags", "ids": "hash", "weighted": True},
            ],
        },
        "tables": {
            "user": {"rows": NUM_USERS, "width": 8, "init": 0.1},
            "item": {"rows": 13, "width": 8, "init": 0.1},
            "viewed": {"rows": 30, "width": 4, "pooling": "mean", "init": 0.1},
            "tags": {"rows": 17, "width": 8, "init": 0.1},
        },
        "model": {"kind": "dcnv2", "cross_layers": 2, "rank": 3, "deep_mlp": [8]},
        "heads": {"tasks": ["click", "buy"], "hidden": [6]},
        "optim": {
            "dense": {"lr": 0.01, "eps": 1e-6, "warmup_steps": 5, "clip_norm": 0.3},
            "tables": {"lr": 0.1, "eps": 1e-6},
        },
        "sharding": {"allowed": ["table_wise"], "min_column_shard": 4},
        "checkpoint": {"every_slices": 100, "keep": 10},
        "evaluation": {"skip": 0.25, "bootstrap": 20},
    }
    return replaced(raw, **over)


def replaced(raw: Raw, **over: Any) -> Raw:
    """A copy with `section__key=value` set; None removes the key."""
    raw = copy.deepcopy(raw)
    for path, value in over.items():
        node, (*parents, last) = raw, path.split("__")
        for name in parents:
            node = node.setdefault(name, {})
        if value is None:
            node.pop(last, None)
        else:
            node[last] = value
    return raw


def teacher(folder: Path, stream: str | Path, **over: Any) -> Raw:
    return job(folder, stream, run__name="teacher", distillation={"publish": {"teacher": "fm"}}, **over)


def student(folder: Path, stream: str | Path, log: str | Path, method: str, **over: Any) -> Raw:
    """A smaller job that learns from `log`."""
    base: Raw = {
        "run__name": "student",
        "distillation": {"learn": {"supervision": str(log), "method": method, "wait_s": 0.0}},
        "features": {
            "dense": ["price"],
            "sparse": [
                {"name": "user", "table": "user", "ids": "identity"},
                {"name": "item", "table": "item", "ids": "hash"},
            ],
        },
        "tables": {"user": {"rows": NUM_USERS, "width": 4}, "item": {"rows": 50, "width": 4}},
    }
    return job(folder, stream, **(base | over))


def parsed(raw: Raw) -> JobConfig:
    return parse_config(raw, "test", JobConfig)


def here() -> RankEnv:
    """This process's place in the process group that exists, or one rank of one."""
    if not dist.is_initialized():
        return RankEnv()
    rank, world = dist.get_rank(), dist.get_world_size()
    local = local_ranks(world)
    return RankEnv(rank, world, rank % local, local, 0, True)


class Recorder:
    """Loss (this rank's share) and logits by example id of every step, taken where the loop hands outputs to the host."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.logits: dict[int, list[float]] = {}

    def see(self, batch: Any, output: Any) -> None:
        self.losses.append(float(output.loss))
        for i, logit in zip(batch.ids.tolist(), output.logits.tolist(), strict=True):
            if i >= 0:
                self.logits[i] = logit


def run(raw: Raw, stop_after: int = 0) -> tuple[int, Recorder]:
    """Run a job as this rank; exit code and record. stop_after: ask to stop once so many steps are done."""
    recorder, put = Recorder(), loop.HostCopies.put

    def spy(self: Any, batch: Any, output: Any) -> None:
        recorder.see(batch, output)
        put(self, batch, output)

    loop.HostCopies.put = spy  # type: ignore[method-assign]
    try:
        code = run_job(parsed(raw), here(), lambda: bool(stop_after) and len(recorder.losses) >= stop_after)
    finally:
        loop.HostCopies.put = put  # type: ignore[method-assign]
    return code, recorder


def on(ranks: Callable[..., list[Any]], n: int, raw: Raw, stop_after: int = 0) -> list[tuple[int, Recorder]]:
    """`run` on n ranks; one rank runs in this process."""
    return [run(raw, stop_after)] if n == 1 else ranks(n, run, raw, stop_after)


def global_losses(records: list[tuple[int, Recorder]]) -> list[float]:
    """The loss of every global batch: the mean over ranks of their shares times W."""
    return np.mean([r.losses for _, r in records], axis=0).tolist()


def all_logits(records: list[tuple[int, Recorder]]) -> dict[int, list[float]]:
    return {i: logit for _, r in records for i, logit in r.logits.items()}


def read_checkpoint(folder: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of one full checkpoint, whole, read with the safetensors library instead of the code under test."""
    folder = Path(folder)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    index = json.loads((folder / "index.json").read_text())["tensors"]
    opened = [safe_open(str(folder / f["path"]), "pt") for f in files if f["path"] != "index.json"]
    state = {}
    for name, entry in index.items():
        for offsets, sizes, number, _ in entry["chunks"]:
            box = opened[number].get_tensor(f"{name}@{','.join(map(str, offsets))}")
            whole = state.setdefault(name, torch.empty(entry["shape"], dtype=box.dtype))
            assert list(box.shape) == sizes
            whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] = box
    return state


def last_state(raw: Raw) -> dict[str, torch.Tensor]:
    """The tensors of the newest committed checkpoint of a job."""
    state = read_checkpoint(committed(Path(raw["run"]["folder"]) / "checkpoints")[-1].folder)
    return {name: tensor for name, tensor in state.items() if not name.startswith("rank.")}


def summary(raw: Raw) -> Raw:
    return json.loads((Path(raw["run"]["folder"]) / "summary.json").read_text())


def scores(raw: Raw) -> Raw:
    """What of a summary depends on examples and weights alone."""
    return {k: summary(raw)[k] for k in ("slices", "evaluated_from", "examples", "covered", "groups")}


def bootstrap(raw: Raw) -> dict[str, np.ndarray]:
    with np.load(Path(raw["run"]["folder"]) / "bootstrap.npz") as arrays:
        return dict(arrays)


def supervision_files(raw: Raw) -> dict[str, Any]:
    """What was logged, without the time of the commits."""
    root = Path(raw["run"]["folder"]) / "supervision"
    files: dict[str, Any] = {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
    for name in (n for n in files if n.endswith("manifest.json")):
        files[name] = json.loads(files[name])
        del files[name]["extra"]["at"]
    return files


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not bitwise equal, or are in one of the two only."""
    return [k for k in sorted({*a, *b}) if k not in a or k not in b or not torch.equal(a[k], b[k])]


def assert_same_outcome(a: Raw, b: Raw) -> None:
    """Two finished jobs left bitwise equal weights, metrics, bootstrap replicates and supervision."""
    assert same(last_state(a), last_state(b)) == []
    assert scores(a) == scores(b) or json.dumps(scores(a)) == json.dumps(scores(b))  # NaN differs from itself
    left, right = bootstrap(a), bootstrap(b)
    assert left.keys() == right.keys() and all(left[k].tobytes() == right[k].tobytes() for k in left)
    assert supervision_files(a) == supervision_files(b)


def copied(raw: Raw, folder: Path) -> Raw:
    """The same job with a copy of its run folder."""
    shutil.copytree(raw["run"]["folder"], folder)
    return replaced(raw, run__folder=str(folder))

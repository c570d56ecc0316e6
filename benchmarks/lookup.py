"""FBGEMM's table-batched embedding: `exfm bench lookup [--rows N --tables N --width N --batch N --pooling N --dtype fp32|fp16]`.

forward: pooled sums of all tables in one call; both: forward, and backward with the fused row-wise Adagrad. It measures FBGEMM, so
what counts is its share of two bounds that are measured in the same turns: copying memory, and torch.index_select of the same rows one
by one. Beside them torch's embedding_bag. Ids are fresh in every call, uniform or Zipf over tables that no cache holds.

Bytes counted, N ids, U different rows among them, b examples, t tables, row bytes r, width d:
  forward  N r rows + 8 N ids + 8 (t b + 1) offsets read, 4 t b d pooled sums written
  backward 4 t b d gradients + 8 N ids + U r rows + 4 U accumulators read, U r rows + 4 U accumulators written; sorting ids is not counted
  gather   N r + 8 N read, N r written; copy: read and written
Under Zipf ids rows repeat, and caches serve a part of the forward bytes. Writes lookup.json and lookup.md under --out.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor

from benchmarks._turns import clock_of, in_turns, machine, ratio
from benchmarks.plan import say
from exfm.data.errors import UserError
from exfm.data.hashing import hash64, salt_of
from exfm.trainer.peak import available_bytes

GIB = 2**30
ZIPF = 1.05
FRESH = 8  # sets of ids in turn: together their rows are more than a cache holds
TARGETS = {"forward": 0.70, "both": 0.60}  # of copy bandwidth, on a GPU at its default shape
DTYPES = {"fp32": (SparseType.FP32, 4), "fp16": (SparseType.FP16, 2)}


@dataclass(frozen=True)
class Shape:
    tables: int
    rows: int
    width: int
    batch: int
    pooling: int
    dtype: str

    @property
    def row_bytes(self) -> int:
        return self.width * DTYPES[self.dtype][1]

    @property
    def ids(self) -> int:
        return self.tables * self.batch * self.pooling

    @property
    def table_bytes(self) -> int:
        """Rows and their accumulators."""
        return self.tables * self.rows * (self.row_bytes + 4)


# beyond any cache here; the GPU's is the shape that the targets name
SHAPES = {"cpu": Shape(4, 1_000_000, 128, 1024, 20, "fp32"), "cuda": Shape(8, 10_000_000, 128, 16384, 20, "fp32")}


@dataclass(frozen=True)
class Ids:
    """Rows of every table [t * b * l], with where examples begin, and the same rows of the tables laid end to end."""

    rows: Tensor
    offsets: Tensor
    flat: Tensor
    different: int


def make_ids(s: Shape, kind: str, seed: int, device: torch.device) -> Ids:
    rng = np.random.default_rng(seed)
    if kind == "uniform":
        rows = rng.integers(0, s.rows, s.ids)
    else:  # popularity ranks by the inverse of the continuous distribution, scattered over the table
        power = 1 - ZIPF
        place = (rng.random(s.ids) * ((s.rows + 1.0) ** power - 1) + 1) ** (1 / power)
        rows = (hash64(place.astype(np.int64), salt_of("lookup")) % np.uint64(s.rows)).astype(np.int64)
    flat = rows + np.repeat(np.arange(s.tables) * s.rows, s.batch * s.pooling)
    offsets = np.arange(0, s.ids + 1, s.pooling)
    as_tensor = lambda x: torch.from_numpy(x).to(device)  # noqa: E731
    return Ids(as_tensor(rows), as_tensor(offsets), as_tensor(flat), len(np.unique(flat)))


def counted(s: Shape, different: float) -> dict[str, float]:
    """Bytes of each work, as the module's docstring counts them."""
    pooled = 4 * s.tables * s.batch * s.width
    forward = s.ids * (s.row_bytes + 8) + 8 * (s.tables * s.batch + 1) + pooled
    backward = pooled + 8 * s.ids + 2 * different * (s.row_bytes + 4)
    return {"forward": forward, "both": forward + backward, "gather": s.ids * (2 * s.row_bytes + 8), "bag": forward}


def make_tables(s: Shape, device: torch.device) -> SplitTableBatchedEmbeddingBagsCodegen:
    cuda = device.type == "cuda"
    where = (EmbeddingLocation.DEVICE, ComputeDevice.CUDA) if cuda else (EmbeddingLocation.HOST, ComputeDevice.CPU)
    tables = SplitTableBatchedEmbeddingBagsCodegen(
        [(s.rows, s.width, *where)] * s.tables,
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.01,
        weights_precision=DTYPES[s.dtype][0],
        device=device if cuda else None,
    )
    weights_of(tables).fill_(0.01)
    return tables


def weights_of(tables: SplitTableBatchedEmbeddingBagsCodegen) -> Tensor:
    """All tables end to end."""
    weights = tables.weights_dev if tables.weights_dev.numel() else tables.weights_host
    return weights.detach()


def works(s: Shape, sets: list[Ids], tables: Any, device: torch.device, copied: int) -> dict[str, Callable[[], object]]:
    rows = weights_of(tables).view(-1, s.width)
    source, target = (torch.ones(copied, dtype=torch.uint8, device=device) for _ in range(2))
    gathered = torch.empty(s.ids, s.width, dtype=rows.dtype, device=device)
    gradient = torch.full((s.batch, s.tables * s.width), 1e-3, device=device)
    # each has its own place in the round: no work finds rows that another has just loaded
    turns: list[Iterator[Ids]] = [cycle(sets[k * 2 % len(sets) :] + sets[: k * 2 % len(sets)]) for k in range(4)]

    def gather() -> None:
        torch.index_select(rows, 0, next(turns[0]).flat, out=gathered)

    def bag() -> None:
        ids = next(turns[1])
        torch.nn.functional.embedding_bag(ids.flat, rows, ids.offsets[:-1], mode="sum")

    def forward() -> None:
        ids = next(turns[2])
        with torch.no_grad():
            tables(ids.rows, ids.offsets)

    def both() -> None:
        ids = next(turns[3])
        tables(ids.rows, ids.offsets).backward(gradient)

    return {"copy": lambda: target.copy_(source), "gather": gather, "bag": bag, "forward": forward, "both": both}


def measure(s: Shape, kind: str, tables: Any, device: torch.device, turns: int, copied: int) -> dict[str, Any]:
    sets = [make_ids(s, kind, seed, device) for seed in range(FRESH)]
    different = statistics.mean(ids.different for ids in sets)
    bytes_of = counted(s, different) | {"copy": 2 * copied}
    jobs = works(s, sets, tables, device, copied)
    repeats = 1 if device.type == "cpu" else 10
    seconds = dict(zip(jobs, in_turns(list(jobs.values()), turns, device, repeats), strict=True))
    rates = {name: [bytes_of[name] / t for t in own] for name, own in seconds.items()}
    return {
        "ids": kind,
        "different_rows": different,
        "bytes": bytes_of,
        "seconds": {name: statistics.median(own) for name, own in seconds.items()},
        "bytes_per_s": {name: statistics.median(own) for name, own in rates.items()},
        "of_copy": {name: ratio(rates[name], rates["copy"]) for name in ("gather", "bag", "forward", "both")},
        "of_gather": {name: ratio(rates[name], rates["gather"]) for name in ("bag", "forward", "both")},
    }


def markdown(result: dict[str, Any]) -> str:
    s = Shape(**result["shape"])
    m = result["machine"]
    lines = [
        f"{m['device']}, {result['threads']} thread(s), {m['date']}, load {m['load']}; {s.tables} tables of {s.rows:,} x {s.width} {s.dtype} "
        f"({s.table_bytes / GIB:.1f} GiB with accumulators), batch {s.batch:,}, pooling {s.pooling}; medians of {result['turns']} turns of "
        f"{result['clock']}, quartiles in brackets.",
        "",
        "| ids | different rows | work | counted, MB | ms | GB/s | by copy | by gather | target, by copy |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    names = {"copy": "copy", "gather": "index_select", "bag": "torch's embedding_bag", "forward": "TBE forward", "both": "TBE forward + backward"}  # fmt: skip
    for r in result["rows"]:
        for name, title in names.items():
            shares = [_share(r[of].get(name)) for of in ("of_copy", "of_gather")]
            lines.append(
                f"| {r['ids']} | {r['different_rows'] / s.ids:.2f} of {s.ids:,} | {title} | {r['bytes'][name] / 1e6:,.0f} | "
                f"{1000 * r['seconds'][name]:.2f} | {r['bytes_per_s'][name] / 1e9:,.1f} | {shares[0]} | {shares[1]} | {_target(result, r, name)} |"
            )
    return "\n".join([*lines, ""])


def _share(found: dict[str, float] | None) -> str:
    return "" if found is None else f"{found['ratio']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def _target(result: dict[str, Any], row: dict[str, Any], name: str) -> str:
    """Targets are of a GPU at its default shape under uniform ids."""
    if name not in TARGETS or row["ids"] != "uniform" or result["shape"] != asdict(SHAPES["cuda"]):
        return ""
    return f"{TARGETS[name]:.2f}: {'met' if row['of_copy'][name]['ratio'] >= TARGETS[name] else 'missed'}"


def check(s: Shape, device: torch.device) -> None:
    """UserError for sizes below 1 and for tables that do not fit here."""
    for name, value in asdict(s).items():
        if name != "dtype" and value < 1:
            raise UserError(f"--{name} is {value}; use 1 or more")
    if s.width % 4:
        raise UserError(f"--width is {s.width}; FBGEMM wants a multiple of 4")
    free = available_bytes(device)
    if s.table_bytes > 0.8 * free:
        raise UserError(
            f"{s.tables} tables of {s.rows:,} rows take {s.table_bytes / GIB:.1f} GiB; {free / GIB:.1f} GiB are available, of which 0.8 may "
            "go to tables; use fewer --rows or --tables"
        )


def main(args: list[str], data_dir: str | None = None) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    default = SHAPES[device.type]
    parser = argparse.ArgumentParser(
        prog="exfm bench lookup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("tables", "rows", "width", "batch", "pooling"):
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name))
    parser.add_argument("--dtype", default=default.dtype, choices=tuple(DTYPES))
    parser.add_argument("--ids", default="uniform,zipf")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; a rank has one")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/lookup"))
    o = parser.parse_args(args)
    if wrong := [k for k in o.ids.split(",") if k not in ("uniform", "zipf")]:
        raise UserError(f"--ids names {', '.join(wrong)}; there are: uniform, zipf")
    s = Shape(o.tables, o.rows, o.width, o.batch, o.pooling, o.dtype)
    check(s, device)
    torch.set_num_threads(o.threads)
    tables = make_tables(s, device)
    result: dict[str, Any] = {
        "machine": machine(),
        "threads": o.threads,
        "clock": clock_of(device)[1],
        "turns": o.turns,
        "shape": asdict(s),
        "zipf": ZIPF,
        "rows": [],
    }
    copied = min(GIB if device.type == "cuda" else GIB // 8, s.table_bytes)
    for kind in o.ids.split(","):
        result["rows"].append(row := measure(s, kind, tables, device, o.turns, copied))
        say(f"{kind} ids: forward {_share(row['of_copy']['forward'])} of copy, both {_share(row['of_copy']['both'])}")
    o.out.mkdir(parents=True, exist_ok=True)
    (o.out / "lookup.json").write_text(json.dumps(result, indent=1))
    (o.out / "lookup.md").write_text(text := markdown(result))
    print(text)
    return 0

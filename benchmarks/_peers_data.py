"""What the peers are trained on: streams for exfm, and the same batches held in memory for the others."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from benchmarks.dense import SIZES, SMALL
from exfm.data.batch import Batch
from exfm.data.criteo import CATEGORIES, COUNTS, SCHEMA
from exfm.data.cut import Cut, write_stream
from exfm.data.frappe import prepare_frappe
from exfm.data.manifest import open_stream
from exfm.data.reader import open_slice
from exfm.trainer.columns import batch_columns
from exfm.trainer.config import JobConfig, parse_config, read_raw

ROOT = Path(__file__).parents[1]
BATCH, EPOCHS = 4096, 2
MODELS = {"small": SMALL} | {name: SIZES[name][-1] for name in ("l8n32", "l8n96")}


@dataclass(frozen=True)
class World:
    """A stream and the job that trains on its slices [0, last); test: the slice to score afterwards, None for none."""

    job: dict[str, Any]
    test: int | None


@dataclass(frozen=True)
class Held:
    """One batch in memory: dense [b, D], rows [b, F] of each feature's table, labels [b]."""

    dense: Tensor
    rows: Tensor
    labels: Tensor


def model_of(name: str) -> dict[str, Any]:
    return {"kind": "wukong", **MODELS[name], "dense_embeddings": 1}


def frappe(source: Path, folder: Path, examples: int) -> World:
    """Real Frappe, two epochs, each in an order of its own. examples: train on so many of the first epoch; 0: on all."""
    path = folder / "stream"
    if not (path / "stream.json").exists():
        prepare_frappe(source, str(path), 1, epochs=EPOCHS)
    raw = read_raw(ROOT / "configs/frappe.yaml", [])
    raw["stream"] = {"path": str(path), "global_batch": BATCH, "shuffle_window": 1 << 20, "last": EPOCHS}
    return World(_finished(raw, folder), None if examples else EPOCHS + 1)


def table_rows(total: int) -> list[int]:
    """Rows of the 26 tables: the Kaggle file's, scaled to `total` in all."""
    own = [t["rows"] for t in read_raw(ROOT / "configs/criteo.yaml", [])["tables"].values()]
    return [max(1, round(rows * total / sum(own))) for rows in own]


def criteo(folder: Path, examples: int, total: int, model: str = "small", batch: int = BATCH) -> World:
    """Criteo-shaped: 13 dense columns, 26 ids from Zipf's law with exponent 1, labels by chance. total: rows of all tables."""
    path, sizes = folder / f"stream-{total}-{examples}", table_rows(total)
    if not (path / "stream.json").exists():
        random = np.random.default_rng(0)

        def made(start: int, stop: int) -> pa.Table:
            number, n = pa.array(np.arange(start, stop)), stop - start
            columns: dict[str, Any] = {SCHEMA.id: number, SCHEMA.timestamp: number}
            columns |= {name: random.exponential(10, n).astype(np.float32) for name in COUNTS}
            columns |= {c: zipf(random, rows, n) for c, rows in zip(CATEGORIES, sizes, strict=True)}
            return pa.table(columns | {"click": (random.random(n) < 0.25).astype(np.float32)})

        write_stream(str(path), SCHEMA, made, [Cut(0, examples, 0, examples)])
    raw = read_raw(ROOT / "configs/criteo.yaml", [])
    raw["tables"] = {
        name: {"rows": rows, "width": MODELS[model]["width"]} for name, rows in zip(CATEGORIES, sizes, strict=True)
    }
    raw["features"]["sparse"] = [{"name": c, "table": c, "ids": "identity"} for c in CATEGORIES]
    raw["stream"] = {"path": str(path), "global_batch": batch, "last": 1}
    return World(_finished(raw, folder, model), None)


def zipf(random: np.random.Generator, rows: int, n: int) -> np.ndarray:
    """n ids below `rows`, id i with a chance of about 1 / (i + 1)."""
    return np.minimum((rows + 1.0) ** random.random(n) - 1, rows - 1).astype(np.int64)


def _finished(raw: dict[str, Any], folder: Path, model: str = "small") -> dict[str, Any]:
    return raw | {"model": model_of(model), "run": {"name": "peers", "folder": str(folder / "run"), "device": "cpu"}}


def job_of(world: World, sets: dict[str, Any] | None = None) -> JobConfig:
    return parse_config(world.job | (sets or {}), "of the peers' benchmark", JobConfig)


def batches_of(config: JobConfig, index: int, examples: int = 0) -> Iterator[Batch]:
    """The batches of a slice in the order in which exfm's job has them. examples: at most so many; 0: all."""
    stream = open_stream(config.stream.path)
    reader = open_slice(stream, config.stream, batch_columns(config, stream), index, config.run.seed)
    return reader.batches(0, examples or None)


def held(config: JobConfig, index: int, examples: int = 0) -> list[Held]:
    """`batches_of` in plain tensors."""
    found = []
    for batch in batches_of(config, index, examples):
        rows = batch.sparse.values().view(len(batch.sparse.keys()), -1).T.contiguous()
        found.append(Held(batch.dense, rows, batch.labels[:, 0]))
    return found


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Exact area under the ROC curve; equal scores count half."""
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[place]
    positives = labels.sum()
    return float((rank[labels == 1].sum() - positives * (positives + 1) / 2) / (positives * (len(labels) - positives)))


def sizes_of(config: JobConfig) -> list[int]:
    """Rows of every feature's table, in the order of the features."""
    return [config.tables[f.table].rows for f in config.features.sparse]

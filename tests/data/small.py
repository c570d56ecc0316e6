"""A small stream with every kind of column and missing value."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from exfm.data.columns import BatchColumns, SparseInput
from exfm.data.cut import Cut, write_stream
from exfm.data.manifest import Stream
from exfm.data.schema import Schema, SparseColumn

SCHEMA = Schema(
    name="small",
    user="user",
    labels=("click", "buy"),
    dense=("price", "age_s"),
    sparse=(
        SparseColumn(name="user"),
        SparseColumn(name="item"),
        SparseColumn(name="recent", list=True),
        SparseColumn(name="tags", list=True, weights="tag_weights"),
    ),
)


def some_rows(n: int, seed: int = 0, first_id: int = 0) -> pa.Table:
    """n rows of SCHEMA with missing values of every kind, example ids first_id + 10 x row."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 4, n)
    tags = [rng.integers(0, 1000, k).tolist() for k in lengths]
    label = rng.integers(0, 2, n).astype(np.float32)
    columns = {
        "example_id": first_id + 10 * np.arange(n),
        "timestamp": 1_000 + first_id + np.arange(n) // 2,
        "user": rng.integers(0, 20, n),
        "item": pa.array(rng.integers(0, 50, n), mask=rng.random(n) < 0.1),
        "recent": [rng.integers(0, 50, k).tolist() for k in rng.integers(0, 5, n)],
        "tags": tags,
        "tag_weights": [rng.random(len(t)).astype(np.float32).tolist() for t in tags],
        "price": pa.array(rng.normal(size=n).astype(np.float32), mask=rng.random(n) < 0.2),
        "age_s": rng.exponential(100, n).astype(np.float32),
        "click": label,
        "buy": pa.array(label * 0, mask=rng.random(n) < 0.5),
    }
    types = SCHEMA.feature_types() | SCHEMA.label_types()
    return pa.table({name: pa.array(columns[name], type=kind) for name, kind in types.items()})


def identity(ids: np.ndarray, lengths: np.ndarray, example_ids: np.ndarray) -> np.ndarray:
    """Ids as they are: the mapping to table rows is not what these tests are about."""
    return ids.astype(np.int64)


COLUMNS = BatchColumns(
    schema=SCHEMA,
    dense=(("price", False), ("age_s", True)),
    sparse=(
        SparseInput("user", "user", identity),
        SparseInput("item", "item", identity),
        SparseInput("recent", "recent", identity),
        SparseInput("tags", "tags", identity, weights="tag_weights"),
    ),
    labels=("click", "buy"),
)


def write_small(folder: Path, rows: tuple[int, ...], seed: int = 0, schema: Schema = SCHEMA) -> Stream:
    """A stream of SCHEMA with the given number of rows per slice."""
    tables = [some_rows(n, seed + i, first_id=100_000 * i) for i, n in enumerate(rows)]
    edges = np.concatenate([[0], np.cumsum(rows)]).tolist()
    cuts = [Cut(edges[i], edges[i + 1], 1_000 + 100_000 * i, 1_000 + 100_000 * (i + 1)) for i in range(len(rows))]
    return write_stream(str(folder), schema, pa.concat_tables(tables), cuts)

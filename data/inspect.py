"""What is in a stream: slices, label rates and statistics of every column, in bounded memory."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from rich.box import SIMPLE
from rich.console import Group
from rich.table import Table

from exfm.data.errors import UserError
from exfm.data.hashing import hash64
from exfm.data.manifest import SliceManifest, Stream, column_array, open_stream, slice_folder
from exfm.data.schema import Schema
from exfm.data.source import AlignedFiles, SliceSource

SKETCH = 16_384


@dataclass
class Distinct:
    """Number of distinct ids: exact up to SKETCH of them, then estimated from the SKETCH smallest 64-bit hashes.

    With h the largest of them as a share of the hash space, (SKETCH - 1) / h (Bar-Yossef et al., 2002); its relative
    standard error is 1 / sqrt(SKETCH), 0.8%.
    """

    hashes: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    exact: bool = True

    def add(self, ids: np.ndarray) -> None:
        found = np.union1d(self.hashes, hash64(ids))
        self.exact = self.exact and len(found) <= SKETCH
        self.hashes = found[:SKETCH]

    def count(self) -> int:
        return len(self.hashes) if self.exact else round((SKETCH - 1) / (float(self.hashes[-1]) / 2.0**64))


@dataclass
class Ids:
    """Statistics of an id column, or of a column of id lists."""

    is_list: bool
    rows: int = 0
    nulls: int = 0
    values: int = 0
    distinct: Distinct = field(default_factory=Distinct)

    def add(self, column: pa.Array) -> None:
        self.rows += len(column)
        self.nulls += column.null_count
        values = (column.flatten() if self.is_list else column).drop_null().to_numpy(zero_copy_only=False)
        self.values += len(values)
        self.distinct.add(values)

    def result(self) -> dict[str, Any]:
        found = {"type": "list" if self.is_list else "id", "nulls": self.nulls / max(self.rows, 1)}
        found |= {"distinct": self.distinct.count(), "distinct_is_exact": self.distinct.exact}
        return found | ({"mean_length": self.values / max(self.rows, 1)} if self.is_list else {})


@dataclass
class Numbers:
    """Statistics of a column of numbers, or of lists of them, without the missing ones."""

    kind: str = "dense"
    rows: int = 0
    nulls: int = 0
    nans: int = 0
    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    low: float = np.inf
    high: float = -np.inf

    def add(self, column: pa.Array) -> None:
        self.rows += len(column)
        self.nulls += column.null_count
        flat = column.flatten() if pa.types.is_list(column.type) else column
        values = flat.drop_null().to_numpy(zero_copy_only=False).astype(np.float64)
        known = values[~np.isnan(values)]
        self.nans += len(values) - len(known)
        if not len(known):
            return
        total, mean = self.count + len(known), float(known.mean())
        self.squares += float(((known - mean) ** 2).sum()) + (mean - self.mean) ** 2 * self.count * len(known) / total
        self.mean += (mean - self.mean) * len(known) / total
        self.count, self.low, self.high = total, min(self.low, float(known.min())), max(self.high, float(known.max()))

    def result(self) -> dict[str, Any]:
        rows = max(self.rows, 1)
        found: dict[str, Any] = {"type": self.kind, "nulls": self.nulls / rows, "nans": self.nans / rows}
        known = {
            "mean": self.mean,
            "std": (self.squares / max(self.count, 1)) ** 0.5,
            "min": self.low,
            "max": self.high,
        }
        return found | (known if self.count else dict.fromkeys(known))


def inspect(url: str) -> dict[str, Any]:
    """Facts of a stream, fit for JSON; one row group at a time is in memory. UserError where it is missing or damaged.

    schema; slices: state (missing, features, part labelled, labelled), rows, [t0, t1), share of observed labels and label rates,
    in a joined stream the seconds from t1 to the commit of every kind of files; features:
    type, share of nulls, distinct ids, mean list length, mean, std, min, max and share of NaN of numbers.
    """
    stream = open_stream(url)
    statistics = _statistics(stream.schema)
    slices = [_slice(stream, index, statistics) for index in _indices(stream)]
    return {
        "path": stream.root,
        "schema": stream.schema.model_dump(mode="json"),
        "schema_digest": stream.schema_digest,
        "sealed": stream.info.num_slices is not None,
        "rows": sum(found["rows"] for found in slices),
        "slices": slices,
        "features": {name: column.result() for name, column in statistics.items()},
        "extra": stream.info.extra,
    }


def _statistics(schema: Schema) -> dict[str, Ids | Numbers]:
    found: dict[str, Ids | Numbers] = {}
    for column in schema.sparse:
        found[column.name] = Ids(column.list)
        if column.weights:
            found[column.weights] = Numbers("list of weights")
    return found | {n: Numbers() for n in schema.dense} | ({schema.weight: Numbers("weight")} if schema.weight else {})


def _indices(stream: Stream) -> list[int]:
    """The slices of a sealed stream, or those that a growing one has so far."""
    if stream.info.num_slices is not None:
        return list(range(stream.info.num_slices))
    names = [path.rstrip("/").rsplit("/", 1)[-1] for path in stream.fs.ls(stream.root, detail=False)]
    return sorted(int(name.removeprefix("slice=")) for name in names if name.startswith("slice="))


def _slice(stream: Stream, index: int, statistics: dict[str, Ids | Numbers]) -> dict[str, Any]:
    features = stream.manifest(index, "features")
    if features is None:
        return {"slice": index, "state": "missing", "rows": 0}
    for table in _groups(stream, features, tuple(statistics)):
        for name, column in statistics.items():
            column.add(column_array(table, name))
    found: dict[str, Any] = {"slice": index, "rows": features.rows, "t0": features.t0, "t1": features.t1}
    kinds = stream.label_kinds(stream.schema.labels)
    committed = [m for m in (stream.manifest(index, kind) for kind in kinds) if m is not None]
    if "join" in stream.info.extra:
        found["lag_s"] = {m.kind: m.extra["at"] - m.t1 for m in (features, *committed)}
    if not committed:
        return found | {"state": "features"}
    rates: dict[str, dict[str, float | None]] = {}
    extra: dict[str, Any] = {}
    for labels in committed:
        rates |= _rates(stream, features, labels)
        extra |= {key: value for key, value in labels.extra.items() if key != "at"}
    state = "labelled" if len(committed) == len(kinds) else "part labelled"
    rates = {task: rates[task] for task in stream.schema.labels if task in rates}
    return found | {"state": state, "labels": rates, "extra": extra}


def _rates(stream: Stream, features: SliceManifest, labels: SliceManifest) -> dict[str, dict[str, float | None]]:
    """Of every task of one kind of label files: share of observed labels and share of positives among them."""
    if labels.row_groups != features.row_groups:
        raise UserError(
            f"{slice_folder(stream.root, features.slice)}: {labels.kind} are not of these features; prepare the slice again"
        )
    tasks = tuple(stream.types(labels.kind))
    sums = {name: np.zeros(2) for name in tasks}
    for table in _groups(stream, labels, tasks):
        for name, total in sums.items():
            values = table.column(name).to_numpy()
            total += [np.isfinite(values).sum(), np.nansum(values)]
    return {n: {"observed": o / labels.rows, "rate": p / o if o else None} for n, (o, p) in sums.items()}


def _groups(stream: Stream, manifest: SliceManifest, columns: tuple[str, ...]) -> Iterator[pa.Table]:
    folder = f"{slice_folder(stream.root, manifest.slice)}/{manifest.kind}"
    files = AlignedFiles(stream.fs, folder, manifest, columns, stream.types(manifest.kind))
    source = SliceSource([files], stream.schema.id)
    return (source.read(files, number, columns) for number in range(source.num_groups))


def render(found: dict[str, Any]) -> Group:
    """What `inspect` found, as tables for a rich console; under a label's name, its rate."""
    labels = found["schema"]["labels"]
    slices = _table(f"{found['path']}: {found['rows']:,} examples", "slice", "state", "rows", "from", "to", *labels)
    for s in found["slices"]:
        rates = [s.get("labels", {}).get(name, {}).get("rate") for name in labels]
        times = [_time(s.get("t0")), _time(s.get("t1"))]
        slices.add_row(str(s["slice"]), s["state"], f"{s['rows']:,}", *times, *(_number(r) for r in rates))
    ids = _table("ids", "column", "type", "nulls", "distinct", "mean length")
    numbers = _table("numbers", "column", "nulls", "nans", "mean", "std", "min", "max")
    for name, c in found["features"].items():
        if "distinct" in c:
            distinct = "~" * (not c["distinct_is_exact"]) + _number(c["distinct"])
            ids.add_row(name, c["type"], _number(c["nulls"]), distinct, _number(c.get("mean_length")))
        else:
            numbers.add_row(name, *(_number(c[key]) for key in ("nulls", "nans", "mean", "std", "min", "max")))
    return Group(slices, ids, numbers)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=SIMPLE, title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name in ("column", "type", "state") else "right", no_wrap=True)
    return table


def _number(value: float | str | None) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def _time(seconds: int | None) -> str:
    return "" if seconds is None else str(np.datetime64(seconds, "s")).replace("T", " ")[:16]

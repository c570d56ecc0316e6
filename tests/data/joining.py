"""An inbox, a clock advanced by hand and a joiner, for the tests of joining."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from exfm.data.clock import ManualClock
from exfm.data.inbox import event_types
from exfm.data.join import Joiner
from exfm.data.join_config import JoinConfig
from exfm.data.manifest import Stream, open_stream
from tests.data.small import SCHEMA, some_rows

START, SLICE_S = 1_000, 50
WINDOWS = {"click": 60, "buy": 1_000}
JOINED = SCHEMA.model_copy(update={"label_windows": WINDOWS})
FEATURES = list(SCHEMA.feature_types())
Event = tuple[int, str, float | None, int]  # example id, task, value, timestamp


def config(folder: Path, **over: Any) -> JoinConfig:
    schema = folder / "schema.yaml"
    schema.parent.mkdir(parents=True, exist_ok=True)
    schema.write_text(yaml.safe_dump(JOINED.model_dump(mode="json", exclude_defaults=True)))
    base = {"inbox": str(folder / "inbox"), "out": str(folder / "out"), "schema_file": str(schema), "slice_s": SLICE_S}
    return JoinConfig.model_validate(base | {"start": START} | over)


def joiner(folder: Path, at: float = START, **over: Any) -> tuple[Joiner, ManualClock]:
    clock = ManualClock(at)
    return Joiner(config(folder, **over), clock), clock


def drop(folder: Path, kind: str, name: str, table: pa.Table) -> None:
    path = folder / "inbox" / kind / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path.with_name("_" + name))
    path.with_name("_" + name).rename(path)


def drop_rows(folder: Path, name: str, table: pa.Table) -> None:
    drop(folder, "features", name, table.select(FEATURES))


def drop_events(folder: Path, name: str, events: list[Event]) -> None:
    columns = list(zip(*events, strict=True)) or [[], [], [], []]
    types = event_types(SCHEMA).items()
    drop(folder, "labels", name, pa.table({n: pa.array(c, t) for (n, t), c in zip(types, columns, strict=True)}))


def rows(n: int = 400) -> pa.Table:
    """Two examples a second from START on: 100 to a slice. Example ids are 10 x row."""
    return some_rows(n)


def stream(folder: Path, generation: Any = "first") -> Stream:
    return open_stream(str(folder / "out"), generation)


def kinds(folder: Path, index: int) -> list[str]:
    """The kinds of files committed of a slice."""
    found = (folder / "out" / f"slice={index:06d}").glob("*/manifest.json")
    return sorted(path.parent.name for path in found)


def column(folder: Path, index: int, kind: str, name: str) -> list[Any]:
    path = folder / "out" / f"slice={index:06d}" / kind / "part-00000.parquet"
    return pq.read_table(path).column(name).to_pylist()


def files(folder: Path) -> dict[str, bytes]:
    """The slices of a joined stream, byte by byte; what a killed writer left under another name does not count."""
    root = folder / "out"
    found = [p for p in sorted(root.glob("slice=*/*/*")) if ".tmp." not in p.name] + [root / "stream.json"]
    return {str(p.relative_to(root)): p.read_bytes() for p in found}

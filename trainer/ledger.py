"""The ledger: which examples were learned or knowingly left out, in committed order, and the audit that proves it."""

from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from exfm.data.commit import Filesystem, commit
from exfm.data.errors import UserError
from exfm.data.hashing import id_sum
from exfm.data.reader import SliceReader

TYPES = pa.schema(
    {"slice": pa.int64(), "start": pa.int64(), "stop": pa.int64(), "id_sum": pa.uint64(), "world_size": pa.int32(), "attempt": pa.int32(), "skipped": pa.bool_()}
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """Positions [start, stop) of a slice were learned, or left out after a bad loss (`skipped`).

    id_sum: order-free digest of the example ids that the model got.
    """

    slice: int
    start: int
    stop: int
    id_sum: int
    world_size: int
    attempt: int
    skipped: bool = False


def write_ledger(fs: Filesystem, path: str, entries: list[Entry]) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([asdict(e) for e in entries], schema=TYPES), sink)
    commit(fs, path, sink.getvalue().to_pybytes())


def as_array(entries: list[Entry]) -> np.ndarray:
    """[entries, fields] i64, as a checkpoint holds it; the unsigned id_sum by its bits."""
    rows = [[f - 2**64 if f >= 2**63 else f for f in map(int, astuple(e))] for e in entries]
    return np.array(rows, np.int64).reshape(len(rows), len(fields(Entry)))


def from_array(rows: np.ndarray) -> list[Entry]:
    """The inverse of `as_array`."""
    named = ({f.name: value for f, value in zip(fields(Entry), row, strict=True)} for row in rows.tolist())
    return [Entry(**(e | {"id_sum": e["id_sum"] % 2**64, "skipped": bool(e["skipped"])})) for e in named]


def read_ledger(fs: Filesystem, path: str) -> list[Entry]:
    if not fs.exists(path):
        return []
    with fs.open(path, "rb") as f:
        try:
            return [Entry(**row) for row in pq.read_table(f).to_pylist()]
        except (pa.ArrowException, TypeError, OSError) as error:
            raise UserError(f"{path} is no ledger ({error}); the audit needs the one that the job wrote") from None


def audit(entries: list[Entry], slices: range, open_reader: Callable[[int], SliceReader]) -> dict[str, Any]:
    """Compare the ledger with the data. open_reader(slice) -> SliceReader of the job's own order.

    Returns counts; skipped: examples that the ledger says were left out. UserError names the first gap, overlap or difference in ids.
    """
    examples = skipped = 0
    done = []
    for index in slices:
        mine = [e for e in entries if e.slice == index]
        if index > max((e.slice for e in entries), default=-1):
            break
        reader = open_reader(index)
        ids = reader.source.column(reader.columns.schema.id)
        position = 0
        for entry in mine:
            if entry.start != position:
                kind = "skipped" if entry.start > position else "repeated"
                raise UserError(
                    f"slice {index}: positions {min(position, entry.start)}..{max(position, entry.start)} were {kind}"
                )
            if not entry.skipped and entry.id_sum != id_sum(ids[reader.order.rows(entry.start, entry.stop)]):
                raise UserError(
                    f"slice {index} positions {entry.start}..{entry.stop}: the examples learned are not those of the data"
                )
            position = entry.stop
            if entry.skipped:
                skipped += entry.stop - entry.start
            else:
                examples += entry.stop - entry.start
        done.append({"slice": index, "examples": position, "of": reader.examples})
    stray = [e.slice for e in entries if e.slice not in {d["slice"] for d in done}]
    if stray:
        raise UserError(
            f"the ledger has entries of slice {stray[0]}, but none of slice {len(done) + slices.start}: it was skipped"
        )
    for part in done[:-1]:
        if part["examples"] != part["of"]:
            raise UserError(
                f"slice {part['slice']}: {part['of'] - part['examples']} of {part['of']} examples were skipped"
            )
    last = done[-1] if done else None
    return {"slices": len(done), "examples": examples, "skipped": skipped, "repeated": 0, "last": last}

"""Cutting a time-sorted table into slices, at timestamp boundaries, and writing them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from exfm.data.commit import open_folder
from exfm.data.errors import UserError
from exfm.data.manifest import Stream, StreamInfo, commit_stream
from exfm.data.schema import Schema
from exfm.data.writer import write_slice

# (message, done, total); done == total ends the message's bar
Progress = Callable[[str, int, int], None]

TableOf = Callable[[int, int], pa.Table]


class Cut(NamedTuple):
    """One slice: rows [row0, row1) of the sorted table, time [t0, t1) in Unix seconds."""

    row0: int
    row1: int
    t0: int
    t1: int


def equal_slices(timestamps: np.ndarray, num_slices: int) -> list[Cut]:
    """Slices of about equal counts; all events of one second are in the same slice and [t0, t1) tile the time.

    timestamps: ascending Unix seconds. UserError where there are fewer distinct seconds than slices.
    """
    if num_slices < 1:
        raise UserError(f"num_slices is {num_slices}; at least 1 is needed")
    starts = _second_starts(timestamps)
    if len(starts) < num_slices:
        raise UserError(
            f"{len(timestamps)} rows with {len(starts)} distinct timestamps cannot be cut into {num_slices} slices; use "
            f"at most {len(starts)} slices"
        )
    ideal = np.arange(1, num_slices) * (len(timestamps) / num_slices)
    after = np.clip(np.searchsorted(starts, ideal), 1, len(starts) - 1) if num_slices > 1 else np.empty(0, np.int64)
    nearest = after - (ideal - starts[after - 1] < starts[after] - ideal)
    number = np.arange(1, num_slices)
    chosen = np.maximum.accumulate(np.maximum(nearest - number, 0)) + number
    chosen = np.minimum(chosen, len(starts) - num_slices + number)
    rows = [0, *starts[chosen].tolist(), len(timestamps)]
    times = [*timestamps[np.array(rows[:-1])].tolist(), int(timestamps[-1]) + 1]
    return [Cut(*edge) for edge in zip(rows, rows[1:], times, times[1:], strict=False)]


def window_slices(timestamps: np.ndarray, window_s: int) -> list[Cut]:
    """Slices of exactly `window_s` seconds, the first one beginning at the first event's timestamp.

    timestamps: ascending Unix seconds. UserError names the first window without events.
    """
    if window_s < 1:
        raise UserError(f"window_s is {window_s}; at least 1 second is needed")
    _second_starts(timestamps)
    first, last = int(timestamps[0]), int(timestamps[-1])
    num_windows = (last - first) // window_s + 1
    ends = np.searchsorted(timestamps, first + window_s * np.arange(1, num_windows + 1))
    counts = np.diff(ends, prepend=0)
    if not counts.all():
        empty = int(np.argmin(counts != 0))
        gap_s = int(np.diff(timestamps).max())
        raise UserError(
            f"window {empty} of {window_s} s, [{first + empty * window_s}, {first + (empty + 1) * window_s}), has no "
            f"events; {gap_s} s pass without one: use a wider window, or num_slices for slices of equal counts"
        )
    rows = [0, *ends.tolist()]
    return [Cut(rows[i], rows[i + 1], first + i * window_s, first + (i + 1) * window_s) for i in range(num_windows)]


def _second_starts(timestamps: np.ndarray) -> np.ndarray:
    """First row of every distinct timestamp. UserError for no rows or unsorted ones."""
    if len(timestamps) == 0:
        raise UserError("there are no rows to cut into slices; check the source")
    steps = np.diff(timestamps)
    if (steps < 0).any():
        raise UserError(
            f"row {int(np.argmax(steps < 0)) + 1} is earlier than the row before it; sort by timestamp first"
        )
    return np.concatenate([[0], np.flatnonzero(steps) + 1])


def new_stream(url: str, schema: Schema, num_slices: int) -> Stream:
    """A stream to write slices into; commit_stream completes it. UserError where the folder already holds a stream."""
    fs, root = open_folder(url)
    if fs.exists(f"{root}/stream.json"):
        raise UserError(f"{root} already holds a stream; use an empty folder")
    return Stream(fs, root, StreamInfo(stream_schema=schema, num_slices=num_slices))


def write_stream(
    url: str,
    schema: Schema,
    table: pa.Table | TableOf,
    cuts: Sequence[Cut],
    extra_of_slice: Callable[[int], dict[str, Any]] | None = None,
    progress: Progress | None = None,
    extra: dict[str, Any] | None = None,
) -> Stream:
    """Write a whole stream: its slices, then stream.json, so that a stream that can be opened is complete.

    table: sorted by timestamp, or a function of (row0, row1) that makes those rows, so that they need not all be in
    memory at once. extra_of_slice, extra: further facts for the labels manifests and for stream.json. UserError where
    the folder already holds a stream or a slice is not fit to train on.
    """
    stream = new_stream(url, schema, len(cuts))
    for index, cut in enumerate(cuts):
        rows = table.slice(cut.row0, cut.row1 - cut.row0) if isinstance(table, pa.Table) else table(cut.row0, cut.row1)
        write_slice(stream, index, cut.t0, cut.t1, rows, extra_of_slice(index) if extra_of_slice else None)
        if progress:
            progress("writing slices", index + 1, len(cuts))
    return commit_stream(url, schema, len(cuts), extra)

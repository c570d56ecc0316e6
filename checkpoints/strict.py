"""What no save writes, though every checksum may be right: checksums tell of accidents, anyone can compute them.

ValueError for numbers, boxes and nesting that would make a reader wrong, slow without end or large without end.
"""

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

MAX_DEPTH = 64
MAX_NUMBER = 2**48
MAX_NAME = 1024
# of a manifest or an index: a million shards' worth
MAX_TEXT_BYTES = 2**28
COUNTS = ("step", "world_size", "optimizer_steps", "ledger_entries", "first_evaluated", "examples", "slice")
WORDS = ("kind", "version", "rows")
SECTIONS = ("config", "identity", "position", "versions", "of")

Box = tuple[tuple[int, ...], tuple[int, ...]]


def count(value: Any) -> int:
    """A whole number from 0 to 2^48; true, 1.0 and NaN are none."""
    if type(value) is not int or not 0 <= value < MAX_NUMBER:
        raise ValueError(f"{shown(value)} is no count")
    return value


def shown(value: Any) -> str:
    """A value that somebody else wrote, short enough for a message and without control characters."""
    text = value if isinstance(value, str) else repr(value)
    text = "".join(c if c.isprintable() else "?" for c in text[:300])
    return text if len(text) < 300 else text + "..."


def check_name(name: str) -> str:
    """A tensor's name: printable, so that it cannot command a terminal."""
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise ValueError(f"'{shown(name)}' is no name of a tensor")
    return name


def check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        inside = (v for c in level for v in (c.values() if isinstance(c, dict) else c))
        level = [v for v in inside if isinstance(v, dict | list) and v]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {MAX_DEPTH}")


def check_fields(manifest: dict[str, Any]) -> None:
    """The fields that loading relies on, as far as they are there."""
    for name in (n for n in COUNTS if n in manifest):
        count(manifest[name])
    for name in (n for n in WORDS if n in manifest):
        if not isinstance(manifest[name], str) or len(manifest[name]) > MAX_NAME:
            raise ValueError(f"{name} is {shown(manifest[name])}")
    for name in (n for n in SECTIONS if n in manifest):
        if not isinstance(manifest[name], dict):
            raise ValueError(f"{name} is {shown(manifest[name])}")
    if "position" in manifest:
        count(manifest["position"]["slice"]), count(manifest["position"]["consumed"])
    if "seconds" in manifest and not (type(manifest["seconds"]) in (int, float) and 0 <= manifest["seconds"] < 2**40):
        raise ValueError(f"seconds is {shown(manifest['seconds'])}")
    for link in (manifest.get("base"), manifest.get("of")):
        if link is not None and not (isinstance(link["name"], str) and isinstance(link["sum"], str)):
            raise ValueError(f"it rests on {shown(link)}")


def check_cover(shape: Sequence[int], boxes: Sequence[Box]) -> None:
    """The boxes (offsets, sizes), all inside the shape, cover it exactly: every value once."""
    covered = sum(math.prod(sizes) for _, sizes in boxes)
    if covered != math.prod(shape):
        raise ValueError(f"its chunks hold {covered} of {math.prod(shape)} values")
    real = [box for box in boxes if math.prod(box[1])]
    if len(real) < 2:
        return
    if any(tuple(sizes[2:]) != tuple(shape[2:]) for _, sizes in real):
        raise ValueError("its chunks are cut in other dimensions than rows and columns")
    flat = [((*o, 0)[:2], (*s, 1)[:2]) for o, s in real]
    if _overlap(sorted(flat)):
        raise ValueError("its chunks overlap")


def _overlap(boxes: Sequence[Box]) -> bool:
    """Whether any two of the boxes, by first row, share a value: a sweep over the rows."""
    active: list[tuple[int, int]] = []  # (first column, columns) of boxes that the sweep is in
    ends: list[tuple[int, tuple[int, int]]] = []
    for (row, column), (rows, columns) in boxes:
        while ends and ends[0][0] <= row:
            gone = heapq.heappop(ends)[1]
            del active[bisect_left(active, gone)]
        at = bisect_left(active, (column, 0))
        if at < len(active) and active[at][0] < column + columns:
            return True
        if at and sum(active[at - 1]) > column:
            return True
        insort(active, (column, columns))
        heapq.heappush(ends, (row + rows, (column, columns)))
    return False


def check_apart(ranges: Sequence[tuple[int, int, int]]) -> None:
    """No two of the (file, start, bytes) share a byte: what is read is never more than what lies on the disk."""
    before = (-1, 0)
    for file, start, size in sorted(r for r in ranges if r[2]):
        if file == before[0] and start < before[1]:
            raise ValueError(f"two chunks share byte {start} of file {file}")
        before = (file, start + size)

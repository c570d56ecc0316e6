"""MovieLens-1M as a stream: what is known of an example is what happened strictly before its second."""

import os
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from exfm.data.cut import Progress, equal_slices, write_stream
from exfm.data.manifest import Stream, column_array
from exfm.data.movielens_files import AGES, GENDERS, GENRES, download, read_events
from exfm.data.schema import Schema, SparseColumn

__all__ = ["SCHEMA", "download", "prepare"]

HISTORY = 20
LIKED_FROM = 4
MAX_GAP_S = 30 * 86_400

SCHEMA = Schema(
    name="ml1m",
    user="user_id",
    labels=("liked",),
    dense=("num_liked", "num_disliked", "like_rate", "movie_count", "movie_like_rate", "seconds_since_last"),
    sparse=(
        *(SparseColumn(name=n) for n in ("user_id", "movie_id", "gender", "age", "occupation", "zip3", "year")),
        *(SparseColumn(name=n, list=True) for n in ("genres", "liked_movies", "disliked_movies")),
    ),
)

Ints = NDArray[np.int64]


class Before(NamedTuple):
    """What an example's key (its user or movie) had seen strictly before the example's second.

    order [n]: examples grouped by key, in time order within. start, first [n]: for every example, in time order, the
    position in `order` of its key's first event of that second, and of its key's first event: [first, start) is the past.
    """

    order: Ints
    start: Ints
    first: Ints

    def tally(self, flags: np.ndarray) -> tuple[Ints, Ints]:
        """Number of flagged events before `start` and before `first`, counted along `order`."""
        total = np.concatenate([[0], np.cumsum(flags[self.order])])
        return total[self.start], total[self.first]


def before(keys: Ints, timestamps: Ints) -> Before:
    """Find the past of every example; timestamps ascending."""
    order = np.argsort(keys, kind="stable")
    new_key = np.diff(keys[order], prepend=keys[order[:1]] - 1) != 0
    new_second = new_key | (np.diff(timestamps[order], prepend=0) != 0)
    position = np.arange(len(keys))
    start, first = np.empty_like(order), np.empty_like(order)
    start[order] = np.maximum.accumulate(np.where(new_second, position, 0))
    first[order] = np.maximum.accumulate(np.where(new_key, position, 0))
    return Before(order, start, first)


def prepare(source: str | os.PathLike[str], out: str, num_slices: int = 50, progress: Progress | None = None) -> Stream:
    """Write MovieLens-1M as a stream of `num_slices` slices of about equal counts.

    source: the publisher's unpacked folder, or an events.parquet of the same content; both give the same bytes.
    UserError where the source is missing or wrong, or `out` already holds a stream.
    """
    if progress:
        progress("reading ratings", 0, 1)
    events = read_events(source)
    if progress:
        progress("reading ratings", 1, 1)
    cuts = equal_slices(events.column("timestamp").to_numpy(), num_slices)
    extra = {"genres": list(GENRES), "ages": list(AGES), "genders": list(GENDERS), "liked_from_rating": LIKED_FROM}
    return write_stream(out, SCHEMA, Examples(events), cuts, progress=progress, extra=extra)


class Examples:
    """Examples of the events: called with (row0, row1), it makes their table."""

    def __init__(self, events: pa.Table) -> None:
        self.events = events
        liked = events.column("rating").to_numpy() >= LIKED_FROM
        movies, timestamps = (events.column(n).to_numpy() for n in ("movie_id", "timestamp"))
        user = before(events.column("user_id").to_numpy(), timestamps)
        self.columns: dict[str, np.ndarray] = {"liked": liked.astype(np.float32)}
        self.histories: dict[str, tuple[Ints, Ints, Ints]] = {}
        for name, flags in (("liked", liked), ("disliked", ~liked)):
            stop, start = user.tally(flags)
            self.columns[f"num_{name}"] = stop - start
            newest_first = movies[user.order[flags[user.order]]]
            self.histories[f"{name}_movies"] = (newest_first, stop, np.minimum(stop - start, HISTORY))
        likes, dislikes = self.columns["num_liked"], self.columns["num_disliked"]
        self.columns["like_rate"] = _rate(likes, likes + dislikes)
        movie = before(movies, timestamps)
        stop, start = movie.tally(liked)
        self.columns["movie_count"] = movie.start - movie.first
        self.columns["movie_like_rate"] = _rate(stop - start, movie.start - movie.first)
        previous = timestamps[user.order[np.maximum(user.start - 1, 0)]]
        gap_s = np.minimum(timestamps - previous, MAX_GAP_S)
        self.columns["seconds_since_last"] = np.where(user.start > user.first, gap_s, 0)

    def __call__(self, row0: int, row1: int) -> pa.Table:
        """Rows [row0, row1) with the columns of SCHEMA."""
        events = self.events.slice(row0, row1 - row0)
        table: dict[str, pa.Array] = {SCHEMA.id: pa.array(np.arange(row0, row1))}
        for name, kind in (SCHEMA.feature_types() | SCHEMA.label_types()).items():
            if name in self.histories:
                table[name] = _latest(*self.histories[name], row0, row1)
            elif name in self.columns:
                table[name] = pa.array(self.columns[name][row0:row1].astype(np.float32))
            elif name != SCHEMA.id:
                table[name] = column_array(events, name).cast(kind)
        return pa.table(table)


def _rate(likes: np.ndarray, events: np.ndarray) -> np.ndarray:
    """Share of likes with one like and one dislike added."""
    return (likes + 1) / (events + 2)


def _latest(values: Ints, stop: Ints, counts: Ints, row0: int, row1: int) -> pa.Array:
    """Lists of the `counts` values before position `stop`, last one first, for rows [row0, row1)."""
    stop, counts = stop[row0:row1], counts[row0:row1]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    back = np.arange(offsets[-1]) - np.repeat(offsets[:-1], counts)
    flat = values[np.repeat(stop - 1, counts) - back]
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(flat))

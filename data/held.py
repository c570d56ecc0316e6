"""What a joiner holds between the inbox and the stream: rows that are in no slice yet, and the label events of open windows."""

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from exfm.data.errors import UserError
from exfm.data.events import Events, Examples, Ints, Known
from exfm.data.inbox import FEATURES, LABELS, Inbox
from exfm.data.schema import Schema


@dataclass
class Held:
    """rows: by the file that they came in, in the order of taking. files: names of the label files, as events.file numbers them."""

    inbox: Inbox
    schema: Schema
    taken: dict[str, list[str]] = field(default_factory=lambda: {FEATURES: [], LABELS: []})
    rows: list[tuple[str, pa.Table]] = field(default_factory=list)
    known: Known = field(default_factory=Known)
    events: Events = field(default_factory=Events.none)
    files: list[str] = field(default_factory=list)

    def new(self) -> dict[str, list[str]]:
        """The files that have not been taken, in order of their names."""
        return {kind: [n for n in self.inbox.names(kind) if n not in self.taken[kind]] for kind in (FEATURES, LABELS)}

    def again(self, kind: str, names: tuple[str, ...], t0: int) -> None:
        """Hold again what of the files taken before is in no slice yet."""
        for name in names:
            if not self.inbox.is_retired(kind, name):
                self.taken[kind].append(name)
                if kind == LABELS:
                    self.add_events(name)
                else:
                    self._add_rows(name, self.inbox.read(kind, name), t0)

    def add_events(self, name: str) -> None:
        self.files.append(name)
        self.events = self.events.plus(Events.of(self.inbox.read(LABELS, name), self.schema, len(self.files) - 1))

    def add_features(self, name: str, t0: int, late: str) -> int:
        """Hold a new file's rows; how many of them were earlier than t0 and dropped.

        UserError for one that is there already, or, with late: refuse, is earlier than t0.
        """
        table = self.inbox.read(FEATURES, name)
        ids = table.column(self.schema.id).to_numpy()
        slices, _ = self.known.find(ids)
        if (slices >= 0).any():
            raise self._twice(int(ids[np.argmax(slices >= 0)]), name)
        early = table.column(self.schema.timestamp).to_numpy() < t0
        if early.any() and late == "refuse":
            raise UserError(
                f"{self.inbox.root}/{FEATURES}/{name}: example {ids[early][0]} is earlier than the open slice, which begins at {t0}; "
                "raise features_delay_s, or set late_features: drop"
            )
        self._add_rows(name, table, t0)
        return int(early.sum())

    def _add_rows(self, name: str, table: pa.Table, t0: int) -> None:
        early = table.column(self.schema.timestamp).to_numpy() < t0
        if not early.all():
            self.rows.append((name, table.filter(pa.array(~early)) if early.any() else table))

    def know_rows(self, index: int) -> None:
        """Make the rows held known, as of slice `index` or later. UserError for an id that is there twice."""
        ids, timestamps = self.column(self.schema.id), self.column(self.schema.timestamp)
        examples = Examples.of(ids, timestamps)
        again = np.flatnonzero(examples.sorted[1:] == examples.sorted[:-1])
        if len(again):
            row = int(examples.order[again[0] + 1])
            ends = np.cumsum([table.num_rows for _, table in self.rows])
            raise self._twice(int(ids[row]), self.rows[int(np.searchsorted(ends, row, side="right"))][0])
        self.known.slices[index] = examples

    def column(self, name: str) -> Ints:
        return np.concatenate([np.empty(0, np.int64), *(table.column(name).to_numpy() for _, table in self.rows)])

    def next_end(self, t0: int, slice_s: int) -> int:
        """Where the slice that begins at t0 ends: after its first window that has examples; 0 while there are none."""
        timestamps = self.column(self.schema.timestamp)
        return t0 + slice_s * ((int(timestamps.min()) - t0) // slice_s + 1) if len(timestamps) else 0

    def cut(self, t1: int) -> pa.Table:
        """Take out the rows before t1, in order of time; rows of one second keep their order."""
        inside, left = [], []
        for name, table in self.rows:
            mask = table.column(self.schema.timestamp).to_numpy() < t1
            if mask.any():
                inside.append(table.filter(pa.array(mask)))
            if not mask.all():
                left.append((name, table.filter(pa.array(~mask)) if mask.any() else table))
        self.rows = left
        rows = pa.concat_tables(inside)
        order = np.argsort(rows.column(self.schema.timestamp).to_numpy(), kind="stable")
        return rows.take(pa.array(order)).combine_chunks()

    def retire(self) -> None:
        """Move away the files of which nothing is held any more."""
        needed = {
            FEATURES: {name for name, _ in self.rows},
            LABELS: {self.files[n] for n in np.unique(self.events.file)},
        }
        for kind, names in self.taken.items():
            for name in [n for n in names if n not in needed[kind]]:
                self.inbox.retire(kind, name)
                names.remove(name)

    def _twice(self, example: int, name: str) -> UserError:
        return UserError(
            f"{self.inbox.root}/{FEATURES}/{name}: example id {example} has been there before; ids must be unique: take the row out "
            "of the file"
        )

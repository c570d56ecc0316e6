"""The joiner: commits a slice's features when its window has passed, and each task's labels when theirs has.

Exactly once, wherever it is killed: <stream>/join.json says which files of the inbox have been taken and what has been counted,
and is committed before any slice that holds their rows. Rows of the open slice and events of open windows are not saved: the files
that they came from stay in the inbox, and are read again. What is committed is never replaced.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from exfm.data.clock import Clock
from exfm.data.commit import commit_json, open_folder, open_parquet, read_json
from exfm.data.errors import UserError
from exfm.data.events import Bools, Examples, Ints
from exfm.data.held import Held
from exfm.data.inbox import FEATURES, LABELS, Inbox
from exfm.data.join_config import JoinConfig, Stage, State
from exfm.data.manifest import SliceManifest, Stream, commit_stream, open_stream, slice_folder
from exfm.data.writer import write_kind

TOLERANCE_S = 1.0  # a clock that is set back by less is waited out
COUNTS = ("late", "amended", "dropped", "unknown")


class Joiner:
    """Call `step` again and again. UserError where the inbox or the clock is wrong; the joiner is of no use after that."""

    def __init__(self, config: JoinConfig, clock: Clock) -> None:
        self.config, self.clock = config, clock
        self.schema = config.schema_of()
        self.fs, self.root = open_folder(config.out)
        self.first_stages, amended = config.stages(self.schema)
        self.stages = self.first_stages + amended
        self.last_stages = amended or self.first_stages
        self.window_s = np.array([self.schema.label_window_s(t) for t in self.schema.labels])
        self.ends: dict[int, int] = {}  # t1 of the slices known
        self.done: set[tuple[int, str]] = set()  # label files committed, of the slices known
        self.stream: Stream | None = None
        self.at = 0.0
        self._load()

    def now(self) -> float:
        """The time, never before the last commit's. UserError where the clock is earlier."""
        now = float(self.clock.now())
        if now < self.at - TOLERANCE_S:
            raise UserError(
                f"the clock says {now:.1f}, which is earlier than the last commit in {self.root}, at {self.at:.1f}; set the clock right, "
                "or join into an empty folder"
            )
        self.at = max(self.at, now)
        return self.at

    # ---------------------------------------------------------------- where it stopped

    def _load(self) -> None:
        try:
            state = State.model_validate(read_json(self.fs, f"{self.root}/join.json"))
        except (FileNotFoundError, NotADirectoryError):
            state = State()
        except ValueError as error:
            raise UserError(f"{self.root}/join.json is damaged: {error}") from None
        self.first, self.at = state.first, state.at
        self.counts = {what: {t: state.counts.get(what, {}).get(t, 0) for t in self.schema.labels} for what in COUNTS}
        self.late_features = state.late_features
        self.held = Held(Inbox.open(self.config.inbox, self.schema), self.schema)
        self.next, self.t0 = state.first, 0
        if self.fs.exists(f"{self.root}/stream.json"):
            self._reopen()
            self._reread(state)
            self._settle()
        self.now()
        try:
            self._save()
        except OSError as error:
            raise UserError(f"{self.root} is not writable ({error}); choose another `out`") from None
        if self.stream is None and self.config.start is not None:
            self._begin(self.config.start)

    def _begin(self, start: int) -> None:
        self.stream = commit_stream(self.config.out, self.schema, None, {"join": self.config.facts(start)})
        self.t0 = start

    def _reopen(self) -> None:
        """Find out what the stream has. UserError where another config made it."""
        self.stream = stream = open_stream(self.config.out)
        found = stream.info.extra.get("join")
        if found is None:
            raise UserError(f"{self.root} holds a stream that no joiner made; choose another `out`")
        wanted = self.config.facts(found["start"] if self.config.start is None else self.config.start)
        if found != wanted or stream.schema_digest != self.schema.digest():
            raise UserError(
                f"{self.root} was begun with {found} and schema {stream.schema_digest}, the config says {wanted} and "
                f"{self.schema.digest()}; set these again, or choose another `out`"
            )
        if (sealed := stream.info.num_slices) not in (None, self.config.slices):
            raise UserError(
                f"{self.root} is complete with {sealed} slices; set slices: {sealed}, or choose another `out`"
            )
        self.t0 = found["start"]
        if self.next:
            self.t0 = stream.wait(self.next - 1, "features", 0).t1
        while manifest := stream.manifest(self.next, "features"):
            self._remember(manifest, *self._ids(manifest))
            for stage in self.stages:
                if labels := stream.manifest(manifest.slice, stage.kind):
                    self._finished(labels)

    def _ids(self, manifest: SliceManifest) -> tuple[Ints, Ints]:
        """Ids and timestamps of a committed slice."""
        columns = [self.schema.id, self.schema.timestamp]
        folder = f"{slice_folder(self.root, manifest.slice)}/features"
        tables = [open_parquet(self.fs, f"{folder}/{part.path}").read(columns=columns) for part in manifest.parts]
        table = pa.concat_tables(tables)
        return table.column(columns[0]).to_numpy(), table.column(columns[1]).to_numpy()

    def _reread(self, state: State) -> None:
        """Read the files again whose rows and events are not in the stream yet; all in them has been counted."""
        held = self.held
        held.again(FEATURES, state.features, self.t0)
        held.again(LABELS, state.labels, self.t0)
        held.know_rows(self.next)
        slices, _ = held.known.find(held.events.ids)
        held.events.settled = (slices >= 0) | (held.events.timestamps < state.settled_before)
        self._prune(slices)

    def _save(self) -> None:
        state = State(
            first=self.first, features=tuple(self.held.taken[FEATURES]), labels=tuple(self.held.taken[LABELS]),
            settled_before=self.t0, counts=self.counts, late_features=self.late_features, at=self.at,
        )  # fmt: skip
        commit_json(self.fs, f"{self.root}/join.json", state.model_dump())

    # ---------------------------------------------------------------- one step

    def step(self) -> list[dict[str, Any]]:
        """Take what has arrived and commit what is due; a line of metrics per commit."""
        now = self.now()
        self._take(self._forget(now))
        lines: list[dict[str, Any]] = []
        if self.stream is None:
            return lines
        while (self.config.slices is None or self.next < self.config.slices) and (
            t1 := self.held.next_end(self.t0, self.config.slice_s)
        ):
            if now < t1 + self.config.features_delay_s:
                break
            lines.append(self._commit_features(self.stream, t1))
        if lines:
            self.held.know_rows(self.next)
        for index in self.ends:
            for stage in self.stages:
                if (index, stage.kind) not in self.done and now >= self.ends[index] + stage.after_s:
                    lines.append(self._commit_labels(self.stream, index, stage))
        slices, _ = self.held.known.find(self.held.events.ids)
        self._prune(slices)
        self.held.retire()
        if self.next == self.config.slices and self.stream.info.num_slices is None:
            self.stream = commit_stream(self.config.out, self.schema, self.next, self.stream.info.extra)
        return lines

    @property
    def finished(self) -> bool:
        """Whether all slices that the config asks for are labelled."""
        all_cut = self.config.slices is not None and self.next >= self.config.slices
        return all_cut and len(self.done) == len(self.ends) * len(self.stages)

    def totals(self) -> dict[str, Any]:
        """What has been counted: label events by task, and late rows of features."""
        return {"late_features": self.late_features, **self.counts}

    def _take(self, changed: bool = False) -> None:
        """Take the new files. What was taken and counted is committed before any of it gets into a slice."""
        held, new = self.held, self.held.new()
        if self.stream is None:
            if not new[FEATURES]:
                return
            first = int(held.inbox.read(FEATURES, new[FEATURES][0]).column(self.schema.timestamp).to_numpy().min())
            self._begin(first - first % self.config.slice_s)
        for name in new[FEATURES]:
            self.late_features += held.add_features(name, self.t0, self.config.late_features)
        if new[FEATURES]:
            held.know_rows(self.next)
        for name in new[LABELS]:
            held.add_events(name)
        if self._settle() or new[FEATURES] or new[LABELS] or changed:
            for kind, names in new.items():
                held.taken[kind] += names
            self._save()

    # ---------------------------------------------------------------- commits

    def _commit_features(self, stream: Stream, t1: int) -> dict[str, Any]:
        rows = self.held.cut(t1)
        ids = rows.column(self.schema.id).to_numpy()
        manifest = write_kind(stream, self.next, "features", self.t0, t1, rows, ids, now=self.now)
        self._remember(manifest, ids, rows.column(self.schema.timestamp).to_numpy())
        return self._line(manifest, self.config.features_delay_s, {})

    def _commit_labels(self, stream: Stream, index: int, stage: Stage) -> dict[str, Any]:
        examples = self.held.known.slices[index]
        number = self.schema.labels.index
        labels = {task: self.held.events.labels(examples, number(task), stage.after_s) for task in stage.tasks}
        table = pa.table({task: pa.array(values, from_pandas=True) for task, values in labels.items()})
        features = stream.wait(index, "features", 0)
        manifest = write_kind(stream, index, stage.kind, features.t0, features.t1, table, examples.ids, now=self.now)
        self._finished(manifest)
        positives = {task: int((values == 1).sum()) for task, values in labels.items()}
        return self._line(manifest, max(stage.after_s, self.config.features_delay_s), {"positives": positives})

    def _remember(self, manifest: SliceManifest, ids: Ints, timestamps: Ints) -> None:
        """A slice's features are committed."""
        self.held.known.slices[manifest.slice] = Examples.of(ids, timestamps)
        self.ends[manifest.slice] = self.t0 = manifest.t1
        self.next = manifest.slice + 1
        self.at = max(self.at, float(manifest.extra["at"]))

    def _finished(self, manifest: SliceManifest) -> None:
        """A kind of labels is committed."""
        self.done.add((manifest.slice, manifest.kind))
        self.at = max(self.at, float(manifest.extra["at"]))

    def _line(self, manifest: SliceManifest, due_s: float, facts: dict[str, Any]) -> dict[str, Any]:
        """Append a commit's line to join_metrics.jsonl. lag: since it was due, in seconds and whole slices."""
        at = float(manifest.extra["at"])
        lag_s = at - manifest.t1 - due_s
        line = {
            "stage": manifest.kind, "slice": manifest.slice, "rows": manifest.rows, "t1": manifest.t1, "at": at, "lag_s": lag_s,
            "lag_slices": int(lag_s // self.config.slice_s), **facts, **self.totals(),
        }  # fmt: skip
        with self.fs.open(f"{self.root}/join_metrics.jsonl", "ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
        return line

    # ---------------------------------------------------------------- label events

    def _settle(self) -> bool:
        """Count the events of which it is now clear what they are; whether there were any late or unknown ones."""
        events, fresh = self.held.events, ~self.held.events.settled
        slices, timestamps = self.held.known.find(events.ids)
        found, window_s = slices >= 0, self.window_s[events.task]
        unknown = fresh & ~found & (events.timestamps < self.t0)
        too_late = events.timestamps > timestamps + window_s
        late = fresh & found & (too_late | self._is_committed(self.first_stages, slices))
        lost = self._is_committed(self.last_stages, slices) | (
            events.timestamps > timestamps + window_s + self.config.amend_s
        )
        for what, mask in zip(COUNTS, (late, late & ~lost, late & lost, unknown), strict=True):
            for number, task in enumerate(self.schema.labels):
                self.counts[what][task] += int((mask & (events.task == number)).sum())
        events.settled = events.settled | found | unknown
        self._prune(slices)
        return bool((late | unknown).any())

    def _is_committed(self, stages: Sequence[Stage], slices: Ints) -> Bools:
        """Whether the labels [e] of each event's slice and task are committed in these stages."""
        out = np.zeros(len(slices), bool)
        for stage in stages:
            done = [index for index, kind in self.done if kind == stage.kind]
            tasks = [self.schema.labels.index(task) for task in stage.tasks]
            out |= np.isin(slices, done) & np.isin(self.held.events.task, tasks)
        return out

    def _prune(self, slices: Ints) -> None:
        """Drop the events that no commit will look at."""
        keep = np.where(slices >= 0, ~self._is_committed(self.last_stages, slices), ~self.held.events.settled)
        self.held.events = self.held.events.where(keep)

    def _forget(self, now: float) -> bool:
        """Forget the slices that are over, in order; whether there were any."""
        before = self.first
        over_s = max(stage.after_s for stage in self.stages) + self.config.remember_s
        while self.first < self.next and now >= self.ends[self.first] + over_s and self._all_done(self.first):
            self.done -= {(self.first, stage.kind) for stage in self.stages}
            del self.held.known.slices[self.first], self.ends[self.first]
            self.first += 1
        return self.first > before

    def _all_done(self, index: int) -> bool:
        return all((index, stage.kind) in self.done for stage in self.stages)

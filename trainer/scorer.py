"""A scorer: a sharded teacher, frozen, that logs predictions of slices before their labels exist.

Slice t is scored with the snapshot after slice t - 1 - lag: a function of t, waited for. Snapshots are swapped in place at slice
boundaries, where they are deltas only their rows. What is committed is never scored again.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exfm.checkpoints.canonical import dense_state, table_state
from exfm.checkpoints.commits import Committed, committed
from exfm.checkpoints.snapshots import load_snapshot, refused, snapshot_name
from exfm.checkpoints.storage import Storage
from exfm.checkpoints.store import agreed, from_rank_0
from exfm.data.batch import Batch
from exfm.data.commit import commit_json
from exfm.data.errors import UserError
from exfm.data.manifest import open_stream
from exfm.data.reader import SliceReader, ahead, open_slice
from exfm.distillation.supervision import SupervisionLog
from exfm.distillation.version import Origin, Versions, leaks
from exfm.trainer.build import build_scoring
from exfm.trainer.columns import batch_columns
from exfm.trainer.env import RankEnv
from exfm.trainer.log import RunLog
from exfm.trainer.publish import Publisher
from exfm.trainer.score_config import ScoreConfig, Scored
from exfm.trainer.steps import EVAL_PIPELINES, Feed, HostCopies
from exfm.trainer.waiting import wait_together
from exfm.trainer.watch import BUILDING, RESTORING, Doing

WAIT_ROUND_S = 5.0


class Stopped(Exception):
    """The job was asked to stop while it waited; everything is committed."""


class Scorer:
    """One attempt of a scorer on this rank. follow: wait for slices and snapshots that are not there yet."""

    def __init__(
        self,
        config: ScoreConfig,
        env: RankEnv,
        device: torch.device,
        follow: bool,
        should_stop: Callable[[], bool],
        doing: Doing,
    ) -> None:
        self.config, self.env, self.device, self.follow = config, env, device, follow
        self.should_stop, self.doing = should_stop, doing
        self.log = RunLog(Path(config.run.folder), config.run.name, env.rank == 0, config.run.log_every_s)
        self.scored = Scored(config)
        self.stream = self.scored.stream
        self.doing.phase = BUILDING
        job = self.scored.job()
        self.job = job
        self.columns = replace(batch_columns(job, self.stream), labels=(), supervision=())
        built = build_scoring(job, env, device)
        shapes = {name: (t.rows, t.width) for name, t in job.tables.items()}
        # nothing is trained: the sums of data-parallel tables stand for none
        tables = table_state(built.shards, built.plan, shapes, lambda p: p.new_empty(len(p)), device.type)
        weights = {name: tensor for name, tensor in tables.items() if name.endswith(".weight")}
        self.state = weights | dense_state({"served": built.served})
        self.storage = Storage(self.scored.snapshots, job.checkpoint.retries)
        self.held: Committed | None = None
        self.supervision = SupervisionLog(self.scored.log_folder)
        self.meet(Origin())
        self.pipeline = EVAL_PIPELINES[config.run.pipeline](built.model, None, device)
        self.copies = HostCopies(device)
        self.examples, self.seconds, self.step, self.newest = 0, 0.0, 0, 0

    def meet(self, origin: Origin) -> None:
        """Set what the teacher had learned before its first slice, as its snapshots say."""
        who = self.scored.identity(origin)
        self.versions = Versions(self.stream, who)
        self.publisher = Publisher(self.supervision, who, self.stream, "snapshot")

    def close(self) -> None:
        self.log.close()

    def run(self) -> bool:
        """Score to the end; False if it was asked to stop. UserError where it cannot go on."""
        index = from_rank_0(lambda: max(self.supervision.slices(), default=self.scored.first - 1)) + 1
        try:
            while (last := self._last(index)) is None or index < last:
                if not self._ready(index):
                    self.log.say(f"scored up to slice {index - 1}; slice {index} or its snapshot is not there yet")
                    break
                self._score(index)
                index += 1
        except Stopped:
            return False
        self._summary(index)
        return True

    # ---------------------------------------------------------------- what there is

    def _last(self, index: int) -> int | None:
        """One past the last slice, looked up anew while the stream is still growing."""
        if self.scored.last is None:
            self.stream = self.scored.stream = from_rank_0(
                lambda: open_stream(self.job.stream.path, self.job.stream.labels)
            )
        return self.scored.last

    def _ready(self, index: int) -> bool:
        """Whether a slice's features and snapshot are there; with `follow` they are waited for."""
        if not self._wait(
            f"the features of slice {index}", lambda: self.stream.manifest(index, "features") is not None
        ):
            return False
        return self._swap(index)

    def _wait(self, what: str, ready: Callable[[], bool], wait_s: float | None = None) -> bool:
        """Wait for something (wait_s: at most so long); without `follow` only look. Stopped where any rank was asked to."""
        self.doing.phase = f"waiting for {what}"
        begun = time.monotonic()
        while True:
            left = float("inf") if wait_s is None else wait_s - (time.monotonic() - begun)
            found = wait_together(ready, max(0.0, min(WAIT_ROUND_S, left)) if self.follow else 0.0, self.should_stop)
            if found == "stop":
                raise Stopped
            if found == "ready":
                return True
            if not self.follow or from_rank_0(lambda left=left: left <= WAIT_ROUND_S):  # type: ignore[misc]
                return False
            if self.log.due():
                self.log.say(f"waiting for {what} ({time.monotonic() - begun:.0f} s)")

    def _swap(self, index: int) -> bool:
        """Load the snapshot that scores a slice; False where it is not there yet. UserError where it never will be."""
        wanted, hold = self.scored.wanted(index), self.config.score.hold

        def settled() -> bool:
            return self.storage.exists(f"{snapshot_name(wanted)}/manifest.json") or self._verdict(wanted) != ""

        there = self._wait(f"snapshot {snapshot_name(wanted)}", settled, self.config.score.wait_s if hold else None)
        if not there and not (hold and self.follow):
            return False
        name, why = from_rank_0(lambda: self._choose(wanted))
        if name is None:
            raise UserError(
                f"slice {index} is to be scored with {snapshot_name(wanted)}, but {why or 'it is not there'}; no snapshot of the "
                f"{hold} slices before it is there; raise score.hold or checkpoint.snapshots.keep of the teacher"
            )
        if name != snapshot_name(wanted):
            self.log.say(f"slice {index}: {why or 'its snapshot is late'}; {name} stands in")
        self._load(name)
        return True

    def _choose(self, wanted: int) -> tuple[str | None, str]:
        """The snapshot to score with, and why it is not the one wanted."""
        there = [c.name for c in committed(self.storage)]
        candidates = [snapshot_name(i) for i in range(wanted, wanted - self.config.score.hold - 1, -1)]
        return next((name for name in candidates if name in there), None), self._verdict(wanted)

    def _verdict(self, wanted: int) -> str:
        """Why a snapshot will not come, or ""."""
        if why := refused(self.storage, wanted):
            return why
        newer = [c.name for c in committed(self.storage) if c.step > wanted]
        if newer and not self.storage.exists(f"{snapshot_name(wanted)}/manifest.json"):
            return f"it has been removed: {newer[0]} is there already"
        return ""

    def _load(self, name: str) -> None:
        self.doing.phase = RESTORING
        if self.held is not None and self.held.name == name:
            return
        begun = time.monotonic()
        before, self.held = self.held, None  # what is half loaded is nothing
        found = agreed(lambda: load_snapshot(self.storage, name, self.state, before))
        origin = Origin(**found.manifest.get("origin", {}))
        if origin != self.versions.identity.origin:
            self.meet(origin)
        if why := leaks(origin, self.stream, self.scored.teacher_first):
            raise UserError(f"snapshot {found.folder}: {why}; its predictions would leak labels and are refused")
        expected = self.versions.after(found.step)
        if found.manifest.get("version") != expected:
            raise UserError(
                f"snapshot {found.folder} is of version {str(found.manifest.get('version'))[:12]}, but a teacher of this config that "
                f"trained on slices {self.scored.teacher_first} to {found.step} of {self.stream.root} is {expected[:12]}: it is of "
                "another teacher, or was edited; publish it again"
            )
        self.held = found
        how = "its delta" if before is not None and found.base else "all of it"
        self.log.say(f"snapshot {name} loaded ({how}) in {time.monotonic() - begun:.2f} s")

    # ---------------------------------------------------------------- scoring

    def _score(self, index: int) -> None:
        assert self.held is not None
        begun = time.monotonic()
        self.doing.phase = f"opening slice {index}"
        reader = open_slice(
            self.stream, self.job.stream, self.columns, index, self.job.run.seed, self.env.rank, self.env.world_size
        )
        feed = Feed(self._batches(reader), self.doing)
        batches, done = iter(feed), 0
        try:
            with torch.no_grad():
                while True:
                    try:
                        output = self.pipeline.progress(batches)
                    except StopIteration:
                        break
                    self.copies.put(feed.in_flight.popleft(), output)
                    self._take()
                    self.step += 1
                    self.doing.step = self.step
                    done = min(done + reader.global_batch, reader.examples)
                    if self.log.due():
                        self._line(index, done / reader.examples, begun)
            self._take(drain=True)
        finally:
            self.pipeline.reset()  # TorchRec's reads the iterator that it was first given until it is told otherwise
            feed.close()
        self.doing.phase = f"ending slice {index}"
        self.publisher.publish(index, str(self.held.manifest["version"]), self.held.step)
        self.publisher.expire(self.config.score.ttl_s)
        self.examples += reader.examples
        self.seconds += time.monotonic() - begun
        self._line(index, 1.0, begun, reader.examples)

    def _batches(self, reader: SliceReader) -> Iterator[Batch]:
        batches = reader.batches(pinned=self.device.type == "cuda")
        return ahead(batches, self.config.score.prefetch) if self.config.score.prefetch else batches

    def _take(self, drain: bool = False) -> None:
        for batch, logits, _ in self.copies.ready(drain):
            real = batch.ids.numpy() >= 0
            values = logits.numpy()[real]
            self._check(values, batch.ids[torch.from_numpy(real)])
            self.publisher.add(batch.rows.numpy()[real], values.copy())

    def _check(self, values: Any, ids: Tensor) -> None:
        finite = torch.from_numpy(values).isfinite().all(dim=1)
        if not bool(finite.all()):
            assert self.held is not None
            row = int((~finite).nonzero()[0])
            raise UserError(
                f"snapshot {self.held.folder} gives example {int(ids[row])} the logits {values[row].tolist()}; predictions are finite; "
                "remove the snapshot and let the teacher publish a sound one (checkpoint.snapshots.gate)"
            )

    # ---------------------------------------------------------------- talk

    def _line(self, index: int, share: float, begun: float, rows: int | None = None) -> None:
        """rows: of a slice that has ended."""
        assert self.held is not None
        last, first = self.scored.last, self.scored.first
        slices = (last if last is not None else index + 1) - first
        seconds = max(self.seconds + (0.0 if rows is not None else time.monotonic() - begun), 1e-9)
        values: dict[str, Any] = {
            "slice": index - first,
            "slices": slices,
            "share": (index - first + share) / slices,
            "examples": self.examples,
            "examples_per_s": self.examples / seconds,
            "staleness_slices": index - 1 - self.held.step,
        }
        if rows is None:
            self.log.record("progress", self.step, values)
            return
        manifest, features = self.supervision.manifest(index), self.stream.manifest(index, "features")
        assert manifest is not None and features is not None
        values["lag_s"] = float(manifest.extra["at"]) - float(features.extra.get("at", "nan"))
        self.newest = self.stream.newest("features", max(self.newest, index))
        values["behind_slices"] = self.newest - index
        values["slice_seconds"], values["rows"] = time.monotonic() - begun, rows
        self.log.record("score", self.step, values)
        self.log.say(
            f"slice {index}: {rows:,} examples scored by {self.held.name}, {rows / max(values['slice_seconds'], 1e-9):,.0f}/s"
        )

    def _summary(self, index: int) -> None:
        if self.env.rank != 0:
            return
        path = Path(self.config.run.folder).absolute() / "summary.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        summary = {
            "name": self.config.run.name,
            "teacher": self.config.score.teacher,
            "log": self.scored.log_folder,
            "slices": [self.scored.first, index],
            "examples": self.examples + before.get("examples", 0),
            "seconds": self.seconds + before.get("seconds", 0.0),
            "examples_per_s": self.examples / self.seconds if self.seconds else None,
            "world_size": self.env.world_size,
        }
        commit_json(self.supervision.fs, str(path), summary)


def run_score(
    config: ScoreConfig, env: RankEnv, device: torch.device, follow: bool, should_stop: Callable[[], bool], doing: Doing
) -> bool:
    """Score in an existing process group; False if it was asked to stop."""
    doing.phase = f"waiting for teacher {config.score.teacher} to begin"
    if wait_together(config.teacher_yaml.exists, float("inf") if follow else 0.0, should_stop) == "stop":
        return False
    scorer = Scorer(config, env, device, follow, should_stop, doing)
    try:
        return scorer.run()
    finally:
        scorer.close()

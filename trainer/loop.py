"""The one training loop, for teacher and student: build, restore, for each slice train, evaluate, publish, commit."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from exfm.data.columns import padding
from exfm.data.commit import open_folder
from exfm.data.hashing import id_sum
from exfm.data.manifest import Stream, open_stream
from exfm.data.reader import SliceReader, ahead, open_slice, slices_of
from exfm.distillation.supervision import SupervisionLog
from exfm.distillation.version import Identity, Origin, genesis, next_version, slice_digest
from exfm.sharding.plan import Plan
from exfm.sharding.planner import plan_table
from exfm.trainer.anatomy import COMMITTING, WAITING, Anatomy, Pace, peak_flops
from exfm.trainer.build import build, rehearse
from exfm.trainer.columns import batch_columns
from exfm.trainer.commits import Commits
from exfm.trainer.config import JobConfig
from exfm.trainer.env import RankEnv
from exfm.trainer.guard import Check, LossGuard, Position
from exfm.trainer.ledger import Entry
from exfm.trainer.log import RunLog
from exfm.trainer.metrics import Metrics, Predictions
from exfm.trainer.planning import PLAN
from exfm.trainer.publish import Publisher
from exfm.trainer.steps import PIPELINES, Feed, HostCopies, Pipeline
from exfm.trainer.stragglers import OwnTime
from exfm.trainer.summary import slice_line, write_summary
from exfm.trainer.teachers import Teachers
from exfm.trainer.trace import Tracer
from exfm.trainer.waiting import wait_together
from exfm.trainer.watch import BUILDING, Doing


@dataclass
class Progress:
    """Where the job is: next position (slice, consumed), steps done, teacher version, examples with supervision."""

    slice: int
    consumed: int
    step: int
    version: str
    covered: int
    examples: int
    seconds: float


class Job:
    """One attempt of a job on this rank."""

    def __init__(
        self,
        config: JobConfig,
        env: RankEnv,
        device: torch.device,
        should_stop: Callable[[], bool],
        doing: Doing | None = None,
        planned: tuple[Plan, str] | None = None,
    ) -> None:
        """planned: the sharding plan, and in words where it comes from; made here if it is not given."""
        self.config, self.env, self.device, self.should_stop = config, env, device, should_stop
        self.doing = doing or Doing()
        self.doing.phase, self.doing.failed = BUILDING, None
        self.anatomy = Anatomy(device)
        self.own = OwnTime(config, env, self.anatomy, self.doing)
        self.folder = Path(config.run.folder)
        self.stream: Stream = open_stream(config.stream.path, config.stream.labels)
        self.slices = slices_of(self.stream, config.stream)
        self.first_evaluated = self.slices.start + int(np.ceil(config.evaluation.skip * len(self.slices)))
        self.columns = batch_columns(config, self.stream)
        offsets = self.stream.schema.logit_offsets(config.heads.tasks)
        plan, self.plan_word = planned or (None, "")
        self.built = build(config, env, device, offsets, plan)
        # as many examples as usual: what is compiled is tuned for them
        usual = -(-config.stream.global_batch // env.world_size) if config.dense_engine.compile else 1
        rehearse(self.built, padding(self.columns, usual), device)
        self.anatomy.watch(self.built.model, self.built.objective)
        self.log = RunLog(self.folder, config.run.name, env.rank == 0, config.run.log_every_s)
        self.commits = Commits(self)
        self.pipeline = Pipeline(config.run.pipeline, self.built, device, self.anatomy)
        self.tracer = Tracer(config.run.trace, self.folder, env.rank, self.anatomy)
        self.copies = HostCopies(device)
        self.metrics = Metrics(len(config.stream.domains), len(config.heads.tasks), config.evaluation.bootstrap)
        self.entries: list[Entry] = []
        self.ledger_fs, root = open_folder(self.folder)
        self.ledger_path = f"{root}/ledger.parquet"
        self.progress = Progress(self.slices.start, 0, 0, "", 0, 0, 0.0)
        self.begin_from(Origin())
        learn = config.distillation.learn
        tasks = config.heads.tasks
        self.teachers = None if learn is None else Teachers(learn, tasks, self.stream, self.slices.start)
        self.offsets = np.array(offsets, np.float32)
        self.newest = self.slices.start  # labelled slice that rank 0 has seen
        self.learned_ids = 0
        self.scored = 0  # position of the next batch whose loss is seen
        self.guard = LossGuard(config.run.spike_factor)
        self.skip_to: Position = (self.slices.start, 0)
        self.begun = time.monotonic()

    def begin_from(self, origin: Origin) -> None:
        """Set what the job had learned before its first slice; nothing is trained or published yet."""
        self.origin = origin
        self.progress.version = genesis(self.config.digest(), origin)
        self.publisher = self._publisher()

    def learned_until(self) -> int | None:
        """The end (Unix seconds) of what the weights have learned; None where nobody knows, because a warm start did not say."""
        p, known = self.progress, self.origin.until
        index = p.slice if p.consumed else p.slice - 1
        own = self.stream.manifest(max(index, self.slices.start), "features")
        if own is None or (self.origin.parent and known is None):
            return known
        end = own.t1 if index >= self.slices.start else own.t0
        return end if known is None else max(end, known)

    def _publisher(self) -> Publisher | None:
        publish = self.config.distillation.publish
        if publish is None:
            return None
        log = SupervisionLog(str(self.folder / "supervision" / publish.teacher))
        who = Identity(
            publish.teacher,
            self.config.digest(),
            self.config.heads.tasks,
            self.slices.start,
            self.stream.generation,
            self.origin,
        )
        return Publisher(log, who, self.stream)

    # ---------------------------------------------------------------- training

    def close(self) -> None:
        self.doing.closing()
        self.tracer.close()
        self.commits.saver.close()
        self.log.close()
        self.built.close()

    def train(self) -> bool:
        """Train to the end; False if it stopped early with everything committed. A finished job stays as it is."""
        self._announce()
        if self.progress.slice == self.slices.stop and (self.folder / "summary.json").exists():
            self.log.say("finished before; nothing to do")
            return True
        flops, peak = 3 * self.built.served.size().flops_per_example, peak_flops(self.device, self.config.precision)
        self.pace = Pace(self.anatomy, flops, peak, self.env.world_size, self.progress.examples)
        finished = self._train()
        self.commits.wait()
        if finished:
            write_summary(self)
        return finished

    def _train(self) -> bool:
        while self.progress.slice < self.slices.stop:
            reader = self.open(self.progress.slice)
            if reader is None:
                self.commits.begin()
                return False
            while self.progress.consumed < reader.examples:
                self._segment(reader)
                stopping = self._agree()
                if self.progress.consumed < reader.examples:
                    if stopping or not self.commits.busy():
                        self.commits.begin()
                    if stopping:
                        return False
            evaluated = self._end_slice()
            stopping = self._agree()
            done, last = self.progress.slice - self.slices.start, self.progress.slice == self.slices.stop
            publish = self.commits.publishable(evaluated)
            regular = done % self.config.checkpoint.every_slices == 0
            if last or stopping or publish or (regular and not self.commits.busy()):
                self.commits.begin(publish)
            if stopping and not last:
                return False
        return True

    def open(self, index: int) -> SliceReader | None:
        """This rank's reader of a slice, with supervision beside it where the job learns from a teacher; None to stop."""
        self.anatomy.mark(WAITING)
        self.doing.phase = f"waiting for slice {index}"
        config, teachers = self.config.stream, self.teachers
        wait_s = config.wait_s if config.on_missing == "wait" else 0.0
        kinds = ("features", *self.stream.label_kinds(self.config.heads.tasks))
        ready = wait_together(lambda: all(self.stream.manifest(index, k) for k in kinds), wait_s, self.should_stop)
        if ready == "stop":
            return None
        for kind in kinds:  # says what is missing where the wait was in vain
            self.stream.wait(index, kind, 0.0)
        if teachers is not None:
            self.doing.phase = f"waiting for the supervision of slice {index}"
            if not teachers.wait(index, self.should_stop, self.log.say):
                return None
            self.built.objective.weigh(teachers.weights(index))
        self.doing.phase = f"opening slice {index}"
        seed, rank, world_size = self.config.run.seed, self.env.rank, self.env.world_size
        sidecars = None if teachers is None else teachers.sidecars
        return open_slice(self.stream, config, self.columns, index, seed, rank, world_size, sidecars)

    def _segment(self, reader: SliceReader) -> None:
        """Train from the present position to the next commit point; the pipeline is empty afterwards."""
        start = self.scored = self.progress.consumed
        if self.skip_to > (self.progress.slice, start):
            return self._skip(reader, start)
        every = self.config.checkpoint.every_examples
        # commit points inside a slice lie on whole global batches
        length = -(-every // reader.global_batch) * reader.global_batch if every else reader.examples
        stop = min(start + length, reader.examples)
        feed = Feed(self._batches(reader, start, stop), self.doing, self.anatomy)
        self.learned_ids, steps = 0, 0
        check: Check | None = None
        try:
            for batch, output in self.pipeline.run(feed):
                self.tracer.step()
                self.copies.put(batch, output)
                self._consume(reader, drain=False)
                self.progress.step += 1
                self.doing.step = self.progress.step
                steps += 1
                before = self.progress.consumed
                self.progress.consumed = min(start + steps * reader.global_batch, stop)
                self.progress.examples += self.progress.consumed - before
                self._line(reader)
                if steps % self.config.run.nan_check_steps == 0:
                    if check is not None and self._answer(check):
                        feed.ended = True
                    check = self.guard.ask(self.should_stop())
            self._consume(reader, drain=True)
            if check is not None:
                self._answer(check)
        finally:
            feed.close()
        self.anatomy.mark(COMMITTING)
        self.built.replicas.sync()
        self._enter(start)

    def _skip(self, reader: SliceReader, start: int) -> None:
        """Leave out the examples up to `skip_to`, as far as they are in this slice."""
        p, (index, consumed) = self.progress, self.skip_to
        p.consumed = min(consumed, reader.examples) if index == p.slice else reader.examples
        self.entries.append(Entry(p.slice, start, p.consumed, 0, self.env.world_size, self.env.attempt, skipped=True))

    def _batches(self, reader: SliceReader, start: int, stop: int) -> Any:
        batches = reader.batches(start, stop, pinned=self.device.type == "cuda")
        depth = self.config.stream.prefetch
        return ahead(batches, depth) if depth else batches

    def _consume(self, reader: SliceReader, drain: bool) -> None:
        """Count scored examples: metrics, supervision to publish, ids learned."""
        for batch, logits, loss in self.copies.ready(drain):
            whole = self.scored + reader.global_batch <= reader.examples
            self.guard.see(loss, (self.progress.slice, self.scored), whole)
            self.scored += reader.global_batch
            real = batch.ids.numpy() >= 0
            ids = batch.ids.numpy()[real]
            scored = logits.numpy()[real]
            predictions = Predictions(
                scored + self.offsets,
                batch.labels.numpy()[real],
                batch.weights.numpy()[real],
                batch.domain.numpy()[real],
                batch.users.numpy()[real],
            )
            self.metrics.add(predictions, self.progress.slice >= self.first_evaluated)
            self.learned_ids = (self.learned_ids + id_sum(ids)) % 2**64
            if self.teachers is not None and batch.supervision_mask is not None:
                found = batch.supervision_mask.numpy()[real]
                self.progress.covered += self.teachers.cover(ids, found, self.progress.slice)
            if self.publisher is not None:
                self.publisher.add(batch.rows.numpy()[real], scored.copy())

    def _answer(self, check: Check) -> bool:
        """Whether to stop. BadLoss where any rank's loss was bad."""
        return self.guard.answer(check, (self.progress.slice, self.progress.consumed))

    def _agree(self) -> bool:
        """Before a commit: the last update's loss is unknown, so the dense weights are looked at too."""
        self.guard.bad |= not bool(torch.stack([p.isfinite().all() for p in self.built.dense_weights()]).all())
        zero = self.built.zero
        self.guard.bad |= zero is not None and zero.not_finite
        return self._answer(self.guard.ask(self.should_stop()))

    # ---------------------------------------------------------------- commit points

    def _enter(self, start: int) -> None:
        """Add the segment that just ended to the ledger."""
        # int64 wraps as the uint64 sum does
        total = torch.from_numpy(np.array([self.learned_ids], np.uint64).view(np.int64))
        dist.all_reduce(total)
        learned = int(total.numpy().view(np.uint64)[0])
        p = self.progress
        self.entries.append(Entry(p.slice, start, p.consumed, learned, self.env.world_size, self.env.attempt))

    def _end_slice(self) -> dict[str, Any]:
        """The merged metrics of the slice, by group and task."""
        p = self.progress
        self.doing.phase = f"ending slice {p.slice}"
        metrics = slice_line(self)
        self.metrics.slice[:] = 0
        if self.publisher is not None:
            self.publisher.publish(p.slice, p.version, p.slice - 1)
            assert self.config.distillation.publish is not None
            self.publisher.expire(self.config.distillation.publish.ttl_s)
        digest = slice_digest(self.stream, p.slice, self.config.heads.tasks)
        p.version = next_version(p.version, self.config.digest(), digest)
        p.slice, p.consumed = p.slice + 1, 0
        return metrics

    # ---------------------------------------------------------------- talk

    def _announce(self) -> None:
        size = self.built.served.size()
        rows = sum(t.rows * t.width for t in self.config.tables.values())
        if self.env.rank == 0:
            self.built.planned.write(self.folder / PLAN)
        self.log.say(
            f"{self.env.world_size} rank(s) on {self.device.type}, pipeline {PIPELINES[self.config.run.pipeline].__name__}, dense engine "
            f"{self.config.dense_engine.kind}; {rows:,} table and {size.num_parameters:,} dense parameters, "
            f"{size.flops_per_example:,} FLOP per example forward"
        )
        if self.plan_word:
            self.log.say(self.plan_word)
        for line in plan_table(self.built.plan, self.config.tables):
            self.log.say(line)

    def _line(self, reader: SliceReader) -> None:
        if self.log.due():
            self.own.report(self.log, self.progress.step)
            slice_line(self, reader)
            if self.commits.saver.busy():
                self.log.say(self.commits.saver.progress_line())

"""The commits of a job: what belongs to one, when one is due, putting one back."""

import time
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from exfm.checkpoints.canonical import boxes
from exfm.checkpoints.commits import Committed, committed, nonsense
from exfm.checkpoints.keeping import clean
from exfm.checkpoints.saver import Request, Saver
from exfm.checkpoints.snapshots import publish, refuse, snapshot_name
from exfm.checkpoints.sources import NotFinite
from exfm.checkpoints.storage import Storage
from exfm.checkpoints.store import Partials, agreed, from_rank_0, load, load_partials, restore_newest
from exfm.checkpoints.warm import warm_source, warm_start
from exfm.data.errors import UserError
from exfm.distillation.version import Origin
from exfm.embeddings.tables import fill_initial
from exfm.trainer.anatomy import COMMITTING, Anatomy
from exfm.trainer.gate import refusal
from exfm.trainer.learning import check_beginning, origin_of
from exfm.trainer.ledger import as_array, from_array, write_ledger
from exfm.trainer.state import canonical_state, check_identity, random_state, restore_random, versions
from exfm.trainer.watch import SAVING

if TYPE_CHECKING:
    from exfm.trainer.loop import Job


class Commits:
    """Saves and restores one job. Knows all of its parts; the loop knows when."""

    def __init__(self, job: "Job") -> None:
        config = job.config
        self.job = job
        self.config = config.checkpoint
        self.state = canonical_state(job.built, config, job.device)
        self.storage = Storage(config.checkpoint_folder, self.config.retries)
        self.saver = Saver(self.storage, self.config, job.device, job.built.kernels, job.built.plan, job.log.say)
        self.saver.prepare(self.state)
        job.doing.moved = lambda: self.storage.moved_bytes

    # ---------------------------------------------------------------- saving

    def busy(self) -> bool:
        """Whether this commit point is passed over, because some rank's last save still runs. All ranks call."""
        if self.config.when_busy == "wait":
            return False
        busy = torch.tensor([float(self.saver.busy())])
        dist.all_reduce(busy, op=dist.ReduceOp.MAX)
        if busy[0] > 0:
            self.job.log.say("the last save still runs; this commit point is skipped")
        return bool(busy[0] > 0)

    def publishable(self, metrics: dict[str, Any]) -> bool:
        """Whether a snapshot is due after the slice that just ended with these metrics by group, and may be published."""
        snapshots, ended = self.config.snapshots, self.job.progress.slice
        if snapshots is None or (ended - self.job.slices.start) % snapshots.every_slices:
            return False
        if why := refusal(snapshots.gate, metrics["all"]):
            self._refuse(ended - 1, why)
        return not why

    def _refuse(self, index: int, why: str) -> None:
        if self.job.env.rank == 0:
            refuse(self._snapshots(), index, why)
        self.job.log.say(f"snapshot of slice {index} is not published: {why}; the last good one stays")

    def begin(self, publish_too: bool = False) -> None:
        """Begin a commit of the present state; it ends in the background, and then, if so told, a snapshot of it is published."""
        job, p = self.job, self.job.progress
        job.doing.phase = SAVING
        job.anatomy.mark(COMMITTING)
        p.seconds += time.monotonic() - job.begun
        job.begun = time.monotonic()
        entries = list(job.entries)
        request = Request(
            p.step,
            self.state,
            self._partials(),
            self._manifest() | ({"snapshot": p.slice - 1} if publish_too else {}),
            # a view for people and the audit; what counts is in the checkpoint
            before_commit=lambda: write_ledger(job.ledger_fs, job.ledger_path, entries),
        )
        if publish_too:
            request.after_commit = partial(self._publish, p.slice - 1, p.version)
        self.saver.save(request)
        self._record()

    def wait(self) -> None:
        """Until the last commit has ended. SaveError if it failed."""
        self.job.doing.phase = SAVING
        self.job.anatomy.mark(COMMITTING)
        self.saver.wait()
        self._record()

    def _record(self) -> None:
        for saved in self.saver.take_ended():
            self.job.log.record("checkpoint", self.job.progress.step, saved.as_dict())

    def _partials(self) -> dict[str, np.ndarray]:
        """This rank's arrays."""
        job = self.job
        arrays = {f"metrics/{k}": v.copy() for k, v in job.metrics.state().items()} | random_state(job.device)
        arrays["progress/covered"] = np.array(job.progress.covered)
        if job.teachers is not None:
            arrays["progress/teachers"] = job.teachers.sums.copy()
        if job.publisher is not None:
            arrays |= {f"publish/{k}": v for k, v in job.publisher.state().items()}
        if job.env.rank == 0:
            arrays["ledger"] = as_array(job.entries)
        return arrays

    def _manifest(self) -> dict[str, Any]:
        job, p = self.job, self.job.progress
        return {
            "identity": job.config.identity(),
            "config": job.config.model_dump(mode="json"),
            "plan": job.built.plan,
            "position": {"slice": p.slice, "consumed": p.consumed},
            "version": p.version,
            "origin": asdict(job.origin),
            "learned_until": job.learned_until(),
            "optimizer_steps": job.built.optimizers.steps,
            "ledger_entries": len(job.entries),
            "first_evaluated": job.first_evaluated,
            "examples": p.examples,
            "seconds": p.seconds,
            "anatomy": job.anatomy.state(),
            "versions": versions(),
            "loss_guard": job.guard.state(),
        }

    def _publish(self, index: int, version: str, found: Committed) -> None:
        """In the background, of a commit that was just made."""
        job, config = self.job, self.config.snapshots
        assert config is not None
        word = {"version": version, "origin": asdict(job.origin)}
        try:
            job.log.say(publish(self._snapshots(), found, config, index, word, self.saver.group))
        except NotFinite as error:
            self._refuse(index, str(error))

    # ---------------------------------------------------------------- restoring

    def restore(self) -> bool:
        """Continue from the newest undamaged commit, or begin from `checkpoint.warm_start`; False for a fresh start.

        UserError for a checkpoint of another config. All ranks call.
        """
        job = self.job
        found = restore_newest(self.storage, self._load, self._reset, job.log.say)
        if found is None:
            if (warm := self.config.warm_start) is not None:
                links = from_rank_0(lambda: warm_source(warm))
                if job.config.teaches:
                    check_beginning(job.stream, job.slices.start, links[-1])
                job.begin_from(origin_of(links[-1]))
                hashed = {f.table for f in job.config.features.sparse if f.ids == "hash"}
                job.log.say(warm_start(warm, links, self.state, hashed))
                job.built.restored()
            return False
        job.built.restored()
        p = job.progress
        job.log.say(f"resumed from {found.folder}: slice {p.slice}, {p.consumed} examples into it, step {p.step}")
        if (due := found.manifest.get("snapshot")) is not None:
            self._publish_missing(due, found)
        self.saver.tidy(found.name)  # a job that died removing an old commit may have none left to make
        return True

    def _publish_missing(self, index: int, found: Committed) -> None:
        """The snapshot that a commit was to be published as, where the job died in between."""
        there = from_rank_0(lambda: any(s.name == snapshot_name(index) for s in committed(self._snapshots())))
        if not there and self.config.snapshots is not None:
            self._publish(index, found.manifest["version"], found)
        elif self.config.snapshots is not None:
            keep = self.config.snapshots.keep
            from_rank_0(lambda: clean(self._snapshots(), keep, 0))

    def _snapshots(self) -> Storage:
        folder = self.config.snapshots.folder if self.config.snapshots else ""
        return Storage(folder or str(self.job.folder / "snapshots"), self.config.retries)

    def _reset(self) -> None:
        """Tables as they were built: what a damaged commit left in them must not stay where an older one has no rows."""
        config = self.job.config
        for shard in self.job.built.shards:
            table = config.tables[shard.table]
            fill_initial(shard.weight, shard.table, table, config.run.seed, shard.row, shard.column)
        for name, tensor in self.state.items():
            if name.endswith(".adagrad_sum"):
                for _, box in boxes(tensor):
                    box.zero_()

    def _check(self, newest: Committed, share: list[Partials]) -> None:
        """Damaged where a manifest lacks what a job saves, or arrays are of another kind."""
        with nonsense(newest):
            for key in self._manifest():
                newest.manifest[key]
            mean, count = newest.manifest["loss_guard"]
            Anatomy(torch.device("cpu")).load(newest.manifest["anatomy"])
            Origin(**newest.manifest["origin"])
            float(mean), int(count)
            for arrays in share:
                for name, own in self._partials().items():
                    if name in ("ledger", "random/cuda") and name not in arrays:
                        continue
                    found, grows = arrays[name], name == "ledger" or name.startswith("publish/")
                    if found.dtype != own.dtype or found.ndim != own.ndim or found.shape[grows:] != own.shape[grows:]:
                        raise ValueError(f"{name} is {found.dtype} {found.shape}, not {own.dtype} {own.shape}")
                torch.Generator().set_state(torch.from_numpy(arrays["random/cpu"]))

    def _load(self, links: list[Committed]) -> None:
        """Put back a chain of commits. Where it is Damaged, nothing of the job but its live tensors has changed."""
        newest, job = links[-1], self.job
        with nonsense(newest):
            check_identity(newest, job.config)
        exact = load(links, self.state)
        share = load_partials(newest)
        agreed(lambda: self._check(newest, share))
        m, p = newest.manifest, job.progress
        p.slice, p.consumed, p.step = m["position"]["slice"], m["position"]["consumed"], newest.step
        job.begin_from(Origin(**m["origin"]))
        p.version, p.seconds, p.examples = m["version"], m["seconds"], m["examples"]
        if p.slice > job.slices.stop:
            raise UserError(
                f"{newest.folder} has trained slices up to {p.slice}; stream.last {job.slices.stop} is before that"
            )
        if p.slice > m["first_evaluated"]:  # an evaluation that has begun keeps its window when stream.last changes
            job.first_evaluated = m["first_evaluated"]
        job.built.optimizers.steps = m["optimizer_steps"]
        job.guard.load(m["loss_guard"])
        job.anatomy.load(m["anatomy"])
        for arrays in share:
            job.metrics.merge({k: arrays[f"metrics/{k}"] for k in job.metrics.state()})
            p.covered += int(arrays["progress/covered"])
            if job.teachers is not None:
                job.teachers.sums += arrays["progress/teachers"]
            if job.publisher is not None:
                job.publisher.add(arrays["publish/rows"], arrays["publish/logits"])
            if "ledger" in arrays:  # rank 0's, of which there is one
                job.entries = from_array(arrays["ledger"])
        if m["world_size"] == job.env.world_size:
            restore_random(share[0], job.device)
        if exact:
            self.saver.continue_from(newest, len(links) - 1)

"""A student's teachers: waiting for their supervision of a slice, how much it weighs, and what of it arrived."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from exfm.checkpoints.store import from_rank_0
from exfm.data.errors import UserError
from exfm.data.manifest import SliceManifest, Stream
from exfm.data.source import AlignedFiles
from exfm.distillation.config import LearnConfig, TeacherConfig
from exfm.distillation.supervision import SupervisionLog
from exfm.trainer.columns import supervision_column
from exfm.trainer.learning import check_rows
from exfm.trainer.waiting import wait_together

SLICE, TOTAL = range(2)
SEEN, COVERED, STALENESS, LAG = range(4)


@dataclass(frozen=True)
class Supply:
    """How old a teacher's supervision of a slice is: slices between its watermark and the slice, seconds after the features."""

    staleness: int
    lag_s: float


class Teachers:
    """s teachers. sums [2, s, 4], of the slice at hand and of all so far: examples, those with a prediction, and their staleness
    (slices) and lag (seconds) added up.
    """

    def __init__(self, learn: LearnConfig, tasks: tuple[str, ...], stream: Stream, first: int) -> None:
        self.learn, self.stream, self.first = learn, stream, first
        self.teachers = learn.all_teachers
        self.wanted = [{t: teacher.task(t) for t in tasks} for teacher in self.teachers]
        # one object for all slices: it remembers the versions that it has checked
        self.logs = {log.path: SupervisionLog(log.path) for teacher in self.teachers for log in teacher.logs}
        self.read: list[SupervisionLog | None] = []  # of the slice at hand, by teacher
        self.supplies: list[Supply | None] = []
        self.sums = np.zeros((2, len(self.teachers), 4))

    def wait(self, index: int, should_stop: Callable[[], bool], say: Callable[[str], None]) -> bool:
        """Wait for the supervision of a slice; False to stop. UserError where there is none and the job must have it."""
        self.read = logs = [self._log(teacher, index) for teacher in self.teachers]
        verdict = wait_together(
            lambda: all(log is None or log.manifest(index) for log in logs), self.learn.wait_s, should_stop
        )
        if verdict == "stop":
            return False
        features = self.stream.manifest(index, "features")
        assert features is not None
        self.supplies = from_rank_0(lambda: [self._supply(log, features) for log in logs])
        for teacher, log, supply in zip(self.teachers, logs, self.supplies, strict=True):
            if supply is None:
                self._missing(teacher, log, index, say)
        return True

    def _log(self, teacher: TeacherConfig, index: int) -> SupervisionLog | None:
        path = teacher.log(index)
        return None if path is None else self.logs[path]

    def _supply(self, log: SupervisionLog | None, features: SliceManifest) -> Supply | None:
        manifest = None if log is None else log.manifest(features.slice)
        if log is None or manifest is None:
            return None
        try:
            staleness = features.slice - 1 - int(manifest.extra["watermark"])
            lag = float(manifest.extra["at"]) - float(features.extra.get("at", "nan"))
        except (KeyError, TypeError, ValueError):
            staleness, lag = 0, float("nan")  # the check that follows names what is wrong with it
        limit = self.learn.max_staleness
        return None if limit is not None and staleness > limit else Supply(staleness, lag)

    def _missing(
        self, teacher: TeacherConfig, log: SupervisionLog | None, index: int, say: Callable[[str], None]
    ) -> None:
        where = f"slice {index}: teacher '{teacher.name}'"
        if log is None:  # as the config says
            say(f"{where} has no log before slice {teacher.logs[0].first}, learning without it")
            return
        if log.manifest(index) is None:
            why = f"has no supervision in {log.root} after {self.learn.wait_s:g} s"
            if (kept := log.slices()) and kept[0] > index:
                why = f"has no supervision in {log.root} any more, which begins with slice {kept[0]} (ttl_s)"
        else:
            why = f"has supervision in {log.root} that is more than {self.learn.max_staleness} slices stale"
        if self.learn.on_missing == "fail":
            raise UserError(f"{where} {why}; run the teacher, or set distillation.learn.on_missing: label_only")
        say(f"{where} {why}, learning without it")

    def sidecars(self, features: SliceManifest) -> Sequence[AlignedFiles]:
        """The slice's supervision files, checked."""
        files: list[AlignedFiles] = []
        for number, (log, supply) in enumerate(zip(self.read, self.supplies, strict=True)):
            if log is not None and supply is not None:
                names = {
                    theirs: supervision_column(number, own) for own, theirs in self.wanted[number].items() if theirs
                }
                check_rows(self.stream, features, log)
                files.append(log.open_checked(self.stream, features, names))
        return files

    def weights(self, index: int) -> tuple[float, ...]:
        """Factor of every teacher's losses in a slice: its weight, the warm-up and the staleness."""
        learn = self.learn
        warm = min(1.0, (index - self.first + 1) / learn.warmup_slices) if learn.warmup_slices else 1.0
        return tuple(
            learn.loss_weight * teacher.weight * warm * self._decay(supply)
            for teacher, supply in zip(self.teachers, self.supplies, strict=True)
        )

    def _decay(self, supply: Supply | None) -> float:
        half_life = self.learn.staleness_half_life
        return 1.0 if supply is None or half_life is None else 0.5 ** (supply.staleness / half_life)

    def cover(self, ids: np.ndarray, found: np.ndarray, index: int) -> int:
        """Count examples with predictions; those that have them all. found [b, s, t].

        UserError for an example without one where the job must have them all.
        """
        complete = np.ones(len(ids), bool)
        for number, (log, supply, wanted) in enumerate(zip(self.read, self.supplies, self.wanted, strict=True)):
            own = found[:, number, [t is not None for t in wanted.values()]].all(axis=1)
            complete &= own
            self.sums[:, number, SEEN] += len(ids)
            if log is None or supply is None:
                continue
            if self.learn.on_missing == "fail" and not own.all():
                raise UserError(
                    f"{log.root} has no prediction for example {ids[~own][0]} of slice {index}; score it or set "
                    "distillation.learn.on_missing: label_only"
                )
            self.sums[:, number, COVERED:] += own.sum() * np.array([1.0, supply.staleness, supply.lag_s])
        return int(complete.sum())

    def describe(self, which: int) -> dict[str, dict[str, float]]:
        """By teacher: share of examples with a prediction, their mean staleness in slices and lag in seconds. All ranks call."""
        sums = torch.from_numpy(self.sums[which].copy())
        dist.all_reduce(sums)
        return {
            teacher.name: {
                "coverage": own[COVERED] / max(own[SEEN], 1.0),
                "staleness_slices": own[STALENESS] / own[COVERED] if own[COVERED] else float("nan"),
                "lag_s": own[LAG] / own[COVERED] if own[COVERED] else float("nan"),
            }
            for teacher, own in zip(self.teachers, sums.tolist(), strict=True)
        }

    def end_slice(self, index: int) -> dict[str, dict[str, float]]:
        """`describe` of the slice that ended, with the weight that its losses had; the next one begins. All ranks call."""
        ended = self.describe(SLICE)
        self.sums[SLICE] = 0
        weights = self.weights(index)
        return {name: own | {"weight": w} for (name, own), w in zip(ended.items(), weights, strict=True)}

"""Streams, what teachers say, and fleets of students of `exfm bench optimum`; what is there is not made again."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from benchmarks._optimum_fleet import Fleet, Student
from benchmarks._optimum_worlds import (
    EVALUATED,
    FIRST,
    WORLD,
    Condition,
    Truth,
    biased,
    known_logits,
    make_place,
    read_truth,
    score,
)
from exfm.launch.demo import CONFIGS
from exfm.trainer.config import JobConfig, parse_config

UNDISTILLED = "undistilled"
FAINT, STRONG = (0.1, 0.3, 1.0, 3.0), (0.3, 1.0, 3.0, 10.0)
ARMS: dict[str, tuple[str, str, tuple[float, ...]]] = {  # method, fit of the adapter, loss weights that are tried
    "single head": ("single_head", "current", FAINT),
    "AH": ("auxiliary_head", "current", STRONG),
    "AH twice": ("student_adapter", "never", STRONG),  # what two heads are worth without an adapter
    "AH+SA": ("student_adapter", "current", STRONG),
}
ADAPTER_LR = 0.03
STUDENT = {"stream.first": FIRST, "stream.global_batch": 64, "optim.dense.lr": 0.004}
MOST = 120  # students of a fleet

Results = dict[str, dict[str, dict[str, float]]]  # condition -> arm and weight -> scores


class Bench:
    """One folder of streams and results."""

    def __init__(self, out: Path) -> None:
        self.out = out
        (out / "results").mkdir(parents=True, exist_ok=True)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The students' config."""
        return dict(yaml.safe_load((CONFIGS / "synth_student.yaml").read_text()))

    def place(self, condition: Condition, seed: int) -> Path:
        """Folder of all that belongs to one seed of a world, with its stream."""
        folder = self.out / "-".join(["world", *(f"{k}={v:g}" for k, v in condition.world.items()), str(seed)])
        make_place(folder, condition.settings(seed))
        return folder

    def says(self, condition: Condition, seed: int) -> NDArray[np.float32]:
        """The logits [s, n] that a condition's students learn from."""
        logits = known_logits(condition, condition.settings(seed), read_truth(self.place(condition, seed)))
        return biased(condition, logits).astype(np.float32)

    def student(self, condition: Condition, seed: int, learn: dict[str, Any] | None = None) -> JobConfig:
        """The job of a condition's student; its supervision is wherever `learn` says."""
        place = self.place(condition, seed)
        changes = {
            "run.seed": seed,
            "stream.path": str(place / "stream"),
            "stream.domains": [condition.domain],
            "stream.domain": condition.domain["name"],
            "distillation": {"learn": {"adapter": {"lr": ADAPTER_LR}} | learn} if learn else {},
        }
        return job(self.config, self.out / "student", STUDENT | changes)

    def results(self, conditions: Sequence[Condition], seed: int) -> Results:
        """Scores of all arms and weights under conditions of one world and domain, and of the teachers."""
        missing = [c for c in conditions if not self._cache(c, seed).exists()]
        per_fleet = max(1, MOST // len(list(trials())))
        for start in range(0, len(missing), per_fleet):
            self._run(missing[start : start + per_fleet], seed)
        return {c.key: json.loads(self._cache(c, seed).read_text()) for c in conditions}

    def _cache(self, condition: Condition, seed: int) -> Path:
        about = [asdict(condition), seed, ARMS, ADAPTER_LR, WORLD, STUDENT, self.config]
        return (
            self.out / "results" / f"{hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]}.json"
        )

    def _run(self, conditions: Sequence[Condition], seed: int) -> None:
        says = {c.key: self.says(c, seed) for c in conditions}
        names = [(c.key, f"{arm} {w:g}") for c in conditions for arm, w in trials()]
        students = [Student(says[c.key], ARMS[arm][0], w, ARMS[arm][1]) for c in conditions for arm, w in trials()]
        plain = conditions[0]
        adapted, auxiliary = (
            self.student(plain, seed, {"supervision": "none", "method": m})
            for m in ("student_adapter", "auxiliary_head")
        )
        found = Fleet(self.student(plain, seed), adapted, auxiliary, [Student(), *students]).train()
        truth = read_truth(self.place(plain, seed))
        mask = truth.mask(plain.domain)
        assert (np.isfinite(found[0, FIRST:]) == mask[FIRST:]).all(), (
            "students serve other examples than their domain's"
        )
        scores = {c.key: {UNDISTILLED: _score(found[0], truth, mask)} for c in conditions}
        for (key, name), logits in zip(names, found[1:], strict=True):
            scores[key][name] = _score(logits, truth, mask)
        for c in conditions:
            teacher = _score(says[c.key].astype(np.float64), truth, mask)
            self._cache(c, seed).write_text(json.dumps(scores[c.key] | {"teacher": teacher}))


def trials() -> Iterator[tuple[str, float]]:
    """Every arm with every loss weight that is tried."""
    yield from ((arm, weight) for arm, (*_, weights) in ARMS.items() for weight in weights)


def _score(logits: Any, truth: Truth, mask: NDArray[np.bool_]) -> dict[str, float]:
    counted = mask.copy()
    counted[:EVALUATED] = False
    return score(logits[counted], truth.probability[counted]) | {"examples": float(counted.sum())}


def job(config: dict[str, Any], folder: Path, changes: dict[str, Any]) -> JobConfig:
    """A config with changes by dotted key."""
    raw = json.loads(json.dumps(config))
    fixed = {"run.folder": str(folder), "run.name": folder.name, "evaluation.bootstrap": 0, "stream.prefetch": 0}
    for key, value in (fixed | changes).items():
        *path, last = key.split(".")
        node = raw
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return parse_config(raw, str(folder), JobConfig)

"""Running the jobs of `exfm bench distill`: in this process, one after the other, each of them once.

A run's folder is named by a digest of its configuration, so a run that has finished is found again, whichever part asks.
"""

import contextlib
import hashlib
import io
import json
import logging
import random
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks._distill_stats import Run
from exfm.data.manifest import open_stream
from exfm.distillation.supervision import SupervisionLog
from exfm.trainer.config import JobConfig, parse_config
from exfm.trainer.env import RankEnv
from exfm.trainer.run import run_job

Raw = dict[str, Any]
UNDISTILLED = "undistilled"
ARMS: dict[str, Raw | None] = {
    UNDISTILLED: None,
    "single head": {"method": "single_head"},
    "auxiliary head": {"method": "auxiliary_head"},
    "auxiliary head on label + prediction": {"method": "auxiliary_head", "auxiliary_labels": True},
    "auxiliary head + adapter, current batch": {"method": "student_adapter", "adapter": {"fit": "current"}},
    "auxiliary head + adapter, previous batch": {"method": "student_adapter", "adapter": {"fit": "previous"}},
}
SINGLE_HEAD, AUXILIARY, ADAPTER = "single head", "auxiliary head", "auxiliary head + adapter, current batch"
GRID = {"optim.tables.lr": [0.05, 0.1, 0.2, 0.4], "optim.dense.lr": [0.001, 0.002, 0.004]}
LOSS_WEIGHT = {"distillation.learn.loss_weight": [0.3, 1.0, 3.0]}
TUNING_SEED = 1000
CPU_SECONDS = "cpu_seconds"  # beside a run's summary; other work on the machine hardly changes them
REPLICATES = 200  # as many as a student's default, to be paired with them
console = Console(stderr=True)


@dataclass(frozen=True)
class Study:
    """A stream with its teacher and its student. domains: name -> definition; tuned_on is none of the reported ones."""

    name: str
    title: str
    stream: Path
    teacher: Raw
    student: Raw
    domains: dict[str, Raw]
    described: dict[str, str]
    tuned_on: str
    reported: tuple[str, ...]

    @property
    def task(self) -> str:
        return str(self.student["heads"]["tasks"][0])


@dataclass(frozen=True)
class Teacher:
    """A finished teacher and the log that students read."""

    folder: Path
    log: str

    def cost(self) -> tuple[int, int]:
        """(bytes of the log's data files, predictions in it)."""
        log = SupervisionLog(self.log)
        manifests = [log.manifest(int(p.name.split("=")[1])) for p in sorted(Path(self.log).glob("slice=*"))]
        parts = [(p, len(m.extra["tasks"])) for m in manifests if m is not None for p in m.parts]
        return sum(p.bytes for p, _ in parts), sum(p.rows * tasks for p, tasks in parts)


class Runner:
    """Runs a study's jobs under `out`. done, reused: jobs run now and jobs found finished."""

    def __init__(self, out: Path, study: Study) -> None:
        self.out, self.study = out / study.name, study
        self.done = self.reused = 0

    def teacher(self, seed: int, changes: Mapping[str, Any] | None = None) -> Teacher:
        """The teacher over all traffic; it publishes its forward pass."""
        domains = [self._domain(name) for name in self.study.domains]
        base = {"run.seed": seed, "stream.domains": domains, "evaluation.bootstrap": REPLICATES}
        folder = self.run(self.study.teacher, "teacher", base | dict(changes or {}), keep_state=True)
        return Teacher(folder, str(folder / "supervision" / "teacher"))

    def student(
        self, arm: str, domain: str, seed: int, settings: Raw, teacher: Teacher | None, changes: Mapping[str, Any] | None = None
    ) -> Run:  # fmt: skip
        """One student of one domain. settings: what tuning chose; teacher: not looked at by the undistilled arm."""
        all_changes: Raw = {
            "run.seed": seed,
            "stream.domain": domain,
            "stream.domains": [self._domain(domain)],
            "distillation": {},
        }
        if (method := ARMS[arm]) is not None:
            assert teacher is not None
            all_changes["distillation"] = {"learn": {"supervision": teacher.log, "wait_s": 0.0, **method}}
        folder = self.run(self.study.student, arm, all_changes | settings | dict(changes or {}))
        return read(folder, domain, self.study.task)

    def run(self, config: Raw, name: str, changes: Mapping[str, Any], keep_state: bool = False) -> Path:
        """The folder of the finished job of `config` with `a.b: value` changes; run unless it is there."""
        raw = changed(config, {"stream.path": str(self.study.stream), "checkpoint.every_slices": 1000, **changes})
        raw["run"] |= {"name": "", "folder": "", "device": "cpu"}
        slug = "".join(c if c.isalnum() else "-" for c in name)
        digest = hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()[:12]
        folder = self.out / "runs" / f"{slug}-{digest}"
        raw["run"] |= {"name": slug, "folder": str(folder)}
        if (folder / "summary.json").exists():
            self.reused += 1
            return folder
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted: its cost would be a part of it
        begun = time.process_time()
        with quiet():
            run_job(parse_config(raw, str(folder), JobConfig), RankEnv())
        (folder / CPU_SECONDS).write_text(str(time.process_time() - begun))
        if not keep_state:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        self.done += 1
        return folder

    def _domain(self, name: str) -> Raw:
        return {"name": name, **self.study.domains[name]}


@dataclass(frozen=True)
class Tuned:
    """An arm's best setting on the tuning domain. trials: how many settings were tried, of `of`."""

    settings: Raw
    ne: float
    trials: int
    of: int


def tune(runner: Runner, arm: str, trials: int, teacher: Teacher) -> Tuned:
    """The best of `trials` settings drawn without replacement from the arm's grid, by NE on the tuning domain."""
    grid = GRID if ARMS[arm] is None else GRID | LOSS_WEIGHT
    settings = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    drawn = random.Random(0).sample(settings, min(trials, len(settings)))
    no_bootstrap = {"evaluation.bootstrap": 0}
    domain = runner.study.tuned_on
    scored = [(runner.student(arm, domain, TUNING_SEED, s, teacher, no_bootstrap).ne, s) for s in drawn]
    ne, best = min(scored, key=lambda pair: pair[0])
    say(f"{runner.study.name}, {arm}: NE {ne:.4f} on {domain}, best of {len(drawn)} trials: {best}")
    return Tuned(best, ne, len(drawn), len(settings))


def read(folder: Path, group: str, task: str) -> Run:
    """A finished job's numbers on a group of its examples."""
    summary = json.loads((folder / "summary.json").read_text())
    m = summary["groups"][group][task]
    cpu_seconds = float((folder / CPU_SECONDS).read_text())
    with np.load(folder / "bootstrap.npz") as arrays:
        ne, calibration = arrays[f"{group}/{task}"], arrays[f"{group}/{task}/calibration"]
    return Run(
        m["ne"], m["auc"], m["log_loss"], m["calibration"], cpu_seconds, int(m["examples"]), ne, calibration,
        summary["table_parameters"], summary["dense_parameters"], summary["flops_per_example"],
    )  # fmt: skip


def changed(config: Raw, changes: Mapping[str, Any]) -> Raw:
    """A copy with `a.b: value` set; value None removes the key."""
    raw: Raw = json.loads(json.dumps(config))
    for key, value in changes.items():
        *path, last = key.split(".")
        node = raw
        for part in path:
            node = node.setdefault(part, {})
        if value is None:
            node.pop(last, None)
        else:
            node[last] = value
    return raw


def smaller_of(study: Study, last: int) -> Study:
    """The study on the first `last` slices."""
    first = {"stream.last": min(last, open_stream(str(study.stream)).info.num_slices or last)}
    return replace(study, teacher=changed(study.teacher, first), student=changed(study.student, first))


def say(text: str) -> None:
    console.print(f"{time.strftime('%H:%M:%S')} {text}", highlight=False, soft_wrap=True)


@contextlib.contextmanager
def quiet() -> Any:
    """Without the jobs' own lines and TorchRec's warnings."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)

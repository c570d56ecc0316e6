"""What the distillation stage costs, each beside its limit: a student's step, reading, logging, scoring, bytes.

Others may use the machine: what is compared runs in turns in this process, and the ratio is the median over the turns.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from benchmarks._distill_runs import ADAPTER, ARMS, Raw, Runner, Teacher, changed, quiet, say
from benchmarks._distill_sweeps import score
from exfm.trainer.config import JobConfig, parse_config
from exfm.trainer.env import RankEnv, process_group
from exfm.trainer.loop import Job
from exfm.trainer.publish import Publisher
from exfm.trainer.run import run_job
from exfm.trainer.steps import Feed

# limits: of a student's step, of reading speed, of the teacher's step, of scoring speed, bytes per prediction
STEP, READING, FORWARD, SCORING, BYTES = 1.10, 0.95, 1.02, 2.5, 6.0
CPU = torch.device("cpu")
SLICE, READ_SLICES, STEPS, TURNS = 20, 10, 40, 15
LAST, TEACHER_TURNS = 12, 3
# from the student of the table to one with as much work per step as a served model has
STUDENTS: dict[str, Raw] = {
    "width 8, top MLP 64, batch 64": {},
    "width 8, top MLP 64, batch 1,024": {"stream.global_batch": 1024},
    "width 64, top MLP 512-256, batch 1,024": {
        "stream.global_batch": 1024, "model.width": 64, "model.bottom_mlp": [128], "model.top_mlp": [512, 256],
    },
}  # fmt: skip


def cost(runner: Runner) -> dict[str, Any]:
    """All measurements on one study's stream."""
    teacher = runner.teacher(0)
    num_bytes, predictions = teacher.cost()
    results: dict[str, Any] = {"steps": {}}
    with process_group(RankEnv(), CPU, 600.0):
        torch.set_num_threads(1)
        for name, changes in STUDENTS.items():
            results["steps"][name] = step_ratio(runner, teacher, changes)
            say(f"student {name}: step x {results['steps'][name]['ratio']:.3f}")
        results["reading"] = reading_ratio(runner, teacher)
        say(f"reading joined slices: {results['reading']['ratio']:.3f} of plain ones")
    results |= teacher_costs(runner)
    say(
        f"mode forward: teacher's time x {results['forward']['ratio']:.4f}; scorer x {results['scoring']['ratio']:.2f} of training"
    )
    results["bytes"] = {"per_prediction": num_bytes / predictions, "predictions": predictions, "bytes": num_bytes}
    return results | {"verdicts": verdicts(results)}


def verdicts(r: dict[str, Any]) -> dict[str, Any]:
    """Measurement -> value, limit and whether it holds."""
    by_step = {f"step, {name}": (s["ratio"], STEP, s["ratio"] <= STEP) for name, s in r["steps"].items()}
    forward, reading, scoring = (r[name]["ratio"] for name in ("forward", "reading", "scoring"))
    other = {
        "reading": (reading, READING, reading >= READING),
        "mode forward": (forward, FORWARD, forward <= FORWARD),
        "scoring": (scoring, SCORING, scoring >= SCORING),
        "bytes": (r["bytes"]["per_prediction"], BYTES, r["bytes"]["per_prediction"] <= BYTES),
    }
    return {k: {"value": v, "limit": limit, "holds": bool(ok)} for k, (v, limit, ok) in (by_step | other).items()}


def alternate(works: list[Callable[[], Any]], turns: int) -> list[list[float]]:
    """CPU seconds of each work in each of `turns`, one after the other within a turn; the first turn is not counted.

    All work is this process's, and nothing in it waits: other work on the machine hardly changes them.
    """
    times: list[list[float]] = [[] for _ in works]
    for turn in range(turns + 1):
        for number, work in enumerate(works):
            begun = time.process_time()
            work()
            if turn:
                times[number].append(time.process_time() - begun)
    return times


def ratio_of(one: list[float], other: list[float]) -> dict[str, float]:
    """Median over turns of other / one, with the quartiles."""
    ratios = sorted(b / a for a, b in zip(one, other, strict=True))
    n = len(ratios)
    return {"ratio": median(ratios), "quartile_low": ratios[n // 4], "quartile_high": ratios[(3 * n) // 4], "turns": n}


def step_ratio(runner: Runner, teacher: Teacher, changes: Raw) -> dict[str, Any]:
    """A step (forward, backward, optimisers; batches are ready) of AH+SA by one of the undistilled student."""
    learn = {"learn": {"supervision": teacher.log, "wait_s": 0.0, **(ARMS[ADAPTER] or {})}}
    common: Raw = {"stream.domains": [], "stream.domain": None, "stream.prefetch": 0} | changes
    if "model.width" in changes:
        common |= {f"tables.{name}.width": changes["model.width"] for name in runner.study.student["tables"]}
    with (
        job(runner, runner.study.student, common | {"distillation": {}}, "cost-plain") as plain,
        job(runner, runner.study.student, common | {"distillation": learn}, "cost-distilled") as distilled,
    ):
        times = alternate([stepper(plain), stepper(distilled)], TURNS)
    per_step = [median(t) / STEPS for t in times]
    return ratio_of(*times) | {"undistilled_s": per_step[0], "distilled_s": per_step[1]}


def stepper(j: Job) -> Callable[[], None]:
    """Trains STEPS steps on batches that are decoded already."""
    reader = j.open(SLICE)
    assert reader is not None
    size = j.config.stream.global_batch
    batches = list(reader.batches(0, min(reader.examples // size, STEPS) * size))
    block = (batches * STEPS)[:STEPS]

    def steps() -> None:
        for _ in j.pipeline.run(Feed(iter(block), j.doing)):
            pass

    return steps


def reading_ratio(runner: Runner, teacher: Teacher) -> dict[str, float]:
    """Rows per second of slices joined with supervision by that of plain ones; opening and checking included."""
    learn = {"learn": {"supervision": teacher.log, "wait_s": 0.0, "method": "single_head"}}
    common: Raw = {"stream.domains": [], "stream.domain": None, "stream.global_batch": 1024, "stream.prefetch": 0}
    with (
        job(runner, runner.study.student, common | {"distillation": {}}, "cost-plain") as plain,
        job(runner, runner.study.student, common | {"distillation": learn}, "cost-joined") as joined,
    ):
        slices = range(SLICE, SLICE + READ_SLICES)
        rows = sum(m.rows for m in (plain.stream.manifest(i, "features") for i in slices) if m is not None)
        plain_s, joined_s = alternate([partial(read_all, plain, slices), partial(read_all, joined, slices)], TURNS)
    found = ratio_of(joined_s, plain_s)
    return found | {"plain_rows_per_s": rows / median(plain_s), "joined_rows_per_s": rows / median(joined_s)}


def read_all(j: Job, slices: range) -> None:
    for index in slices:
        reader = j.open(index)
        assert reader is not None
        for _ in reader.batches():
            pass


def teacher_costs(runner: Runner) -> dict[str, Any]:
    """Logging's share of a teacher's time, and rows per second of training and of a scorer, job after job in turns."""
    snapshots = {"stream.last": LAST, "checkpoint": {"every_slices": 1, "snapshots": {"keep": LAST}}}
    published = runner.teacher(90, snapshots)
    shares, training, scoring = [], [], []
    for turn in range(TEACHER_TURNS):
        seconds, logging_s, rows_per_s = train_timed(runner, turn)
        shares.append(seconds / (seconds - logging_s))
        training.append(rows_per_s)
        name = f"cost-scorer-{turn}"
        shutil.rmtree(runner.out / name, ignore_errors=True)
        score(runner, published, 0, 1, LAST, name)
        scoring.append(json.loads((runner.out / name / "summary.json").read_text())["examples_per_s"])
    found = ratio_of([1 / s for s in scoring], [1 / t for t in training])
    return {
        "forward": {"ratio": median(shares), "turns": TEACHER_TURNS},
        "scoring": found | {"training_rows_per_s": median(training), "scoring_rows_per_s": median(scoring)},
    }


def train_timed(runner: Runner, turn: int) -> tuple[float, float, float]:
    """(seconds, those of them that went into logging, rows per second) of a short teacher: the calls that log are timed."""
    spent = 0.0

    def timed(function: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            nonlocal spent
            begun = time.perf_counter()
            function(*args)
            spent += time.perf_counter() - begun

        return call

    name = f"cost-teacher-{turn}"
    shutil.rmtree(runner.out / name, ignore_errors=True)
    config = configured(runner, runner.study.teacher, {"run.seed": 90, "stream.last": LAST}, name)
    patches = [patch.object(Publisher, call, timed(getattr(Publisher, call))) for call in ("add", "publish")]
    with quiet(), patches[0], patches[1]:
        run_job(config, RankEnv())
    summary = json.loads((runner.out / name / "summary.json").read_text())
    return summary["seconds"], spent, summary["examples_per_s"]


def configured(runner: Runner, config: Raw, changes: Raw, name: str) -> JobConfig:
    where = {
        "stream.path": str(runner.study.stream),
        "run.name": name,
        "run.folder": str(runner.out / name),
        "run.device": "cpu",
    }
    return parse_config(changed(config, where | {"checkpoint.every_slices": 1000} | changes), name, JobConfig)


@contextmanager
def job(runner: Runner, config: Raw, changes: Raw, name: str) -> Iterator[Job]:
    with quiet():
        made = Job(configured(runner, config, changes, name), RankEnv(), CPU, lambda: False)
    try:
        yield made
    finally:
        made.close()

"""The sweeps of `exfm bench distill`: how old predictions may be, and how large student and teacher should be."""

from collections.abc import Sequence
from typing import Any

from benchmarks._distill_runs import (
    ADAPTER,
    AUXILIARY,
    SINGLE_HEAD,
    UNDISTILLED,
    Raw,
    Runner,
    Teacher,
    Tuned,
    quiet,
    read,
    say,
)
from benchmarks._distill_stats import Run, gain, means, plain, transfer
from exfm.trainer.config import parse_config
from exfm.trainer.env import RankEnv
from exfm.trainer.run import run_scorer
from exfm.trainer.score_config import ScoreConfig

AGES = (0, 1, 2, 4, 8)  # slices between a snapshot and the slice that it scores
FORWARD = "forward"
SWEEP_ARMS = (UNDISTILLED, SINGLE_HEAD, AUXILIARY, ADAPTER)
STUDENT_SIZES: dict[str, Raw] = {
    "width 4, top MLP 32": {"width": 4, "bottom_mlp": [8], "top_mlp": [32]},
    "width 8, top MLP 64": {},
    "width 16, top MLP 256-128": {"width": 16, "bottom_mlp": [32], "top_mlp": [256, 128]},
}
TEACHER_SIZES: dict[str, Raw] = {
    "width 8, 1 layer": {
        "width": 8, "layers": 1, "num_fmb": 4, "num_lcb": 4, "rank": 4, "fmb_mlp": [32], "dense_mlp": [16], "final_mlp": [32],
    },
    "width 16, 2 layers": {},
    "width 32, 3 layers": {
        "width": 32, "layers": 3, "num_fmb": 16, "num_lcb": 16, "rank": 16, "fmb_mlp": [256], "dense_mlp": [64],
        "final_mlp": [128],
    },
}  # fmt: skip


def score(runner: Runner, teacher: Teacher, age: int, first: int, last: int, name: str = "") -> str:
    """The log of a scorer that predicts slices first..last - 1 with snapshots `age` slices older than the newest."""
    folder = runner.out / (name or f"runs/{teacher.folder.name}-age-{age}")
    raw = {
        "run": {"name": folder.name, "folder": str(folder), "device": "cpu"},
        "score": {"teacher": str(teacher.folder), "log": "teacher", "lag": age, "first": first, "last": last},
    }
    if not (folder / "summary.json").exists():
        with quiet():
            run_scorer(parse_config(raw, str(folder), ScoreConfig), RankEnv())
    return str(folder / "supervision" / "teacher")


def resized(config: Raw, model: Raw) -> Raw:
    """The changes that give a job's model and all its tables another size."""
    changes = {f"model.{key}": value for key, value in model.items()}
    if "width" in model:
        changes |= {f"tables.{name}.width": model["width"] for name in config["tables"]}
    return changes


def staleness(
    runner: Runner, seeds: int, tuned: dict[str, Tuned], num_slices: int, ages: Sequence[int] = AGES
) -> dict[str, Any]:
    """Students of the first reported domain under predictions of several ages.

    The teacher for age L begins L slices earlier than the one for age 0, so slice t is scored after the same number of
    slices whatever the age. Students and evaluation are the same everywhere: from the first slice that a teacher which
    has learned one slice scores, to the end.
    """
    domain, begin = runner.study.reported[0], max(ages) + 1
    window = {"stream.first": begin, "stream.last": num_slices}
    base = [runner.student(UNDISTILLED, domain, s, tuned[UNDISTILLED].settings, None, window) for s in range(seeds)]
    rows: dict[str, Any] = {}
    every: tuple[int | str, ...] = (FORWARD, *ages)
    for age in every:
        logs = [supervised(runner, seed, age, begin, num_slices) for seed in range(seeds)]
        by_arm = {}
        for arm in SWEEP_ARMS[1:]:
            chosen = tuned[arm].settings
            runs = [runner.student(arm, domain, seed, chosen, log, window) for seed, log in enumerate(logs)]
            by_arm[arm] = means(runs) | {"gain": plain(gain(base, runs))}
        rows[str(age)] = by_arm
        say(f"{runner.study.name}: age {age} done")
    return {"domain": runner.study.described[domain], "seeds": seeds, "begin": begin, "base": means(base), "ages": rows}


def supervised(runner: Runner, seed: int, age: int | str, begin: int, num_slices: int) -> Teacher:
    """A teacher and its predictions of slices begin to the end, `age` slices old; the forward pass's own for FORWARD."""
    old = 0 if age == FORWARD else int(age)
    changes = {
        "stream.first": begin - 1 - old,
        "stream.last": num_slices - old,
        "checkpoint": {"every_slices": 1, "snapshots": {"keep": num_slices}},
    }
    teacher = runner.teacher(seed, changes)
    return teacher if age == FORWARD else Teacher(teacher.folder, score(runner, teacher, old, begin, num_slices))


def sizes(runner: Runner, seeds: int, tuned: dict[str, Tuned], arms: Sequence[str]) -> dict[str, Any]:
    """Every size of student under every size of teacher on the first reported domain, with the table's settings."""
    domain, task = runner.study.reported[0], runner.study.task
    teachers: dict[str, list[Teacher]] = {}
    scored: dict[str, list[Run]] = {}
    for size, model in TEACHER_SIZES.items():
        changes = resized(runner.study.teacher, model)
        teachers[size] = [runner.teacher(seed, changes) for seed in range(seeds)]
        scored[size] = [read(t.folder, domain, task) for t in teachers[size]]
        say(f"{runner.study.name}: teacher {size} done")
    students = {}
    for size, model in STUDENT_SIZES.items():
        changes = resized(runner.study.student, model)

        def run(arm: str, logs: Sequence[Teacher | None], changes: Raw = changes) -> list[Run]:
            chosen = tuned[arm].settings
            return [runner.student(arm, domain, seed, chosen, log, changes) for seed, log in enumerate(logs)]

        base = run(UNDISTILLED, [None] * seeds)
        taught = {t: {arm: run(arm, logs) for arm in arms} for t, logs in teachers.items()}
        students[size] = {
            "base": means(base),
            "taught": {
                t: {arm: compared(base, runs, scored[t]) for arm, runs in by_arm.items()}
                for t, by_arm in taught.items()
            },
            "small_to_large": {
                arm: plain(gain(by_size[0], by_size[-1]))
                for arm in arms
                for by_size in [[by_arm[arm] for by_arm in taught.values()]]
            },
        }
        say(f"{runner.study.name}: student {size} done")
    return {
        "domain": runner.study.described[domain],
        "seeds": seeds,
        "arms": list(arms),
        "teachers": {t: means(runs) for t, runs in scored.items()},
        "students": students,
    }


def compared(base: list[Run], runs: list[Run], teachers: list[Run]) -> dict[str, Any]:
    return means(runs) | {"gain": plain(gain(base, runs)), "transfer": plain(transfer(base, runs, teachers))}

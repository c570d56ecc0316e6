"""The table of `exfm bench distill`: domains x arms x seeds on one stream, each arm tuned on another domain with equal budget."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks._distill_runs import ARMS, GRID, LOSS_WEIGHT, UNDISTILLED, Runner, Teacher, Tuned, read, say, tune
from benchmarks._distill_stats import Run, calibration_change, gain, means, plain, pooled, pooled_ratio, transfer
from exfm.data.errors import UserError


def settings(runner: Runner, trials: int, arms: Iterable[str], known: Path | None = None) -> dict[str, Tuned]:
    """Every arm's setting, tuned on the study's tuning domain with the first seed's teacher.

    known: distill.json of an earlier run, whose settings are taken instead. UserError where it had another budget.
    """
    if known is None:
        teacher = runner.teacher(0)
        return {arm: tune(runner, arm, trials, teacher) for arm in arms}
    parts = json.loads(known.read_text()).values()
    found: dict[str, Any] = next(
        (p["tuned"] for p in parts if p.get("study") == runner.study.name and "tuned" in p), {}
    )
    if wrong := [arm for arm in arms if arm not in found or found[arm]["trials"] != min(trials, found[arm]["of"])]:
        raise UserError(
            f"{known} has no settings of {trials} trials on {runner.study.name} for {', '.join(wrong)}; leave out --tuned, or give "
            "the file of a run with the same --trials"
        )
    return {arm: Tuned(**found[arm]) for arm in arms}


def table(runner: Runner, seeds: int, trials: int, known: Path | None = None) -> dict[str, Any]:
    """Tune, run every arm with every seed on every reported domain, and compare."""
    study = runner.study
    best = settings(runner, trials, ARMS, known)
    teachers: list[Teacher] = []
    runs: dict[str, dict[str, list[Run]]] = {d: {arm: [] for arm in ARMS} for d in study.reported}
    for seed in range(seeds):
        teachers.append(runner.teacher(seed))
        for domain in study.reported:
            for arm in ARMS:
                runs[domain][arm].append(runner.student(arm, domain, seed, best[arm].settings, teachers[-1]))
        say(f"{study.name}: seed {seed} done on {', '.join(study.reported)}")
    scored = {d: [read(t.folder, d, study.task) for t in teachers] for d in study.reported}
    everywhere = [read(t.folder, "all", study.task) for t in teachers]
    return summarise(runs, scored, everywhere) | {
        "study": study.name,
        "title": study.title,
        "described": {d: study.described[d] for d in study.reported},
        "tuned_on": study.described[study.tuned_on],
        "seeds": seeds,
        "tuned": {arm: vars(t) for arm, t in best.items()},
        "grid": GRID | LOSS_WEIGHT,
        "supervision": supervision(teachers),
        "jobs": {"run": runner.done, "found": runner.reused},
    }


def supervision(teachers: Sequence[Teacher]) -> dict[str, float]:
    """What was logged, over all teachers: bytes per example and task, and in one teacher's log."""
    costs = [t.cost() for t in teachers]
    return {
        "bytes_per_prediction": sum(b for b, _ in costs) / sum(n for _, n in costs),
        "bytes": sum(b for b, _ in costs) / len(costs),
    }


def summarise(
    runs: dict[str, dict[str, list[Run]]], teachers: dict[str, list[Run]], everywhere: list[Run]
) -> dict[str, Any]:
    """runs: domain -> arm -> a run per seed; teachers: domain -> a teacher's run on it per seed."""
    domains, collected = {}, {}
    for domain, by_arm in runs.items():
        base, best = by_arm[UNDISTILLED], teachers[domain]
        arms = {arm: compare(base, done, best) for arm, done in by_arm.items()}
        collected[domain] = arms
        domains[domain] = {"teacher": means(best), "advantage": plain(gain(base, best)), "arms": plain(arms)}
    advantages = [gain(runs[d][UNDISTILLED], teachers[d]) for d in runs]
    overall = {}
    for arm in next(iter(runs.values())):
        if arm == UNDISTILLED:
            continue
        own = [collected[d][arm] for d in runs]
        overall[arm] = plain(
            {
                "gain": pooled([o["gain"] for o in own]),
                "gain_percent": pooled([o["gain_percent"] for o in own]),
                "calibration_change": pooled([o["calibration_change"] for o in own]),
                "transfer": pooled_ratio([o["gain"] for o in own], advantages),
                "time_ratio": pooled_time(runs, arm),
                "calibration_verdicts": {d: collected[d][arm]["calibration_change"]["verdict"] for d in runs},
            }
        )
    return {"teacher": means(everywhere), "domains": domains, "overall": overall}


def compare(base: list[Run], done: list[Run], teachers: list[Run]) -> dict[str, Any]:
    """An arm on a domain: its means and, against the undistilled runs, gain, transfer ratio and calibration."""
    result: dict[str, Any] = means(done)
    if done is base:
        return result
    gained = gain(base, done)
    percent = 100 / means(base)["ne"]
    low, high = gained["interval"]
    in_percent = {
        "value": percent * gained["value"],
        "interval": [percent * low, percent * high],
        "replicates": percent * gained["replicates"],
    }
    return result | {
        "gain": gained,
        "gain_percent": in_percent,
        "transfer": transfer(base, done, teachers),
        "calibration_change": calibration_change(base, done),
        "time_ratio": means(done)["cpu_seconds"] / means(base)["cpu_seconds"],
    }


def pooled_time(runs: dict[str, dict[str, list[Run]]], arm: str) -> float:
    """CPU seconds of the arm's jobs against the undistilled one, medians over seeds, mean over domains."""
    ratios = [means(by[arm])["cpu_seconds"] / means(by[UNDISTILLED])["cpu_seconds"] for by in runs.values()]
    return sum(ratios) / len(ratios)


def smoke(runner: Runner) -> dict[str, Any]:
    """Every arm once with untuned settings: that it runs, no more."""
    study, models = runner.study, {}
    teacher = runner.teacher(0)
    for domain in study.reported:
        models[f"{study.described[domain]}: teacher"] = means([read(teacher.folder, domain, study.task)])
        for arm in ARMS:
            models[f"{study.described[domain]}: {arm}"] = means([runner.student(arm, domain, 0, {}, teacher)])
    summary = json.loads((teacher.folder / "summary.json").read_text())
    everywhere = summary["groups"]["all"][study.task]
    clicks = round(everywhere["base_rate"] * everywhere["examples"])
    return {"models": models, "examples": int(everywhere["examples"]), "clicks": clicks}

"""What the kill campaign's loops add up to, as JSON and as the table of docs/. See benchmarks/kill.py."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks._kill_loop import MEMBERS, LoopOutcome

# what can be wrong with a loop, and how the table says it
PROBLEMS = {
    "predictions": "log slices in which an example has not exactly one committed prediction",
    "recommitted": "log slices that were committed again",
    "logits": "log files that differ from the undisturbed ones in a bit",
    "learned": "jobs that did not learn every example of their domain exactly once",
    "weights": "tensors or numbers of the last commits that differ from the undisturbed ones in a bit",
    "corrupt": "committed checkpoints that do not verify or load",
    "leftover": "folders left without a manifest",
    "failed": "jobs that did not end with exit code 0",
}


def summarise(outcomes: Sequence[LoopOutcome], undisturbed: LoopOutcome, seed: int, seconds: float) -> dict[str, Any]:
    kills = [k for o in outcomes for k in o.kills]
    violations = {kind: sum(len(o.problems.get(kind, [])) for o in outcomes) for kind in PROBLEMS}
    return {
        "seed": seed,
        "loops": len(outcomes),
        "loops_by_launcher": dict(Counter(o.launcher for o in outcomes)),
        "kills": len(kills),
        "kills_by_launcher": dict(Counter(o.launcher for o in outcomes for _ in o.kills)),
        "kills_by_job": {name: sum(k.job == name for k in kills) for name in MEMBERS},
        "kills_by_victims": dict(Counter(k.who for k in kills)),
        "aimed": sum(k.when == "save" for k in kills),
        "aimed_and_inside": sum(k.when == "save" and bool(k.inside) for k in kills),
        "inside": dict(Counter(where for k in kills for where in k.inside.split())),
        "forced": sum(o.forced for o in outcomes),
        "predictions": sum(o.predictions for o in outcomes),
        "learned": {name: sum(o.learned.get(name, 0) for o in outcomes) for name in MEMBERS if name != "scorer"},
        "of_each_loop": {"predictions": undisturbed.predictions, "learned": undisturbed.learned},
        "violations": violations,
        "wrong": sum(bool(o.problems) for o in outcomes),
        "undisturbed_seconds": undisturbed.seconds,
        "seconds": seconds,
        "outcomes": [asdict(o) for o in outcomes],
    }


def markdown(r: dict[str, Any]) -> str:
    """The table of docs/."""
    by = {key: _counts(r[f"{key}"]) for key in ("loops_by_launcher", "kills_by_launcher", "kills_by_job", "inside")}
    who = ", ".join(f"{n} of {w}" for w, n in sorted(_victims(r["kills_by_victims"]).items()))
    each = r["of_each_loop"]
    rows = [
        ("loops of teacher, scorer and three students", f"{r['loops']} ({by['loops_by_launcher']})"),
        ("kills (SIGKILL)", f"{r['kills']} ({by['kills_by_launcher']})"),
        ("of whom", by["kills_by_job"]),
        ("of what", who),
        ("aimed at a folder being written, of these inside one", f"{r['aimed']}, {r['aimed_and_inside']}"),
        ("inside a write in all, by folder", by["inside"] or "0"),
        ("surviving ranks that needed SIGKILL after SIGTERM", r["forced"]),
        ("predictions committed once, of those of an undisturbed loop", f"{r['predictions']:,} of {each['predictions'] * r['loops']:,}"),
        ("examples learned once, of those of an undisturbed loop", f"{sum(r['learned'].values()):,} of {sum(each['learned'].values()) * r['loops']:,}"),
        *((words, r["violations"][kind]) for kind, words in PROBLEMS.items()),
        ("loops with any violation", r["wrong"]),
        ("seconds; of the undisturbed loop", f"{r['seconds']:.0f}; {r['undisturbed_seconds']:.0f}"),
    ]  # fmt: skip
    lines = [f"Seed {r['seed']}.", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows]
    for o in r["outcomes"]:
        lines += [f"- loop {o['number']} ({o['launcher']}): {k}: {m}" for k, v in o["problems"].items() for m in v]
    return "\n".join(lines) + "\n"


def _counts(values: dict[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in values.items())


def _victims(values: dict[str, int]) -> dict[str, int]:
    names = {"one": "one rank", "all": "the whole job (under torchrun: with it)"}
    return {names[key]: n for key, n in values.items()}

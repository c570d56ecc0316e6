"""Jobs that are killed and go on as if nothing had been: `exfm bench kill [--quick]`.

Every run draws a job (ranks, teacher or student, sharding, when it commits) and moments at which one rank or all of them get
SIGKILL: two thirds anywhere in the time that the undisturbed job takes, a third inside a save (a checkpoint folder without a
manifest). The others are ended as torchrun does it, all start again, until the job is done. Then weights, optimisers, metrics
and published supervision must be bitwise those of the undisturbed job, and the ledger must be clean. Ranks are forked
from a server that has imported everything; one run in ten goes through torchrun --max-restarts. Writes kills.md and kills.json.

--loop: instead, a teacher, a scorer that follows it and three students run together; one rank or the whole of any of them is
killed, a third of the times while it writes a commit, a snapshot or a slice of a log, and started again, until all have ended
and so many kills have hit. Then every example must have exactly one committed prediction per log and every job must have
learned every example of its domain exactly once, with logits and weights bitwise those of an undisturbed loop. The second
loop goes through `exfm run`'s launcher. Writes loop_kills.md and loop_kills.json.
"""

import argparse
import json
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from benchmarks import _kill_loop_report
from benchmarks._kill_campaign import Campaign, Outcome
from benchmarks._kill_jobs import draw_jobs
from benchmarks._kill_loop import LoopOutcome, Loops, play_all
from benchmarks._kill_loop_jobs import LoopSize
from benchmarks._kill_ranks import warm_up
from exfm.data.errors import UserError

SAY_S = 10.0
console = Console(stderr=True)
# what can be wrong with a run, and how the table says it
PROBLEMS = {
    "corrupt": "corrupt states (a committed checkpoint that does not verify or load)",
    "differing": "runs that differ from the undisturbed one",
    "audit": "runs with examples repeated or lost",
    "resume": "runs that did not go on from the newest commit, or lost more than since it",
    "leftover": "runs that left a folder without a manifest",
    "failed": "runs that did not end with exit code 0",
}


def main(args: list[str], data_dir: str | None = None) -> int:
    parser = argparse.ArgumentParser(prog="exfm bench kill", description=__doc__)
    parser.add_argument("--runs", type=int, help="default 100, with --quick 10")
    parser.add_argument("--quick", action="store_true", help="10 runs of smaller jobs")
    parser.add_argument("--seed", type=int, default=0, help="of jobs, victims and moments")
    parser.add_argument("--loop", action="store_true", help="teacher, scorer and students together")
    parser.add_argument("--kills", type=int, help="of --loop: in all, default 100, with --quick 6")
    parser.add_argument("--only", type=int, metavar="N", help="run number N alone")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of the table")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/kill"))
    options = parser.parse_args(args)
    if options.loop:
        return _main_loop(options)
    runs = options.runs if options.runs is not None else (10 if options.quick else 100)
    if runs < 1:
        raise UserError(f"--runs is {runs}; at least 1 is needed")
    result = campaign(options.out, runs, options.quick, options.seed, options.only)
    print(json.dumps(result, indent=1) if options.json else markdown(result))
    return 1 if result["wrong"] else 0


def _main_loop(options: argparse.Namespace) -> int:
    kills = options.kills if options.kills is not None else (6 if options.quick else 100)
    if kills < 1:
        raise UserError(f"--kills is {kills}; at least 1 is needed")
    result = loop_campaign(options.out, kills, options.quick, options.seed)
    print(json.dumps(result, indent=1) if options.json else _kill_loop_report.markdown(result))
    if result["kills"] < kills:
        console.print(f"only {result['kills']} of {kills} kills hit: the jobs ended before", highlight=False)
    return 1 if result["wrong"] or result["kills"] < kills else 0


def loop_campaign(out: Path, kills: int, quick: bool, seed: int) -> dict[str, Any]:
    """Play loops until so many kills have hit; the numbers, also in loop_kills.json and loop_kills.md."""
    begun = time.monotonic()
    warm_up()
    scratch = out / "loops"
    shutil.rmtree(scratch, ignore_errors=True)
    loops = Loops(scratch, LoopSize(3, 250, 1) if quick else LoopSize(5, 400, 2), seed)
    console.print(f"the undisturbed loop took {loops.undisturbed.seconds:.0f} s", highlight=False)
    outcomes: list[LoopOutcome] = []
    result: dict[str, Any] = {}
    for outcome in play_all(loops, kills, 9 if quick else 11, 0 if quick else 10):
        outcomes.append(outcome)
        result = _kill_loop_report.summarise(outcomes, loops.undisturbed, seed, time.monotonic() - begun)
        (out / "loop_kills.json").write_text(json.dumps(result, indent=1))
        (out / "loop_kills.md").write_text(_kill_loop_report.markdown(result))
        facts = f"{result['kills']}/{kills} kills, {result['wrong']} wrong"
        line = (
            f"loop {outcome.number} ({outcome.launcher}, {outcome.seconds:.0f} s): {len(outcome.kills)} kills; {facts}"
        )
        console.print(line, highlight=False, soft_wrap=True)
        for kind, messages in outcome.problems.items():
            console.print(f"loop {outcome.number}: {kind}: {messages[0]}", markup=False, soft_wrap=True)
    if not result["wrong"]:
        shutil.rmtree(scratch, ignore_errors=True)
    return result


def campaign(
    out: Path, runs: int, quick: bool, seed: int, only: int | None = None, prepare: Callable[[], None] | None = None
) -> dict[str, Any]:
    """Play the runs; the numbers, also in kills.json and kills.md. prepare: called by every forked rank before its job, so that a test can break something."""
    begun = time.monotonic()
    warm_up()
    scratch = out / "work"
    shutil.rmtree(scratch, ignore_errors=True)
    slices, rows = (4, 330) if quick else (6, 550)
    played = Campaign(scratch, draw_jobs(3 if quick else 12, seed), slices, rows, seed, prepare)
    numbers = range(runs) if only is None else [only]
    outcomes: list[Outcome] = []
    for outcome in _shown(played.play_all(numbers), len(numbers), seed):
        outcomes.append(outcome)
        result = summarise(outcomes, seed, quick, time.monotonic() - begun)
        # after every run: a campaign that is stopped has said what it found
        (out / "kills.json").write_text(json.dumps(result, indent=1))
        (out / "kills.md").write_text(markdown(result))
    if not result["wrong"]:
        shutil.rmtree(scratch)
    return result


def _shown(outcomes: Any, total: int, seed: int) -> Any:
    """A bar on a terminal, a line per interval elsewhere; a wrong run is said at once."""
    said, kills, wrong = time.monotonic(), 0, 0
    with Progress(console=console, disable=not console.is_terminal) as bars:
        bar = bars.add_task(f"seed {seed}", total=total)
        for done, outcome in enumerate(outcomes, 1):
            kills += len(outcome.kills)
            wrong += bool(outcome.problems)
            facts = f"seed {seed}: {done}/{total} runs, {kills} kills, {wrong} wrong"
            bars.update(bar, completed=done, description=facts)
            for kind, messages in outcome.problems.items():
                console.print(
                    f"run {outcome.number} ({outcome.job}): {kind}: {messages[0]}", markup=False, soft_wrap=True
                )
            if not console.is_terminal and (time.monotonic() - said > SAY_S or done == total):
                said = time.monotonic()
                console.print(facts, highlight=False, soft_wrap=True)
            yield outcome


def summarise(outcomes: Sequence[Outcome], seed: int, quick: bool, seconds: float) -> dict[str, Any]:
    kills = [k for o in outcomes for k in o.kills]
    redone = [k.redone for k in kills]
    return {
        "seed": seed,
        "quick": quick,
        "runs": len(outcomes),
        "runs_by_launcher": dict(Counter(o.launcher for o in outcomes)),
        "jobs": sorted({o.job for o in outcomes}),
        "kills": len(kills),
        "kills_by_victims": dict(Counter(k.who for k in kills)),
        "aimed_at_saves": sum(k.when == "save" for k in kills),
        "aimed_and_inside": sum(k.when == "save" and k.inside_save for k in kills),
        "inside_saves": sum(k.inside_save for k in kills),
        "runs_without_kill": sum(not o.kills for o in outcomes),
        "forced": sum(o.forced for o in outcomes),
        "redone_steps": {
            "median": statistics.median(redone) if redone else 0,
            "max": max(redone, default=0),
            "limits": sorted({k.limit for k in kills}),
        },
        "problems": {kind: sum(kind in o.problems for o in outcomes) for kind in PROBLEMS},
        "corrupt_states": sum(len(o.problems.get("corrupt", [])) for o in outcomes),
        "wrong": sum(bool(o.problems) for o in outcomes),
        "seconds": seconds,
        "outcomes": [asdict(o) for o in outcomes],
    }


def markdown(r: dict[str, Any]) -> str:
    """The table of docs/."""
    launchers = ", ".join(f"{n} {name}" for name, n in sorted(r["runs_by_launcher"].items()))
    who = ", ".join(f"{n} of {name} rank{'s' * (name == 'all')}" for name, n in sorted(r["kills_by_victims"].items()))
    redone = r["redone_steps"]
    limits = ", ".join(map(str, redone["limits"]))
    problems = {**r["problems"], "corrupt": r["corrupt_states"]}
    rows = [
        ("runs", f"{r['runs']} ({launchers}) of {len(r['jobs'])} jobs"),
        ("kills (SIGKILL)", f"{r['kills']} ({who})"),
        ("aimed at a save, of these inside one", f"{r['aimed_at_saves']}, {r['aimed_and_inside']}"),
        ("inside a save in all (left a folder without a manifest)", r["inside_saves"]),
        ("runs without a kill (the job was faster five times)", r["runs_without_kill"]),
        ("surviving ranks that needed SIGKILL after SIGTERM", r["forced"]),
        ("steps repeated after a kill: median, max", f"{redone['median']:g}, {redone['max']}"),
        ("at most possible by the commit points, by job", limits),
        *((words, problems[kind]) for kind, words in PROBLEMS.items()),
        ("seconds", f"{r['seconds']:.0f}"),
    ]
    lines = [f"Seed {r['seed']}{', quick form' if r['quick'] else ''}.", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows]
    for o in r["outcomes"]:
        lines += [
            f"- run {o['number']} ({o['job']}, {o['launcher']}): {k}: {m}" for k, v in o["problems"].items() for m in v
        ]
    return "\n".join(lines) + "\n"

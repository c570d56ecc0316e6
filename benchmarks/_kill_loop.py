"""The kill campaign's loop: teacher, scorer and students run together, and any of them is killed. See benchmarks/kill.py."""

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from benchmarks._kill_campaign import Saves, wait, word_of
from benchmarks._kill_loop_jobs import (
    SCORER,
    STUDENTS,
    TEACHER,
    LoopSize,
    Manifests,
    check_loop,
    loop_configs,
    writing_roots,
)
from benchmarks._kill_ranks import Forked, Launched
from exfm.data.synth import synth

MEMBERS = (TEACHER, SCORER, *STUDENTS)
LOOP_S = 1800.0  # a loop that takes longer hangs, on a loaded machine too
AIM_S = 20.0  # the longest wait for a job to begin writing
PAUSE_S = 0.6
DELAY_S = 0.05  # the longest pause between seeing a folder being written and the kill


@dataclass(frozen=True)
class LoopAim:
    """One kill. victim: chooses among the ranks that live then; at `share` of the undisturbed loop's steps, and pause_s later,
    so that building and restoring are hit too.
    """

    who: str
    when: str
    victim: int
    share: float
    pause_s: float
    delay_s: float


@dataclass
class LoopKill:
    """One kill that hit. inside: it left a folder without a manifest (commit, snapshot or log), whether aimed at or not."""

    job: str
    who: str
    when: str
    inside: str


@dataclass
class LoopOutcome:
    """One loop: its kills, what was checked, what was wrong by kind."""

    number: int
    launcher: str
    kills: list[LoopKill] = field(default_factory=list)
    forced: int = 0
    predictions: int = 0
    learned: dict[str, int] = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=dict)
    seconds: float = 0.0

    def blame(self, kind: str, *messages: str) -> None:
        if messages:
            self.problems.setdefault(kind, []).extend(messages)


def draw_aims(number: int, seed: int, count: int) -> list[LoopAim]:
    """What kills loop `number`: a function of the seed alone. Every third kill is inside a folder being written."""
    random = Random(f"loop/{seed}/{number}")
    offset, shares = random.randrange(3), sorted(random.uniform(-0.1, 1.0) for _ in range(count))
    return [
        LoopAim(
            random.choice(["one", "all"]),
            "save" if (k + offset) % 3 == 0 else "any",
            random.randrange(2520),  # a multiple of every number of ranks
            share,
            random.random() * PAUSE_S,
            random.random() * DELAY_S,
        )
        for k, share in enumerate(shares)
    ]


def steps_bytes(folder: Path) -> int:
    """How far a loop is: the bytes of metrics, to which every step adds a line."""
    files = (folder / name / "metrics.jsonl" for name in MEMBERS)
    return sum(f.stat().st_size for f in files if f.exists())


class Loops:
    """Plays loops under `out`. size: of the stream; both launchers are compared with forked ranks that nobody disturbed."""

    def __init__(self, out: Path, size: LoopSize, seed: int) -> None:
        self.out, self.size, self.seed = out, size, seed
        self.stream, self.reference = str(out / "stream"), out / "undisturbed"
        synth(self.stream, num_slices=size.slices, rows_per_slice=size.rows, num_users=150, num_items=60, seed=seed)
        outcome = LoopOutcome(-1, "forked")
        self._run(outcome, self.reference, [], 0)
        if not outcome.problems:
            self._check(outcome, self.reference)
        if outcome.problems:
            raise RuntimeError(f"the undisturbed loop: {outcome.problems}")
        self.undisturbed, self.whole = outcome, steps_bytes(self.reference)

    def play(self, number: int, aims: int, kills: int, launcher: str = "forked") -> LoopOutcome:
        """One loop in which so many kills are tried and at most `kills` hit; fewer where the jobs end before."""
        outcome = LoopOutcome(number, launcher)
        folder = self.out / f"loop-{number:03d}"
        shutil.rmtree(folder, ignore_errors=True)
        begun = time.monotonic()
        self._run(outcome, folder, draw_aims(number, self.seed, aims), kills)
        if not outcome.problems:
            self._check(outcome, folder)
        outcome.seconds = time.monotonic() - begun
        if not outcome.problems:
            shutil.rmtree(folder)
        return outcome

    def _run(self, outcome: LoopOutcome, folder: Path, aims: list[LoopAim], kills: int) -> None:
        begun = time.monotonic()
        launch: Callable[[Any, int], Any] = Launched if outcome.launcher == "torchrun" else Forked
        manifests, crews = Manifests(folder), {}
        try:
            for name, raw in loop_configs(folder, self.stream).items():
                crews[name] = launch(raw, self.size.ranks(name))
            for aim in aims:
                if not _pump(crews, manifests, outcome, lambda a=aim: steps_bytes(folder) >= a.share * self.whole):
                    break
                time.sleep(aim.pause_s)
                _strike(crews, folder, aim, outcome)
                if len(outcome.kills) == kills:
                    break
            _pump(crews, manifests, outcome, lambda: False)
            if not outcome.problems and any(not crew.succeeded() for crew in crews.values()):
                hangs = [name for name, crew in crews.items() if not crew.ended()]
                outcome.blame("failed", f"{', '.join(hangs)} did not end in {LOOP_S:g} s; see {folder}")
        finally:
            outcome.forced = sum(crew.forced for crew in crews.values())
            for crew in crews.values():
                crew.close()
        manifests.look()
        outcome.blame("recommitted", *manifests.twice)
        outcome.seconds = time.monotonic() - begun

    def _check(self, outcome: LoopOutcome, folder: Path) -> None:
        checked = check_loop(folder, self.reference, self.stream)
        outcome.predictions, outcome.learned = checked.predictions, checked.learned
        for kind, messages in checked.problems.items():
            outcome.blame(kind, *messages)


def _pump(crews: dict[str, Any], manifests: Manifests, outcome: LoopOutcome, over: Callable[[], bool]) -> bool:
    """Look on until `over`; False if before that all jobs had ended, or one had failed."""

    def settled() -> bool:
        manifests.look()
        for name, crew in crews.items():
            if crew.ended() and not crew.succeeded():
                outcome.blame("failed", f"{name} ended with {crew.codes()}: {word_of(crew.run)}")
        return bool(outcome.problems) or all(crew.ended() for crew in crews.values())

    wait(lambda: settled() or over(), LOOP_S, 0.05)
    return not settled()


def _strike(crews: dict[str, Any], folder: Path, aim: LoopAim, outcome: LoopOutcome) -> None:
    """Kill a job that still runs, one of its ranks or all of it, and start it again as its launcher would."""
    living = [name for name, crew in crews.items() if not crew.ended() for _ in range(crew.world_size)]
    if not living:
        return
    crew = crews[name := living[aim.victim % len(living)]]
    wait(lambda: crew.ended() or crew.begun(), LOOP_S, 0.01)
    saves = [Saves(root, prefix) for root, prefix in writing_roots(folder, name)]
    if aim.when == "save":
        _stop_inside(crew, saves[aim.victim % len(saves)], aim.delay_s)
    pids = crew.ranks()
    if not pids:
        return
    if aim.who == "all":
        crew.kill()
    else:
        _signal(pids[aim.victim % len(pids) :][:1], signal.SIGKILL)
        _signal(pids, signal.SIGCONT)  # the others see how it goes
    crew.settle()
    if crew.succeeded():  # it had ended just before
        return
    inside = sorted({saves.root.name for saves in saves if saves.running()})
    outcome.kills.append(LoopKill(name, aim.who, aim.when, " ".join(inside)))
    crew.revive()


def _stop_inside(crew: Any, saves: Saves, delay_s: float) -> None:
    """Return with the job's ranks stopped while such a folder is being written, if possible `delay_s` after that began."""
    deadline = time.monotonic() + AIM_S
    while not crew.ended() and time.monotonic() < deadline:
        if not (seen := saves.running()):
            time.sleep(0.002)
            continue
        time.sleep(delay_s)
        pids = crew.ranks()
        _signal(pids, signal.SIGSTOP)
        if seen & saves.running():
            return
        _signal(pids, signal.SIGCONT)
        delay_s /= 2


def _signal(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def play_all(loops: Loops, kills: int, per_loop: int, torchrun_every: int) -> Iterator[LoopOutcome]:
    """Loops until so many kills have hit. torchrun_every: of so many loops one is launched by torchrun, the second first; 0: none."""
    left, number, idle = kills, 0, 0
    while left > 0 and idle < 5:
        launcher = "torchrun" if torchrun_every and number % torchrun_every == 1 else "forked"
        outcome = loops.play(number, per_loop, left, launcher)
        left, number = left - len(outcome.kills), number + 1
        idle = 0 if outcome.kills else idle + 1
        yield outcome

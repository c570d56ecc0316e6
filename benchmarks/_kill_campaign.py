"""The kill campaign's runs: when ranks are killed, and what must hold afterwards. See benchmarks/kill.py."""

import json
import os
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from threading import Lock
from typing import Any

from benchmarks._kill_jobs import KillJob, differences, gaps, steps_done, verify
from benchmarks._kill_ranks import Forked, Torchrun
from exfm.checkpoints.commits import Committed, committed
from exfm.data.errors import UserError
from exfm.data.synth import synth
from exfm.launch.auditing import audit_run

LIFE_S = 400.0  # a life that takes longer hangs; torchrun's ranks may import for a minute each time
SAVE_DELAY_S = 0.1  # the longest pause between seeing a save and the kill


@dataclass(frozen=True)
class Aim:
    """Who is to be killed and when. moment: share of the undisturbed job's time; `save`: in the first save after it."""

    who: str
    victim: int
    when: str
    moment: float
    delay_s: float


@dataclass
class Kill:
    """One kill that hit. inside_save: it left a folder without manifest; redone: steps reached before that were lost."""

    who: str
    when: str
    inside_save: bool
    redone: int
    limit: int


@dataclass
class Outcome:
    """One run: its kills, and what was wrong by kind (corrupt, differing, audit, resume, leftover, failed)."""

    number: int
    job: str
    launcher: str
    kills: list[Kill] = field(default_factory=list)
    missed: int = 0
    forced: int = 0
    problems: dict[str, list[str]] = field(default_factory=dict)
    seconds: float = 0.0

    def blame(self, kind: str, *messages: str) -> None:
        if messages:
            self.problems.setdefault(kind, []).extend(messages)


class Saves:
    """Sees saves from outside: folders without a manifest that were not there before and never had one."""

    def __init__(self, root: Path, prefix: str = "step=") -> None:
        self.root, self.prefix, self.known = root, prefix, unfinished(root, prefix)

    def running(self) -> set[tuple[str, int]]:
        bare = unfinished(self.root, self.prefix)
        # a committed folder loses its manifest before it is removed
        self.known |= {(p.name, p.inode()) for p in _folders(self.root, self.prefix)} - bare
        return bare - self.known


def _folders(root: Path, prefix: str) -> list[os.DirEntry[str]]:
    try:
        return [p for p in os.scandir(root) if p.name.startswith(prefix) and p.is_dir()]
    except FileNotFoundError:
        return []


def unfinished(root: Path, prefix: str = "step=") -> set[tuple[str, int]]:
    """(name, inode) of folders `prefix`* without a manifest."""
    return {(p.name, p.inode()) for p in _folders(root, prefix) if not os.path.exists(f"{p.path}/manifest.json")}


class Draw:
    """What run `number` does: a function of the seed alone. Every third run aims at saves, every tenth is torchrun's."""

    def __init__(self, number: int, seed: int, jobs: Sequence[KillJob], may_torchrun: bool) -> None:
        random = Random(f"{seed}/{number}")
        self.number, self.torchrun, self.job = number, may_torchrun and number % 10 == 9, random.choice(jobs)
        # now and then a second kill, in the life after the first
        count = 1 if self.torchrun or random.random() < 0.75 else 2
        when = "save" if number % 3 == 2 else "any"
        self.aims = [
            Aim(
                random.choice(["one", "all"]),
                random.randrange(6),
                when,
                random.random() * 0.95,
                random.random() * SAVE_DELAY_S,
            )
            for _ in range(count)
        ]


class Campaign:
    """Runs jobs under `out`. prepare: a module-level function that every forked rank calls first (to break something)."""

    def __init__(self, out: Path, jobs: list[KillJob], slices: int, rows: int, seed: int, prepare: Callable[[], None] | None = None) -> None:  # fmt: skip
        self.out, self.jobs, self.slices, self.rows, self.seed, self.prepare = out, jobs, slices, rows, seed, prepare
        self.stream, self.one_group = str(out / "stream"), Lock()
        self.seconds: dict[str, float] = {}  # of undisturbed jobs
        synth(self.stream, num_slices=slices, rows_per_slice=rows, num_users=150, num_items=60, seed=seed)
        self.teacher = KillJob(-1, 2, "teacher", "table_wise", {"every_slices": slices})

    def _config(self, job: KillJob, folder: Path) -> dict[str, Any]:
        return job.config(folder, self.stream, self.out / self.teacher.name / "supervision" / "fm")

    def reference(self, job: KillJob, torchrun: bool = False) -> Path:
        """The undisturbed run of a job under a launcher, made once; the supervision that a student learns from comes first.

        Sums over 3 ranks of data-parallel tables end in another last bit under torchrun than in forked ranks, always the same
        one: runs are compared with their own kind. Sums over 2 ranks cannot.
        """
        torchrun &= job.ranks > 2
        folder = self.out / (job.name + "-torchrun" * torchrun)
        if folder.name in self.seconds:
            return folder
        if job.role == "student":
            self.reference(self.teacher)
        crew: Any = (Torchrun if torchrun else Forked)(self._config(job, folder), job.ranks)
        begun = time.monotonic()
        wait(lambda: crew.ended(), LIFE_S)
        self.seconds[folder.name] = time.monotonic() - begun
        codes = crew.codes()
        crew.close()
        if any(codes):
            raise RuntimeError(f"the undisturbed job ended with {codes}; see {folder}/logs/ranks.log")
        return folder

    def play_all(self, numbers: Iterable[int]) -> Iterator[Outcome]:
        """Runs under torchrun, which import for long, go on beside the others."""
        drawn = [Draw(number, self.seed, self.jobs, self.prepare is None) for number in numbers]
        for draw in drawn:
            self.reference(draw.job)
            if draw.torchrun:
                self.reference(draw.job, torchrun=True)
        with ThreadPoolExecutor(1) as aside:
            slow = deque(aside.submit(self.play, draw) for draw in drawn if draw.torchrun)
            for draw in drawn:
                if not draw.torchrun:
                    yield self.play(draw)
                while slow and slow[0].done():
                    yield slow.popleft().result()
            yield from (outcome.result() for outcome in slow)

    def play(self, draw: Draw) -> Outcome:
        """One run with its kills. Where the job ends before the first of them, again with half the moment."""
        begun = time.monotonic()
        for missed in range(5):
            outcome = Outcome(draw.number, draw.job.name, "torchrun" if draw.torchrun else "forked", missed=missed)
            self._run(outcome, draw.job, [replace(a, moment=a.moment / 2**missed) for a in draw.aims])
            if outcome.kills or outcome.problems:
                break
        outcome.seconds = time.monotonic() - begun
        return outcome

    def _run(self, outcome: Outcome, job: KillJob, aims: list[Aim]) -> None:
        run = self.out / f"run-{outcome.number:03d}"
        shutil.rmtree(run, ignore_errors=True)
        launch = Torchrun if outcome.launcher == "torchrun" else Forked
        crew = launch(self._config(job, run), job.ranks, self.prepare)
        read, step = 0, 0  # bytes of metrics.jsonl and the step at which the present life began
        try:
            for aim in aims:
                saves = Saves(run / "checkpoints")
                if not _strike(crew, aim, run, saves, self.seconds[job.name]):
                    break
                crew.settle()
                if crew.succeeded():  # they had all ended just before
                    break
                read, step = self._bury(outcome, job, run, aim, saves, read, step)
                crew.revive()
            if not wait(crew.ended, LIFE_S):
                outcome.blame("failed", f"hangs; see {run}/logs/ranks.log")
            elif not crew.succeeded():
                outcome.blame("failed", f"ended with {crew.codes()}: {word_of(run)}")
            else:
                self._check(outcome, job, run, read, step)
        finally:
            outcome.forced += crew.forced
            crew.close()

    def _bury(self, outcome: Outcome, job: KillJob, run: Path, aim: Aim, saves: Saves, read: int, step: int) -> tuple[int, int]:  # fmt: skip
        """Look at what a kill has left. Returns where the next life must begin: (size of metrics.jsonl, newest step)."""
        found = committed(run / "checkpoints")
        outcome.blame("corrupt", *self._damaged(found))
        newest = found[-1].step if found else 0
        steps = steps_done(run / "metrics.jsonl", read)
        _check_life(outcome, steps, step)
        # a save may still be in flight, and the one before it is then the last commit
        limit = 2 * job.commit_every(self.slices, self.rows)
        redone = max([step, *steps]) - newest
        if not 0 <= redone <= limit:
            outcome.blame("resume", f"{redone} steps were lost, between commits there are at most {limit}")
        outcome.kills.append(Kill(aim.who, aim.when, bool(saves.running()), redone, limit))
        metrics = run / "metrics.jsonl"
        return metrics.stat().st_size if metrics.exists() else 0, newest

    def _damaged(self, found: list[Committed]) -> list[str]:
        with self.one_group:  # a process has one default process group
            return [problem for problem in map(verify, found) if problem]

    def _check(self, outcome: Outcome, job: KillJob, run: Path, read: int, step: int) -> None:
        """A finished run against the undisturbed one."""
        _check_life(outcome, steps_done(run / "metrics.jsonl", read), step)
        outcome.blame("leftover", *(name for name, _ in unfinished(run / "checkpoints")))
        outcome.blame("corrupt", *self._damaged(committed(run / "checkpoints")))
        if "corrupt" not in outcome.problems:
            found = differences(run, self.reference(job, outcome.launcher == "torchrun"))
            outcome.blame("differing", *([f"{len(found)} things differ, the first is {found[0]}"] if found else []))
        try:
            learned, whole = audit_run(run)["examples"], self.slices * self.rows
            if learned != whole:
                outcome.blame("audit", f"{learned} of {whole} examples were learned")
        except UserError as error:
            outcome.blame("audit", str(error))
        if not outcome.problems:
            shutil.rmtree(run)


def _check_life(outcome: Outcome, steps: list[int], newest: int) -> None:
    """A life goes on from the newest commit on disk and leaves out no step."""
    if wrong := gaps([newest, *steps]):
        outcome.blame("resume", f"after step {wrong[0][0]} came step {wrong[0][1]}; newest commit: step {newest}")


def _strike(crew: Any, aim: Aim, run: Path, saves: Saves, seconds: float) -> bool:
    """Wait for the moment and kill; False if the job ended before."""
    if crew.life_begins_with:
        sign = run / crew.life_begins_with
        before = sign.stat().st_mtime_ns if crew.life else 0
        wait(lambda: crew.ended() or (sign.exists() and sign.stat().st_mtime_ns > before), LIFE_S, 0.01)
    moment = time.monotonic() + aim.moment * seconds
    wait(lambda: (saves.running(), crew.ended() or time.monotonic() >= moment)[1], LIFE_S, 0.01)
    if aim.when == "save":
        _find_save(crew, saves, aim.delay_s)
    pids = crew.ranks()
    for pid in pids if aim.who == "all" else pids[aim.victim % max(len(pids), 1) :][:1]:
        os.kill(pid, signal.SIGKILL)
    return bool(pids)


def _find_save(crew: Any, saves: Saves, delay_s: float) -> None:
    """Return inside a save, if possible `delay_s` after it began; half of that is tried where the save was over by then."""
    while not crew.ended():
        if seen := saves.running():
            time.sleep(delay_s)
            if seen & saves.running():
                return
            delay_s /= 2
        time.sleep(0.002)


def wait(over: Callable[[], bool], limit_s: float, poll_s: float = 0.02) -> bool:
    deadline = time.monotonic() + limit_s
    while not (done := over()) and time.monotonic() < deadline:
        time.sleep(poll_s)
    return done


def word_of(run: Path) -> str:
    """Why a job failed: exit.json's message."""
    try:
        return json.loads((run / "exit.json").read_text())["message"]
    except (OSError, ValueError, KeyError):
        return f"see {run}/logs/ranks.log"

"""`python -m benchmarks._startup_marks train|rank ...`: `exfm train` and its ranks with a clock at their stages.

Stages are the functions that do them, wrapped; what nobody wrapped is `rest`. Written to <run>/startup-launcher.json and
<run>/startup-rank-N.json at the first step, after which the job goes on.
"""

import sys
import time

BEGAN = time.time(), time.process_time()

import contextlib  # noqa: E402
import functools  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

TICK = os.sysconf("SC_CLK_TCK")
Seconds = tuple[float, float]  # of the wall and of this process's CPU


def started(pid: int) -> float:
    """Unix time at which a process began, to a hundredth of a second (Linux)."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return time.time() - float(Path("/proc/uptime").read_text().split()[0]) + ticks / TICK


class Marks:
    """Seconds by stage. A stage inside another is taken out of the outer one."""

    def __init__(self) -> None:
        self.stages: dict[str, Seconds] = {}
        self.inside: list[list[float]] = []

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begun, inner = (time.time(), time.process_time()), [0.0, 0.0]
        self.inside.append(inner)
        try:
            yield
        finally:
            self.inside.pop()
            whole = time.time() - begun[0], time.process_time() - begun[1]
            self.add(name, (whole[0] - inner[0], whole[1] - inner[1]))
            if self.inside:
                for i in (0, 1):
                    self.inside[-1][i] += whole[i]

    def add(self, name: str, seconds: Seconds) -> None:
        old = self.stages.get(name, (0.0, 0.0))
        self.stages[name] = old[0] + seconds[0], old[1] + seconds[1]

    def wrap(self, owner: Any, function: str, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, function)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return original(*args, **kwargs)

        setattr(owner, function, timed)

    def wrap_enter(self, owner: Any, function: str, name: str) -> None:
        """Of a context manager, only the way in."""
        original: Callable[..., Any] = getattr(owner, function)

        @contextlib.contextmanager
        def timed(*args: Any, **kwargs: Any) -> Iterator[Any]:
            with contextlib.ExitStack() as stack:
                with self.stage(name):
                    value = stack.enter_context(original(*args, **kwargs))
                yield value

        setattr(owner, function, timed)

    def write(self, path: Path, **more: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"stages": self.stages, "ended": time.time(), "cpu": time.process_time(), **more}))


def train(arguments: list[str]) -> None:
    """As `exfm train` does it, but the ranks are this module's."""
    marks = Marks()
    begun = started(os.getpid())
    marks.add("interpreter", (BEGAN[0] - begun, BEGAN[1]))
    with marks.stage("imports"):
        from exfm.launch import cli, local
    marks.wrap(local.LocalJob, "check", "checks")
    marks.wrap(local.LocalJob, "__post_init__", "checks")
    popen, start = local.subprocess.Popen, local.LocalJob.start

    def with_marks(command: list[str], **kwargs: Any) -> Any:
        here = ["benchmarks._startup_marks", "rank"]
        at = command.index("exfm.trainer")
        return popen([*command[:at], *here, *command[at + 1 :]], **kwargs)

    def started_job(self: Any, environment: Any) -> None:
        local.subprocess.Popen = with_marks  # type: ignore[misc,assignment]
        start(self, environment)
        local.subprocess.Popen = popen  # type: ignore[misc]
        marks.write(self.folder / "startup-launcher.json", began=begun)

    local.LocalJob.start = started_job  # type: ignore[method-assign]
    sys.argv = ["exfm", "train", *arguments]
    cli.main()


def rank(arguments: list[str]) -> None:
    marks = Marks()
    begun = started(os.getpid())
    marks.add("interpreter", (BEGAN[0] - begun, BEGAN[1]))
    with marks.stage("imports"):
        from exfm.trainer import __main__, build, commits, loop, run, steps
    marks.wrap(run, "plan_here", "planning")
    marks.wrap_enter(run, "process_group", "joining")
    marks.wrap(build, "shard_tables", "building and sharding tables")
    marks.wrap(build, "fill_initial", "filling tables")
    marks.wrap(loop, "build", "dense part, its engine and optimisers")
    marks.wrap(loop, "rehearse", "rehearsing steps")
    marks.wrap(run, "Job", "log, metrics, savers")
    marks.wrap(commits.Commits, "restore", "restoring")
    marks.wrap(loop.Job, "open", "opening the first slice")
    marks.wrap(steps.Feed, "__next__", "first batch")
    original = steps.Pipeline.run

    def first(self: Any, feed: Any) -> Any:
        stepping = original(self, feed)
        with marks.stage("first step"):
            one = next(stepping)
        env = __main__.rank_env()
        config = loaded[0]
        more = {"began": begun, "torchrun_began": started(os.getppid()), "rank": env.rank}
        marks.write(Path(config.run.folder) / f"startup-rank-{env.rank}.json", **more)
        yield one
        yield from stepping

    steps.Pipeline.run = first  # type: ignore[method-assign]
    loaded: list[Any] = []
    load = __main__.load_any

    def loading(*args: Any) -> Any:
        with marks.stage("reading the config"):
            loaded.append(load(*args))
        return loaded[-1]

    __main__.load_any = loading
    sys.argv = ["exfm.trainer", *arguments]
    __main__.leave(__main__.main())


if __name__ == "__main__":
    {"train": train, "rank": rank}[sys.argv[1]](sys.argv[2:])

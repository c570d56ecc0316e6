"""Progress of running jobs: a live Rich table on a terminal, one line per interval elsewhere."""

import json
import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from exfm.launch.local import LocalJob
from exfm.launch.preflighting import warnings


class JobView:
    """Context manager; `update` takes a job's newest metrics line, `ended` its exit code."""

    def __init__(self, console: Console, every_s: float = 5.0) -> None:
        self.console, self.every_s = console, every_s
        self.live = console.is_terminal
        self.tasks: dict[str, TaskID] = {}
        self.said: dict[str, float] = {}
        self.met: set[str] = set()
        self.bars = Progress(
            TextColumn("{task.description:<16}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[facts]}"),
            console=console,
            disable=not self.live,
        )

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()

    def update(self, job: LocalJob, line: dict[str, Any]) -> None:
        if job.name not in self.met:
            self.met.add(job.name)
            for word in warnings(job):
                self.console.print(f"[bold yellow]{job.name}: preflight warns:[/] {escape(word)}", highlight=False)
        if "share" not in line:
            return
        facts = (
            f"slice {line['slice'] + 1}/{line['slices']}  {line['examples']:>9,} examples  {line['examples_per_s']:>7,.0f}/s  "
            + (f"NE so far {line['ne_so_far']:.4f}  {line['seconds_left']:.0f} s left" if "ne_so_far" in line else "")
        )
        if self.live:
            if job.name not in self.tasks:
                self.tasks[job.name] = self.bars.add_task(job.name, total=1.0, facts="")
            self.bars.update(self.tasks[job.name], completed=line["share"], facts=facts)
        elif time.monotonic() - self.said.get(job.name, 0.0) > self.every_s:
            self.said[job.name] = time.monotonic()
            self.console.print(f"{job.name}: {facts}", highlight=False)

    def ended(self, job: LocalJob, code: int) -> None:
        words = {0: "done", 75: "stopped early, everything committed"}.get(code, f"failed with exit code {code}")
        if not self.live:
            self.console.print(f"{job.name}: {words}", highlight=False)
        elif job.name in self.tasks:
            self.bars.update(self.tasks[job.name], description=f"{job.name}: {words}")
        if code == 0 and (word := _anatomy(job)):
            self.console.print(f"{job.name}: {word}", highlight=False)


def _anatomy(job: LocalJob) -> str:
    """Where the time of a finished training job went, in its own words."""
    path = job.folder / "summary.json"
    return str(json.loads(path.read_text()).get("anatomy", "")) if path.exists() else ""

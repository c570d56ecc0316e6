"""`exfm train CONFIG --preflight-only`: start the ranks, look whether the job could go on, show the page."""

import json
from collections.abc import Mapping
from typing import Any

from exfm.launch.local import LocalJob, run_jobs
from exfm.trainer.preflight import FACTS, PAGE


class _Silent:
    """A view of jobs that shows none: see launch/progress.py."""

    def update(self, job: LocalJob, line: dict[str, Any]) -> None:
        pass

    def ended(self, job: LocalJob, code: int) -> None:
        pass


def run_preflight(job: LocalJob, environment: Mapping[str, str], as_json: bool) -> int:
    """0 where the job could start. UserError, with the page printed, where it could not."""
    job.preflight_only, job.max_restarts = True, 0
    for name in (PAGE, FACTS):  # of an earlier start
        (job.folder / "logs" / name).unlink(missing_ok=True)
    try:
        return run_jobs([job], environment, _Silent())
    finally:
        path = job.folder / "logs" / (FACTS if as_json else PAGE)
        if path.exists():  # not where the ranks did not meet
            print(path.read_text().rstrip("\n"))


def warnings(job: LocalJob) -> list[str]:
    """What the preflight of a running job found that did not keep it from starting."""
    if job.job.run.preflight == "off":
        return []
    try:
        findings = json.loads((job.folder / "logs" / FACTS).read_text())["findings"]
    except (OSError, ValueError):
        return []
    return [f"{f['what']}; {f['fix']}" for f in findings if f["level"] == "warn"]

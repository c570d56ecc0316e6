"""The first second of a job: every rank looks at its machine, all compare, and nothing is built where the job cannot go on."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from exfm.checkpoints.store import from_rank_0
from exfm.data.errors import UserError
from exfm.data.finding import Finding
from exfm.sharding.planner import topology_of
from exfm.sharding.topology import Topology
from exfm.trainer import facts as looking
from exfm.trainer import links
from exfm.trainer.config import JobConfig, RunConfig
from exfm.trainer.env import RankEnv
from exfm.trainer.facts import Facts
from exfm.trainer.fits import Needs
from exfm.trainer.readiness import Report, Storing, judge
from exfm.trainer.score_config import ScoreConfig

T = TypeVar("T")
PAGE, FACTS = "preflight.txt", "preflight.json"


def preflight(
    config: JobConfig | ScoreConfig, env: RankEnv, device: torch.device, needs: Needs | None, whole_page: bool = False
) -> None:
    """All ranks call, before the model is built. UserError, the same on all of them, where the job cannot go on.

    needs: of a scorer not known. whole_page: say it all, though nothing is wrong, and measure whatever the config says.
    """
    if config.run.preflight == "off" and not whole_page:
        return
    begun = time.monotonic()
    facts = looking.collect(config, env, device)
    storing, speeds = _storing(config, facts), None
    findings = _agreed(env, lambda: judge(facts, needs, storing))
    broken = any(f.level == "error" for f in findings)
    if env.world_size > 1 and not broken and (whole_page or config.run.preflight == "full"):
        topology = _agreed(env, lambda: _given_topology(config, env, device))
        hosts = [f.host for f in facts]
        speeds = links.measure(device, hosts, topology)
        slow = links.slow_links(speeds.links, hosts, device.type, topology)
        findings = judge(facts, needs, storing, slow)
    report = Report(tuple(facts), tuple(findings), needs, storing, speeds, time.monotonic() - begun)
    if env.rank == 0:
        _tell(report, config.run, whole_page)
    if broken:
        raise UserError(report.message(str(Path(config.run.folder) / "logs" / PAGE)))


def _agreed(env: RankEnv, act: Callable[[], T]) -> T:
    """Rank 0's answer: what others know may differ, and with it what they would do."""
    return act() if env.world_size == 1 else from_rank_0(act)


def _storing(config: JobConfig | ScoreConfig, facts: Sequence[Facts]) -> Storing | None:
    if isinstance(config, ScoreConfig):
        return None
    c = config.checkpoint
    return Storing(config.checkpoint_folder, facts[0].commits, c.keep, c.full_every)


def _given_topology(config: JobConfig | ScoreConfig, env: RankEnv, device: torch.device) -> Topology | None:
    """The machines that the user has named: their figures are a promise, those of a preset only a data sheet."""
    sharding = config.sharding
    if sharding is None or not sharding.topology:
        return None
    return topology_of(sharding, device.type, env.world_size, env.local_world_size)


def _tell(report: Report, run: RunConfig, whole_page: bool) -> None:
    """The page and all facts into <run>/logs; to stderr the page where something is wrong or it is asked for, else a line."""
    logs, page = Path(run.folder) / "logs", report.page()
    say = page if report.errors or whole_page else "\n".join([report.line(), *map(_loud, report.findings)])
    try:
        logs.mkdir(parents=True, exist_ok=True)
        (logs / PAGE).write_text(page)
        (logs / FACTS).write_text(json.dumps(report.as_dict()))
    except OSError as error:
        say += f"\nthis page cannot be kept in {logs}: {error.strerror}"
    print("\n".join(f"[{run.name}] {line}".rstrip() for line in say.splitlines()), file=sys.stderr, flush=True)


def _loud(finding: Finding) -> str:
    return f"preflight: {finding.level.upper()}: {finding.what}; {finding.fix}"

"""How launched jobs are: what SLURM says of them beside what they say themselves, in their run folders."""

import fcntl
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table

from exfm.data.commit import nan_for_null
from exfm.data.errors import UserError
from exfm.launch.fleet import Launched, chosen, path_of, read_fleet
from exfm.launch.slurm import cluster
from exfm.launch.slurm.cluster import PENDING, Queued
from exfm.trainer.ending import DONE, STOPPED, read_exit

TAIL_BYTES = 1 << 16
OVER = ("done", "failed", "stopped early", "cancelled", "timed out", "not submitted", "not running")
ENDED = {"COMPLETED": "done", "CANCELLED": "cancelled", "TIMEOUT": "timed out", "PREEMPTED": "preempted", "NODE_FAIL": "node lost"}  # fmt: skip


def status(folder: Path) -> list[dict[str, Any]]:
    """A row for every job of a launch, or for the one job of a run's folder. UserError for any other folder."""
    if path_of(folder).exists():
        jobs = read_fleet(folder).jobs
        queued = cluster.jobs([j.job_id for j in jobs if j.job_id]) if cluster.has_slurm() else {}
        return [row(job, queued.get(job.job_id or "")) for job in jobs]
    if not any((folder / name).exists() for name in ("metrics.jsonl", "exit.json", "config.yaml")):
        raise UserError(f"{folder} is neither the folder of a launch nor of a run")
    alone = Launched(name=folder.name, config="", run_folder=str(folder), script="", logs=str(folder / "logs"))
    return [row(alone, None)]


def row(job: Launched, queued: Queued | None) -> dict[str, Any]:
    """state: waiting, running, done, failed, cancelled, ...; why: what SLURM waits for, or the job's last words."""
    run = Path(job.run_folder)
    word = read_exit(run)
    state, why = _state(job, queued, word)
    found: dict[str, Any] = {
        "job": job.name,
        "id": job.job_id,
        "state": state,
        "nodes": queued.nodes if queued is not None and queued.live else "",
        "restarts": queued.restarts if queued is not None else None,
        "time_left_s": queued.limit_s - queued.seconds if queued is not None and state == "running" and queued.limit_s else None,
        "run_folder": job.run_folder,
        "why": why,
    }  # fmt: skip
    return found | progress(run)


def _state(job: Launched, queued: Queued | None, word: dict[str, Any] | None) -> tuple[str, str]:
    said = "" if word is None else str(word["message"])
    if queued is not None and queued.live:
        if queued.state in PENDING:
            return "waiting", queued.reason
        return "running" if queued.state == "RUNNING" else queued.state.lower(), ""
    if word is not None and word["exit_code"] == DONE:
        return "done", ""
    if queued is not None and queued.state in ENDED and queued.state != "COMPLETED":
        return ENDED[queued.state], said
    if word is not None:
        return ("stopped early" if word["exit_code"] == STOPPED else "failed"), said
    if queued is not None:
        return "failed", f"SLURM says {queued.state}; see {job.logs}"
    if job.job_id is None and job.script:
        return "not submitted", ""
    if job.script:
        return "unknown to SLURM", ""
    return ("running" if is_locked(Path(job.run_folder)) else "not running"), ""


def is_locked(run: Path) -> bool:
    """Whether a job holds its run folder, as far as this machine can tell."""
    try:
        with open(run / "lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def progress(run: Path) -> dict[str, Any]:
    """From the newest lines of a run's metrics: step, slice, share, examples_per_s, ne, and the lag of its stage."""
    lines = _newest(run / "metrics.jsonl")
    moving: dict[str, Any] = next((x for x in reversed(lines) if x["kind"] in ("progress", "slice", "score")), {})
    ended: dict[str, Any] = next((x for x in reversed(lines) if x["kind"] in ("slice", "score")), {})
    return {
        "step": moving.get("step"),
        "slice": moving.get("slice"),
        "slices": moving.get("slices"),
        "share": moving.get("share"),
        "examples_per_s": moving.get("examples_per_s"),
        "ne": moving.get("ne_so_far"),
        "lag_s": ended.get("lag_s"),
        "behind_slices": ended.get("behind_slices"),
        "seconds_since": time.time() - moving["time"] if moving else None,
    }


def _newest(path: Path) -> list[dict[str, Any]]:
    """Whole lines of the last part of a file."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - TAIL_BYTES))
            text = file.read()
    except OSError:
        return []
    lines = text[: text.rfind(b"\n") + 1].splitlines()[size > TAIL_BYTES :]
    return [nan_for_null(json.loads(line)) for line in lines]


COLUMNS = (
    "job",
    "id",
    "state",
    "nodes",
    "step",
    "slice",
    "examples/s",
    "NE so far",
    "lag",
    "restarts",
    "time left",
    "",
)


def render(rows: list[dict[str, Any]]) -> RenderableType:
    table = Table(box=None, pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, justify="right" if name in COLUMNS[4:11] else "left", overflow="fold")
    for r in rows:
        lag = [] if r["lag_s"] is None or r["lag_s"] != r["lag_s"] else [span(r["lag_s"])]
        if r["behind_slices"]:
            lag.append(f"{r['behind_slices']} slices")
        cells = [
            r["job"], r["id"] or "", f"[{_colour(r['state'])}]{r['state']}[/]", r["nodes"], _number(r["step"]),
            "" if r["slice"] is None else f"{r['slice'] + 1}/{r['slices']}", _number(r["examples_per_s"]),
            "" if r["ne"] is None or r["ne"] != r["ne"] else f"{r['ne']:.4f}", ", ".join(lag), _number(r["restarts"]),
            "" if r["time_left_s"] is None else span(r["time_left_s"]), r["why"].splitlines()[0][:160] if r["why"] else "",
        ]  # fmt: skip
        table.add_row(*cells)
    return table


def _colour(state: str) -> str:
    return {"done": "green", "running": "cyan", "failed": "bold red", "timed out": "bold red"}.get(state, "yellow")


def _number(value: float | None) -> str:
    return "" if value is None or value != value else f"{value:,.0f}"


def span(seconds: float) -> str:
    minutes = int(seconds) // 60
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def watch(folder: Path, console: Console, every_s: float) -> list[dict[str, Any]]:
    """A live table until nothing waits or runs any more; the last rows."""
    with Live(console=console, auto_refresh=False) as live:
        while True:
            rows = status(folder)
            live.update(render(rows), refresh=True)
            if all(r["state"] in OVER for r in rows):
                return rows
            time.sleep(every_s)


def log_files(folder: Path, names: list[str], rank: int | None) -> list[Path]:
    """Files that jobs have written: of a rank, or the script's and the nodes' (torchrun's without SLURM), newest last."""
    if path_of(folder).exists():
        jobs = chosen(read_fleet(folder), names)
    else:
        jobs = [Launched(name=folder.name, config="", run_folder=str(folder), script="", logs=str(folder / "logs"))]
    found: list[Path] = []
    for job in jobs:
        if rank is not None:
            found += Path(job.run_folder, "logs").glob(f"rank-{rank:05d}.log")
        elif job.job_id is None:
            found += Path(job.logs).glob("torchrun.log")
        else:
            base, _, task = job.job_id.partition("_")
            found += Path(job.logs).glob(f"slurm-{base}{f'_{task}' if task else ''}.log")
            found += Path(job.run_folder, "logs").glob("slurm-*-node*.log")
    if not found:
        what = f"of rank {rank} " if rank is not None else ""
        raise UserError(f"no log {what}of {', '.join(j.name for j in jobs)} yet")
    return sorted(set(found), key=lambda p: p.stat().st_mtime)

"""Lines and summaries of a job: merged over ranks, written by rank 0."""

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from exfm.data.clock import clock_of
from exfm.data.commit import commit_json
from exfm.data.reader import SliceReader
from exfm.trainer.anatomy import verdict
from exfm.trainer.metrics import auc, replicate_calibration, replicate_ne, summarise
from exfm.trainer.teachers import TOTAL

if TYPE_CHECKING:
    from exfm.trainer.loop import Job


def _merged(array: np.ndarray) -> np.ndarray:
    total = torch.from_numpy(array.copy())
    dist.all_reduce(total)
    return total.numpy()


def _groups(job: "Job") -> list[str]:
    return ["all", *(d.name for d in job.config.stream.domains)]


def _by_group(job: "Job", sums: np.ndarray) -> dict[str, dict[str, Any]]:
    return {
        group: {task: summarise(sums[g, t]) for t, task in enumerate(job.config.heads.tasks)}
        for g, group in enumerate(_groups(job))
    }


def slice_line(job: "Job", reader: SliceReader | None = None) -> dict[str, Any]:
    """At a slice's end (all ranks call) the merged metrics; inside one (`reader` given) this rank's own, as progress.

    Returns them by group and task.
    """
    p = job.progress
    ended = reader is None
    own = job.metrics.slice.copy()
    sums = _merged(own) if ended else own
    num_slices = len(job.slices)
    inside = 1.0 if ended else p.consumed / reader.examples  # type: ignore[union-attr]
    share = (p.slice - job.slices.start + inside) / num_slices
    seconds = p.seconds + time.monotonic() - job.begun
    total = job.metrics.total if job.metrics.total[0, 0, 0] else own
    so_far = summarise(total[0, 0])["ne"]
    values: dict[str, Any] = {
        "slice": p.slice,
        "slices": num_slices,
        "share": share,
        "examples": p.examples,
        "examples_per_s": p.examples / max(seconds, 1e-9),
        "ne_so_far": so_far,
        "seconds_left": seconds * (1 - share) / max(share, 1e-9),
        "lr": job.built.optimizers.lr,
        **job.pace.since(p.examples),
    }
    metrics = _by_group(job, sums)
    if ended:
        values["metrics"] = metrics
        values |= _lag(job)
        if job.teachers is not None:
            values["teachers"] = job.teachers.end_slice(p.slice)
    job.log.record("slice" if ended else "progress", p.step, values)
    if not ended or job.log.due():
        job.log.say(
            f"slice {p.slice - job.slices.start + 1}/{num_slices}  {values['examples']:,} examples  "
            f"{values['examples_per_s']:,.0f}/s  NE so far {so_far:.4f}  {values['seconds_left']:.0f} s left"
        )
    return metrics


def _lag(job: "Job") -> dict[str, Any]:
    """lag_s: seconds since the slice that just ended was labelled; behind_slices: labelled ones that wait."""
    if job.env.rank != 0:
        return {}
    p, kinds = job.progress, job.stream.label_kinds(job.config.heads.tasks)
    manifests = [job.stream.manifest(p.slice, kind) for kind in kinds]
    job.newest = min(job.stream.newest(kind, max(job.newest, p.slice)) for kind in kinds)
    labelled = max(float(m.extra.get("at", "nan")) for m in manifests if m is not None)
    return {"lag_s": clock_of(job.stream.root).now() - labelled, "behind_slices": job.newest - p.slice}


def anatomy_line(summary: dict[str, Any]) -> str:
    """Where the time went, largest first, and what to change."""
    stages: dict[str, float] = summary["stages"]
    total = max(sum(stages.values()), 1e-9)
    shares = [
        f"{stage} {s / total:.0%}" for stage, s in sorted(stages.items(), key=lambda i: -i[1]) if s / total >= 0.005
    ]
    mfu = f", MFU {summary['mfu']:.0%}" if "mfu" in summary else ""
    return (
        f"time: {', '.join(shares)}; goodput {summary['goodput']:.0%}, {summary['flops_per_s'] / 1e9:,.1f} GFLOP/s a rank{mfu}; "
        f"{summary['bottleneck']}"
    )


def write_summary(job: "Job") -> None:
    """summary.json and bootstrap.npz (replicates by group and task) of the evaluated slices; all ranks call."""
    p = job.progress
    total, histogram = _merged(job.metrics.total), _merged(job.metrics.histogram)
    replicates = _merged(job.metrics.replicates)
    covered = int(_merged(np.array([p.covered], np.int64))[0])
    groups = _by_group(job, total)
    for g, group in enumerate(_groups(job)):
        for t, task in enumerate(job.config.heads.tasks):
            groups[group][task]["auc"] = auc(histogram[g, t])
    supplied = None if job.teachers is None else job.teachers.describe(TOTAL)
    size = job.built.served.size()
    if job.env.rank != 0:
        return
    fs, root = job.ledger_fs, job.ledger_path.rsplit("/", 1)[0]
    seconds = p.seconds + time.monotonic() - job.begun
    summary = {
        "name": job.config.run.name,
        "stream": job.stream.root,
        "slices": [job.slices.start, job.slices.stop],
        "evaluated_from": job.first_evaluated,
        "examples": p.examples,
        "skipped": sum(e.stop - e.start for e in job.entries if e.skipped),
        "covered": covered,
        "teachers": supplied,
        "seconds": seconds,
        "examples_per_s": float(p.examples / max(seconds, 1e-9)),
        "world_size": job.env.world_size,
        "device": torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else "cpu",
        "dense_parameters": size.num_parameters,
        "flops_per_example": size.flops_per_example,
        "table_parameters": sum(t.rows * t.width for t in job.config.tables.values()),
        **job.pace.whole(p.examples),
        "groups": groups,
    }
    summary["bottleneck"] = verdict(summary["stages"])
    summary["anatomy"] = anatomy_line(summary)
    arrays: dict[str, Any] = {}
    for g, group in enumerate(_groups(job)):
        for t, task in enumerate(job.config.heads.tasks):
            arrays[f"{group}/{task}"] = replicate_ne(replicates[:, g, t])
            arrays[f"{group}/{task}/calibration"] = replicate_calibration(replicates[:, g, t])
    np.savez(f"{root}/bootstrap.npz", **arrays)
    commit_json(fs, f"{root}/summary.json", summary)
    main = groups["all"][job.config.heads.tasks[0]]
    job.log.say(summary["anatomy"])
    job.log.say(f"done: {p.examples:,} examples, NE {main['ne']:.4f}, AUC {main['auc']:.4f}, {seconds:.0f} s")

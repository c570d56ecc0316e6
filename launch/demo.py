"""`exfm demo`: the whole loop, small: one teacher over all traffic, two students of one domain each, a report."""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from exfm.data.errors import UserError
from exfm.data.manifest import open_stream
from exfm.data.movielens import download
from exfm.data.movielens import prepare as prepare_movielens
from exfm.data.synth import synth
from exfm.launch.comparison import Comparison, StudentPair, compare, table
from exfm.launch.local import LocalJob, run_jobs
from exfm.launch.progress import JobView
from exfm.launch.report import write_report

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Demo:
    """Where a demo's data and configs are. domains: the students' domains, named in the teacher's config."""

    name: str
    teacher: Path
    student: Path
    domains: tuple[dict[str, Any], ...]


DEMOS = {
    "ml1m": Demo(
        "MovieLens-1M",
        CONFIGS / "movielens_teacher.yaml",
        CONFIGS / "movielens_student.yaml",
        tuple({"name": f"d{k}", "column": "user_id", "modulo": 10, "values": [k]} for k in (3, 7)),
    ),
    "synth": Demo(
        "the synthetic stream",
        CONFIGS / "synth_teacher.yaml",
        CONFIGS / "synth_student.yaml",
        tuple({"name": f"d{k}", "column": "domain", "values": [k]} for k in (1, 2)),
    ),
}


def find_source(data: str | None, data_dir: str | None, cache: Path, say: Callable[[str], None], on: OnProgress) -> str:
    """Path of MovieLens-1M's files, or "synth". Order: --data, EXFM_DATA_DIR, the publisher, the synthetic stream.

    UserError where --data or EXFM_DATA_DIR names a place without data: only an unnamed source is replaced by another.
    """
    if data == "synth":
        return "synth"
    if data is not None and data != "ml1m":
        return _existing(Path(data))
    if data_dir:
        return _existing(Path(data_dir) / "ml1m")
    try:
        return str(download(cache, on))
    except (OSError, UserError) as error:
        if data == "ml1m":
            raise UserError(
                f"MovieLens-1M could not be downloaded ({error}); pass --data DIR or set EXFM_DATA_DIR"
            ) from None
        say(f"MovieLens-1M could not be downloaded ({error}); running on the built-in synthetic stream")
        return "synth"


def _existing(folder: Path) -> str:
    if not folder.exists():
        raise UserError(
            f"{folder} does not exist; give the folder of MovieLens-1M's files (ratings.dat or events.parquet)"
        )
    parquet = folder / "events.parquet"
    return str(parquet if parquet.exists() else folder)


def make_stream(source: str, out: Path, on: OnProgress) -> None:
    """Prepare the stream unless it is complete already."""
    if (out / "stream.json").exists() and open_stream(str(out)).info.num_slices:
        return
    if any(out.glob("slice=*")):  # an interrupted preparation, of use to nobody
        shutil.rmtree(out)
    if source == "synth":
        synth(str(out), num_slices=30, rows_per_slice=20_000, seed=0, progress=on)
    else:
        prepare_movielens(source, str(out), num_slices=50, progress=on)


def demo_jobs(demo: Demo, out: Path, nproc: int, stream: Path) -> tuple[list[LocalJob], list[StudentPair]]:
    """The teacher's job and, per domain, an undistilled and a distilled student."""
    if not demo.teacher.exists():
        raise UserError(f"{demo.teacher} does not exist; run `exfm demo` from a checkout of exfm")
    common = [f"stream.path={stream}", "checkpoint.every_slices=10"]
    teacher = out / "teacher"
    sets = [*common, f"run.folder={teacher}", f"stream.domains={_yaml(demo.domains)}"]
    jobs = [LocalJob(demo.teacher, nproc, tuple(sets))]
    pairs = []
    for domain in demo.domains:
        folders = {}
        for kind in ("undistilled", "distilled"):
            name = f"{domain['name']}-{kind}"
            folders[kind] = out / name
            sets = [*common, f"run.name={name}", f"run.folder={out / name}"]
            sets += [f"stream.domains={_yaml([domain])}", f"stream.domain={domain['name']}"]
            learn = f"distillation.learn.supervision={teacher / 'supervision' / 'teacher'}"
            sets.append(learn if kind == "distilled" else "distillation={}")
            jobs.append(LocalJob(demo.student, 1, tuple(sets)))
        pairs.append(StudentPair(domain["name"], folders["undistilled"], folders["distilled"]))
    return jobs, pairs


def _yaml(value: Any) -> str:
    return json.dumps(value)  # JSON is YAML


def run_demo(
    data: str | None, out: Path, nproc: int, environment: Mapping[str, str], data_dir: str | None, console: Console, on: OnProgress
) -> tuple[Comparison, Path]:  # fmt: skip
    """Prepare, train all jobs side by side, compare, write the report; the comparison and the report's path."""
    begun = time.monotonic()
    source = find_source(data, data_dir, out / "download", console.print, on)
    demo = DEMOS["synth" if source == "synth" else "ml1m"]
    stream = out / "stream" if source != "synth" else out / "stream-synth"
    console.print(f"exfm demo on {demo.name}: one teacher, students of {', '.join(d['name'] for d in demo.domains)}")
    make_stream(source, stream, on)
    jobs, pairs = demo_jobs(demo, out, nproc, stream)
    with JobView(console) as view:
        code = run_jobs(jobs, environment, view)
    if code:
        raise KeyboardInterrupt
    comparison = compare(jobs[0].folder, pairs)
    best = best_reachable(demo, stream, comparison.task)
    report = write_report(out / "report.html", [j.folder for j in jobs], comparison, f"exfm demo on {demo.name}", best)
    console.print(table(comparison))
    console.print(f"{time.monotonic() - begun:.0f} s in all. Report: {report.resolve()}", soft_wrap=True)
    return comparison, report


def best_reachable(demo: Demo, stream: Path, task: str) -> dict[str, float]:
    """Bayes-optimal NE of all traffic and of every domain where the stream knows it (synthetic), else nothing."""
    known = open_stream(str(stream)).info.extra.get("tasks", {}).get(task)
    if known is None:
        return {}
    by_value = known["bayes_ne_by_domain"]
    return {"all": known["bayes_ne"]} | {d["name"]: by_value[str(d["values"][0])] for d in demo.domains}

"""What distillation buys on MovieLens-1M: `exfm bench distill [--quick]`.

One teacher over all traffic per seed; the student serves one domain (user_id % 10 == 3, a tenth of the users). Arms: no
distillation, single head, auxiliary head, auxiliary head + student adapter (both fitting rules). Every arm is tuned with the
same number of trials on ANOTHER domain (user_id % 10 == 7), then run with every seed on the reported one. One pass in
order of time over 50 slices, progressive NE over the last 80%. Writes distill.md and distill.json.
"""

import argparse
import contextlib
import io
import json
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.progress import track

from exfm.data.errors import UserError
from exfm.launch.demo import CONFIGS, find_source, make_stream
from exfm.trainer.config import JobConfig, load_config, parse_config
from exfm.trainer.env import RankEnv
from exfm.trainer.run import run_job

TASK, REPORTED, TUNED_ON = "liked", "d3", "d7"
TUNING_SEED = 1000
TRIALS = 12  # per arm: all of GRID, or as many draws from GRID x LOSS_WEIGHT
GRID = {"optim.tables.lr": [0.05, 0.1, 0.2, 0.4], "optim.dense.lr": [0.001, 0.002, 0.004]}
LOSS_WEIGHT = {"distillation.learn.loss_weight": [0.3, 1.0, 3.0]}
ARMS: dict[str, dict[str, Any] | None] = {
    "undistilled": None,
    "single head": {"method": "single_head"},
    "auxiliary head": {"method": "auxiliary_head"},
    "auxiliary head + adapter, current batch": {"method": "student_adapter", "adapter": {"fit": "current"}},
    "auxiliary head + adapter, previous batch": {"method": "student_adapter", "adapter": {"fit": "previous"}},
}
console = Console(stderr=True)


@dataclass(frozen=True)
class Run:
    """One finished job's numbers on a group. replicates: bootstrap NE."""

    ne: float
    auc: float
    log_loss: float
    calibration: float
    seconds: float
    replicates: np.ndarray


def main(args: list[str], data_dir: str | None = None) -> int:
    parser = argparse.ArgumentParser(prog="exfm bench distill", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="5 seeds instead of 10")
    parser.add_argument("--seeds", type=int, help="number of seeds, at least 2")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/distill"))
    options = parser.parse_args(args)
    seeds = options.seeds or (5 if options.quick else 10)
    if seeds < 2:
        raise UserError(f"--seeds is {seeds}; a deviation needs at least 2")
    begun = time.monotonic()
    stream = options.out / "stream"
    make_stream(
        find_source("ml1m" if not data_dir else None, data_dir, options.out, console.print, _quiet), stream, _quiet
    )
    bench = Bench(options.out, stream)
    teachers = [bench.teacher(seed) for seed in _track(range(seeds), "teachers")]
    best = {arm: bench.tune(arm, TRIALS, teachers[0]) for arm in _track(ARMS, "tuning")}
    runs = {
        arm: [bench.student(arm, REPORTED, seed, best[arm], teachers[seed]) for seed in range(seeds)]
        for arm in _track(ARMS, "reported runs")
    }
    teacher_runs = [_read(folder, REPORTED) for folder in teachers]
    logged = sum(f.stat().st_size for f in (teachers[0] / "supervision").rglob("*.parquet"))
    result = summarise(runs, teacher_runs, best, TRIALS, seeds, logged, time.monotonic() - begun)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "distill.json").write_text(json.dumps(result, indent=1))
    text = markdown(result)
    (options.out / "distill.md").write_text(text)
    print(text)
    return 0


def _track(items: Any, what: str) -> Iterator[Any]:
    yield from track(list(items), what, console=console, disable=not console.is_terminal)


def _quiet(message: str, done: int, total: int) -> None:
    if done >= total:
        console.print(f"{message}: {done}/{total}", highlight=False)


class Bench:
    """Runs jobs in this process and reads their summaries; a finished run is not run again."""

    def __init__(self, out: Path, stream: Path) -> None:
        self.out, self.stream = out, stream
        self.teacher_config = yaml.safe_load((CONFIGS / "movielens_teacher.yaml").read_text())
        self.student_config = yaml.safe_load((CONFIGS / "movielens_student.yaml").read_text())

    def teacher(self, seed: int) -> Path:
        folder = self.out / f"teacher-{seed}"
        self._run(self.teacher_config, folder, {"run.seed": seed})
        return folder

    def tune(self, arm: str, trials: int, teacher: Path) -> dict[str, Any]:
        """The best of `trials` settings drawn without replacement from the arm's grid, by NE on the tuning domain."""
        grid = GRID if ARMS[arm] is None else GRID | LOSS_WEIGHT
        settings = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
        drawn = random.Random(0).sample(settings, min(trials, len(settings)))
        scored = [(self.student(arm, TUNED_ON, TUNING_SEED, s, teacher).ne, s) for s in drawn]
        ne, best = min(scored, key=lambda pair: pair[0])
        console.print(f"{arm}: NE {ne:.4f} on {TUNED_ON} with {best}", highlight=False)
        return best

    def student(self, arm: str, domain: str, seed: int, settings: dict[str, Any], teacher: Path) -> Run:
        name = "-".join([arm.replace(" ", "_"), domain, str(seed), *(f"{v:g}" for v in settings.values())])
        changes: dict[str, Any] = {
            "run.seed": seed,
            "stream.domain": domain,
            "stream.domains": [{"name": domain, "column": "user_id", "modulo": 10, "values": [int(domain[1:])]}],
            "distillation": {},
        }
        if (method := ARMS[arm]) is not None:
            supervision = str(teacher / "supervision" / "teacher")
            changes["distillation"] = {"learn": {"supervision": supervision, **method}}
        self._run(self.student_config, self.out / "students" / name, changes | settings)
        return _read(self.out / "students" / name, domain)

    def _run(self, config: dict[str, Any], folder: Path, changes: dict[str, Any]) -> None:
        raw = json.loads(json.dumps(config))
        changes = {
            "run.folder": str(folder),
            "run.name": folder.name.replace(",", ""),
            "stream.path": str(self.stream),
            "checkpoint.every_slices": 1000,
            **changes,
        }
        for key, value in changes.items():
            *path, last = key.split(".")
            node = raw
            for part in path:
                node = node.setdefault(part, {})
            node[last] = value
        job = parse_config(raw, str(folder), JobConfig)
        if (folder / "summary.json").exists():
            if load_config(folder / "config.yaml", [], JobConfig).identity() == job.identity():
                return
            shutil.rmtree(folder)
        with contextlib.redirect_stderr(io.StringIO()):
            run_job(job, RankEnv())


def _read(folder: Path, group: str) -> Run:
    summary = json.loads((folder / "summary.json").read_text())
    m = summary["groups"][group][TASK]
    with np.load(folder / "bootstrap.npz") as arrays:
        replicates = arrays[f"{group}/{TASK}"]
    return Run(m["ne"], m["auc"], m["log_loss"], m["calibration"], summary["seconds"], replicates)


def summarise(
    runs: dict[str, list[Run]], teachers: list[Run], best: dict[str, Any], trials: int, seeds: int, logged: int, seconds: float
) -> dict[str, Any]:  # fmt: skip
    """Means, deviations over seeds, paired gains with 95% intervals (clustered by user, mean over seeds), transfer ratios."""
    base = runs["undistilled"]
    arms = []
    for arm, done in runs.items():
        gain = np.mean([b.replicates - r.replicates for b, r in zip(base, done, strict=True)], axis=0)
        advantage = np.mean([b.replicates - t.replicates for b, t in zip(base, teachers, strict=True)], axis=0)
        mean_gain = float(np.mean([b.ne - r.ne for b, r in zip(base, done, strict=True)]))
        mean_advantage = float(np.mean([b.ne - t.ne for b, t in zip(base, teachers, strict=True)]))
        arms.append(
            {
                "arm": arm,
                **_means(done),
                "gain": mean_gain,
                "gain_percent": 100 * mean_gain / float(np.mean([b.ne for b in base])),
                "gain_interval": _interval(gain),
                "transfer_ratio": mean_gain / mean_advantage,
                "transfer_interval": _interval(gain / advantage),
                "settings": best[arm],
            }
        )
    return {
        "domain": "user_id % 10 == 3",
        "tuned_on": "user_id % 10 == 7",
        "trials_per_arm": trials,
        "seeds": seeds,
        "teacher": _means(teachers),
        "arms": arms,
        "supervision_bytes": logged,
        "seconds": seconds,
        "grid": GRID | LOSS_WEIGHT,
    }


def _means(runs: list[Run]) -> dict[str, float]:
    keys = ("ne", "auc", "log_loss", "calibration", "seconds")
    out = {key: float(np.mean([asdict(r)[key] for r in runs])) for key in keys}
    return out | {f"{key}_sd": float(np.std([asdict(r)[key] for r in runs], ddof=1)) for key in ("ne", "auc")}


def _interval(replicates: np.ndarray) -> list[float]:
    low, high = np.nanpercentile(replicates, [2.5, 97.5])
    return [float(low), float(high)]


def markdown(r: dict[str, Any]) -> str:
    """The table of docs/."""
    t = r["teacher"]
    lines = [
        f"Student on {r['domain']}; {r['seeds']} seeds (teacher and student), mean and standard deviation over seeds; intervals: "
        f"95%, paired Poisson bootstrap clustered by user. Every arm: best of {r['trials_per_arm']} trials on {r['tuned_on']}.",
        "",
        "| arm | NE | AUC | log loss | calibration | NE gain [95%] | gain | transfer ratio [95%] | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
        f"| teacher (all users) | {t['ne']:.4f} ± {t['ne_sd']:.4f} | {t['auc']:.4f} ± {t['auc_sd']:.4f} | {t['log_loss']:.4f} | "
        f"{t['calibration']:.3f} | | | | {t['seconds']:.0f} |",
    ]
    for a in r["arms"]:
        gain = transfer = percent = ""
        if a["arm"] != "undistilled":
            gain = f"{a['gain']:.4f} [{a['gain_interval'][0]:.4f}, {a['gain_interval'][1]:.4f}]"
            percent = f"{a['gain_percent']:.2f}%"
            transfer = f"{a['transfer_ratio']:.2f} [{a['transfer_interval'][0]:.2f}, {a['transfer_interval'][1]:.2f}]"
        lines.append(
            f"| {a['arm']} | {a['ne']:.4f} ± {a['ne_sd']:.4f} | {a['auc']:.4f} ± {a['auc_sd']:.4f} | {a['log_loss']:.4f} | "
            f"{a['calibration']:.3f} | {gain} | {percent} | {transfer} | {a['seconds']:.1f} |"
        )
    lines += ["", f"Supervision logged per teacher: {r['supervision_bytes'] / 2**20:.1f} MiB. Settings chosen:", ""]
    lines += [f"- {a['arm']}: " + ", ".join(f"{k} {v:g}" for k, v in a["settings"].items()) for a in r["arms"]]
    return "\n".join(lines) + "\n"

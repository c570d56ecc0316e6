"""The stream and the jobs of `exfm bench scaling`: the trainer in this process, one rank, each job once.

A finished run is one JSON file named by a digest of its configuration and stream, so an interrupted bench goes on where it stopped.
"""

import hashlib
import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from benchmarks._distill_runs import changed, quiet
from benchmarks._scaling_sizes import TRAINING, Raw, Size, wukong
from exfm.data.commit import commit_json
from exfm.data.manifest import open_stream
from exfm.data.synth import World, entropy, synth
from exfm.embeddings.tables import pooled_features
from exfm.models.interface import InputSpec
from exfm.trainer.config import JobConfig, check_against_stream, parse_config, read_raw
from exfm.trainer.env import RankEnv
from exfm.trainer.run import run_job

# Strong preferences of 8 latent dimensions, weighed differently in each of 8 domains: a product of three embeddings. They do not
# drift and no ids arrive, so that what limits a model is what it can compute and how fast it learns.
WORLD: Raw = {
    "num_slices": 8, "rows_per_slice": 20_000, "seed": 7, "num_users": 40, "num_items": 25, "num_groups": 10, "num_domains": 8,
    "width": 8, "growth": 0.0, "drift": 0.0, "affinity": 2.0, "domain_gain": 1.0,
}  # fmt: skip
WIDTH = 8  # of every embedding that interacts; users and items have four, as the paper gives to features that matter


def base(world: World) -> Raw:
    """The job of the synthetic stream, without model and learning rates: what a user gives with --config."""
    ids = {
        "user_id": ("user", world.num_ids("user", world.num_slices), 4 * WIDTH),
        "item_id": ("item", world.num_ids("item", world.num_slices), 4 * WIDTH),
        "recent_items": ("recent", world.num_ids("item", world.num_slices), 4 * WIDTH),
        "segment": ("segment", world.num_groups, WIDTH),
        "category": ("category", world.num_groups, WIDTH),
        "domain": ("domain", world.num_domains, WIDTH),
    }
    pooling = {"recent": {"pooling": "mean"}}
    return {
        "run": {"name": "scaling", "folder": ""},
        "stream": {"path": "", "global_batch": 512},
        "features": {
            "dense": ["context_a", "context_b", "noise"],
            "sparse": [{"name": name, "table": table, "ids": "identity"} for name, (table, _, _) in ids.items()],
        },
        "tables": {
            table: {"rows": rows, "width": width, "init": 0.1} | pooling.get(table, {})
            for table, rows, width in ids.values()
        },
        "heads": {"tasks": ["click"]},
        "optim": {"dense": {"warmup_steps": 50, "clip_norm": 10.0}},
    }


@dataclass(frozen=True)
class Study:
    """What every size is trained on. width: d. evaluated: share of the slices, the last ones, that count."""

    stream: str
    raw: Raw
    width: int
    inputs: InputSpec
    evaluated: float
    title: str

    @property
    def task(self) -> str:
        return str(self.raw["heads"]["tasks"][0])


@dataclass(frozen=True)
class Rates:
    """Learning rates of the dense part and of the tables."""

    dense: float
    tables: float


def synthetic(out: Path, evaluated: float, **over: Any) -> Study:
    """The study of the synthetic stream, which is made unless it is there. over: settings of the world."""
    settings = WORLD | over
    world = World(**settings)
    path = out / "stream"
    if (path / "stream.json").exists():
        made = open_stream(str(path)).info.extra["settings"]
        if {k: made[k] for k in settings} != settings:
            shutil.rmtree(path)
    if not (path / "stream.json").exists():
        shutil.rmtree(path, ignore_errors=True)
        synth(str(path), **settings)
    words = f"synthetic stream, {world.num_slices * world.rows_per_slice:,} examples, {world.num_users} users, {world.num_items} items"
    return _study(str(path), base(world), evaluated, words)


def given(stream: str, config: Path, evaluated: float) -> Study:
    """The study of a user's stream with the features, tables and first task of a config. UserError where they do not fit."""
    raw = read_raw(config, [])
    raw.pop("distillation", None)
    if tasks := (raw.get("heads") or {}).get("tasks"):
        raw["heads"] = {"tasks": tasks[:1]}
    return _study(stream, raw, evaluated, f"stream {Path(stream).name}, features of {config.name}")


def _study(stream: str, raw: Raw, evaluated: float, title: str) -> Study:
    raw = changed(raw, {"stream.path": stream, "evaluation.skip": 1 - evaluated})
    tables, model = (raw[k] if isinstance(raw.get(k), dict) else {} for k in ("tables", "model"))
    widths = [t["width"] for t in tables.values() if isinstance(t, dict) and isinstance(t.get("width"), int)]
    width = model.get("width") or math.gcd(*widths) or 1
    # any model will do to have the rest checked
    config = parse_config(changed(raw, {"model": wukong((1, 1, 1), width, 1)}), "of the bench", JobConfig)
    check_against_stream(config, open_stream(stream, config.stream.labels))
    inputs = InputSpec(len(config.features.dense), pooled_features(config.features, config.tables))
    return Study(stream, raw, width, inputs, evaluated, title)


def bayes(study: Study, first: int) -> float | None:
    """The lowest reachable NE, expected, of the stream from slice `first` on; None where the stream does not say."""
    stream = open_stream(study.stream)
    (kind,) = stream.label_kinds([study.task])
    last = study.raw["stream"].get("last") or stream.info.num_slices
    manifests = [stream.manifest(index, kind) for index in range(first, last or 0)]
    known = [(m.rows, m.extra.get(study.task)) for m in manifests if m is not None]
    if not known or any(truth is None for _, truth in known):
        return None
    rows, rate, ne = np.array([(n, t["base_rate"], t["bayes_ne"]) for n, t in known if t]).T
    share = rows / rows.sum()
    return float((share * ne * entropy(rate)).sum() / entropy(float((share * rate).sum())))


class Runner:
    """Runs jobs under `out`. done, reused: jobs run now and jobs found finished."""

    def __init__(self, out: Path, study: Study, threads: int = 1) -> None:
        self.out, self.study, self.threads = out, study, threads
        stream = open_stream(study.stream)
        self.stream = stream.fs.cat_file(f"{stream.root}/stream.json").decode()
        self.done = self.reused = 0

    def run(self, size: Size, rates: Rates, seed: int) -> Raw:
        """NE and more of a finished run; trained unless its file is there."""
        raw = changed(self.study.raw, {
            "model": size.model, "optim.dense.lr": rates.dense, "optim.tables.lr": rates.tables, "run.seed": seed,
            "run.device": "cpu", "checkpoint": {"every_slices": 100_000}, "evaluation.bootstrap": 0,
        })  # fmt: skip
        raw["run"] |= {"name": size.architecture, "folder": str(self.out / "job"), "threads_per_rank": self.threads}
        content = json.dumps({k: v for k, v in raw.items() if k != "run"} | {"seed": seed}, sort_keys=True)
        digest = hashlib.sha256((content + self.stream).encode()).hexdigest()[:16]
        kept = self.out / "runs" / f"{size.architecture}-{size.rung}-{digest}.json"
        if kept.exists():
            self.reused += 1
            return dict(json.loads(kept.read_text()))
        shutil.rmtree(self.out / "job", ignore_errors=True)  # of a run that was interrupted
        begun = time.process_time()
        with quiet():
            run_job(parse_config(raw, "of the bench", JobConfig), RankEnv())
        result = self._read(size, rates, seed) | {"cpu_seconds": time.process_time() - begun}
        kept.parent.mkdir(parents=True, exist_ok=True)
        commit_json(fsspec.filesystem("file"), str(kept), result)
        shutil.rmtree(self.out / "job")
        self.done += 1
        return result

    def _read(self, size: Size, rates: Rates, seed: int) -> Raw:
        summary = json.loads((self.out / "job" / "summary.json").read_text())
        assert TRAINING * summary["flops_per_example"] == size.flops
        m = summary["groups"]["all"][self.study.task]
        return {
            "architecture": size.architecture, "rung": size.rung, "label": size.label, "seed": seed, "flops": size.flops,
            "dense_parameters": summary["dense_parameters"], "table_parameters": summary["table_parameters"],
            "lr_dense": rates.dense, "lr_tables": rates.tables, "ne": m["ne"], "auc": m["auc"], "evaluated": m["examples"],
            "evaluated_from": summary["evaluated_from"], "examples": summary["examples"],
        }  # fmt: skip

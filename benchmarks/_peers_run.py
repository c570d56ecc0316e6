"""One peer trains once in a process of its own: `python -m benchmarks._peers_run SPEC.json`, which says what; the result goes beside it."""

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import _peers_fuxictr
from benchmarks._peers_data import EPOCHS, Held, World, auc, criteo, frappe, held, job_of, sizes_of
from benchmarks._peers_torch import Trainer
from exfm.trainer.config import JobConfig
from exfm.trainer.env import RankEnv, process_group
from exfm.trainer.loop import Job

CPU = torch.device("cpu")


def world_of(spec: dict[str, Any]) -> World:
    folder = Path(spec["folder"])
    if spec["data"] == "frappe":
        return frappe(Path(spec["source"]), folder, spec["examples"])
    return criteo(folder, spec["examples"], spec["rows"])


def config_of(spec: dict[str, Any], world: World) -> JobConfig:
    run = {"run": world.job["run"] | {"threads_per_rank": spec["threads"]}}
    engine = {"dense_engine": {"compile": True}} if spec["compiled"] else {}
    optim = {"optim": {"dense": {"lr": spec["lr"]}, "tables": {"lr": spec["tables_lr"]}}}
    return job_of(world, run | optim | (engine if spec["peer"] == "exfm" else {}))


class Enough(Exception):
    """As many examples as asked for have been trained."""


def train_exfm(spec: dict[str, Any], config: JobConfig, world: World) -> dict[str, Any]:
    """The job as `exfm train` runs it in its rank: reader, pipeline, tables, loss guard, metrics, log, commits between slices."""
    shutil.rmtree(config.run.folder, ignore_errors=True)
    marks: list[tuple[float, float, int]] = []
    with process_group(RankEnv(), CPU, 600):
        job = Job(config, RankEnv(), CPU, lambda: False)
        run = job.pipeline.run

        def timed(feed: Any) -> Iterator[Any]:
            for item in run(feed):
                yield item
                marks.append((time.perf_counter(), time.process_time(), job.progress.examples))
                if spec["examples"] and job.progress.examples >= spec["examples"]:
                    raise Enough

        job.pipeline.run = timed  # type: ignore[method-assign]
        found: dict[str, Any] = {"marks": marks, "parameters": _parameters(config, job)}
        with contextlib.suppress(Enough):
            job.train()
        if world.test is not None:
            test = _batches(job, config, world.test)
            with torch.no_grad():
                scores = [job.built.model(batch)[1].logits[:, 0] for batch in test]
            found["auc"] = auc(torch.cat(scores).numpy(), torch.cat([b.labels[:, 0] for b in test]).numpy())
        job.commits.wait()
        job.close()
    return found


def _parameters(config: JobConfig, job: Job) -> int:
    return job.built.served.size().num_parameters + sum(t.rows * t.width for t in config.tables.values())


def _batches(job: Job, config: JobConfig, index: int) -> list[Any]:
    reader = job.open(index)
    assert reader is not None
    return list(reader.batches())


def train_plain(spec: dict[str, Any], config: JobConfig, train: list[list[Held]], test: list[Held]) -> dict[str, Any]:
    """train: the batches of every epoch."""
    trainer = Trainer(config, spec["peer"], spec["compiled"])
    trainer.score(train[0][0])  # compiles
    marks, done = [], 0
    for batch in (batch for epoch in train for batch in epoch):
        trainer.step(batch)
        done += len(batch.labels)
        marks.append((time.perf_counter(), time.process_time(), done))
    found: dict[str, Any] = {"marks": marks, "parameters": sum(p.numel() for p in trainer.model.parameters())}
    if test:
        scores = torch.cat([trainer.score(batch) for batch in test]).numpy()
        found["auc"] = auc(scores, torch.cat([b.labels for b in test]).numpy())
    return found


def speeds(marks: list[tuple[float, float, int]]) -> dict[str, float]:
    """Examples per wall and per CPU second between the first step's end and the last one's."""
    (wall, cpu, first), (wall_end, cpu_end, last) = marks[0], marks[-1]
    return {
        "examples_per_s": (last - first) / (wall_end - wall),
        "examples_per_cpu_s": (last - first) / (cpu_end - cpu),
    }


def train(spec: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(spec["threads"])
    world = world_of(spec)
    config = config_of(spec, world)
    if spec["peer"] == "exfm":
        found = train_exfm(spec, config, world)
    else:
        epochs = 1 if world.test is None else EPOCHS
        batches = [held(config, index, spec["examples"]) for index in range(epochs)]
        test = [] if world.test is None else held(config, world.test)
        if spec["peer"] == "fuxictr":
            names, folder = [f.name for f in config.features.sparse], Path(spec["folder"]) / "fuxictr"
            found = _peers_fuxictr.run(
                Path(spec["fuxictr"]), folder, names, sizes_of(config), batches[0], test, spec["lr"]
            )
        else:
            found = train_plain(spec, config, batches, test)
    return found | speeds(found.pop("marks"))


def main(path: Path, work: Callable[[dict[str, Any]], dict[str, Any]] = train) -> None:
    result = work(json.loads(path.read_text()))
    path.with_suffix(".result.json").write_text(json.dumps(result, default=np.ndarray.tolist))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # libraries' threads now and then abort an interpreter that ends

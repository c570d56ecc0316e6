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
from benchmarks._peers_data import EPOCHS, Held, World, auc, batches_of, criteo, frappe, held, job_of, sizes_of
from benchmarks._peers_torch import Trainer
from benchmarks._peers_torchrec import TorchRec
from exfm.data.batch import Batch
from exfm.trainer.config import JobConfig
from exfm.trainer.env import RankEnv, pick_device, process_group
from exfm.trainer.loop import Job


def world_of(spec: dict[str, Any]) -> World:
    folder = Path(spec["folder"])
    if spec["data"] == "frappe":
        return frappe(Path(spec["source"]), folder, spec["examples"])
    return criteo(folder, spec["examples"], spec["rows"], spec["model"], spec["batch"])


def config_of(spec: dict[str, Any], world: World) -> JobConfig:
    run = world.job["run"] | {"threads_per_rank": spec["threads"], "device": spec["device"], "seed": spec["seed"]}
    if spec["device"] == "cuda":
        run |= {"pipeline": "sparse_dist"}
    sets = {
        "run": run,
        "optim": {"dense": {"lr": spec["lr"]}, "tables": {"lr": spec["tables_lr"]}},
        "precision": {"dense": spec["precision"]},
        "dense_engine": {"compile": spec["compiled"] and spec["peer"] == "exfm"},
    }
    return job_of(world, sets)


def now(device: torch.device, settled: bool = False) -> tuple[float, float]:
    """Wall and CPU seconds. settled: after the device has done what it was told; between two such marks its speed is known."""
    if settled and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter(), time.process_time()


class Enough(Exception):
    """As many examples as asked for have been trained."""


def train_exfm(spec: dict[str, Any], config: JobConfig, test: int | None) -> dict[str, Any]:
    """The job as `exfm train` runs it in its rank: reader, pipeline, tables, loss guard, metrics, log, commits between slices.

    test: the slice that is scored afterwards.
    """
    shutil.rmtree(config.run.folder, ignore_errors=True)
    marks: list[tuple[float, float, int]] = []
    device = pick_device(config.run.device, RankEnv())
    with process_group(RankEnv(), device, 600):
        job = Job(config, RankEnv(), device, lambda: False)
        run = job.pipeline.run

        def timed(feed: Any) -> Iterator[Any]:
            for item in run(feed):
                yield item
                marks.append((*now(device, settled=not marks), job.progress.examples))
                if spec["examples"] and job.progress.examples >= spec["examples"]:
                    raise Enough

        job.pipeline.run = timed  # type: ignore[method-assign]
        found: dict[str, Any] = {"marks": marks, "parameters": _parameters(config, job)}
        with contextlib.suppress(Enough):
            job.train()
        if device.type == "cuda":
            marks.append((*now(device, settled=True), marks[-1][2]))
        if test is not None:
            batches = _batches(job, config, test)
            with torch.no_grad():
                scores = [job.built.model(batch)[1].logits[:, 0] for batch in batches]
            found["auc"] = auc(torch.cat(scores).numpy(), torch.cat([b.labels[:, 0] for b in batches]).numpy())
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


def train_torchrec(config: JobConfig, batches: list[Batch], compiled: bool) -> dict[str, Any]:
    device = pick_device(config.run.device, RankEnv())
    with process_group(RankEnv(), device, 600):
        trainer = TorchRec(config, device, compiled)
        if device.type == "cuda":
            batches = [batch.pin_memory() for batch in batches]
        marks, done = [], 0
        for examples, _ in trainer.train(batches):
            done += examples
            marks.append((*now(device, settled=not marks), done))
        marks.append((*now(device, settled=True), done))
        dense = sum(p.numel() for p in trainer.served.parameters())
    return {"marks": marks, "parameters": dense + sum(t.rows * t.width for t in config.tables.values())}


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
        found = train_exfm(spec, config, world.test)
    elif spec["peer"] == "torchrec":
        epochs = 1 if world.test is None else EPOCHS
        batches = [b for index in range(epochs) for b in batches_of(config, index, spec["examples"])]
        found = train_torchrec(config, batches, spec["compiled"])
    else:
        epochs = 1 if world.test is None else EPOCHS
        batches = [held(config, index, spec["examples"]) for index in range(epochs)]
        test = [] if world.test is None else held(config, world.test)
        if spec["peer"] == "fuxictr":
            names, folder = [f.name for f in config.features.sparse], Path(spec["folder"]) / "fuxictr"
            found = _peers_fuxictr.run(
                Path(spec["fuxictr"]), folder, names, sizes_of(config), batches[0], test, spec["lr"], spec["seed"]
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

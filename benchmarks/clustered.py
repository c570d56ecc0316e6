"""What looking up a user's repeated lists once per batch saves: `exfm bench clustered`, the MovieLens teacher on one rank.

Two models, of the same start, take every step in turn in one process: one with stream.once naming the histories, one without. Ids per
example that are sent and looked up, CPU time of reading and of the whole step, NE of the pass. Writes clustered.json and clustered.md.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._movielens import movielens
from exfm.data.batch import Batch
from exfm.data.errors import UserError
from exfm.data.manifest import Stream, open_stream
from exfm.data.reader import open_slice
from exfm.trainer.anatomy import Anatomy
from exfm.trainer.build import build
from exfm.trainer.columns import batch_columns
from exfm.trainer.config import JobConfig, load_config
from exfm.trainer.env import RankEnv, process_group
from exfm.trainer.steps import Feed, Pipeline

ROOT = Path(__file__).parents[1]
SETTINGS = {"every list": [], "repeated lists once": ["stream.once=[liked_movies, disliked_movies]"]}
CPU = torch.device("cpu")


class Run:
    """One setting's model and what it has cost so far. CPU seconds per slice, ids and loss in all."""

    def __init__(self, config: JobConfig, stream: Stream) -> None:
        self.config, self.stream, self.columns = config, stream, batch_columns(config, stream)
        self.pipeline = Pipeline("base", build(config, RankEnv(), CPU, (0.0,)), CPU, Anatomy(CPU))
        self.reading: list[float] = []
        self.stepping: list[float] = []
        self.examples = self.ids = 0
        self.loss = self.positive = 0.0

    def read(self, index: int) -> list[Batch]:
        begun = time.process_time()
        batches = list(open_slice(self.stream, self.config.stream, self.columns, index, 0).batches())
        self.reading.append((time.process_time() - begun) / sum(map(len, batches)))
        return batches

    def step(self, index: int) -> None:
        batches = self.read(index)
        begun = time.process_time()
        losses = [float(out.loss) for _, out in self.pipeline.run(Feed(iter(batches)))]
        self.stepping.append((time.process_time() - begun) / sum(map(len, batches)))
        for batch, loss in zip(batches, losses, strict=True):
            self.examples += len(batch)
            self.ids += batch.sparse.values().numel()
            self.loss += loss * len(batch)
            self.positive += float(batch.labels.sum())

    def result(self) -> dict[str, Any]:
        rate = self.positive / self.examples
        entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
        return {
            "ids_per_example": self.ids / self.examples,
            "reading_us": 1e6 * statistics.median(self.reading),
            "step_us": 1e6 * statistics.median(self.stepping),
            "ne": self.loss / self.examples / entropy,
        }


def markdown(found: dict[str, dict[str, Any]], ratios: list[float]) -> str:
    lines = [
        "| lookup | ids per example | reading, CPU us per example | whole step, CPU us per example | NE |",
        "|---|---|---|---|---|",
    ]
    for name, r in found.items():
        lines.append(
            f"| {name} | {r['ids_per_example']:.1f} | {r['reading_us']:.2f} | {r['step_us']:.1f} | {r['ne']:.5f} |"
        )
    low, middle, high = ratios
    lines += ["", f"Step's CPU time, once by every: {middle:.3f} [quartiles over slices {low:.3f}, {high:.3f}].", ""]
    return "\n".join(lines)


def main(args: list[str], data_dir: str | None = None) -> int:
    parser = argparse.ArgumentParser(prog="exfm bench clustered", description=__doc__)
    parser.add_argument("--slices", type=int, default=20, help="of 50")
    parser.add_argument("--set", action="append", default=[], dest="sets", help="override a key of the config")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/clustered"))
    o = parser.parse_args(args)
    if o.slices < 2:
        raise UserError(f"--slices is {o.slices}; a spread needs 2 or more")
    path = movielens(o.out, data_dir, "clustered")
    sets = [f"stream.path={path}", "distillation={}", *o.sets]
    stream = open_stream(str(path))
    with process_group(RankEnv(), CPU, 60.0):
        runs = {
            name: Run(load_config(ROOT / "configs/movielens_teacher.yaml", sets + own, JobConfig), stream)
            for name, own in SETTINGS.items()
        }
        for index in range(o.slices):
            for run in list(runs.values())[:: 1 if index % 2 else -1]:
                run.step(index)
    every, once = runs.values()
    ratios = statistics.quantiles([b / a for a, b in zip(every.stepping, once.stepping, strict=True)], n=4)
    found = {name: run.result() for name, run in runs.items()}
    result = {"global_batch": every.config.stream.global_batch, "lookups": found, "step_ratio_quartiles": ratios}
    (o.out / "clustered.json").write_text(json.dumps(result, indent=1))
    (o.out / "clustered.md").write_text(text := markdown(found, ratios))
    print(text)
    return 0

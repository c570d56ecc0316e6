"""A run's folder as the report reads it; a run that is still going has no summary yet."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from exfm.data.commit import nan_for_null
from exfm.data.errors import UserError
from exfm.sharding.plan import read_plan
from exfm.sharding.planner import describe
from exfm.trainer.metrics import entropy
from exfm.trainer.planning import PLAN

DTYPE_BYTES = {"fp32": 4, "fp16": 2}


@dataclass(frozen=True)
class Run:
    """slices: the line of each finished slice; ticks: (share of the job, seconds, examples) at every logged line."""

    folder: Path
    name: str
    config: dict[str, Any]
    config_text: str
    summary: dict[str, Any] | None
    plan: list[dict[str, Any]]
    slices: list[dict[str, Any]]
    ticks: list[tuple[float, float, float]]

    @property
    def groups(self) -> list[str]:
        """What the run measured; of a student only its domain, because that is all it sees."""
        own = self.config["stream"].get("domain")
        if own:
            return [own]
        return ["all", *(d["name"] for d in self.config["stream"].get("domains") or [])]

    @property
    def task(self) -> str:
        return str(self.config["heads"]["tasks"][0])

    def series(self, group: str, task: str, value: str) -> tuple[list[int], list[float]]:
        """(slices, values) of a metric, without the slices that have none."""
        lines = [(line["slice"], line["metrics"].get(group, {}).get(task)) for line in self.slices]
        found = [(s, m[value]) for s, m in lines if m is not None and m[value] is not None and np.isfinite(m[value])]
        return [s for s, _ in found], [v for _, v in found]

    def pooled_ne(self, group: str, task: str, width: int) -> tuple[list[int], list[float]]:
        """NE of the last `width` slices together, at every slice."""
        lines = [(line["slice"], line["metrics"].get(group, {}).get(task)) for line in self.slices]
        kept = [(s, m) for s, m in lines if m is not None and np.isfinite(m["log_loss"])]
        slices, values = [], []
        for i, (number, _) in enumerate(kept):
            window = [m for _, m in kept[max(0, i + 1 - width) : i + 1]]
            counts = [m["examples"] for m in window]
            loss, rate = (np.average([m[key] for m in window], weights=counts) for key in ("log_loss", "base_rate"))
            if 0 < rate < 1:
                slices.append(number)
                values.append(float(loss / entropy(rate)))
        return slices, values

    def table_shape(self, table: str) -> tuple[int, int, int]:
        """(rows, width, bytes of one value)."""
        spec = self.config["tables"][table]
        return int(spec["rows"]), int(spec["width"]), DTYPE_BYTES[spec["dtype"]]


def read_run(folder: Path) -> Run:
    """UserError for a folder that no job wrote."""
    config_path = folder / "config.yaml"
    if not config_path.is_file():
        raise UserError(
            f"'{folder}' is not a run: it has no config.yaml; give the folder that a job wrote (run.folder)"
        )
    text = config_path.read_text()
    config = yaml.safe_load(text)
    lines = list(_current(_lines(folder / "metrics.jsonl")))
    return Run(
        folder=folder,
        name=str(config["run"]["name"]),
        config=config,
        config_text=text,
        summary=_json(folder / "summary.json"),
        plan=_plan(folder),
        slices=[line for line in lines if line["kind"] == "slice"],
        ticks=[
            (line["share"], line["examples"] / line["examples_per_s"], line["examples"])
            for line in lines
            if line["examples_per_s"]
        ],
    )


def _plan(folder: Path) -> list[dict[str, Any]]:
    """Shard by shard; none where the job has not begun, rows as they are in a plan of an earlier version."""
    found = _json(folder / PLAN) or []
    return found if isinstance(found, list) else describe(read_plan(folder / PLAN))


def _json(path: Path) -> Any:
    return nan_for_null(json.loads(path.read_text())) if path.is_file() else None


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Progress and slice lines; a line cut off by a crash, or still being written, is left out."""
    if not path.is_file():
        return
    for text in path.read_text().splitlines():
        try:
            line = nan_for_null(json.loads(text))
        except json.JSONDecodeError:
            continue
        if line.get("kind") in ("slice", "progress"):
            yield line


def _current(lines: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what was trained again after a restart: a job that goes back takes back the lines from there on."""
    kept: list[dict[str, Any]] = []
    for line in lines:
        while kept and _position(kept[-1]) >= _position(line):
            kept.pop()
        kept.append(line)
    return kept


def _position(line: Mapping[str, Any]) -> tuple[int, int, bool]:
    """Grows from line to line of one attempt: slice, examples, slice end after progress inside it."""
    return line["slice"], line["examples"], line["kind"] == "slice"

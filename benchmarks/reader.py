"""The reader beside bare decoding: `exfm bench reader [--config FILE] [--set KEY=VALUE]`, on a stream that exists.

ours: batches as a job gets them, from committed slices, one thread: checks, joins of features and labels, ids to rows, padding, tensors.
bare: pyarrow decodes the same columns of the same row groups and nothing is made of them. Rows per second of CPU time, so that other
programs of the machine do not count; files in the page cache; medians of rounds in which the two take turns, and the quartiles of the
rounds' ratios. Without --config the MovieLens teacher's. Writes reader.json and reader.md under --out.
"""

import argparse
import json
import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks._movielens import movielens
from exfm.data.manifest import Stream, open_stream, slice_folder
from exfm.data.reader import open_slice
from exfm.trainer.columns import batch_columns
from exfm.trainer.config import JobConfig, check_against_stream, load_config

ROOT = Path(__file__).parents[1]


def ours(config: JobConfig, stream: Stream, slices: range) -> int:
    columns, rows = batch_columns(config, stream), 0
    for index in slices:
        reader = open_slice(stream, config.stream, columns, index, config.run.seed)
        deque(reader.batches(), maxlen=0)
        rows += reader.examples
    return rows


def bare(config: JobConfig, stream: Stream, slices: range) -> int:
    columns, rows = batch_columns(config, stream), 0
    for index in slices:
        for kind, names in (("features", columns.of_features()), ("labels", columns.labels)):
            for path in sorted(Path(slice_folder(stream.root, index), kind).glob("*.parquet")):
                file = pq.ParquetFile(path)
                for group in range(file.num_row_groups):
                    decoded = file.read_row_group(group, columns=list(names), use_threads=False)
                    rows += decoded.num_rows if kind == "features" else 0
    return rows


def rates(rounds: int, *works: Callable[[], int]) -> list[list[float]]:
    """Rows per CPU second of each in every round, in turn."""
    found: list[list[float]] = [[] for _ in works]
    for _ in range(rounds + 1):  # the first one fills the page cache
        for own, work in zip(found, works, strict=True):
            begun = time.process_time()
            rows = work()
            own.append(rows / (time.process_time() - begun))
    return [own[1:] for own in found]


def main(args: list[str], data_dir: str | None = None) -> int:
    parser = argparse.ArgumentParser(prog="exfm bench reader", description=__doc__)
    parser.add_argument("--config", type=Path, help="a job's; default: the MovieLens teacher's")
    parser.add_argument("--set", action="append", default=[], dest="sets", help="override a key of the config")
    parser.add_argument("--slices", type=int, default=10, help="how many are read, from stream.first on")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/reader"))
    o = parser.parse_args(args)
    sets = list(o.sets)
    if o.config is None:
        sets.append(f"stream.path={movielens(o.out, data_dir, 'reader', '--config, or ')}")
    config = load_config(o.config or ROOT / "configs/movielens_teacher.yaml", sets, JobConfig)
    stream = open_stream(config.stream.path, config.stream.labels)
    check_against_stream(config, stream)
    slices = range(config.stream.first, min(config.stream.first + o.slices, stream.info.num_slices or 0))
    pa.set_cpu_count(1)
    found = rates(o.rounds, lambda: ours(config, stream, slices), lambda: bare(config, stream, slices))
    a, b = (statistics.median(own) for own in found)
    low, ratio, high = statistics.quantiles([x / y for x, y in zip(*found, strict=True)], n=4)
    result: dict[str, Any] = {
        "stream": stream.info.stream_schema.name,
        "columns": len(batch_columns(config, stream).of_features()),
        "global_batch": config.stream.global_batch,
        "rows_per_cpu_s": a,
        "bare_rows_per_cpu_s": b,
        "ratio": ratio,
        "ratio_quartiles": [low, high],
    }
    o.out.mkdir(parents=True, exist_ok=True)
    (o.out / "reader.json").write_text(json.dumps(result, indent=1))
    text = (
        "| stream | columns | batch | reader, rows per CPU s | bare pyarrow, rows per CPU s | ratio [quartiles] |\n|---|---|---|---|---|---|\n"
        f"| {result['stream']} | {result['columns']} | {result['global_batch']} | {a:,.0f} | {b:,.0f} | {ratio:.2f} [{low:.2f}, {high:.2f}] |\n"
    )
    (o.out / "reader.md").write_text(text)
    print(text)
    return 0

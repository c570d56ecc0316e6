"""Negatives kept at a rate below 1: what is served is calibrated on the traffic as it was, what is measured on the data as they are."""

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from exfm.data.cut import Cut, write_stream
from exfm.data.manifest import Stream
from exfm.data.schema import Schema, SparseColumn
from tests.distillation.hand_made import hand_log
from tests.trainer.jobs import Raw, job, run, summary

RATE, ITEMS, SLICES = 0.25, 20, 4
# of every item, in the traffic as it was
TRUTH = np.linspace(0.06, 0.3, ITEMS)


def sampled_stream(folder, declared: float, num_impressions: int = 40_000) -> Stream:
    """Impressions of items with known rates, a quarter of the negatives kept; `declared` is what the schema says."""
    rng = np.random.default_rng(0)
    item = rng.integers(0, ITEMS, num_impressions)
    click = rng.random(num_impressions) < TRUTH[item]
    kept = click | (rng.random(num_impressions) < RATE)
    item, click, n = item[kept], click[kept], int(kept.sum())
    schema = Schema(
        name="sampled", labels=("click",), sparse=(SparseColumn(name="item"),), negative_rates={"click": declared}
    )
    table = pa.table(
        {
            "example_id": np.arange(n),
            "timestamp": np.arange(n),
            "item": item,
            "click": click.astype(np.float32),
        }
    )
    edges = np.linspace(0, n, SLICES + 1).astype(int).tolist()
    return write_stream(str(folder), schema, table, [Cut(a, b, a, b) for a, b in pairwise(edges)])


def the_job(folder, stream: Stream, learn: Raw | None) -> Raw:
    return job(
        folder,
        stream.root,
        stream__global_batch=128,
        features={"dense": [], "sparse": [{"name": "item", "table": "item", "ids": "identity"}]},
        tables={"item": {"rows": ITEMS, "width": 8, "init": 0.1}},
        heads={"tasks": ["click"], "hidden": [8]},
        optim={"dense": {"lr": 0.005}, "tables": {"lr": 0.2}},
        evaluation={"skip": 0.5, "bootstrap": 0},
        **({} if learn is None else {"distillation": {"learn": learn}}),
    )


def served_over_truth(raw: Raw, stream: Stream) -> float:
    """Mean served probability / mean known rate over the items, from the last half of the stream."""
    _, recorder = run(raw)
    item = np.concatenate([_column(stream, index, "features", "item") for index in range(SLICES)])
    ids = np.arange(len(item))[len(item) // 2 :]
    served = np.array([1 / (1 + np.exp(-recorder.logits[i][0])) for i in ids])
    # every item counts alike, whatever share of its impressions was kept
    by_item = np.bincount(item[ids], served, ITEMS) / np.bincount(item[ids], minlength=ITEMS)
    return float(by_item.mean() / TRUTH.mean())


def _column(stream: Stream, index: int, kind: str, name: str) -> np.ndarray:
    manifest = stream.manifest(index, kind)
    assert manifest is not None
    folder = f"{stream.root}/slice={index:06d}/{kind}"
    return np.concatenate([pq.read_table(f"{folder}/{part.path}")[name].to_numpy() for part in manifest.parts])


@pytest.mark.parametrize("method", [None, "single_head", "student_adapter"])
def test_what_is_served_is_calibrated_on_the_traffic_as_it_was(method, tmp_path):
    stream = sampled_stream(tmp_path / "stream", RATE)
    learn = None
    if method is not None:  # a teacher that knows the truth
        log = hand_log(
            tmp_path / "fm",
            stream,
            lambda f: np.log(TRUTH / (1 - TRUTH))[f["item"].to_numpy()],
            range(SLICES),
            ("click",),
        )
        learn = {"supervision": log, "method": method}
    raw = the_job(tmp_path / "run", stream, learn)
    assert served_over_truth(raw, stream) == pytest.approx(1, abs=0.04)
    measured = summary(raw)["groups"]["all"]["click"]
    assert measured["calibration"] == pytest.approx(1, abs=0.03)
    click = np.concatenate([_column(stream, index, "labels", "click") for index in range(SLICES // 2, SLICES)])
    assert measured["base_rate"] == pytest.approx(click.mean())  # of the data as they are


def test_without_the_correction_the_served_probability_is_far_too_high(tmp_path):
    stream = sampled_stream(tmp_path / "stream", 1.0)
    assert served_over_truth(the_job(tmp_path / "run", stream, None), stream) > 1.8

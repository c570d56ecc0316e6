"""Slow ranks: named with host and times while they hold up the others; ranks that only wait for them are not."""

import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from exfm.trainer.anatomy import Anatomy
from exfm.trainer.beats import Beat
from exfm.trainer.env import RankEnv
from exfm.trainer.stragglers import STEPS, OwnTime, Ranks, _median_without
from exfm.trainer.watch import Doing
from tests.trainer.jobs import parsed, teacher
from tests.trainer.test_watch import HOST, Launch, launch, stream, wait_until

__all__ = ["launch", "stream"]  # fixtures


def test_a_slow_rank_of_a_running_job_is_named_with_its_host(launch: Callable[..., Launch]) -> None:
    """Rank 2 takes 40 ms longer to read a batch: all ranks take as long for a step."""
    job = launch(3, "slow", 2, log_every_s=1.0)
    wait_until(lambda: "is slow" in job.said() or job.process.poll() is not None)
    said = [line for line in job.said().splitlines() if "is slow" in line]
    assert len(said) == 1 and said[0].startswith(f"[teacher] rank 2 (host {HOST}) is slow: ")
    lines = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "ranks"][-1]
    assert last["slowest"][0]["rank"] == 2 and last["slowest"][0]["host"] == HOST and last["slow"] == [2]
    own = {rank: facts["p50_ms"] for rank, facts in last["ranks"].items()}
    assert own["2"] - max(own["0"], own["1"]) > 20 and last["own_ms"]["max"] == own["2"]
    assert all(facts["steps"] > 0 and facts["p95_ms"] >= facts["p50_ms"] for facts in last["ranks"].values())


# ---------------------------------------------------------------- who is slow


def beats(window: int, *p50_ms: float) -> list[Beat]:
    return [Beat(r, f"n{r}", window=window, p50_ms=p, p95_ms=2 * p, steps=10) for r, p in enumerate(p50_ms)]


def test_a_rank_is_named_once_after_two_slow_intervals_and_again_after_it_has_recovered() -> None:
    ranks = Ranks()
    slow, fine = (120.0, 118.0, 182.0, 121.0), (120.0, 118.0, 119.0, 121.0)
    words = [ranks.see(beats(i, *p))[1] for i, p in enumerate([slow, slow, slow, fine, slow, slow], 1)]
    word = "rank 2 (host n2) is slow: 182 ms a step of its own, median of the others 120 ms"
    assert words == [[], [word], [], [], [], [word]]


def test_a_window_that_is_read_twice_counts_once() -> None:
    ranks = Ranks()
    assert ranks.see(beats(1, 10.0, 20.0))[1] == ranks.see(beats(1, 10.0, 20.0))[1] == []
    assert ranks.see(beats(2, 10.0, 20.0))[1] != []


@pytest.mark.parametrize("p50_ms", [(120.0, 121.0, 119.0), (100.0, 129.0, 100.0), (0.3, 0.9, 0.3), (5.0, 5.0)])
def test_equal_ranks_and_small_differences_are_not_named(p50_ms: tuple[float, ...]) -> None:
    ranks = Ranks()
    assert all(ranks.see(beats(i, *p50_ms))[1] == [] for i in range(1, 5))


def test_of_many_ranks_the_five_slowest_are_recorded() -> None:
    times = np.random.default_rng(0).permutation(1000.0 + np.arange(64))
    record, _ = Ranks().see(beats(1, *times))
    assert [s["rank"] for s in record["slowest"]] == np.argsort(-times)[:5].tolist()
    assert record["own_ms"] == {"min": 1000.0, "median": 1031.5, "max": 1063.0} and "ranks" not in record


def test_nothing_is_said_before_all_ranks_have_a_window() -> None:
    now = beats(1, 10.0, 50.0)
    assert Ranks().see([now[0], replace(now[1], window=0)]) == ({}, []) and Ranks().see([]) == ({}, [])


def test_the_median_of_the_others_is_that_of_a_list_without_the_value() -> None:
    rng = np.random.default_rng(1)
    for n in range(2, 12):
        values = sorted(rng.integers(0, 6, n).astype(float).tolist())
        for value in values:
            others = values.copy()
            others.remove(value)
            assert _median_without(values, value) == statistics.median(others)


# ---------------------------------------------------------------- what is a rank's own


def own_time(tmp_path: Path, world_size: int = 2, **over: object) -> tuple[OwnTime, Anatomy, Doing]:
    anatomy, doing = Anatomy(torch.device("cpu")), Doing()
    config = parsed(teacher(tmp_path, "nowhere", **over))
    return OwnTime(config, RankEnv(0, world_size), anatomy, doing), anatomy, doing


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def seconds(self) -> float:
        return self.now


# stage, wall seconds, seconds in which the main thread ran
STEP = [
    ("reading", 4.0, 0.5),
    ("lookup", 8.0, 1.0),
    ("forward", 3.0, 2.0),
    ("backward", 9.0, 2.5),
    ("optimizer", 1.0, 0.5),
]


@pytest.mark.parametrize(
    ("engine", "expected"), [({}, 4 + 1 + 3 + 2.5 + 0.5), ({"kind": "fsdp"}, 4 + 1 + 2 + 2.5 + 0.5)]
)
def test_on_a_cpu_waiting_for_peers_is_not_a_ranks_own(engine: dict[str, str], expected: float, tmp_path: Path) -> None:
    own, anatomy, doing = own_time(tmp_path, dense_engine=engine)
    own.cpu = clock = Clock()  # type: ignore[assignment]
    own.every_s = 0.0
    for stage, wall, ran in [("waiting", 50.0, 1.0), ("committing", 50.0, 9.0), *STEP * STEPS]:
        clock.now += ran
        anatomy.heard(stage, wall)
    assert doing.own == {"window": 1, "p50_ms": 1000 * expected, "p95_ms": 1000 * expected, "steps": STEPS}


def test_on_a_gpu_only_stages_without_collectives_count(tmp_path: Path) -> None:
    own, anatomy, doing = own_time(tmp_path)
    own.cpu, own.every_s = None, 0.0
    for stage, wall, _ in STEP * STEPS * 2:
        anatomy.heard(stage, wall)
    assert doing.own == {"window": 2, "p50_ms": 7000.0, "p95_ms": 7000.0, "steps": STEPS}


def test_a_job_of_one_rank_measures_nothing(tmp_path: Path) -> None:
    own, anatomy, doing = own_time(tmp_path, world_size=1)
    anatomy.heard("optimizer", 1.0)
    assert anatomy.heard != own.heard and doing.own == {}

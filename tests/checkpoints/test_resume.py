"""A job that stopped, was killed or moved to other ranks goes on exactly where its last commit was."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from exfm.checkpoints.commits import committed
from exfm.launch.auditing import audit_run
from exfm.trainer.run import DONE, STOPPED
from tests.trainer.jobs import (
    ROWS,
    Raw,
    assert_same_outcome,
    job,
    last_state,
    make_stream,
    on,
    replaced,
    run,
    same,
    student,
    teacher,
)
from tests.warm import forked

# of 16 examples: slice 0 has 9 steps, slice 1 ten
STOPS = {"mid-slice": 12, "slice end": 19}


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> str:
    return make_stream(tmp_path_factory.mktemp("resume") / "stream").root


@pytest.fixture(scope="module")
def log(stream, tmp_path_factory) -> Path:
    """Supervision of the whole stream."""
    folder = tmp_path_factory.mktemp("resume") / "teacher"
    run(teacher(folder, stream))
    return folder / "supervision" / "fm"


def make(kind: str, folder: Path, stream: str, log: Path) -> Raw:
    return teacher(folder, stream) if kind == "teacher" else student(folder, stream, log, "student_adapter")


@pytest.fixture(scope="module")
def undisturbed(stream, log, tmp_path_factory, rank_pool) -> Callable[[str, int, str], Raw]:
    """undisturbed(kind, ranks, pipeline): a finished job of 16 examples a step; each is run once."""

    @functools.cache
    def finished(kind: str, ranks: int, pipeline: str) -> Raw:
        raw = make(kind, tmp_path_factory.mktemp("whole") / "run", stream, log)
        raw = replaced(raw, run__pipeline=pipeline, stream__global_batch=16)
        assert {code for code, _ in on(rank_pool, ranks, raw)} == {DONE}
        return raw

    return finished


@pytest.mark.parametrize("kind", ["teacher", "student"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_two_runs_of_one_seed_are_bitwise_equal(ranks, kind, stream, log, tmp_path, on_ranks):
    a, b = (make(kind, tmp_path / name, stream, log) for name in "ab")
    for raw in (a, b):
        assert {code for code, _ in on(on_ranks, ranks, raw)} == {DONE}
    assert_same_outcome(a, b)


def test_another_seed_starts_and_ends_elsewhere(stream, tmp_path):
    a, b = (job(tmp_path / str(seed), stream, run__seed=seed) for seed in (0, 1))
    for raw in (a, b):
        run(raw)
    assert {name for name in last_state(a) if name.endswith("weight")} <= set(same(last_state(a), last_state(b)))


@pytest.mark.parametrize("pipeline", [pytest.param("base", marks=pytest.mark.slow), "sparse_dist"])
@pytest.mark.parametrize("stop", STOPS.values(), ids=STOPS)
@pytest.mark.parametrize("kind", ["teacher", "student"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_stopping_and_resuming_changes_nothing(ranks, kind, stop, pipeline, undisturbed, tmp_path, on_ranks):
    whole = undisturbed(kind, ranks, pipeline)
    halves = replaced(whole, run__folder=str(tmp_path / "halves"))
    assert {code for code, _ in on(on_ranks, ranks, halves, stop)} == {STOPPED}
    position = committed(tmp_path / "halves" / "checkpoints")[-1].manifest["position"]
    assert position["slice"] == (1 if stop == 12 else 2) and bool(position["consumed"]) == (stop == 12)
    first = audit_run(tmp_path / "halves")["examples"]
    assert {code for code, _ in on(on_ranks, ranks, halves)} == {DONE}
    assert_same_outcome(whole, halves)
    assert first < audit_run(tmp_path / "halves")["examples"] == sum(ROWS)


@pytest.mark.parametrize("kind", ["table_wise", "data_parallel"])
def test_three_ranks_resume_bitwise_although_gloo_rounds_by_the_place_in_a_buffer(kind, stream, tmp_path, on_ranks):
    """DDP lays out its buckets anew after its first steps: those of a restarted job must not be its first."""
    whole = teacher(tmp_path / "whole", stream, sharding__allowed=[kind], stream__global_batch=16)
    halves = replaced(whole, run__folder=str(tmp_path / "halves"))
    on(on_ranks, 3, whole)
    on(on_ranks, 3, halves, 5)
    on(on_ranks, 3, halves)
    assert_same_outcome(whole, halves)


def test_commits_inside_slices_change_nothing(stream, tmp_path):
    whole = teacher(tmp_path / "whole", stream)
    often = teacher(tmp_path / "often", stream, checkpoint={"every_slices": 1, "every_examples": 50, "keep": 100})
    run(whole)
    run(often)
    assert_same_outcome(whole, often)
    positions = [
        (c.manifest["position"]["slice"], c.manifest["position"]["consumed"])
        for c in committed(tmp_path / "often/checkpoints")
    ]
    # 50 examples are rounded up to 2 batches of 32
    assert positions[:4] == [(0, 64), (0, 128), (1, 0), (1, 64)]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, "table_wise"), (3, "row_wise")),
        ((3, "row_wise"), (1, "data_parallel")),
        ((1, "data_parallel"), (2, "column_wise")),
        pytest.param((2, "column_wise"), (3, "table_wise"), marks=pytest.mark.slow),
        pytest.param((3, "data_parallel"), (2, "row_wise"), marks=pytest.mark.slow),
    ],
)
def test_other_ranks_and_sharding_restore_the_checkpoint_bitwise(before, after, stream, tmp_path, on_ranks):
    first = teacher(tmp_path / "run", stream, sharding__allowed=[before[1]])
    on(on_ranks, before[0], first, 7)
    saved, ledger = last_state(first), audit_run(tmp_path / "run")["examples"]
    # what the newly built model holds before a step is what a checkpoint of it holds
    then = replaced(first, sharding__allowed=[after[1]], run__folder=str(tmp_path / "run"))
    states = [restored(then)] if after[0] == 1 else on_ranks(after[0], restored, then)
    held = {k: v for state in states for k, v in state.items()}
    differing = same(saved, held)
    segmented = {n for n in saved if saved[n].shape != held[n].shape}
    assert set(differing) == segmented
    for name in segmented:
        assert name.endswith(".adagrad_sum")
        one, many = sorted((saved[name], held[name]), key=lambda t: t.shape[1])
        assert one.shape[1] == 1 and torch.equal(
            held[name], many.mean(1, keepdim=True) if held[name] is one else one.expand_as(many)
        )
    on(on_ranks, after[0], then)
    assert ledger < audit_run(tmp_path / "run")["examples"] == sum(ROWS)


def restored(raw: Raw) -> dict[str, torch.Tensor]:
    """Whole tensors that a job holds after restoring, gathered through a checkpoint of its own; on rank 0."""
    import torch.distributed as dist

    from exfm.checkpoints.config import CheckpointConfig
    from exfm.checkpoints.saver import Request, Saver
    from exfm.checkpoints.storage import Storage
    from exfm.trainer.env import process_group
    from exfm.trainer.loop import Job
    from tests.trainer.jobs import here, parsed, read_checkpoint
    from tests.trainer.starts import CPU

    with process_group(here(), CPU, 60):
        held = Job(parsed(raw), here(), CPU, lambda: False)
        assert held.commits.restore()
        root = Path(raw["run"]["folder"]) / "held"
        saver = Saver(Storage(root), CheckpointConfig(), CPU, held.built.kernels, held.built.plan)
        saver.save(Request(held.progress.step, held.commits.state, {}, {}))
        saver.wait()
        saver.close()
        held.close()
        return read_checkpoint(committed(root)[-1].folder) if dist.get_rank() == 0 else {}


def test_a_resumed_job_on_other_ranks_learns_on_to_nearly_the_same_end(stream, tmp_path, on_ranks):
    whole, moved = teacher(tmp_path / "whole", stream), teacher(tmp_path / "moved", stream)
    run(whole)
    on(on_ranks, 2, moved, 7)
    on(on_ranks, 3, moved)
    a, b = last_state(whole), last_state(moved)
    assert all(torch.allclose(a[k], b[k], atol=1e-4, rtol=0) for k in a)


def wait_for(path: Path, process: subprocess.Popen, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not path.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    assert path.exists(), f"{path} did not appear"


def test_a_killed_rank_loses_nothing_that_was_committed(tmp_path, on_ranks, warm):
    """torchrun with 2 ranks, one killed with SIGKILL between two commits, started again: bitwise the undisturbed run."""
    stream = make_stream(tmp_path / "stream", (640,) * 5).root
    killed = teacher(tmp_path / "killed", stream, checkpoint={"every_slices": 1, "every_examples": 320, "keep": 3})
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(killed))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "exfm.trainer", str(tmp_path / "job.yaml")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(tmp_path / "log", "w") as out:
        first = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        wait_for(tmp_path / "killed/supervision/fm/slice=000001/manifest.json", first)
        (killed_rank,) = (f["pid"] for f in forked(tmp_path) if f["rank"] == 1)
        os.kill(killed_rank, signal.SIGKILL)
        assert first.wait(60) != 0
        assert 0 < committed(tmp_path / "killed/checkpoints")[-1].manifest["position"]["slice"] < 5
        subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=environment, check=True, timeout=100)
    assert json.loads((tmp_path / "killed/exit.json").read_text())["exit_code"] == 0
    whole = replaced(killed, run__folder=str(tmp_path / "whole"))
    on_ranks(2, run, whole)
    assert_same_outcome(whole, killed)
    assert audit_run(tmp_path / "killed")["examples"] == 5 * 640

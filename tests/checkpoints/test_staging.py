"""What a background save commits is what was live when it began, though training goes on meanwhile; one save at a time."""

import contextlib
import io
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from exfm.checkpoints.canonical import boxes
from exfm.checkpoints.commits import committed
from exfm.checkpoints.saver import SaveError, Saver
from exfm.checkpoints.storage import Storage
from exfm.trainer import loop
from exfm.trainer.run import DONE, STOPPED
from tests.trainer.jobs import Raw, job, last_state, make_stream, read_checkpoint, replaced, run, same

# of several parts of 1 MiB each; hashed ids spread over all of them
BIG = {
    "user": {"rows": 20, "width": 8},
    "item": {"rows": 40_000, "width": 16},
    "viewed": {"rows": 30, "width": 4, "pooling": "mean"},
    "tags": {"rows": 60_000, "width": 8},
}
PLANS = {
    "mixed": {"user": ["row_wise"], "item": ["column_wise"], "viewed": ["data_parallel"], "tags": ["table_wise"]},
    "rows": {name: ["row_wise"] for name in BIG},
}
PAUSE_S = 0.03
PATIENCE_S = 30


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> str:
    return make_stream(tmp_path_factory.mktemp("staging") / "stream", (192, 192)).root


def make(folder: Path, stream: str, staging: str, plan: str = "mixed", dtype: str = "fp32", **over: Any) -> Raw:
    """A commit every three steps."""
    checkpoint = {"every_slices": 1, "every_examples": 96, "keep": 100, "staging": staging, "buffer_mib": 1}
    tables = {name: table | {"dtype": dtype} for name, table in BIG.items()}
    return job(folder, stream, tables=tables, sharding__tables=PLANS[plan], checkpoint=checkpoint, **over)


class Slow:
    """Makes the writing of data files slow, and sees what happens meanwhile. Everything is of this rank."""

    def __init__(self, fail_at: str = "", trains_on_until: int = 0) -> None:
        self.fail_at, self.trains_on_until = fail_at, trains_on_until
        self.live: dict[int, list[tuple[str, tuple[int, ...], Tensor]]] = {}  # by step, copied when the save began
        self.steps = 0
        self.moved: list[
            int
        ] = []  # of each save, steps that were done between its beginning and the end of its writing
        self.writing: set[str] = set()
        self.together = 0

    @contextlib.contextmanager
    def in_place(self) -> Iterator["Slow"]:
        write, save, put = Storage.write, Saver.save, loop.HostCopies.put

        def slow_write(storage: Storage, path: Any, parts: Any) -> None:
            if not str(path).endswith(".safetensors"):
                return write(storage, path, parts)
            self.writing.add(str(path))
            self.together = max(self.together, len(self.writing))
            begun = int(str(path).split("step=")[1][:8])  # steps that were done then
            try:
                write(storage, path, self.paused(parts, str(path), begun))
            finally:
                self.moved.append(self.steps - begun)
                self.writing.discard(str(path))

        def seen_save(saver: Saver, request: Any) -> None:
            self.live[request.step] = [
                (name, offsets, box.detach().clone())
                for name, tensor in request.state.items()
                for offsets, box in boxes(tensor)
            ]
            save(saver, request)

        def counted(copies: Any, batch: Any, output: Any) -> None:
            self.steps += 1
            put(copies, batch, output)

        Storage.write, Saver.save, loop.HostCopies.put = slow_write, seen_save, counted  # type: ignore[method-assign]
        try:
            yield self
        finally:
            Storage.write, Saver.save, loop.HostCopies.put = write, save, put  # type: ignore[method-assign]

    def paused(self, parts: Any, path: str, begun: int) -> Iterator[Any]:
        self.wait_for_a_step(begun)
        for part in parts:
            time.sleep(PAUSE_S * (len(part) >= 2**16))
            if self.fail_at and self.fail_at in path:
                raise OSError(5, f"cannot write {path}: Input/output error")
            yield part

    def wait_for_a_step(self, begun: int) -> None:
        """Hold a save until training has moved, so that no busy machine can finish it first; a step that waits for
        the save never comes."""
        end = time.monotonic() + PATIENCE_S
        while self.steps == begun < self.trains_on_until and time.monotonic() < end:
            time.sleep(0.001)

    def wrong(self, raw: Raw) -> list[str]:
        """What was committed otherwise than it lived here."""
        found = []
        for commit in committed(Path(raw["run"]["folder"]) / "checkpoints"):
            saved = read_checkpoint(commit.folder)
            for name, offsets, box in self.live.pop(commit.step):
                part = saved[name][tuple(slice(o, o + s) for o, s in zip(offsets, box.shape, strict=True))]
                if not torch.equal(part, box):
                    found.append(f"step {commit.step}: {name} at {offsets}")
        return found + [f"step {step} was not committed" for step in self.live]


def slow_run(raw: Raw, stop_after: int = 0, trains_on_until: int = 0) -> tuple[int, list[str], Slow, str]:
    """(exit code, what was committed wrongly, what was seen, what was said)"""
    said = io.StringIO()
    with Slow(trains_on_until=trains_on_until).in_place() as slow, contextlib.redirect_stderr(said):
        code = run(raw, stop_after)[0]
    dist.barrier()
    wrong = slow.wrong(raw)
    return code, wrong, slow, said.getvalue()


def costs(raw: Raw) -> list[dict[str, Any]]:
    """What each save cost, as the job's metrics say."""
    lines = (Path(raw["run"]["folder"]) / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "stall_s" in line]


@pytest.mark.parametrize(
    ("staging", "plan", "dtype", "pipeline"),
    [
        ("full", "mixed", "fp32", "base"),
        ("full", "rows", "fp16", "sparse_dist"),
        ("bounded", "mixed", "fp32", "sparse_dist"),
        ("bounded", "rows", "fp16", "base"),
        ("copy_on_write", "mixed", "fp32", "base"),
        ("copy_on_write", "mixed", "fp16", "sparse_dist"),
        ("copy_on_write", "rows", "fp32", "sparse_dist"),
        ("copy_on_write", "rows", "fp16", "base"),
    ],
)
def test_what_is_committed_was_live_when_the_save_began(staging, plan, dtype, pipeline, stream, tmp_path, on_ranks):
    raw = make(tmp_path / "run", stream, staging, plan, dtype, run__pipeline=pipeline)
    # bounded staging holds training until all is read; after the last step there is nothing to train
    results = on_ranks(2, slow_run, raw, 0, 0 if staging == "bounded" else 12)
    for code, wrong, slow, _ in results:
        assert code == DONE and wrong == [] and slow.steps == 12
        assert slow.together == 1 and len(slow.moved) == 4  # at most one save in flight
        assert staging == "bounded" or min(slow.moved[:-1]) >= 1
    assert [c.step for c in committed(tmp_path / "run/checkpoints")] == [3, 6, 9, 12]
    copied = [saved["copied_bytes"] for saved in costs(raw)]
    assert len(copied) == 4 and (min(copied[:-1]) > 0) == (staging == "copy_on_write")
    # slow saving changes nothing of what is learned
    plain = replaced(raw, run__folder=str(tmp_path / "plain"), checkpoint={})
    on_ranks(2, run, plain)
    assert same(last_state(raw), last_state(plain)) == []


def test_bounded_staging_lets_training_go_on_once_all_is_read(stream, tmp_path, on_ranks):
    """The stall is the reading: all parts but those that wait to be written."""
    raw = make(tmp_path / "run", stream, "bounded")
    on_ranks(2, slow_run, raw)
    saved = costs(raw)
    # four or more parts are written with a pause before each
    assert all(2 * PAUSE_S < s["stall_s"] < s["seconds"] for s in saved) and len(saved) == 4


@pytest.mark.parametrize("staging", ["full", "copy_on_write"])
def test_skipping_busy_commit_points_says_so_and_never_skips_the_last_one(staging, stream, tmp_path, on_ranks):
    raw = make(tmp_path / "run", stream, staging)
    raw["checkpoint"] |= {"when_busy": "skip", "every_examples": 32}
    results = on_ranks(2, slow_run, raw)
    steps = [c.step for c in committed(tmp_path / "run/checkpoints")]
    assert steps[-1] == 12 and 2 <= len(steps) < 12
    assert results[0][3].count("this commit point is skipped") == 12 - len(steps)
    assert all(code == DONE and wrong == [] and slow.together == 1 for code, wrong, slow, _ in results)


def test_a_stop_is_committed_though_the_last_save_still_runs(stream, tmp_path, on_ranks):
    raw = make(tmp_path / "run", stream, "full")
    raw["checkpoint"] |= {"when_busy": "skip", "every_examples": 32}
    for code, wrong, slow, _ in on_ranks(2, slow_run, raw, 3):
        assert code == STOPPED and wrong == []
        assert committed(tmp_path / "run/checkpoints")[-1].step == slow.steps < 12
    whole = replaced(raw, run__folder=str(tmp_path / "whole"), checkpoint={})
    on_ranks(2, run, whole)
    on_ranks(2, run, raw)
    assert same(last_state(raw), last_state(whole)) == []


def failing_run(raw: Raw) -> tuple[str, int]:
    """The second commit's file cannot be written by rank 1; (what this rank is told, steps done by then)."""
    with Slow("step=00000006/rank-00001").in_place() as slow:
        try:
            run(raw)
        except SaveError as error:
            return str(error), slow.steps
    return "", slow.steps


@pytest.mark.parametrize("staging", ["full", "bounded", "copy_on_write"])
def test_a_save_that_fails_in_the_background_ends_every_rank_at_the_next_commit_point(
    staging, stream, tmp_path, on_ranks
):
    raw = make(tmp_path / "run", stream, staging)
    told = on_ranks(2, failing_run, raw)
    assert told[0] == told[1] and told[0][1] == 9  # the third commit point
    assert re.search("rank-00001.safetensors: .*Input/output error.*; the last commit is intact", told[0][0])
    assert [c.step for c in committed(tmp_path / "run/checkpoints")] == [3]


def test_a_failing_save_at_the_end_is_not_taken_for_a_finished_job(stream, tmp_path, on_ranks):
    raw = make(tmp_path / "run", stream, "full", stream__last=1)
    told = on_ranks(2, failing_run, raw)
    assert all("Input/output error" in text and steps == 6 for text, steps in told)
    assert not (tmp_path / "run/summary.json").exists()


def test_no_thread_of_a_save_outlives_its_job(stream, tmp_path):
    assert run(make(tmp_path / "run", stream, "copy_on_write"))[0] == DONE
    assert [t.name for t in threading.enumerate() if t.name.startswith("checkpoint")] == []

"""A loss that is not finite: noticed, answered by restoring the last commit, and given up the second time."""

import json
from pathlib import Path

import pytest
import torch

from exfm.checkpoints.commits import committed
from exfm.launch.auditing import audit_run
from exfm.trainer import objective
from exfm.trainer.guard import NonFiniteLoss
from exfm.trainer.run import DONE, FAILED, rank_main
from tests.trainer.jobs import ROWS, Raw, assert_same_outcome, here, make_stream, on, parsed, replaced, run, teacher

COMMITS = {"every_slices": 1, "every_examples": 64, "keep": 100}


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> str:
    return make_stream(tmp_path_factory.mktemp("nan") / "stream").root


@pytest.fixture(scope="module")
def undisturbed(stream, tmp_path_factory) -> dict[str, Raw]:
    """The job that nothing happens to, finished on one rank, by pipeline."""
    root, jobs = tmp_path_factory.mktemp("whole"), {}
    for pipeline in ("base", "sparse_dist"):
        jobs[pipeline] = teacher(root / pipeline, stream, checkpoint=COMMITS, run__pipeline=pipeline)
        assert run(jobs[pipeline])[0] == DONE
    return jobs


class Poison:
    """Makes the loss of chosen forward passes NaN, on the last rank alone, in this process."""

    def __init__(self, steps: set[int]) -> None:
        self.steps, self.calls = steps, 0

    def __enter__(self) -> "Poison":
        self.original = objective.label_loss

        def poisoned(logits, labels, weights):
            import torch.distributed as dist

            loss = self.original(logits, labels, weights)
            if not weights.any():  # padding: the rehearsal before the first step
                return loss
            bad = self.calls in self.steps and dist.get_rank() == dist.get_world_size() - 1
            self.calls += 1
            return loss * torch.tensor(float("nan")) if bad else loss

        objective.label_loss = poisoned
        return self

    def __exit__(self, *_: object) -> None:
        objective.label_loss = self.original


def run_poisoned(raw: Raw, steps: set[int]) -> int:
    with Poison(steps):
        return run(raw)[0]


@pytest.mark.parametrize("pipeline", [pytest.param("base", marks=pytest.mark.slow), "sparse_dist"])
@pytest.mark.parametrize("check", [1, pytest.param(4, marks=pytest.mark.slow), 16])
@pytest.mark.parametrize("step", [0, 7, 9], ids=["at once", "mid-slice", "last of a slice"])
def test_a_transient_nan_leaves_no_trace(step, check, pipeline, undisturbed, tmp_path):
    whole = undisturbed[pipeline]
    raw = replaced(whole, run__folder=str(tmp_path / "run"), run__nan_check_steps=check)
    assert run_poisoned(raw, {step}) == DONE
    assert_same_outcome(whole, raw)
    assert audit_run(tmp_path / "run")["examples"] == sum(ROWS)


def test_a_nan_of_one_rank_restores_all_of_them(stream, tmp_path, on_ranks):
    whole = teacher(tmp_path / "whole", stream, checkpoint=COMMITS)
    raw = replaced(whole, run__folder=str(tmp_path / "run"))
    on(on_ranks, 2, whole)
    assert on_ranks(2, run_poisoned, raw, {7}) == [DONE, DONE]
    assert_same_outcome(whole, raw)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_second_nan_ends_the_job_naming_the_slice(ranks, stream, tmp_path, on_ranks):
    raw = teacher(tmp_path / "run", stream, checkpoint=COMMITS)
    always = set(range(7, 1000))
    if ranks == 1:
        with pytest.raises(NonFiniteLoss, match=r"NaN or infinite in slice 1 before example 128"):
            run_poisoned(raw, always)
    else:
        with pytest.raises(AssertionError) as failed:
            on_ranks(2, run_poisoned, raw, always)
        assert [type(e) for e in failed.value.errors.values()] == [NonFiniteLoss] * 2
    # nothing poisoned was committed
    assert committed(tmp_path / "run/checkpoints")[-1].manifest["position"] == {"slice": 1, "consumed": 64}


def test_a_diverging_job_exits_with_1_and_says_where(stream, tmp_path, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *_: None)
    raw = teacher(tmp_path / "run", stream, optim__dense__lr=1e30, optim__dense__warmup_steps=0, optim__tables__lr=1e30)
    assert rank_main(parsed(raw), here()) == FAILED
    word = json.loads((tmp_path / "run/exit.json").read_text())
    assert word["exit_code"] == 1 and "the loss became NaN or infinite in slice 0" in word["message"]
    assert committed(tmp_path / "run/checkpoints") == []
    assert not list(Path(raw["run"]["folder"]).glob("supervision/fm/*"))


def test_restores_can_be_forbidden(stream, tmp_path):
    raw = teacher(tmp_path / "run", stream, checkpoint=COMMITS, run__max_restores=0)
    with pytest.raises(NonFiniteLoss):
        run_poisoned(raw, {7})


def test_weights_that_the_last_update_before_a_commit_spoiled_are_not_committed(undisturbed, tmp_path, monkeypatch):
    """The loss of that step was finite: only the weights show it."""
    whole = undisturbed["base"]
    raw = replaced(whole, run__folder=str(tmp_path / "run"))
    original, calls = objective.label_loss, []

    def spoiled(logits, labels, weights):
        loss = original(logits, labels, weights)
        if weights.any():  # not the rehearsal
            calls.append(loss)
        if len(calls) == 2:  # 64 examples, 32 a step: the second step is the last before the first commit
            loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss

    monkeypatch.setattr(objective, "label_loss", spoiled)
    assert run(raw)[0] == DONE
    assert_same_outcome(whole, raw)

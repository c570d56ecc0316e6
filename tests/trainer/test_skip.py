"""A bad loss with run.on_bad_loss: skip, and loss spikes: what is left out, what is recorded, and who learns of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from exfm.data.commit import open_folder
from exfm.data.errors import UserError
from exfm.launch.auditing import audit_run
from exfm.trainer import objective
from exfm.trainer.guard import WARM_UP, LossGuard, LossSpike, NonFiniteLoss
from exfm.trainer.ledger import Entry, read_ledger, write_ledger
from exfm.trainer.run import DONE
from tests.trainer.jobs import (
    ROWS,
    Raw,
    assert_same_outcome,
    copied,
    last_state,
    make_stream,
    on,
    replaced,
    run,
    same,
    scores,
    student,
    summary,
    tables_of,
    teacher,
)

COMMITS = {"every_slices": 1, "every_examples": 64, "keep": 100}
SKIP = {"run__on_bad_loss": "skip", "checkpoint": COMMITS}
# slice 1 has 160 examples, 5 steps of 32: these positions hold steps 3 and 4 of it, from the commit at 64 on
WINDOW = (64, 128)


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> str:
    return make_stream(tmp_path_factory.mktemp("skip") / "stream").root


class Spoiled:
    """Changes the loss wherever one of the given examples is in the batch, on the rank that has it, in this process."""

    def __init__(self, ids: set[int], change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.ids, self.change = ids, change

    def __enter__(self) -> "Spoiled":
        self.original = objective.Objective.forward
        spoiled = self

        def forward(self: Any, batch: Any, pooled: torch.Tensor) -> Any:
            loss, output = spoiled.original(self, batch, pooled)
            if spoiled.ids & set(batch.ids.tolist()):
                loss = spoiled.change(loss)
                output = objective.StepOutput(output.logits, loss.detach())
            return loss, output

        objective.Objective.forward = forward  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        objective.Objective.forward = self.original  # type: ignore[method-assign]


def to_nan(loss: torch.Tensor) -> torch.Tensor:
    return loss * float("nan")


def to_spike(loss: torch.Tensor) -> torch.Tensor:
    return loss * 1000


CHANGES = {"nan": to_nan, "spike": to_spike}


def ids_of(index: int, start: int, stop: int) -> list[int]:
    return tables_of()[index].column("example_id").to_pylist()[start:stop]


def run_spoiled(raw: Raw, ids: set[int], change: str, stop_after: int = 0) -> int:
    with Spoiled(ids, CHANGES[change]):
        return run(raw, stop_after)[0]


def bad_losses(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "bad_loss"]


def logits_of(raw: Raw, index: int) -> np.ndarray:
    (path,) = Path(raw["run"]["folder"]).glob(f"supervision/fm/slice={index:06d}/part-*.parquet")
    return np.column_stack([c.to_numpy() for c in pq.read_table(path).columns])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_batch_that_always_gives_nan_is_left_out_and_the_rest_is_learned(ranks, stream, tmp_path, on_ranks, capfd):
    raw = teacher(tmp_path / "run", stream, **SKIP)
    poison = set(ids_of(1, 70, 71))
    codes = [run_spoiled(raw, poison, "nan")] if ranks == 1 else on_ranks(ranks, run_spoiled, raw, poison, "nan")
    assert codes == [DONE] * ranks
    learned = sum(ROWS) - 64
    assert summary(raw)["examples"] == learned and summary(raw)["skipped"] == 64
    found = audit_run(tmp_path / "run")
    assert (found["examples"], found["skipped"], found["repeated"]) == (learned, 64, 0)
    fs, root = open_folder(tmp_path / "run")
    entries = read_ledger(fs, f"{root}/ledger.parquet")
    assert [(e.slice, e.start, e.stop) for e in entries if e.skipped] == [(1, *WINDOW)]
    # all of slices 1 to 3 is evaluated, but for the window
    assert summary(raw)["groups"]["all"]["click"]["examples"] == sum(ROWS[1:]) - 64
    (record,) = bad_losses(tmp_path / "run")
    assert "NaN or infinite in slice 1 before example 128" in record["seen"]
    assert (record["restored"], record["noticed"], record["skipped"]) == ([1, 64], [1, 128], [[1, 64], [1, 128]])
    logits = logits_of(raw, 1)
    assert np.isnan(logits[slice(*WINDOW)]).all() and np.isfinite(np.delete(logits, np.s_[slice(*WINDOW)], 0)).all()
    if ranks == 1:
        said = capfd.readouterr().err
        assert "NaN or infinite in slice 1" in said and "restored the commit of step 7 at slice 1 example 64" in said
        assert "skipping the examples from there to slice 1 example 128" in said


def test_what_comes_before_the_window_is_bitwise_the_undisturbed_run(stream, tmp_path):
    """And the window's own examples leave no trace: two different ones there give the same outcome."""
    whole = teacher(tmp_path / "whole", stream, checkpoint=COMMITS)
    a = teacher(tmp_path / "a", stream, **SKIP)
    b = replaced(a, run__folder=str(tmp_path / "b"))
    run(whole)
    assert run_spoiled(a, set(ids_of(1, 97, 98)), "nan") == run_spoiled(b, set(ids_of(1, 120, 128)), "nan") == DONE
    assert_same_outcome(a, b)
    np.testing.assert_array_equal(logits_of(a, 0), logits_of(whole, 0))
    np.testing.assert_array_equal(logits_of(a, 1)[:64], logits_of(whole, 1)[:64])
    assert same(last_state(a), last_state(whole)) != []


@pytest.fixture(scope="module")
def through(stream, tmp_path_factory) -> Raw:
    """A job that skipped WINDOW and went on to its end."""
    raw = teacher(tmp_path_factory.mktemp("through") / "run", stream, **SKIP)
    assert run_spoiled(raw, set(ids_of(1, 70, 71)), "nan") == DONE
    return raw


@pytest.mark.parametrize("stop_after", [8, 10, 14])
def test_a_job_stopped_and_resumed_around_a_skipped_window_ends_as_the_one_that_went_through(
    stop_after, through, tmp_path
):
    stopped = replaced(through, run__folder=str(tmp_path / "stopped"))
    poison = set(ids_of(1, 70, 71))
    assert run_spoiled(stopped, poison, "nan", stop_after) == 75
    assert run_spoiled(stopped, poison, "nan") == DONE
    assert_same_outcome(through, stopped)
    assert audit_run(tmp_path / "stopped")["skipped"] == 64


def test_a_window_may_span_slices_where_commits_are_rare(stream, tmp_path):
    raw = teacher(tmp_path / "run", stream, run__on_bad_loss="skip")  # no commit before the end
    assert run_spoiled(raw, set(ids_of(2, 33, 34)), "nan") == DONE
    skipped = sum(ROWS[:2]) + 96  # noticed a step late
    assert audit_run(tmp_path / "run")["skipped"] == skipped
    assert summary(raw)["examples"] == sum(ROWS) - skipped
    (record,) = bad_losses(tmp_path / "run")
    assert record["skipped"] == [[0, 0], [2, 96]]


def test_more_bad_windows_than_max_restores_end_the_job(stream, tmp_path):
    raw = teacher(tmp_path / "run", stream, **SKIP)
    poison = set(ids_of(1, 70, 71) + ids_of(3, 0, 1))
    with pytest.raises(NonFiniteLoss, match="slice 3"):
        run_spoiled(raw, poison, "nan")
    again = replaced(raw, run__folder=str(tmp_path / "again"), run__max_restores=2)
    assert run_spoiled(again, poison, "nan") == DONE
    assert audit_run(tmp_path / "again")["skipped"] == 64 + 64


def test_fail_ends_the_job_at_the_first_bad_loss(stream, tmp_path):
    raw = teacher(tmp_path / "run", stream, checkpoint=COMMITS, run__on_bad_loss="fail", run__max_restores=5)
    with pytest.raises(NonFiniteLoss):
        run_spoiled(raw, set(ids_of(1, 70, 71)), "nan")
    assert not bad_losses(tmp_path / "run")


def test_a_gap_that_the_ledger_does_not_record_still_fails_the_audit(through, tmp_path):
    copied(through, tmp_path / "run")
    fs, root = open_folder(tmp_path / "run")
    entries = read_ledger(fs, f"{root}/ledger.parquet")
    write_ledger(fs, f"{root}/ledger.parquet", [e for e in entries if not e.skipped] + [Entry(9, 0, 1, 0, 1, 0)])
    with pytest.raises(UserError, match=r"slice 1: positions 64\.\.128 were skipped"):
        audit_run(tmp_path / "run")


@pytest.mark.parametrize("method", ["single_head", "student_adapter"])
def test_a_student_takes_skipped_examples_for_examples_without_a_prediction(method, through, stream, tmp_path):
    pupil = student(tmp_path / "vm", stream, Path(through["run"]["folder"]) / "supervision/fm", method)
    with pytest.raises(UserError, match=f"no prediction for example {ids_of(1, 64, 65)[0]} of slice 1.*label_only"):
        run(pupil)
    lenient = replaced(pupil, run__folder=str(tmp_path / "vm2"))
    lenient["distillation"]["learn"]["on_missing"] = "label_only"
    assert run(lenient)[0] == DONE
    assert summary(lenient)["covered"] == sum(ROWS) - 64
    assert summary(lenient)["examples"] == sum(ROWS)
    assert all(t.isfinite().all() for t in last_state(lenient).values())


# ---------------------------------------------------------------- spikes


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("check", [1, 4])
def test_a_spike_is_answered_as_a_nan(check, ranks, tmp_path, on_ranks):
    rows = (640, 320, 160)
    long = make_stream(tmp_path / "stream", rows).root
    raw = teacher(
        tmp_path / "run", long, **SKIP, run__spike_factor=5.0, run__nan_check_steps=check, run__log_every_s=1000.0
    )
    spike = {tables_of(rows)[1].column("example_id")[70].as_py()}
    codes = [run_spoiled(raw, spike, "spike")] if ranks == 1 else on_ranks(ranks, run_spoiled, raw, spike, "spike")
    assert codes == [DONE] * ranks
    (record,) = bad_losses(tmp_path / "run")
    assert "in slice 1 at example 64, more than run.spike_factor 5 times its running mean" in record["seen"]
    assert audit_run(tmp_path / "run")["skipped"] == 64


def test_no_spike_no_difference(stream, tmp_path):
    off = teacher(tmp_path / "off", stream, checkpoint=COMMITS)
    watched = replaced(off, run__folder=str(tmp_path / "on"), run__spike_factor=50.0)
    assert run(off)[0] == run(watched)[0] == DONE
    assert_same_outcome(off, watched)


def test_a_resumed_job_judges_spikes_as_the_undisturbed_one(tmp_path):
    """The running mean travels with the commit: its first use after a resume is before it could have warmed up anew."""
    rows = (640, 320)
    long = make_stream(tmp_path / "stream", rows).root
    raw = teacher(tmp_path / "run", long, run__spike_factor=5.0, run__max_restores=0)
    spike = {tables_of(rows)[1].column("example_id")[70].as_py()}
    assert run_spoiled(raw, spike, "spike", stop_after=18) == 75
    with pytest.raises(LossSpike, match="in slice 1 at example 64") as resumed:
        run_spoiled(raw, spike, "spike")
    whole = replaced(raw, run__folder=str(tmp_path / "whole"))
    with pytest.raises(LossSpike) as through:
        run_spoiled(whole, spike, "spike")
    assert str(resumed.value) == str(through.value)


def judged(losses: list[float], factor: float) -> int:
    """How many batches pass before a guard of one rank calls a spike."""
    guard = LossGuard(factor)
    for number, loss in enumerate(losses):
        guard.see(loss, (0, number), whole=True)
        try:
            guard.answer(guard.ask(False), (0, number))
        except LossSpike:
            return number
    return len(losses)


def judgements(*cases: tuple[list[float], float]) -> list[int]:
    assert dist.is_initialized()
    return [judged(losses, factor) for losses, factor in cases]


def test_the_running_mean_is_plain_then_exponential_and_judges_only_once_warm(on_ranks):
    level = [1.0] * WARM_UP
    falling = [4.0] * 100 + [1.0] * 150  # the mean is 1 + 3 x 0.99^150 = 1.66 at the end
    cases = (
        ([1.0, 100.0], 2.0),
        ([*level, 2.0, 2.2], 2.0),  # the mean is 1, then 22/21
        ([*level, 0.0, 2.5], 2.0),
        ([*falling, 2 * 1.6], 2.0),
        ([*falling, 2 * 1.7], 2.0),
    )
    assert on_ranks(1, judgements, *cases) == [[2, WARM_UP + 1, WARM_UP + 1, 251, 250]]


def test_a_small_last_batch_is_not_judged(on_ranks):
    assert on_ranks(1, small_batch_counts) == [WARM_UP]


def small_batch_counts() -> int:
    guard = LossGuard(2.0)
    for number in range(WARM_UP):
        guard.see(1.0, (0, number), whole=True)
    guard.see(50.0, (0, WARM_UP), whole=False)
    guard.answer(guard.ask(False), (0, WARM_UP))
    return guard.count


def test_scores_do_not_count_what_was_seen_before_the_restore(stream, tmp_path):
    """The window was predicted once before the loss was noticed; those predictions are in no metric."""
    late = teacher(tmp_path / "late", stream, **SKIP, run__nan_check_steps=1)
    later = replaced(late, run__folder=str(tmp_path / "later"), run__nan_check_steps=16)
    poison = set(ids_of(1, 65, 66))
    run_spoiled(late, poison, "nan")
    run_spoiled(later, poison, "nan")
    assert scores(late)["examples"] == scores(later)["examples"]
    assert scores(late) == scores(later)


def test_two_ranks_and_one_skip_the_same_window(through, tmp_path, on_ranks):
    one = copied(through, tmp_path / "one")
    two = replaced(one, run__folder=str(tmp_path / "two"))
    poison = set(ids_of(1, 70, 71))
    on_ranks(2, run_spoiled, two, poison, "nan")
    assert [r["skipped"] for r in bad_losses(tmp_path / "one")] == [r["skipped"] for r in bad_losses(tmp_path / "two")]
    assert on(on_ranks, 1, one)[0][0] == DONE  # a finished job stays as it is

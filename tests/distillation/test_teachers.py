"""What a student does with its teachers: weights, staleness, outages, a new teacher taking over, several at once."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from exfm.data.errors import UserError
from exfm.data.manifest import Stream, open_stream
from exfm.trainer.config import check_against_stream
from exfm.trainer.run import DONE, STOPPED
from tests.distillation.hand_made import hand_log
from tests.trainer import jobs
from tests.trainer.jobs import (
    Raw,
    assert_same_outcome,
    global_losses,
    last_state,
    make_stream,
    on,
    parsed,
    replaced,
    run,
    same,
    student,
    summary,
)

ROWS = (70, 90, 65, 80)


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> Stream:
    return make_stream(tmp_path_factory.mktemp("teachers") / "stream", ROWS)


def by_id(features):
    return np.sin(features.column("example_id").to_numpy().astype(np.float64))


def shifted(features):
    return by_id(features) + 3


@pytest.fixture(scope="module")
def logs(stream, tmp_path_factory) -> Path:
    """fresh, and stale: the same logits of a teacher two slices older."""
    folder = tmp_path_factory.mktemp("logs")
    hand_log(folder / "fresh", stream, by_id, range(4), at=160.0)
    hand_log(folder / "stale", stream, by_id, range(2, 4), staleness=2, at=160.0)
    hand_log(folder / "new", stream, shifted, range(1, 4), at=160.0)
    hand_log(folder / "shop", stream, shifted, range(2, 4), ("purchase",), staleness=1, at=190.0)
    return folder


def learner(folder: Path, stream: Stream, log: str | Path, method: str = "auxiliary_head", **learn: object) -> Raw:
    raw = student(folder, stream.root, log, method)
    return replaced(raw, **{f"distillation__learn__{key}": value for key, value in learn.items()})


def losses(raw: Raw, **over: object) -> list[float]:
    """Of every step."""
    return run(replaced(raw, **over))[1].losses


def per_slice(raw: Raw) -> list[Raw]:
    """What metrics.jsonl says of the teachers at every slice's end."""
    lines = (Path(raw["run"]["folder"]) / "metrics.jsonl").read_text().splitlines()
    return [line["teachers"] for line in map(json.loads, lines) if line["kind"] == "slice"]


@pytest.fixture
def seen(monkeypatch) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Filled by runs: supervision and its mask, [s, t] by example id, as the step got them."""
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    original = jobs.Recorder.see

    def see(self, batch, output):
        original(self, batch, output)
        for i, logits, mask in zip(batch.ids.tolist(), batch.supervision, batch.supervision_mask, strict=True):
            found[i] = (logits.numpy(), mask.numpy())

    monkeypatch.setattr(jobs.Recorder, "see", see)
    return found


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("method", ["single_head", "student_adapter"])
def test_a_stale_prediction_weighs_half_after_each_half_life(method, stream, logs, tmp_path):
    """Two slices stale and a half-life of one: the losses are those of fresh predictions at a quarter of the weight."""
    late = {"stream__first": 2}
    stale = learner(tmp_path / "a", stream, logs / "stale", method, loss_weight=2.0, staleness_half_life=1.0)
    fresh = learner(tmp_path / "b", stream, logs / "fresh", method, loss_weight=0.5, staleness_half_life=1.0)
    whole = learner(tmp_path / "c", stream, logs / "stale", method, loss_weight=2.0)
    mine = losses(stale, **late)
    assert mine == losses(fresh, **late) != losses(whole, **late)
    assert same(last_state(stale), last_state(fresh)) == []
    assert [line["teacher"]["weight"] for line in per_slice(stale)] == [0.5, 0.5]
    assert {line["teacher"]["staleness_slices"] for line in per_slice(stale)} == {2}


@pytest.mark.parametrize(("index", "weight"), [(0, 0.5), (1, 1.0), (2, 1.5), (3, 1.5)])
def test_the_weight_warms_up_over_the_first_slices(index, weight, stream, logs, tmp_path):
    raw = learner(tmp_path / "a", stream, logs / "fresh", loss_weight=1.5, warmup_slices=3, wait_s=0.0)
    if index == 0:
        constant = learner(tmp_path / "b", stream, logs / "fresh", loss_weight=weight)
        assert losses(raw, stream__last=1) == losses(constant, stream__last=1)
        shutil.rmtree(raw["run"]["folder"])
    run(raw)
    assert per_slice(raw)[index]["teacher"]["weight"] == pytest.approx(weight)


# ---------------------------------------------------------------- outages


def test_what_is_too_stale_counts_as_missing(stream, logs, tmp_path):
    raw = learner(tmp_path / "a", stream, logs / "stale", max_staleness=1, on_missing="label_only")
    raw = replaced(raw, stream__first=2)
    plain = replaced(raw, distillation=None, run__folder=str(tmp_path / "b"))
    assert losses(raw) == losses(plain)
    assert summary(raw)["covered"] == 0 and summary(raw)["teachers"]["teacher"]["coverage"] == 0
    bound = learner(tmp_path / "c", stream, logs / "stale", max_staleness=2)
    assert losses(bound, stream__first=2) != losses(plain, run__folder=str(tmp_path / "d"))
    assert summary(bound)["teachers"]["teacher"]["coverage"] == 1


def test_what_is_too_stale_is_refused_where_all_must_be_there(stream, logs, tmp_path):
    raw = learner(tmp_path / "a", stream, logs / "stale", max_staleness=1)
    with pytest.raises(
        UserError, match="slice 2: teacher 'teacher' has supervision in .*stale that is more than 1 slices"
    ):
        run(replaced(raw, stream__first=2))


# ---------------------------------------------------------------- a new teacher takes over


def cut_over(folder: Path, stream: Stream, logs: Path, *names: tuple[str, int]) -> Raw:
    raw = learner(folder, stream, "", supervision="")
    paths = [{"path": str(logs / name), "first": first} for name, first in names]
    return replaced(raw, distillation__learn__teachers=[{"name": "fm", "logs": paths}])


def test_from_its_slice_on_the_new_log_alone_is_read(stream, logs, tmp_path, seen):
    assert run(cut_over(tmp_path / "a", stream, logs, ("fresh", 0), ("new", 2)))[0] == DONE
    assert len(seen) - (-1 in seen) == sum(ROWS)
    for i, (logits, _) in seen.items():
        if i >= 0:
            wanted = np.sin(float(i)) + (3 if i >= 200_000 else 0)
            np.testing.assert_allclose(logits[0], wanted, rtol=1e-6)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_log_may_be_added_to_a_running_student(ranks, stream, logs, tmp_path, on_ranks):
    both = [("fresh", 0), ("new", 2)]
    whole = cut_over(tmp_path / "whole", stream, logs, *both)
    on(on_ranks, ranks, whole)
    first = cut_over(tmp_path / "halves", stream, logs, both[0])
    assert {code for code, _ in on(on_ranks, ranks, first, 4)} == {STOPPED}  # inside slice 1
    halves = cut_over(tmp_path / "halves", stream, logs, *both)
    assert {code for code, _ in on(on_ranks, ranks, halves)} == {DONE}
    assert_same_outcome(whole, halves)
    # counted over the stop
    assert [line["fm"]["coverage"] for line in per_slice(halves)] == [1.0] * 4
    assert summary(halves)["teachers"]["fm"]["coverage"] == 1


def test_a_teacher_whose_log_begins_later_is_not_missed_before(stream, logs, tmp_path):
    raw = cut_over(tmp_path / "a", stream, logs, ("new", 2))
    assert run(raw)[0] == DONE
    assert [line["fm"]["coverage"] for line in per_slice(raw)] == [0, 0, 1, 1]
    assert summary(raw)["covered"] == sum(ROWS[2:])


# ---------------------------------------------------------------- several teachers


def stamped(stream: Stream, folder: Path) -> Stream:
    """A copy whose features were committed at time 100."""
    shutil.copytree(stream.root, folder)
    for path in folder.glob("slice=*/features/manifest.json"):
        manifest = json.loads(path.read_text())
        manifest["extra"]["at"] = 100.0
        path.write_text(json.dumps(manifest))
    return open_stream(str(folder))


def two(folder: Path, stream: Stream, logs: Path, method: str) -> Raw:
    """fm knows click alone; shop's purchase is the student's buy."""
    raw = learner(folder, stream, "", method, supervision="", on_missing="label_only")
    teachers = [
        {"name": "fm", "logs": [{"path": str(logs / "fresh")}], "tasks": {"buy": None}},
        {
            "name": "shop",
            "logs": [{"path": str(logs / "shop")}],
            "tasks": {"click": None, "buy": "purchase"},
            "weight": 0.5,
        },
    ]
    return replaced(raw, distillation__learn__teachers=teachers)


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_teacher_brings_its_tasks_and_its_own_record(ranks, stream, logs, tmp_path, on_ranks, seen):
    raw = two(tmp_path / "a", stamped(stream, tmp_path / "stream"), logs, "student_adapter")
    on(on_ranks, ranks, raw)
    for i, (logits, mask) in seen.items() if ranks == 1 else []:
        late = i >= 200_000
        if i >= 0:
            assert mask.tolist() == [[True, False], [False, late]]
            assert logits[0, 0] == pytest.approx(np.sin(float(i)), rel=1e-6)
            assert logits[1, 1] == (pytest.approx(np.sin(float(i)) + 3, rel=1e-6) if late else 0)
    late = sum(ROWS[2:]) / sum(ROWS)
    assert summary(raw)["teachers"] == {
        "fm": {"coverage": 1.0, "staleness_slices": 0.0, "lag_s": 60.0},
        "shop": {"coverage": late, "staleness_slices": 1.0, "lag_s": 90.0},
    }
    assert summary(raw)["covered"] == sum(ROWS[2:])  # has all that it could have
    lines = per_slice(raw)
    assert [line["shop"]["coverage"] for line in lines] == [0, 0, 1, 1]
    assert [line["shop"]["staleness_slices"] for line in lines] == [None, None, 1, 1]
    assert [line["shop"]["lag_s"] for line in lines] == [None, None, 90, 90]
    assert {(line["fm"]["weight"], line["shop"]["weight"]) for line in lines} == {(1.0, 0.5)}


def test_two_teachers_on_two_ranks_train_what_one_rank_trains(stream, logs, tmp_path, on_ranks):
    one, both = (two(tmp_path / name, stream, logs, "student_adapter") for name in "ab")
    single, double = on(on_ranks, 1, one), on(on_ranks, 2, both)
    torch.testing.assert_close(global_losses(single), global_losses(double), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- before any rank starts


def refused(raw: Raw, stream: Stream, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_against_stream(parsed(raw), stream)


def test_a_task_that_a_teacher_lacks_is_named_before_any_rank_starts(stream, logs, tmp_path):
    raw = learner(tmp_path, stream, logs / "shop")
    refused(raw, stream, r"has no predictions for task\(s\) click, buy of teacher 'teacher'; it has purchase; name one")
    raw = two(tmp_path, stream, logs, "single_head")
    check_against_stream(parsed(raw), stream)
    raw["distillation"]["learn"]["teachers"][0]["tasks"] = {"order": "click"}
    refused(raw, stream, r"'fm' maps task\(s\) order, which the student does not learn; heads.tasks has click, buy")
    raw["distillation"]["learn"]["teachers"][0]["tasks"] = {"click": None, "buy": None}
    refused(raw, stream, "'fm' teaches no task; map one of click, buy")


def test_a_log_that_does_not_exist_yet_is_no_mistake(stream, tmp_path):
    check_against_stream(parsed(learner(tmp_path, stream, tmp_path / "later")), stream)


def test_supervision_of_another_stream_is_refused_with_the_first_ids(stream, logs, tmp_path):
    other = make_stream(tmp_path / "stream", (60, 60, 60, 60))
    hand_log(tmp_path / "log", other, by_id, range(4))
    raw = learner(tmp_path / "run", stream, tmp_path / "log")
    message = "log/slice=000000 does not belong to .*/features: .*has 70 rows of digest .*, first ids 0, 10, 20; that of .* 60 rows"
    refused(raw, stream, message)

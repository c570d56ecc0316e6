"""Whole student jobs: loss weight 0, what is served, and slices whose supervision is missing."""

import re
import shutil
from pathlib import Path

import pytest
import yaml

from exfm.data.errors import UserError
from exfm.distillation.config import DistillationConfig
from tests.trainer.jobs import (
    ROWS,
    last_state,
    make_stream,
    on,
    replaced,
    run,
    same,
    scores,
    student,
    summary,
    teacher,
)

METHODS = ["single_head", "auxiliary_head", "student_adapter"]


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> str:
    return make_stream(tmp_path_factory.mktemp("student") / "stream").root


@pytest.fixture(scope="module")
def log(stream, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("student") / "teacher"
    run(teacher(folder, stream))
    return folder / "supervision" / "fm"


def served(raw):
    return {k: v for k, v in last_state(raw).items() if k.startswith(("tables.", "dense.served.", "adam.served."))}


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_loss_weight_0_serves_bitwise_the_undistilled_model(ranks, stream, log, tmp_path, on_ranks):
    plain = replaced(student(tmp_path / "plain", stream, log, "single_head"), distillation=None)
    on(on_ranks, ranks, plain)
    for method in METHODS:
        raw = student(tmp_path / method, stream, log, method)
        raw = replaced(raw, distillation__learn__loss_weight=0.0)
        on(on_ranks, ranks, raw)
        assert same(served(plain), served(raw)) == []
        assert scores(raw)["groups"] == scores(plain)["groups"]
        assert scores(raw)["covered"] == sum(ROWS) and scores(plain)["covered"] == 0


@pytest.mark.parametrize("method", METHODS)
def test_distilling_changes_the_served_weights_but_adds_no_served_tensor(method, stream, log, tmp_path):
    raw = student(tmp_path / "run", stream, log, method)
    plain = replaced(raw, distillation=None, run__folder=str(tmp_path / "plain"))
    run(raw)
    run(plain)
    a, b = served(raw), served(plain)
    assert a.keys() == b.keys()
    assert {k for k in a if k.endswith("weight")} & set(same(a, b))
    others = {k.split(".")[1] for k in last_state(raw) if k.startswith("dense.")} - {"served"}
    assert (
        others == {"single_head": set(), "auxiliary_head": {"heads"}, "student_adapter": {"heads", "adapter"}}[method]
    )


def without(log: Path, folder: Path, slices: tuple[int, ...]) -> Path:
    """A copy of the log that ends early."""
    shutil.copytree(log, folder)
    for index in slices:
        shutil.rmtree(folder / f"slice={index:06d}")
    return folder


@pytest.mark.parametrize("ranks", [1, 2])
def test_label_only_counts_what_was_covered(ranks, stream, log, tmp_path, on_ranks):
    short = without(log, tmp_path / "fm", (2, 3))
    raw = student(tmp_path / "run", stream, short, "student_adapter")
    raw = replaced(raw, distillation__learn__on_missing="label_only")
    on(on_ranks, ranks, raw)
    assert (summary(raw)["examples"], summary(raw)["covered"]) == (sum(ROWS), sum(ROWS[:2]))


def test_label_only_without_any_supervision_is_the_undistilled_student(stream, tmp_path):
    raw = student(tmp_path / "run", stream, tmp_path / "none" / "fm", "auxiliary_head")
    raw = replaced(raw, distillation__learn__on_missing="label_only")
    plain = replaced(raw, distillation=None, run__folder=str(tmp_path / "plain"))
    run(raw)
    run(plain)
    assert same(served(raw), served(plain)) == []
    assert summary(raw)["covered"] == 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_missing_supervision_is_refused_by_default(ranks, stream, log, tmp_path, on_ranks):
    short = without(log, tmp_path / "fm", (3,))
    raw = student(tmp_path / "run", stream, short, "auxiliary_head")
    if ranks == 1:
        with pytest.raises(
            UserError, match="slice 3: teacher 'teacher' has no supervision in .*; run the teacher, or set"
        ):
            run(raw)
        return
    with pytest.raises(AssertionError) as failed:
        on(on_ranks, ranks, raw)
    assert any(isinstance(e, UserError) for e in failed.value.errors.values())


def test_rows_that_a_teacher_did_not_score_are_masked_and_not_covered(stream, tmp_path):
    """A teacher of one domain scores no other row; a student of all traffic learns those from labels alone."""
    domains = [{"name": "even", "column": "user", "modulo": 2, "values": [0]}]
    narrow = teacher(tmp_path / "teacher", stream, stream__domains=domains, stream__domain="even")
    run(narrow)
    raw = student(tmp_path / "run", stream, tmp_path / "teacher/supervision/fm", "auxiliary_head")
    raw = replaced(raw, distillation__learn__on_missing="label_only")
    run(raw)
    assert summary(raw)["covered"] == summary(narrow)["examples"] < summary(raw)["examples"] == sum(ROWS)


def test_with_auxiliary_labels_loss_weight_0_is_another_model(stream, log, tmp_path):
    raw = student(tmp_path / "run", stream, log, "auxiliary_head")
    raw = replaced(raw, distillation__learn__loss_weight=0.0, distillation__learn__auxiliary_labels=True)
    plain = replaced(raw, distillation=None, run__folder=str(tmp_path / "plain"))
    run(raw)
    run(plain)
    assert {k for k in served(raw) if k.endswith("weight")} & set(same(served(plain), served(raw)))


def test_the_examples_of_the_documentation_are_configurations():
    text = (Path(__file__).parents[2] / "docs" / "students.md").read_text()
    examples = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)]
    learns = [DistillationConfig.model_validate(example["distillation"]).learn for example in examples]
    assert len(learns) == 6 and all(learn is not None for learn in learns)

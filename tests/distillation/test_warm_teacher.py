"""A teacher that begins with another's weights may score only what those weights have not learned, and its logs say so."""

from pathlib import Path

import pytest
import yaml

from exfm.checkpoints.commits import committed
from exfm.data.errors import UserError
from exfm.data.manifest import Stream
from exfm.distillation.supervision import SupervisionLog, identity_of
from exfm.launch.local import LocalJob
from exfm.trainer.config import parse_config
from exfm.trainer.run import DONE, run_scorer
from exfm.trainer.score_config import ScoreConfig
from tests.trainer.jobs import Raw, here, job, make_stream, replaced, run, student, teacher

ROWS = (64, 70, 66, 60, 50)
SPLIT = 2  # the first teacher learns the slices before it


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> Stream:
    return make_stream(tmp_path_factory.mktemp("warm") / "stream", ROWS)


@pytest.fixture(scope="module")
def first(stream, tmp_path_factory) -> Raw:
    raw = job(tmp_path_factory.mktemp("warm") / "first", stream.root, stream__last=SPLIT)
    run(raw)
    return raw


def second(folder: Path, stream: Stream, first: Raw, begin: int, **over: object) -> Raw:
    """A teacher that begins with the first one's weights, publishing predictions and snapshots."""
    warm = {"path": str(Path(first["run"]["folder"]) / "checkpoints")}
    checkpoint = {"every_slices": 1, "keep": 9, "snapshots": {"keep": 9}, "warm_start": warm}
    return replaced(teacher(folder, stream.root, stream__first=begin, checkpoint=checkpoint), **over)


@pytest.fixture(scope="module")
def honest(stream, first, tmp_path_factory) -> Raw:
    raw = second(tmp_path_factory.mktemp("warm") / "second", stream, first, SPLIT)
    run(raw)
    return raw


def log_of(raw: Raw) -> SupervisionLog:
    return SupervisionLog(str(Path(raw["run"]["folder"]) / "supervision/fm"))


def test_students_learn_from_it_where_it_begins_after_what_it_had_learned(honest, stream, first, tmp_path):
    manifest = log_of(honest).manifest(SPLIT)
    assert manifest is not None
    origin = identity_of(manifest).origin
    assert origin.parent == committed(Path(first["run"]["folder"]) / "checkpoints")[-1].manifest["version"]
    assert origin.until == stream.manifest(SPLIT - 1, "features").t1
    learner = student(tmp_path, stream.root, log_of(honest).root, "auxiliary_head", stream__first=SPLIT)
    assert run(learner)[0] == DONE


def test_its_version_depends_on_the_weights_that_it_began_with(honest, stream, tmp_path):
    """Equal config, equal data, another beginning."""
    cold = replaced(honest, run__folder=str(tmp_path / "cold"))
    del cold["checkpoint"]["warm_start"]
    run(cold)
    warm, other = log_of(honest).manifest(SPLIT), log_of(cold).manifest(SPLIT)
    assert warm.extra["config"] == other.extra["config"] and warm.extra["scored_by"] != other.extra["scored_by"]


def test_a_scorer_of_its_snapshots_says_the_same(honest, stream, tmp_path):
    own = {"name": "scorer", "folder": str(tmp_path), "device": "cpu", "log_every_s": 1000.0}
    score = {"run": own, "score": {"teacher": honest["run"]["folder"], "global_batch": 32, "prefetch": 0}}
    assert run_scorer(parse_config(score, "test", ScoreConfig), here()) == DONE
    log = SupervisionLog(str(tmp_path / "supervision/teacher"))
    assert log.slices() == [SPLIT + 1, SPLIT + 2]
    for index in log.slices():
        manifest = log.manifest(index)
        log.check(stream, manifest)
        assert identity_of(manifest).origin == identity_of(log_of(honest).manifest(SPLIT)).origin


@pytest.mark.parametrize("over", [{}, {"distillation": {}}], ids=["predictions and snapshots", "snapshots alone"])
def test_it_is_refused_where_it_would_score_what_it_has_learned(over, stream, first, tmp_path):
    raw = second(tmp_path / "run", stream, first, SPLIT - 1, **over)
    message = f"would leak labels to students; set stream.first: {SPLIT}, or"
    with pytest.raises(UserError, match=message):
        run(raw)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(UserError, match=message):  # before any rank starts
        LocalJob(tmp_path / "job.yaml").check()


def test_so_is_a_warm_start_of_a_warm_start(honest, stream, tmp_path):
    """What the first teacher had learned is not forgotten by the second."""
    only_first = second(tmp_path / "run", stream, honest, SPLIT)
    with pytest.raises(UserError, match="would leak labels to students; begin with an earlier commit"):
        run(only_first)


def test_whoever_publishes_nothing_may_begin_anywhere(stream, first, tmp_path):
    warm = {"path": str(Path(first["run"]["folder"]) / "checkpoints")}
    assert run(job(tmp_path / "run", stream.root, checkpoint={"warm_start": warm}))[0] == DONE


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"parent": ""}, "does not follow from slices"),
        ({"parent": "0" * 64}, "does not follow from slices"),
        ({"learned_until": 10**12}, "had learned up to time 1000000000000, but its first slice 2 begins at"),
        ({"learned_until": None}, "it is not known until when"),
        ({"learned_until": "late"}, "has no proper learned_until"),
    ],
)
def test_a_log_that_says_otherwise_is_refused(edit, message, honest, stream):
    log = log_of(honest)
    manifest = log.manifest(SPLIT)
    told = manifest.model_copy(update={"extra": manifest.extra | edit})
    with pytest.raises(UserError, match=message):
        log.check(stream, told)

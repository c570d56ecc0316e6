"""A scorer's log is what the snapshot before each slice says of it, on any ranks, whatever happened on the way."""

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from exfm.checkpoints.commits import committed
from exfm.data import writer
from exfm.data.errors import UserError
from exfm.data.manifest import open_stream
from exfm.distillation.supervision import SupervisionLog
from exfm.trainer import scorer as scorer_module
from exfm.trainer.config import parse_config
from exfm.trainer.run import DONE, STOPPED, run_scorer
from exfm.trainer.score_config import ScoreConfig
from tests.sharding.reference import Reference
from tests.trainer.jobs import Raw, here, make_stream, read_checkpoint, replaced, run, student, summary, teacher

ROWS = (70, 90, 65, 80, 50)


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> str:
    """Slices of several parts of 24 rows in row groups of 10."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "PART_ROWS", 24)
        patch.setattr(writer, "ROW_GROUP_ROWS", 10)
        return make_stream(tmp_path_factory.mktemp("scorer") / "stream", ROWS).root


@pytest.fixture(scope="module")
def fm(stream, tmp_path_factory) -> Raw:
    """A teacher that publishes its forward pass and a snapshot after every slice, every other one a delta."""
    checkpoint = {"every_slices": 1, "keep": 100, "snapshots": {"keep": 100, "full_every": 2}}
    raw = teacher(tmp_path_factory.mktemp("scorer") / "teacher", stream, checkpoint=checkpoint)
    run(raw)
    return raw


def config(folder: Path, fm: Raw, **score: Any) -> Raw:
    own = {"name": "scorer", "folder": str(folder), "device": "cpu", "log_every_s": 1000.0}
    section = {"teacher": fm["run"]["folder"], "global_batch": 32, "prefetch": 0, "wait_s": 0.0}
    return {"run": own, "score": section | score}


def score(raw: Raw, follow: bool = False, stop: Any = lambda: False) -> int:
    return run_scorer(parse_config(raw, "test", ScoreConfig), here(), follow, stop)


def log_of(raw: Raw) -> Path:
    return Path(raw["run"]["folder"]) / "supervision/teacher"


def committed_slices(raw: Raw) -> list[int]:
    return SupervisionLog(str(log_of(raw))).slices()


def logged(raw: Raw) -> dict[int, np.ndarray]:
    """The logits [rows, tasks] of every slice in the log, in the order of the data's parts."""
    found = {}
    for folder in sorted(log_of(raw).glob("slice=*")):
        tables = [
            pq.read_table(folder / p["path"]) for p in json.loads((folder / "manifest.json").read_text())["parts"]
        ]
        table = pa.concat_tables(tables)
        found[int(folder.name[6:])] = np.stack([table.column(f"logit/{t}").to_numpy() for t in ("click", "buy")], 1)
    return found


def reference(fm: Raw, stream: str, index: int, after: int) -> np.ndarray:
    """Logits of slice `index` in plain torch from the full commit after slice `after`."""
    commit = next(
        c for c in committed(Path(fm["run"]["folder"]) / "checkpoints") if c.manifest["position"]["slice"] == after + 1
    )
    model = Reference(fm, read_checkpoint(commit.folder), torch.float32)
    rows = pa.concat_tables(
        pq.read_table(p) for p in sorted(Path(stream).glob(f"slice={index:06d}/features/part-*.parquet"))
    )
    pooled = torch.cat([model._pool(f, model.tables, rows) for f in model._features()], 1)
    return model._model(model._dense(rows), pooled).detach().numpy()


@pytest.mark.parametrize(("ranks", "lag", "pipeline"), [(1, 0, "base"), (2, 0, "sparse_dist"), (3, 1, "base")])
def test_every_slice_is_scored_by_the_frozen_snapshot_before_it(ranks, lag, pipeline, stream, fm, tmp_path, on_ranks):
    raw = config(tmp_path / "scorer", fm, lag=lag)
    raw["run"]["pipeline"] = pipeline
    assert (on_ranks(ranks, score, raw) if ranks > 1 else [score(raw)]) == [DONE] * ranks
    found = logged(raw)
    assert sorted(found) == list(range(1 + lag, len(ROWS)))
    for index, logits in found.items():
        want = reference(fm, stream, index, index - 1 - lag)
        np.testing.assert_allclose(logits, want, atol=2e-5)
        # and by no other: the next snapshot says otherwise
        assert np.abs(logits - reference(fm, stream, index, index - lag)).max() > 1e-3
        manifest = SupervisionLog(str(log_of(raw))).manifest(index)
        assert manifest is not None and manifest.extra["watermark"] == index - 1 - lag
        assert [p.row_groups for p in manifest.parts] == [
            p.row_groups for p in open_stream(stream).manifest(index, "features").parts
        ]


def test_scoring_needs_no_labels(stream, fm, tmp_path):
    bare = shutil.copytree(stream, tmp_path / "stream")
    for labels in bare.glob("slice=000004/labels"):
        shutil.rmtree(labels)
    moved = shutil.copytree(fm["run"]["folder"], tmp_path / "teacher")
    text = (moved / "config.yaml").read_text().replace(str(stream), str(bare))
    (moved / "config.yaml").write_text(text)
    raw, whole = config(tmp_path / "a", {"run": {"folder": str(moved)}}), config(tmp_path / "b", fm)
    assert score(raw) == score(whole) == DONE
    assert all(np.array_equal(v, logged(whole)[k]) for k, v in logged(raw).items()) and 4 in logged(raw)


def test_a_scorer_that_was_stopped_or_killed_goes_on_and_logs_the_same(stream, fm, tmp_path, monkeypatch):
    whole = config(tmp_path / "whole", fm)
    score(whole)
    raw = config(tmp_path / "run", fm)
    put, seen = scorer_module.Publisher.publish, []

    def dies(self: Any, index: int, *rest: Any) -> None:
        seen.append(index)
        if len(seen) == 2:
            raise KeyboardInterrupt  # before the commit of the second slice
        put(self, index, *rest)

    monkeypatch.setattr(scorer_module.Publisher, "publish", dies)
    with pytest.raises(KeyboardInterrupt):
        score(raw)
    assert sorted(logged(raw)) == [1]
    assert score(raw) == DONE and seen == [1, 2, 2, 3, 4]
    for index, logits in logged(whole).items():
        assert np.array_equal(logged(raw)[index], logits)
    assert score(raw) == DONE and len(seen) == 5  # all is there: nothing is scored again


def test_a_follower_waits_for_snapshots_and_stops_when_told(stream, fm, tmp_path):
    hidden = shutil.copytree(fm["run"]["folder"], tmp_path / "teacher")
    later = tmp_path / "later"
    shutil.move(hidden / "snapshots/slice=000002", later)
    for number in (3, 4):
        shutil.rmtree(hidden / f"snapshots/slice={number:06d}")
    raw = config(tmp_path / "scorer", {"run": {"folder": str(hidden)}})

    def publish() -> None:
        while committed_slices(raw) != [1, 2]:
            time.sleep(0.05)
        shutil.move(later, hidden / "snapshots/slice=000002")

    thread = threading.Thread(target=publish)
    thread.start()
    assert score(raw, follow=True, stop=lambda: 3 in committed_slices(raw)) == STOPPED
    thread.join()
    assert sorted(logged(raw)) == [1, 2, 3]
    # without --follow it scores what it can and ends
    assert score(raw) == DONE and sorted(logged(raw)) == [1, 2, 3]


def test_a_student_learns_from_a_scorers_log_and_knows_how_stale_it_is(stream, fm, tmp_path):
    raw = config(tmp_path / "scorer", fm, lag=1)
    score(raw)
    vm = student(tmp_path / "student", stream, log_of(raw), "auxiliary_head", stream__first=2)
    assert run(vm)[0] == DONE
    told = summary(vm)["teachers"]["teacher"]
    assert told["coverage"] == 1.0 and told["staleness_slices"] == 1.0


def test_a_snapshot_refused_by_the_gate_is_replaced_within_the_bound_only(stream, tmp_path, fm):
    checkpoint = fm["checkpoint"] | {"snapshots": {"keep": 100, "gate": {"ne": [0.0, 9.0], "calibration": [0.0, 9.0]}}}
    raw = replaced(fm, run__folder=str(tmp_path / "teacher"), checkpoint=checkpoint)
    run(raw)
    shutil.rmtree(tmp_path / "teacher/snapshots/slice=000002")
    (tmp_path / "teacher/snapshots/slice=000002.refused.json").write_text('{"why": "ne of click is 7"}')
    strict = config(tmp_path / "strict", raw)
    with pytest.raises(UserError, match=r"slice 3 .* slice=000002, but ne of click is 7.*raise score.hold"):
        score(strict)
    assert sorted(logged(strict)) == [1, 2]
    held = config(tmp_path / "held", raw, hold=1)
    assert score(held) == DONE and sorted(logged(held)) == [1, 2, 3, 4]
    log = SupervisionLog(str(log_of(held)))
    assert [log.manifest(i).extra["watermark"] for i in (1, 2, 3, 4)] == [0, 1, 1, 3]
    vm = student(tmp_path / "student", stream, log_of(held), "auxiliary_head", stream__first=1)
    assert run(vm)[0] == DONE


def test_a_removed_snapshot_is_named(fm, tmp_path):
    moved = shutil.copytree(fm["run"]["folder"], tmp_path / "teacher")
    for number in (0, 1):
        shutil.rmtree(moved / f"snapshots/slice={number:06d}")
    with pytest.raises(
        UserError, match=r"slice=000000, but it has been removed: slice=000002 is there.*snapshots.keep"
    ):
        score(config(tmp_path / "scorer", {"run": {"folder": str(moved)}}), follow=True)


def test_a_snapshot_of_another_version_is_refused(fm, stream, tmp_path):
    other = replaced(fm, run__folder=str(tmp_path / "other"), run__seed=3)
    run(other)
    moved = Path(shutil.copytree(fm["run"]["folder"], tmp_path / "teacher"))
    shutil.rmtree(moved / "snapshots")
    shutil.copytree(tmp_path / "other/snapshots", moved / "snapshots")
    with pytest.raises(UserError, match=r"slice=000000 is of version .*: it is of another teacher, or was edited"):
        score(config(tmp_path / "scorer", {"run": {"folder": str(moved)}}))


def test_old_supervision_expires_and_is_not_scored_again(fm, tmp_path):
    raw = config(tmp_path / "scorer", fm, ttl_s=1e-6)
    assert score(raw) == DONE and sorted(logged(raw)) == [4]
    assert score(raw) == DONE and sorted(logged(raw)) == [4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first": 0}, "score.first is 0, .* begin at slice 1 or later"),
        ({"lag": 9}, "there is nothing to score"),
        ({"teacher": "/nowhere"}, "/nowhere has no config.yaml"),
    ],
)
def test_what_cannot_be_scored_is_refused(change, message, fm, tmp_path):
    with pytest.raises(UserError, match=message):
        score(config(tmp_path / "scorer", fm, **change))


def test_a_teacher_without_snapshots_is_refused(stream, fm, tmp_path):
    raw = replaced(fm, run__folder=str(tmp_path / "teacher"), checkpoint={}, stream__last=1)
    run(raw)
    with pytest.raises(UserError, match="publishes no snapshots"):
        score(config(tmp_path / "scorer", raw))

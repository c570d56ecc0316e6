"""The supervision log: the right logit beside every example, and nothing accepted that could leak or was mixed up."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from exfm.data import writer
from exfm.data.errors import UserError
from exfm.data.manifest import open_stream
from exfm.trainer.run import DONE
from tests.trainer.jobs import (
    Raw,
    all_logits,
    make_stream,
    on,
    replaced,
    run,
    student,
    summary,
    supervision_files,
    teacher,
)

ROWS = (70, 90, 65, 80)


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> str:
    """Slices of up to 4 parts of 24 rows in row groups of 10."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "PART_ROWS", 24)
        patch.setattr(writer, "ROW_GROUP_ROWS", 10)
        return make_stream(tmp_path_factory.mktemp("supervision") / "stream", ROWS).root


@pytest.fixture(scope="module")
def fm(stream, tmp_path_factory) -> Raw:
    raw = teacher(tmp_path_factory.mktemp("supervision") / "teacher", stream)
    run(raw)
    return raw


@pytest.fixture
def log(fm, tmp_path) -> Path:
    """A copy of the teacher's log, to be damaged."""
    return Path(shutil.copytree(Path(fm["run"]["folder"]) / "supervision" / "fm", tmp_path / "log" / "fm"))


def learn(stream: str, log: Path, folder: Path, **over: object) -> int:
    return run(student(folder, stream, log, "auxiliary_head", **over))[0]


# ---------------------------------------------------------------- what is logged


@pytest.mark.parametrize("pipeline", [pytest.param("base", marks=pytest.mark.slow), "sparse_dist"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_example_has_the_logit_that_its_own_forward_pass_gave(ranks, pipeline, stream, fm, tmp_path, on_ranks):
    raw = replaced(fm, run__folder=str(tmp_path / "run"), run__pipeline=pipeline)
    seen = all_logits(on(on_ranks, ranks, raw))
    single = all_logits(on(on_ranks, 1, replaced(fm, run__folder=str(tmp_path / "single"))))
    logged = {}
    for index in range(len(ROWS)):
        root = tmp_path / f"run/supervision/fm/slice={index:06d}"
        manifest = json.loads((root / "manifest.json").read_text())
        features = open_stream(stream).manifest(index, "features")
        assert [p["path"] for p in manifest["parts"]] == [p.path for p in features.parts]
        assert [p["row_groups"] for p in manifest["parts"]] == [
            [g.model_dump() for g in p.row_groups] for p in features.parts
        ]
        for part in features.parts:
            mine = pq.ParquetFile(root / part.path)
            theirs = pq.ParquetFile(f"{stream}/slice={index:06d}/features/{part.path}")
            sizes = [[f.metadata.row_group(i).num_rows for i in range(f.num_row_groups)] for f in (mine, theirs)]
            assert sizes[0] == sizes[1] == [g.rows for g in part.row_groups]
            logits = np.stack([mine.read().column(i).to_numpy() for i in range(2)], 1)  # click, buy
            logged |= dict(zip(theirs.read().column("example_id").to_pylist(), logits.tolist(), strict=True))
    assert logged == seen  # bitwise
    assert logged.keys() == single.keys() and len(logged) == sum(ROWS)
    assert max(np.abs(np.subtract(logged[i], single[i])).max() for i in logged) < 1e-4
    assert len({tuple(v) for v in logged.values()}) > sum(ROWS) - 10  # a mix-up of rows would show


def test_a_prediction_does_not_depend_on_its_own_or_later_labels(stream, fm, tmp_path):
    """Flip the labels of the last slice: its first batch is scored as before, because nothing of it was learned."""
    other = shutil.copytree(stream, tmp_path / "stream")
    flip_labels(other, 3)
    raw = replaced(fm, stream__path=str(other), run__folder=str(tmp_path / "run"))
    a, b = (all_logits([run(replaced(fm, run__folder=str(tmp_path / "a")))]), all_logits([run(raw)]))
    first = [i for i in a if i < 300_000 + 10 * 32]
    assert all(a[i] == b[i] for i in first)
    assert any(a[i] != b[i] for i in a if i not in set(first))


# ---------------------------------------------------------------- the leak check


def edit(path: Path, **extra: object) -> None:
    manifest = json.loads(path.read_text())
    manifest["extra"] |= extra
    path.write_text(json.dumps(manifest))


def flip_labels(stream: Path, index: int) -> None:
    """Change the first label of a slice and commit it properly, as another preparation of the data would."""
    folder = stream / f"slice={index:06d}" / "labels"
    manifest = json.loads((folder / "manifest.json").read_text())
    part = manifest["parts"][0]
    table = pq.read_table(folder / part["path"])
    click = 1 - table.column("click").to_numpy()
    table = table.set_column(0, "click", pa.array(click.astype(np.float32)))
    stream_of = open_stream(str(stream))
    groups = stream_of.manifest(index, "labels").parts[0].row_groups
    new = writer.write_part(stream_of.fs, str(folder), part["path"], table, groups)
    manifest["parts"][0] = new.model_dump()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_an_untouched_log_passes(stream, log, tmp_path):
    assert learn(stream, log, tmp_path / "run") == DONE


def test_a_student_may_start_late(stream, log, tmp_path):
    assert learn(stream, log, tmp_path / "run", stream__first=3) == DONE


def test_a_late_start_still_checks_what_came_before(stream, log, tmp_path):
    edit(log / "slice=000003/manifest.json", scored_by="0" * 64)
    with pytest.raises(UserError, match="does not follow from slices 0 to 2"):
        learn(stream, log, tmp_path / "run", stream__first=3)


def test_what_was_retired_is_not_missed(stream, log, tmp_path):
    """A version follows from the data alone, so the log needs no earlier slice."""
    shutil.rmtree(log / "slice=000000")
    shutil.rmtree(log / "slice=000001")
    assert learn(stream, log, tmp_path / "run", stream__first=2) == DONE


def test_a_teacher_may_start_late(stream, fm, tmp_path):
    late = replaced(fm, run__folder=str(tmp_path / "late"), stream__first=2)
    run(late)
    raw = student(tmp_path / "run", stream, tmp_path / "late/supervision/fm", "auxiliary_head")
    raw = replaced(raw, distillation__learn__on_missing="label_only")
    assert run(raw)[0] == DONE
    assert summary(raw)["covered"] == sum(ROWS[2:])


def shift_a_logit(log: Path) -> None:
    path = log / "slice=000001/part-00001.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(0, table.column_names[0], pa.array(table.column(0).to_numpy() + 1)), path)


DAMAGE = {
    "an edited logits file": (shift_a_logit, "differs from the checksum"),
    "a watermark at the slice itself": (
        lambda log: edit(log / "slice=000001/manifest.json", watermark=1),
        "had already trained on slice 1",
    ),
    "a later scorer": (
        lambda log: edit(log / "slice=000001/manifest.json", scored_by="f" * 64),
        "does not follow from slices 0 to 0",
    ),
    "a forward pass of an older teacher": (
        lambda log: edit(log / "slice=000002/manifest.json", watermark=0),
        "leak labels and are refused",
    ),
    "another config": (lambda log: edit(log / "slice=000001/manifest.json", config="f" * 64), "mixes teachers"),
    "another teacher": (lambda log: edit(log / "slice=000001/manifest.json", teacher="other"), "mixes teachers"),
    "another first slice": (
        lambda log: edit(log / "slice=000000/manifest.json", first=1),
        "has no version after slice -1",
    ),
    "no first slice": (lambda log: edit(log / "slice=000001/manifest.json", first=None), "has no proper first"),
    "another slice's manifest": (
        lambda log: shutil.copytree(log / "slice=000002", log / "slice=000001", dirs_exist_ok=True),
        "slice=000001 .*(holds the manifest of slice 2|does not belong to)",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_was_edited_is_refused(name, stream, log, tmp_path):
    damage, message = DAMAGE[name]
    damage(log)
    with pytest.raises(UserError, match=message):
        learn(stream, log, tmp_path / "run")


def test_another_teachers_slice_is_refused(stream, fm, log, tmp_path):
    other = replaced(fm, run__folder=str(tmp_path / "other"), run__seed=1)
    run(other)
    shutil.rmtree(log / "slice=000002")
    shutil.copytree(tmp_path / "other/supervision/fm/slice=000002", log / "slice=000002")
    with pytest.raises(UserError, match=r"slice=000002/manifest.json: its teacher 'fm' .* is not that of slice 1"):
        learn(stream, log, tmp_path / "run")
    # nor does a student that starts on or after it take it
    for first, named in ((2, 1), (3, 2)):
        with pytest.raises(UserError, match=f"is not that of slice {named}"):
            learn(stream, log, tmp_path / f"late-{first}", stream__first=first)


def test_supervision_of_another_stream_is_refused(log, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "PART_ROWS", 24)
        patch.setattr(writer, "ROW_GROUP_ROWS", 10)
        other = make_stream(tmp_path / "stream", ROWS, seed=9).root
    with pytest.raises(UserError, match="do not belong|does not belong|other data"):
        learn(other, log, tmp_path / "run")


def test_supervision_of_data_that_changed_since_is_refused(stream, log, tmp_path):
    changed = shutil.copytree(stream, tmp_path / "stream")
    flip_labels(changed, 1)
    with pytest.raises(UserError, match="slice=000002.* does not follow from slices 0 to 1"):
        learn(str(changed), log, tmp_path / "run")
    # a change of an earlier slice breaks the chain of a student that starts after it, too
    with pytest.raises(UserError, match="does not follow from slices 0 to 2"):
        learn(str(changed), log, tmp_path / "late", stream__first=3)


def test_a_teacher_never_overwrites_another_versions_supervision(stream, fm, tmp_path):
    a = replaced(fm, run__folder=str(tmp_path / "a"))
    run(a)
    before = supervision_files(a)
    shutil.rmtree(tmp_path / "a/checkpoints")
    with pytest.raises(UserError, match="already holds supervision of another teacher version"):
        run(replaced(a, optim__dense__lr=0.02))
    assert supervision_files(a) == before


def test_a_shuffling_teacher_is_refused(stream, fm):
    with pytest.raises(UserError, match="an example would be scored after later ones were learned"):
        run(replaced(fm, stream__shuffle_window=64))

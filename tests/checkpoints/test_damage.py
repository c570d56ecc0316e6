"""A damaged commit is named and set aside, and the job goes on from the one before to the same end, bit for bit."""

import contextlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from exfm.checkpoints.commits import committed
from exfm.checkpoints.layout import Damaged
from exfm.checkpoints.snapshots import load_snapshot
from exfm.checkpoints.storage import Storage
from exfm.data.errors import UserError
from exfm.data.manifest import open_stream
from exfm.data.writer import write_part
from exfm.trainer.run import DONE
from tests.ranks import RankFailed
from tests.trainer.jobs import (
    Raw,
    assert_same_outcome,
    copied,
    job,
    make_stream,
    on,
    read_checkpoint,
    replaced,
    run,
    same,
    teacher,
)

EVERY = {"every_slices": 1, "keep": 100}
Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> str:
    return make_stream(tmp_path_factory.mktemp("damage") / "stream").root


@pytest.fixture(scope="module")
def finished(stream, tmp_path_factory, rank_pool) -> dict[str, Raw]:
    """Jobs of two ranks that committed at steps 5, 10, 15 and 20: all in full, in turns, or one long chain."""
    root = tmp_path_factory.mktemp("finished")
    raws = {}
    for name, full_every in {"full": 1, "in turns": 2, "chain": 100}.items():
        raws[name] = teacher(root / name, stream, checkpoint=EVERY | {"full_every": full_every})
        on(rank_pool, 2, raws[name])
    kinds = {name: [c.kind for c in committed(checkpoints(raw))] for name, raw in raws.items()}
    assert kinds == {"full": ["full"] * 4, "in turns": ["full", "delta"] * 2, "chain": ["full"] + ["delta"] * 3}
    return raws


def checkpoints(raw: Raw) -> Path:
    return Path(raw["run"]["folder"]) / "checkpoints"


def folders(raw: Raw) -> list[str]:
    return sorted(p.name for p in checkpoints(raw).iterdir() if p.is_dir())


def heard(raw: Raw) -> str:
    """What a job says on this rank."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert run(raw)[0] == DONE
    return said.getvalue()


def flip(position: float) -> Damage:
    """Flip one bit at a byte, or at a part of the length."""

    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(position if position >= 1 else position * len(content))] ^= 4
        path.write_bytes(content)

    return damage


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def goes_back(raw: Raw, file: str, steps: list[int], on_ranks: Callable[..., list[str]]) -> str:
    """Run a job with a damaged file: it names the file and resumes after these steps were passed over; its end is the same."""
    said = on_ranks(2, heard, raw)[0]
    assert re.search(rf"{file} .*going back to the commit before it", said), said
    resumed = re.search(r"resumed from .*step=0*(\d+)", said)
    assert resumed and [s for s in (5, 10, 15, 20) if s > int(resumed[1])] == steps
    return said


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("rank-00000.safetensors", flip(2)),  # the header's length
        ("rank-00000.safetensors", flip(60)),  # the header
        ("rank-00001.safetensors", flip(0.9)),
        ("rank-00000.safetensors", truncate),
        ("rank-00001.safetensors", empty),
        ("rank-00001.safetensors", Path.unlink),
        ("index.json", flip(0.5)),
        ("index.json", truncate),
        ("index.json", Path.unlink),
        ("manifest.json", flip(0.5)),
        ("manifest.json", truncate),
    ],
)
def test_a_damaged_file_is_named_and_the_commit_before_it_taken(file, damage, finished, tmp_path, on_ranks):
    raw = copied(finished["full"], tmp_path / "run")
    damage(Path(committed(checkpoints(raw))[-1].folder) / file)
    goes_back(raw, f"step=00000020/{file}", [20], on_ranks)
    assert_same_outcome(finished["full"], raw)


@pytest.mark.parametrize(
    ("chain", "step", "damage", "lost"),
    [
        ("in turns", 20, flip(0.5), [20]),  # a delta
        ("in turns", 15, flip(0.5), [15, 20]),  # what a delta rests on
        ("in turns", 15, Path.unlink, [15, 20]),
        ("chain", 10, flip(0.5), [10, 15, 20]),  # in the middle
    ],
)
def test_a_damaged_delta_or_base_takes_with_it_what_rests_on_it_and_no_more(
    chain, step, damage, lost, finished, tmp_path, on_ranks
):
    raw = copied(finished[chain], tmp_path / "run")
    damage(checkpoints(raw) / f"step={step:08d}/rank-00000.safetensors")
    goes_back(raw, f"step={step:08d}/rank-00000.safetensors", lost, on_ranks)
    whole, again = committed(checkpoints(finished[chain])), committed(checkpoints(raw))
    assert [c.step for c in again] == [c.step for c in whole]
    on_ranks(2, run, replaced(raw, stream__last=4))  # what was made anew is undamaged
    assert_same_end(finished[chain], raw, tmp_path, on_ranks)


def assert_same_end(a: Raw, b: Raw, folder: Path, on_ranks: Callable[..., list[str]]) -> None:
    from tests.checkpoints.test_reshard import resaved

    ends = []
    for i, raw in enumerate((a, b)):
        then = replaced(raw, run__folder=str(folder / f"end-{i}"), checkpoint={})
        ends.append(read_checkpoint(on_ranks(2, resaved, then, raw["run"]["folder"])[0]))
    assert [n for n in same(*ends) if not n.startswith("rank.")] == []


def test_a_delta_whose_base_is_gone_or_was_exchanged_is_not_used(finished, tmp_path, on_ranks):
    gone, exchanged = (copied(finished["in turns"], tmp_path / name) for name in ("gone", "exchanged"))
    shutil.rmtree(checkpoints(gone) / "step=00000015")
    assert "holds rows changed since step=00000015, which is missing" in on_ranks(2, heard, gone)[0]
    shutil.rmtree(checkpoints(exchanged) / "step=00000015")
    shutil.copytree(checkpoints(finished["full"]) / "step=00000015", checkpoints(exchanged) / "step=00000015")
    said = on_ranks(2, heard, exchanged)[0]
    assert "step=00000015 is not the commit that" in said and "resumed from" in said.split("going back")[1]
    for raw in (gone, exchanged):
        assert_same_end(finished["in turns"], raw, tmp_path / raw["run"]["folder"].split("/")[-1], on_ranks)


def test_without_any_undamaged_commit_every_rank_refuses_to_begin_anew(finished, tmp_path, on_ranks):
    raw = copied(finished["chain"], tmp_path / "run")
    flip(0.5)(checkpoints(raw) / "step=00000005/rank-00001.safetensors")
    with pytest.raises(RankFailed) as failed:
        on_ranks(2, run, raw)
    for error in failed.value.errors.values():
        assert isinstance(error, UserError)
        assert re.search(
            r"no undamaged commit is left in .*rank-00001.safetensors.*choose another run.folder", str(error)
        )
    assert len(failed.value.errors) == 2


def test_a_commit_without_manifest_is_not_resumed_from_and_is_cleaned_up(stream, tmp_path):
    whole, raw = teacher(tmp_path / "whole", stream), teacher(tmp_path / "run", stream)
    run(whole)
    run(raw, 7)
    good = committed(checkpoints(raw))[-1]
    # newer, complete, but never committed; and one that only just began
    shutil.copytree(good.folder, checkpoints(raw) / "step=00000015")
    (checkpoints(raw) / "step=00000015/manifest.json").unlink()
    (checkpoints(raw) / "step=00000017").mkdir()
    assert [c.step for c in committed(checkpoints(raw))] == [good.step]
    assert f"resumed from {good.folder}" in heard(raw)
    assert_same_outcome(whole, raw)
    assert {"step=00000015", "step=00000017"}.isdisjoint(folders(raw))


def test_a_finished_job_that_died_removing_an_old_commit_removes_it_when_run_again(stream, tmp_path):
    raw = teacher(tmp_path / "run", stream)
    run(raw)
    kept = folders(raw)
    shutil.copytree(committed(checkpoints(raw))[0].folder, checkpoints(raw) / "step=00000003")
    (checkpoints(raw) / "step=00000003/manifest.json").unlink()
    assert run(raw)[0] == DONE
    assert folders(raw) == kept


@pytest.mark.parametrize("file", ["rank-00000.safetensors", "index.json", "manifest.json"])
@pytest.mark.parametrize("damage", [flip(0.5), truncate, Path.unlink], ids=["flip", "truncate", "unlink"])
def test_a_damaged_snapshot_is_refused_by_name_and_a_new_one_published(file, damage, stream, tmp_path):
    over = EVERY | {"full_every": 100, "snapshots": {"full_every": 100, "keep": 100}}
    raw = job(tmp_path / "run", stream, checkpoint=over, stream__last=2)
    run(raw)
    root = Storage(tmp_path / "run/snapshots")
    damage(tmp_path / f"run/snapshots/slice=000001/{file}")
    said = (
        rf"slice=000001/{file}" if (file, damage) != ("manifest.json", Path.unlink) else "has no snapshot slice=000001"
    )
    state = {"tables.user.weight": read_checkpoint(committed(checkpoints(raw))[0].folder)["tables.user.weight"]}
    with pytest.raises(UserError, match=said):
        load_snapshot(root, "slice=000001", state)
    then = replaced(raw, stream__last=None)
    assert run(then)[0] == DONE
    if file == "manifest.json":  # a damaged data file shows only when it is read
        load_snapshot(root, "slice=000003", state)
    else:
        with pytest.raises(Damaged, match=said):
            load_snapshot(root, "slice=000003", state)


def test_a_slice_without_examples_of_the_domain_commits_like_any_other(tmp_path):
    """Nothing is learned, so the step stays: the new commit may not write into the files of the one before."""
    stream = make_stream(tmp_path / "stream", (40, 40, 40)).root
    domains = [{"name": "one", "column": "user", "values": [3]}]
    raw = job(tmp_path / "run", stream, stream__domains=domains, stream__domain="one", checkpoint=EVERY)
    only_first = keep_user_in_first_slice(stream, 3)
    assert only_first
    assert run(raw)[0] == DONE
    found = committed(checkpoints(raw))
    assert [c.manifest["position"]["slice"] for c in found] == [1, 2, 3]
    a, b = (read_checkpoint(found[i].folder) for i in (0, 2))
    assert [n for n in same(a, b) if not n.startswith("rank.")] == []


def keep_user_in_first_slice(stream: str, user: int) -> bool:
    """Give the user's examples of later slices to another user, committed properly."""
    opened = open_stream(stream)
    for index in (1, 2):
        folder = Path(stream) / f"slice={index:06d}/features"
        manifest = json.loads((folder / "manifest.json").read_text())
        path = manifest["parts"][0]["path"]
        table = pq.read_table(folder / path)
        users = table.column("user").to_numpy().copy()
        users[users == user] = user + 1
        table = table.set_column(table.column_names.index("user"), "user", pa.array(users))
        groups = opened.manifest(index, "features").parts[0].row_groups
        manifest["parts"][0] = write_part(opened.fs, str(folder), path, table, groups).model_dump()
        (folder / "manifest.json").write_text(json.dumps(manifest))
    first = pq.read_table(Path(stream) / "slice=000000/features/part-00000.parquet")
    return bool((first.column("user").to_numpy() == user).any())

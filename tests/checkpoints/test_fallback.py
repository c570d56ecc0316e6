"""Going back to an older commit leaves nothing of the damaged one, and never turns into beginning anew."""

import shutil
from pathlib import Path

import pytest
import torch

from benchmarks._kill_jobs import whole_state
from exfm.checkpoints import writer
from exfm.checkpoints.commits import committed
from exfm.checkpoints.saver import SaveError
from exfm.checkpoints.snapshots import load_snapshot
from exfm.checkpoints.storage import Storage
from exfm.data.errors import UserError
from exfm.trainer.run import DONE, STOPPED
from tests.ranks import RankFailed
from tests.trainer.jobs import Raw, job, make_stream, on, read_checkpoint, replaced, run, same

COMMITS = {"every_slices": 1, "keep": 100}


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> str:
    return make_stream(tmp_path_factory.mktemp("fallback") / "stream").root


def spoil(folder: str | Path) -> None:
    path = Path(folder) / "rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_job_without_undamaged_commits_refuses_again_and_again_and_removes_nothing(stream, tmp_path):
    """It may be the disk that is gone for a while: what is there must be there when it comes back."""
    raw = job(tmp_path / "run", stream, checkpoint=COMMITS)
    assert run(raw, 12)[0] == STOPPED
    kept = shutil.copytree(tmp_path / "run/checkpoints", tmp_path / "kept")
    for found in committed(tmp_path / "run/checkpoints"):
        spoil(found.folder)
    before = sorted(p.relative_to(tmp_path / "run") for p in (tmp_path / "run/checkpoints").rglob("*"))
    for _ in range(2):
        with pytest.raises(UserError, match=r"no undamaged commit is left in .*rank-00000.safetensors"):
            run(raw)
        assert sorted(p.relative_to(tmp_path / "run") for p in (tmp_path / "run/checkpoints").rglob("*")) == before
    shutil.rmtree(tmp_path / "run/checkpoints")
    shutil.move(kept, tmp_path / "run/checkpoints")
    assert run(raw)[0] == DONE


def test_rows_that_only_the_damaged_commit_had_begin_anew(stream, tmp_path):
    """The table grew between the commits: going back past that leaves none of the damaged commit's rows."""
    small = job(tmp_path / "run", stream, checkpoint=COMMITS)
    assert run(small, 5)[0] == STOPPED
    grown = replaced(small, tables__user={"rows": 40, "width": 8, "init": 0.1})
    assert run(grown, 5)[0] == STOPPED
    old, new = committed(tmp_path / "run/checkpoints")[-2:]
    saved = read_checkpoint(old.folder)
    spoil(new.folder)
    assert run(grown, 1)[0] == STOPPED  # one more commit, of the first step after going back
    fresh = job(tmp_path / "fresh", stream, checkpoint=COMMITS, tables__user={"rows": 40, "width": 8, "init": 0.1})
    run(fresh, 1)
    state, start = (read_checkpoint(committed(tmp_path / n / "checkpoints")[-1].folder) for n in ("run", "fresh"))
    assert saved["tables.user.weight"].shape == (20, 8)
    # no example has a user above 19: rows 20 to 39 are what a new job begins with
    assert torch.equal(state["tables.user.weight"][20:], start["tables.user.weight"][20:])
    assert not state["tables.user.adagrad_sum"][20:].any()


def out_of_memory(raw: Raw) -> None:
    """Run; rank 1 fails in a way that no one has thought of, in its first save."""
    import torch.distributed as dist

    write = writer.write_file

    def fail(*args, **kwargs):
        if dist.get_rank() == 1:
            raise MemoryError("no memory")
        return write(*args, **kwargs)

    writer.write_file = fail
    try:
        run(raw)
    finally:
        writer.write_file = write


def test_an_unforeseen_error_of_one_rank_in_a_save_is_everybodys(stream, tmp_path, on_ranks):
    raw = job(tmp_path / "run", stream, checkpoint=COMMITS)
    with pytest.raises(RankFailed) as failed:
        on_ranks(2, out_of_memory, raw)
    assert [type(e) for _, e in sorted(failed.value.errors.items())] == [SaveError] * 2
    assert all("no memory" in str(e) for e in failed.value.errors.values())
    assert committed(tmp_path / "run/checkpoints") == []


def test_a_snapshot_that_a_killed_job_did_not_get_to_is_published_by_the_next(stream, tmp_path):
    section = COMMITS | {"snapshots": {"full_every": 3, "keep": 10}}
    raw = job(tmp_path / "run", stream, checkpoint=section)
    assert run(raw)[0] == DONE
    missing = tmp_path / "run/snapshots/slice=000003"
    before = read_checkpoint(missing)
    shutil.rmtree(missing)
    assert run(raw)[0] == DONE  # it was at its end: nothing is trained
    assert same(before, read_checkpoint(missing)) == []


def test_a_snapshot_after_other_ranks_have_gone_on_holds_the_newest_rows(stream, tmp_path, on_ranks):
    """Deltas of two plans lie between two snapshots: their boxes overlap, and none says which came last."""
    section = {"every_slices": 1, "every_examples": 32, "keep": 100, "full_every": 50}
    section["snapshots"] = {"full_every": 10, "every_slices": 2, "keep": 10}
    raw = job(tmp_path / "run", stream, sharding__allowed=["row_wise"], checkpoint=section)
    assert {code for code, _ in on(on_ranks, 2, raw, 14)} == {STOPPED}
    on(on_ranks, 3, raw)
    newest = whole_state(committed(tmp_path / "run/checkpoints")[-1])
    state = {n: torch.zeros_like(t) for n, t in newest.items() if n.startswith("tables.") and n.endswith(".weight")}
    load_snapshot(Storage(tmp_path / "run/snapshots"), "slice=000003", state)
    assert same(state, {n: newest[n] for n in state}) == []

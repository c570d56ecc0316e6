"""A save that fails ends the job with a word that names the file; the commit before it stays and leads to the same end."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml

from exfm.checkpoints.commits import committed
from exfm.checkpoints.saver import SaveError
from exfm.checkpoints.storage import Storage
from exfm.data.errors import UserError
from exfm.trainer.run import DONE, run_job
from tests.ranks import RankFailed
from tests.trainer.jobs import (
    Raw,
    assert_same_outcome,
    here,
    job,
    last_state,
    make_stream,
    on,
    parsed,
    replaced,
    run,
    same,
    teacher,
)

EVERY = {"every_slices": 1, "keep": 2}


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> str:
    return make_stream(tmp_path_factory.mktemp("faults") / "stream").root


def checkpoints(raw: Raw) -> Path:
    return Path(raw["run"]["folder"]) / "checkpoints"


def steps(raw: Raw) -> list[int]:
    return [c.step for c in committed(checkpoints(raw))]


def folders(raw: Raw) -> list[str]:
    return sorted(p.name for p in checkpoints(raw).iterdir() if p.is_dir())


# ------------------------------------------------------------------------------------- failing writes


def run_failing(raw: Raw, rank: int, n: int) -> int:
    """Run; the n-th file that this rank writes breaks off in the middle."""
    calls: list[str] = []
    write, commit = Storage.write, Storage.commit

    def torn(self: Storage, path: Any, parts: Any) -> None:
        calls.append(str(path))
        if len(calls) == n:
            whole = b"".join(parts)
            Path(self.path(path)).write_bytes(whole[: len(whole) // 2])
            raise OSError(28, f"cannot write {self.url}/{path}: No space left on device")
        write(self, path, parts)

    def failing(self: Storage, path: Any, payload: bytes) -> None:
        calls.append(str(path))
        if len(calls) == n:
            raise OSError(28, f"cannot write {self.url}/{path}: No space left on device")
        commit(self, path, payload)

    if dist.get_rank() == rank:
        Storage.write, Storage.commit = torn, failing  # type: ignore[method-assign, assignment]
    try:
        return run(raw)[0]
    finally:
        Storage.write, Storage.commit = write, commit  # type: ignore[method-assign]


# rank 0 writes its file, the index and the manifest of each commit, rank 1 its file
@pytest.mark.parametrize(("rank", "full_every"), [(0, 1), (1, 1), (0, 3)])
def test_a_failure_at_the_nth_write_whatever_n_is_told_on_every_rank_and_leads_to_the_same_end(
    rank, full_every, stream, tmp_path, on_ranks
):
    whole = teacher(tmp_path / "whole", stream, checkpoint=EVERY | {"full_every": full_every})
    raw = replaced(whole, run__folder=str(tmp_path / "run"))
    on(on_ranks, 2, whole)
    failed_at = []
    for n in itertools.count(1):
        before = steps(raw) if n > 1 else []
        try:
            assert on_ranks(2, run_failing, raw, rank, n) == [DONE, DONE]
            break
        except RankFailed as failed:
            errors = [failed.errors[r] for r in (0, 1)]
        assert all(isinstance(e, SaveError) for e in errors)
        told = re.search(
            r"cannot write .*/(step=\d+/[\w.-]+): No space left on device.*last commit is intact", str(errors[0])
        )
        assert told and str(errors[1]) == str(errors[0])
        failed_at.append(told[1])
        assert set(before) - set(steps(raw)) == set() or steps(raw)[-1] > before[-1]  # kept, or replaced by newer ones
        assert set(folders(raw)) == {
            c.name for c in committed(checkpoints(raw))
        }  # what was not finished takes no space
    names = {name.split("/")[1] for name in failed_at}
    assert names == (
        {"rank-00000.safetensors", "index.json", "manifest.json"} if rank == 0 else {"rank-00001.safetensors"}
    )
    if full_every == 1:
        assert_same_outcome(whole, raw)
    else:
        assert_same_end(whole, raw, tmp_path, on_ranks)


def assert_same_end(a: Raw, b: Raw, folder: Path, on_ranks: Callable[..., list[str]]) -> None:
    """What two jobs whose newest commits are deltas lead to."""
    from tests.checkpoints.test_reshard import resaved, tensors

    ends = [replaced(raw, run__folder=str(folder / f"end-{i}"), checkpoint={}) for i, raw in enumerate((a, b))]
    states = [
        tensors(on_ranks(2, resaved, end, raw["run"]["folder"])[0]) for end, raw in zip(ends, (a, b), strict=True)
    ]
    assert same(*states) == []


# ------------------------------------------------------------------------------------- full disks


@pytest.mark.parametrize("staging", ["full", "bounded", "copy_on_write"])
def test_a_full_disk_leaves_the_last_commit_and_the_job_goes_on_once_there_is_space(
    staging, stream, small_disk, tmp_path
):
    over = {"every_slices": 1, "keep": 1, "folder": str(small_disk / "commits"), "staging": staging}
    raw = job(tmp_path / "run", stream, tables__user={"rows": 4000, "width": 16}, checkpoint=over)
    raw = replaced(raw, run__preflight="off")  # the disk stands for one that others fill while the job runs
    whole = replaced(raw, run__folder=str(tmp_path / "whole"), checkpoint={"every_slices": 1})
    assert run(replaced(raw, stream__last=1))[0] == DONE
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 100 * 1024))
    with pytest.raises(SaveError, match=rf"cannot write {small_disk}/.*rank-00000.safetensors: No space left .*intact"):
        run(raw)
    assert [c.step for c in committed(small_disk / "commits")] == [5]
    filler.unlink()
    assert run(raw)[0] == run(whole)[0] == DONE
    shutil.copytree(small_disk / "commits", checkpoints(raw), dirs_exist_ok=True)
    assert_same_outcome(whole, raw)


@pytest.mark.timeout(200)
def test_files_limited_in_size_end_the_job_with_1_and_a_resumable_commit(stream, tmp_path):
    """In a process of its own: the limit is a process's."""
    raw = job(tmp_path / "run", stream, tables__user={"rows": 20_000, "width": 16})
    assert run(raw, 7)[0] == 75
    before = last_state(raw)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(raw))
    command = f"ulimit -f 512; exec {sys.executable} -m exfm.trainer {tmp_path / 'job.yaml'}"
    with open(tmp_path / "log", "w") as out:
        assert subprocess.run(["bash", "-c", command], stdout=out, stderr=out, timeout=100, check=False).returncode == 1
    word = json.loads((tmp_path / "run/exit.json").read_text())
    assert word["exit_code"] == 1 and re.search(
        "cannot write .*rank-00000.safetensors: File too large.*intact", word["message"]
    )
    assert same(before, last_state(raw)) == []
    assert run(raw)[0] == DONE


# ------------------------------------------------------------------------------------- clocks and other jobs


def test_a_clock_that_goes_backwards_changes_neither_the_newest_commit_nor_what_is_kept(stream, tmp_path, monkeypatch):
    whole, raw = (job(tmp_path / name, stream, checkpoint=EVERY) for name in ("whole", "run"))
    run(whole)
    seconds = itertools.count(2_000_000_000, -3600)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: float(next(seconds)))
        run(replaced(raw, stream__last=3))
        for age, name in enumerate(reversed(folders(raw))):
            for path in [*(checkpoints(raw) / name).iterdir(), checkpoints(raw) / name]:
                os.utime(path, (10_000 * (age + 1),) * 2)  # the newest is the oldest
        assert steps(raw) == [10, 15]
        run(raw)
    assert steps(raw) == [15, 20]
    assert_same_outcome(whole, raw)


HOLD = """
import sys, time
from exfm.checkpoints.storage import Storage
with Storage(sys.argv[1]).lock("job 7"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_two_jobs_on_one_checkpoint_folder_the_second_is_refused_until_the_first_is_dead(stream, tmp_path):
    folder = tmp_path / "commits"
    raw = job(tmp_path / "run", stream, checkpoint={"folder": str(folder)})
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout and first.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"another job \(job 7\) is running in {folder}; wait for it, stop it"):
            run(raw)
        first.kill()
        first.wait()
        assert run(raw)[0] == DONE
    finally:
        first.kill()
        first.wait()
        assert first.stdout
        first.stdout.close()
    assert committed(folder)[-1].step == 20


def test_a_running_job_keeps_another_out_of_its_checkpoint_folder(stream, tmp_path):
    folder = str(tmp_path / "commits")
    first = job(tmp_path / "first", stream, checkpoint={"folder": folder})
    told = []

    def other() -> bool:
        if not told:
            with pytest.raises(UserError) as refused, Storage(folder).lock("second"):
                pass
            told.append(str(refused.value))
        return False

    assert run_job(parsed(first), here(), other) == DONE
    assert re.search(rf"another job \(job of {tmp_path}/first on .*\) is running in {folder}", told[0])
    with Storage(folder).lock("free again"):
        pass

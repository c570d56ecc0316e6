"""torchrun's restarts: a killed rank's job goes on by itself; one that has said its last word is not started again."""

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from exfm.checkpoints.commits import committed
from exfm.data.commit import open_folder
from exfm.launch.auditing import audit_run
from exfm.trainer.ending import decided, read_exit, write_exit
from exfm.trainer.env import RankEnv, fresh_part
from exfm.trainer.ledger import read_ledger
from tests.launch.test_signals import SLICES, start, stream, trainers, wait_until
from tests.warm import forked

__all__ = ["stream"]  # the fixture

COMMITS = {"every_slices": 1, "every_examples": 2560}


def start_2(folder: Path, stream: Path, *options: str, **changes: Any) -> "subprocess.Popen[str]":
    process = start(folder, "synth_teacher", stream, options=("--nproc", "2", *options), **changes)
    assert process is not None
    return process


def rank_pids(folder: Path) -> dict[int, int]:
    """Process ids of a job's ranks, forked or not; torchrun itself has none."""
    found = {f["rank"]: f["pid"] for f in forked(folder) if f["rank"] is not None}
    for pid in trainers(folder):
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        found |= {int(v[5:]): pid for v in variables if v.startswith(b"RANK=")}
    return found


def starts(folder: Path) -> int:
    """How often the ranks have begun to train."""
    return len(re.findall(r"rank\(s\) on cpu", (folder / "run/logs/torchrun.log").read_text()))


def lines(folder: Path) -> int:
    path = folder / "run/metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def test_a_job_whose_rank_is_killed_goes_on_from_its_last_commit_by_itself(
    warm: None, stream: Path, tmp_path: Path
) -> None:
    process = start_2(tmp_path, stream, checkpoint=COMMITS)
    wait_until(lambda: committed(tmp_path / "run/checkpoints") and lines(tmp_path) > 2)
    os.kill(rank_pids(tmp_path)[1], signal.SIGKILL)
    begun, before = time.monotonic(), lines(tmp_path)
    wait_until(lambda: lines(tmp_path) > before + 1)
    print(f"{time.monotonic() - begun:.1f} s from SIGKILL to the next training step")
    assert process.wait(120) == 0, process.stderr.read() if process.stderr else ""
    assert starts(tmp_path) == 2
    fs, root = open_folder(tmp_path / "run")
    assert {e.attempt for e in read_ledger(fs, f"{root}/ledger.parquet")} == {0, 1}
    found = audit_run(tmp_path / "run")
    assert (found["slices"], found["skipped"], found["repeated"]) == (SLICES, 0, 0)
    assert not trainers(tmp_path)


def test_without_restarts_a_killed_rank_ends_the_job_and_is_named(stream: Path, tmp_path: Path) -> None:
    process = start_2(tmp_path, stream, "--max-restarts", "0", checkpoint=COMMITS)
    wait_until(lambda: lines(tmp_path) > 2)
    pid = rank_pids(tmp_path)[0]
    os.kill(pid, signal.SIGKILL)
    assert process.wait(60) == 1
    assert process.stderr is not None
    said = " ".join(process.stderr.read().split())
    assert f"pid {pid}) died in '" in said
    assert starts(tmp_path) == 1


def test_ranks_told_to_stop_by_sigusr1_commit_end_with_75_and_are_not_started_again(
    warm: None, stream: Path, tmp_path: Path
) -> None:
    process = start_2(tmp_path, stream)
    wait_until(lambda: lines(tmp_path) > 2)
    os.kill(rank_pids(tmp_path)[1], signal.SIGUSR1)
    assert process.wait(60) == 75
    assert starts(tmp_path) == 1 and not trainers(tmp_path)
    assert len(committed(tmp_path / "run/checkpoints")) == 1
    again = start_2(tmp_path, stream)
    assert again.wait(120) == 0
    assert audit_run(tmp_path / "run")["repeated"] == 0


def test_a_job_that_diverges_is_not_started_again(warm: None, stream: Path, tmp_path: Path) -> None:
    optim = {"dense": {"lr": 1e30, "warmup_steps": 0}, "tables": {"lr": 1e30}}
    process = start_2(tmp_path, stream, optim=optim)
    assert process.wait(120) == 1
    assert process.stderr is not None and "NaN or infinite in slice 0" in " ".join(process.stderr.read().split())
    # the restore inside the first start builds the job twice
    assert starts(tmp_path) == 2
    word = read_exit(tmp_path / "run")
    assert word is not None and word["final"] and word["attempt"] == 0


def test_under_torchrun_alone_a_users_mistake_is_not_trained_again(warm: None, stream: Path, tmp_path: Path) -> None:
    """The ranks that torchrun starts again see the word of those before and leave."""
    process = start_2(tmp_path, stream)
    wait_until(lambda: lines(tmp_path) > 0)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 75
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [
        "--max-restarts",
        "2",
        "-m",
        "exfm.trainer",
        str(tmp_path / "config.yaml"),
        "--set",
        "optim.tables.lr=0.3",
    ]
    begun = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    print(f"{time.monotonic() - begun:.1f} s for 3 starts")
    assert done.returncode == 1
    assert len(re.findall("is of another config", done.stderr)) == 2  # once per rank of the first start
    word = read_exit(tmp_path / "run")
    assert word is not None and (word["exit_code"], word["final"], word["attempt"]) == (2, True, 0)


@pytest.mark.parametrize(
    ("attempt", "run_id", "final", "expected"),
    [(1, "a", True, 2), (3, "a", True, 2), (0, "a", True, None), (1, "b", True, None), (1, "a", False, None)],
    ids=["restart", "third restart", "new launch of the same name", "another launch", "may go better"],
)
def test_only_a_final_word_of_an_earlier_attempt_of_this_launch_decides(
    attempt: int, run_id: str, final: bool, expected: int | None, tmp_path: Path
) -> None:
    write_exit(tmp_path, 2, "no", RankEnv(0, 2, run_id="a"), final)
    assert decided(tmp_path, RankEnv(0, 2, attempt=attempt, run_id=run_id)) == expected


def test_the_first_rank_that_fails_in_an_attempt_is_heard_and_a_later_attempt_after_it(tmp_path: Path) -> None:
    for attempt, rank in [(0, 1), (0, 0), (1, 0), (1, 1)]:
        write_exit(tmp_path, 1, f"{attempt} {rank}", RankEnv(rank, 2, attempt=attempt, run_id="a"))
        word = read_exit(tmp_path)
        assert word is not None and word["message"] == ("0 1" if attempt == 0 else "1 0")


def join(store: dist.Store, world_size: int) -> list[str]:
    """All ranks join through one store; what each then reads of rank 0's address."""

    def one(rank: int) -> str:
        part = fresh_part(store.clone(), rank, world_size, 20)
        if rank == 0:
            part.set("address", str(time.monotonic()))
        return part.get("address").decode()

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(one, range(world_size)))


def test_ranks_started_again_do_not_read_what_the_dead_ones_left_in_torchruns_store(tmp_path: Path) -> None:
    store = dist.FileStore(str(tmp_path / "store"), 3)
    seen = [join(store, 3) for _ in range(3)]
    assert all(len(set(addresses)) == 1 for addresses in seen)
    assert len({addresses[0] for addresses in seen}) == 3


def test_ranks_that_never_join_are_named(tmp_path: Path) -> None:
    store = dist.FileStore(str(tmp_path / "store"), 3)
    store.set("greeting/1", "of a rank that is dead")
    with pytest.raises(TimeoutError, match=r"rank\(s\) 1, 2 did not join within 0.2 s"):
        fresh_part(store, 0, 3, 0.2)

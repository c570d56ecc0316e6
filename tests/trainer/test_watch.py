"""Ranks that die, hang or fail: the others leave soon, and exit.json names who it was and what it was doing."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

from exfm.data.errors import UserError
from exfm.launch.cause import told
from exfm.trainer.beats import Beat, judge
from exfm.trainer.env import RankEnv, process_group
from exfm.trainer.stacks import Stacks
from exfm.trainer.watch import Watch
from tests.trainer.jobs import make_stream, parsed, teacher
from tests.warm import forked

ROOT = Path(__file__).resolve().parents[2]
ROWS = (3200, 3200)  # 100 steps a slice, 2 s at victim.STEP_S
HOST = socket.gethostname()


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_stream(tmp_path_factory.mktemp("watch") / "stream", ROWS).root


class Launch:
    """torchrun of tests.trainer.victim; its ranks are killed when the test ends."""

    def __init__(self, folder: Path, stream: str, ranks: int, fault: str = "none", on: int = 1, **run: Any) -> None:
        self.folder, self.ranks = folder / "run", ranks
        raw = teacher(self.folder, stream, checkpoint={"every_slices": 1}, **{f"run__{k}": v for k, v in run.items()})
        (folder / "config.yaml").write_text(yaml.safe_dump(raw))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += ["-m", "tests.trainer.victim", str(folder / "config.yaml"), fault, str(on)]
        # torchrun gives ranks that do not end half a minute before it kills them
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "20"}
        self.log = open(folder / "log", "w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdout=self.log, stderr=self.log, env=env, cwd=ROOT, start_new_session=True
        )

    def pids(self) -> dict[int, int]:
        """Process ids by rank."""
        return {f["rank"]: f["pid"] for f in forked(self.folder.parent) if f["rank"] is not None}

    def until_training(self) -> dict[int, int]:
        """Wait until slice 0 has been committed and slice 1 has begun."""
        wait_until(lambda: any(self.folder.glob("checkpoints/*/manifest.json")))
        time.sleep(0.5)
        return self.pids()

    def end(self, seconds: float = 60) -> int:
        return self.process.wait(seconds)

    def word(self) -> dict[str, Any]:
        return json.loads((self.folder / "exit.json").read_text())

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def told(self) -> str:
        """What `exfm train` would say."""
        return told(self.word(), self.folder, self.said(), 0.0)

    def stacks(self, rank: int) -> str:
        return (self.folder / "logs" / f"hang-rank-{rank}.txt").read_text()

    def close(self) -> None:
        for pid in [*self.pids().values(), self.process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()
        self.log.close()


@pytest.fixture
def launch(warm: None, tmp_path: Path, stream: str) -> Iterator[Callable[..., Launch]]:
    launches: list[Launch] = []

    def begin(*args: Any, **run: Any) -> Launch:
        launches.append(Launch(tmp_path, stream, *args, **run))
        return launches[-1]

    yield begin
    for one in launches:
        one.close()


def spy_here() -> bool:
    return bool(shutil.which("py-spy") or shutil.which("py-spy", path=str(Path(sys.executable).parent)))


def wait_until(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


@pytest.mark.parametrize("dead", [0])
def test_ranks_leave_soon_after_one_is_killed_and_name_it(dead: int, launch: Callable[..., Launch]) -> None:
    job = launch(3)
    pids = job.until_training()
    os.kill(pids[dead], signal.SIGKILL)
    begun = time.monotonic()
    assert job.end() == 1
    assert time.monotonic() - begun < 15
    word = job.word()
    assert word["exit_code"] == 1 and word["rank"] != dead and not word["final"]
    assert f"rank {dead} (host {HOST}, pid {pids[dead]}) died in '" in word["message"]
    assert "after step 1" in word["message"] and f"; rank {word['rank']} was in '" in word["message"]
    text = job.told()
    assert f"\n  rank {dead}: killed by SIGKILL (out of memory? see dmesg" in text and len(text.splitlines()) <= 6
    assert f"said by rank {word['rank']} (host {HOST}, pid {pids[word['rank']]}), in '" in text
    assert "read: " + ", ".join(f"{job.folder}/logs/rank-0000{r}.log" for r in (dead, word["rank"])) in text


def test_a_stopped_rank_is_named_as_not_heard_of(launch: Callable[..., Launch]) -> None:
    job = launch(2, hang_s=3.0)
    pids = job.until_training()
    os.kill(pids[1], signal.SIGSTOP)
    begun = time.monotonic()
    wait_until((job.folder / "exit.json").exists)
    assert 3 < time.monotonic() - begun < 20
    word = job.word()
    assert word["rank"] == 0 and f"rank 1 (host {HOST}, pid {pids[1]}) has not been heard of for" in word["message"]
    assert "in _segment" in job.stacks(0)
    # it cannot write its own
    theirs = job.stacks(1)
    assert theirs.startswith(f"rank 1 (host {HOST}, pid {pids[1]}) in '") and "its process is stopped" in theirs
    assert ("_segment" if spy_here() else "if it were installed") in theirs
    assert job.told().splitlines()[-1] == f"  stacks: {job.folder}/logs/hang-rank-K.txt of rank(s) 0, 1"


def test_ranks_asked_to_stop_do_not_wait_for_one_that_is_gone(launch: Callable[..., Launch]) -> None:
    """Its connections stay open, as those of a host that has lost its network: only the heartbeat tells."""
    job = launch(2, hang_s=300.0)
    pids = job.until_training()
    os.kill(pids[1], signal.SIGSTOP)
    time.sleep(0.5)
    os.kill(pids[0], signal.SIGTERM)
    begun = time.monotonic()
    wait_until((job.folder / "exit.json").exists)
    assert time.monotonic() - begun < 20
    assert f"pid {pids[1]}) has not been heard of" in job.word()["message"]


def test_a_rank_stuck_in_python_is_named_with_its_phase_and_the_stacks_of_all_are_kept(
    launch: Callable[..., Launch],
) -> None:
    job = launch(3, "stuck", 1, hang_s=3.0)
    wait_until(lambda: 1 in job.pids())
    pid = job.pids()[1]
    assert job.end() == 1
    message = job.word()["message"]
    assert message.startswith(f"rank 1 (host {HOST}, pid {pid}) hangs in 'reading a batch' after step ")
    assert " since 3 s" in message or " since 4 s" in message
    assert "victim.py" in job.stacks(1)
    for other in (0, 2):
        assert job.stacks(other).startswith(f"rank {other} (host ") and "in _segment" in job.stacks(other)


def test_a_rank_that_fails_by_itself_has_its_own_words_in_the_others_mouths(launch: Callable[..., Launch]) -> None:
    job = launch(2, "raise", 1)
    assert job.end() == 1
    word = job.word()
    assert word["message"] == "ValueError: this rank cannot go on"
    assert (word["rank"], word["host"], word["phase"]) == (1, HOST, "reading a batch") and 30 < word["step"] < 45
    assert f"exfm: rank 1 (host {HOST}, pid " in job.said()
    own = (job.folder / "logs" / "rank-00001.log").read_text()
    assert re.match(rf"---- \S+ rank 1 of 2, host {HOST}, pid {word['pid']}, attempt 0, run ", own)
    assert "Traceback (most recent call last)" in own and own.endswith("exfm: ValueError: this rank cannot go on\n")
    assert "this rank cannot go on" in job.told().splitlines()[0] and f"read: {word['log']}" in job.told()


def test_a_commit_that_takes_longer_than_hang_s_is_no_hang(launch: Callable[..., Launch]) -> None:
    """Rank 1 takes 6 s; rank 0 waits for it in a collective."""
    job = launch(2, "slow commit", 1, hang_s=1.0)
    assert job.end(120) == 0
    assert job.word()["exit_code"] == 0


def test_a_hang_limit_above_the_time_out_of_collectives_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'run.hang_s' is 700.*more than run.timeout_s 600"):
        parsed(teacher(tmp_path, "nowhere", run__hang_s=700.0))


# ---------------------------------------------------------------- the verdict


def beats(*collectives: int, **changes: Any) -> list[Beat]:
    return [Beat(r, "h", 100 + r, 7, 0.0, "training step", 40, c, **changes) for r, c in enumerate(collectives)]


def later(found: list[Beat], *silent: int) -> list[Beat]:
    return [b if b.rank in silent else replace(b, number=b.number + 3, at=b.at + 3) for b in found]


def test_the_rank_with_the_fewest_collectives_is_the_one_that_hangs() -> None:
    now = beats(813, 812, 813)
    assert judge(now, later(now), 0, 300.0, died=False) == (
        "rank 1 (host h, pid 101) hangs in 'training step' after step 40, collective 812; "
        "rank 0 waits for it in collective 813 since 300 s"
    )
    assert judge(now, later(now), 1, 300.0, died=False) == (
        "rank 1 (host h, pid 101) hangs in 'training step' after step 40, collective 812, since 300 s"
    )


def test_a_silent_rank_comes_before_one_that_lags_or_has_left() -> None:
    now = beats(813, 812, 813)
    now[0] = replace(now[0], last="rank 2 died")
    assert judge(now, later(now, 2), 1, 5.0, died=True).startswith("rank 2 (host h, pid 102) died in 'training step'")


def test_the_first_rank_that_ended_is_named_where_none_is_silent() -> None:
    now = beats(813, 813, 813)
    now[1], now[2] = replace(now[1], last="ValueError", at=50.0), replace(now[2], last="lost rank 1", at=51.0)
    assert judge(now, later(now, 1, 2), 0, 5.0, died=True).startswith(
        "rank 1 (host h, pid 101) ended in 'training step'"
    )
    assert ": ValueError; rank 0 was in" in judge(now, later(now, 1, 2), 0, 5.0, died=True)


def test_where_all_ranks_wait_in_the_same_collective_none_is_blamed() -> None:
    now = beats(813, 813)
    assert judge(now, later(now), 0, 300.0, died=False) == (
        "all ranks have issued collective 813 and none moves since 300 s: rank 0 in 'training step', rank 1 in 'training step'"
    )


def test_a_lone_rank_says_what_it_hangs_in() -> None:
    now = beats(5)
    assert judge(now, later(now), 0, 300.0, died=False) == (
        "rank 0 (host h, pid 100) hangs in 'training step' after step 40, collective 5, since 300 s"
    )


def test_an_error_that_no_peer_caused_keeps_its_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A storage that refuses connections sounds like a lost peer."""
    now = beats(813, 813)
    config = parsed(teacher(tmp_path, "nowhere")).run
    watch = Watch(config, RankEnv(0, 2), lambda word: None)
    monkeypatch.setattr(watch, "_look", lambda: (now, later(now)))
    assert watch._explain("cannot write s3://b: Connection refused") == ""
    assert watch._explain("cannot write s3://b: timed out") == ""
    assert watch._explain("a wrong shape") == ""
    monkeypatch.setattr(watch, "_look", lambda: (now, later(now, 1)))
    assert watch._explain("[x.cc:5] Connection closed by peer [::1]:5").startswith("rank 1 (host h, pid 101) died in")
    lagging = beats(813, 812)
    monkeypatch.setattr(watch, "_look", lambda: (lagging, later(lagging)))
    assert watch._explain("Timed out waiting 600000ms").startswith("rank 1 (host h, pid 101) hangs in")
    assert watch._explain("") == ""


@pytest.mark.gpu
def test_on_a_gpu_the_flight_recorder_is_saved_beside_the_stacks(tmp_path: Path) -> None:
    with process_group(RankEnv(), torch.device("cuda", 0), 60):
        dist.all_reduce(torch.ones(4, device="cuda"))
        torch.cuda.synchronize()
        Stacks(tmp_path, 0).write(Beat(0))
    trace = json.loads((tmp_path / "logs" / "nccl-trace-rank-0.json").read_text())
    assert any("all_reduce" in entry["profiling_name"] for entry in trace["entries"])

"""Every defect that keeps ranks from working together is planted on real ranks and named before anything is built."""

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import yaml

from exfm.data.errors import UserError
from exfm.trainer import facts as looking
from exfm.trainer.config import parse_config
from exfm.trainer.fits import checkpoint_bytes
from exfm.trainer.planning import plan_here
from exfm.trainer.run import DONE, rank_main, run_job, run_preflight
from exfm.trainer.score_config import ScoreConfig
from tests.trainer.jobs import Raw, assert_same_outcome, here, job, last_state, make_stream, on, parsed, replaced, run

ROOT = Path(__file__).resolve().parents[2]
CLONE_NEWNS, CLONE_NEWNET = 0x00020000, 0x40000000
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
LIBC = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_stream(tmp_path_factory.mktemp("preflight") / "stream").root


# ---------------------------------------------------------------- defects, planted on one of two ranks or more


def refusal(defects: dict[str, Any], raw: Raw, own: Raw, on_rank: int) -> str:
    """What this rank is told. defects: functions of facts.py that answer otherwise on one rank; own: its config."""
    chosen = dist.get_rank() == on_rank
    with ExitStack() as stack:
        for name, answer in defects.items() if chosen else ():
            new = {**getattr(looking, name)(), **answer} if isinstance(answer, dict) else answer
            stack.enter_context(patch.object(looking, name, lambda new=new: new))
        try:
            run_job(parsed(own if chosen else raw), here())
        except UserError as error:
            return str(error)
    return ""


def refused(
    on_ranks: Any, raw: Raw, defects: dict[str, Any], own: Raw | None = None, ranks: int = 2, on_rank: int = 1
) -> str:
    """The one word that all ranks have for it; nothing was built."""
    words = on_ranks(ranks, refusal, defects, raw, own or raw, on_rank)
    folder = Path(raw["run"]["folder"])
    assert len(set(words)) == 1 and words[0].startswith("preflight: "), words
    assert not (folder / "checkpoints").exists() and not (folder / "metrics.jsonl").exists()
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []
    assert (folder / "logs/preflight.txt").read_text().startswith("preflight: this job cannot start")
    return words[0]


@pytest.mark.parametrize("odd", [0, 1])
def test_a_rank_with_another_package_version_is_named_wherever_it_is(odd, on_ranks, stream, tmp_path):
    word = refused(on_ranks, job(tmp_path / "run", stream), {"versions": {"torch": "2.1.0"}}, ranks=3, on_rank=odd)
    host = looking.host_name()
    assert f"version of torch is rank {odd} (host {host}) 2.1.0, and {torch.__version__.split('+')[0]}" in word
    assert word.split("; ")[0].endswith("on the 2 others") and "install the same on every host" in word


def test_a_rank_with_other_code_is_named_with_the_file(on_ranks, stream, tmp_path):
    word = refused(on_ranks, job(tmp_path / "run", stream), {"sources": {"trainer/loop.py": "0ld"}})
    assert "code in trainer/loop.py is rank 1 (host" in word and ") 0ld, and " in word


def test_a_rank_with_another_config_is_named_with_key_and_values(on_ranks, stream, tmp_path):
    raw = job(tmp_path / "run", stream)
    word = refused(on_ranks, raw, {}, replaced(raw, run__seed=7))
    assert "config key run.seed is rank 1 (host" in word and ") 7, and 0 on the other; start all ranks with one" in word
    long = [{"name": f"n{i}", "column": "user", "values": [i]} for i in range(9)]
    raw = replaced(raw, stream__domains=long, run__folder=str(tmp_path / "long"))
    assert "config key stream.domains" in refused(on_ranks, raw, {}, replaced(raw, stream__domains=long[:8]))


@pytest.mark.parametrize(("ahead", "says"), [(30.0, "30.0 s ahead of"), (-7200.0, "7200.0 s behind")])
def test_a_skewed_clock_is_named(ahead, says, on_ranks, stream, tmp_path):
    words = on_ranks(3, skewed, job(tmp_path / "run", stream), ahead)
    assert len(set(words)) == 1
    assert f"the clock of rank 1 (host {looking.host_name()}) is {says} the others'; 5 s are allowed" in words[0]


def skewed(raw: Raw, ahead: float) -> str:
    clock = time.time
    with patch.object(looking, "wall_clock", lambda: clock() + ahead * (dist.get_rank() == 1)):
        return refusal({}, raw, raw, 1)


def test_a_host_with_too_little_memory_is_named_with_what_the_plan_needs(on_ranks, stream, tmp_path):
    raw = job(tmp_path / "run", stream)
    word = refused(on_ranks, raw, {"free_host": 1024})
    assert f"host {looking.host_name()} has 0.00 MiB of memory free, the plan puts" in word


def test_a_disk_that_does_not_take_the_next_two_checkpoints_is_named(on_ranks, stream, tmp_path, small_disk):
    raw = job(tmp_path / "run", stream, checkpoint__folder=str(small_disk), tables__item__rows=50_000)
    word = refused(on_ranks, raw, {})
    assert f"{small_disk} has 3.00 MiB free, the next 2 checkpoint(s) take 3.46 MiB" in word
    fits = replaced(raw, tables__item__rows=30_000, run__folder=str(tmp_path / "fits"))
    assert run_preflight(parsed(fits), here()) == DONE


# ---------------------------------------------------------------- a read-only folder, in a mount namespace of one rank


@contextmanager
def own_mounts() -> Iterator[None]:
    """This thread has its own view of what is mounted."""
    before = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY)
    try:
        assert LIBC.unshare(CLONE_NEWNS) == 0
        assert LIBC.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) == 0
        yield
    finally:
        assert LIBC.setns(before, CLONE_NEWNS) == 0
        os.close(before)


def with_hidden(raw: Raw, how: str, on_rank: int) -> int:
    """The exit code where one rank sees the run folder read-only, or another folder in its place."""
    folder = Path(raw["run"]["folder"])
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    if dist.get_rank() != on_rank:
        return rank_main(parsed(raw), here())
    with own_mounts():
        there = str(folder).encode()
        if how == "other":
            assert LIBC.mount(b"exfm", there, b"tmpfs", 0, b"size=1m") == 0
        else:
            assert LIBC.mount(there, there, None, MS_BIND, None) == 0
            assert LIBC.mount(there, there, None, MS_REMOUNT | MS_BIND | MS_RDONLY, None) == 0
        return rank_main(parsed(raw), here())


@pytest.fixture
def mounting(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("a mount namespace needs root")


@pytest.mark.parametrize(
    ("how", "says"),
    [("read-only", "cannot write in {0}: Read-only file system"), ("other", "does not see what rank 0 writes in {0}")],
)
def test_a_rank_without_the_shared_folder_is_named(how, says, on_ranks, stream, tmp_path, mounting):
    raw = job(tmp_path / "run", stream)
    assert on_ranks(2, with_hidden, raw, how, 1) == [2, 2]
    word = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert word["exit_code"] == 2 and word["final"]
    where = f"rank 1 (host {looking.host_name()}) {says.format(tmp_path / 'run')}; mount the same folder there"
    assert word["message"].startswith(f"preflight: {where}")


def test_rank_0_names_a_run_folder_that_it_cannot_write(on_ranks, stream, tmp_path, mounting):
    codes = on_ranks(2, with_hidden, job(tmp_path / "run", stream), "read-only", 0)
    assert codes[0] == 2
    message = json.loads((tmp_path / "run" / "exit.json").read_text())["message"]
    assert (
        f"run.folder {tmp_path / 'run'} cannot be written by rank 0" in message and "Read-only file system" in message
    )


# ---------------------------------------------------------------- a slow link, in network namespaces


def command(line: str) -> None:
    subprocess.run(line.split(), check=True, capture_output=True)


@pytest.fixture
def three_hosts() -> Iterator[list[str]]:
    """Network namespaces of three hosts on one switch; the second sends at 80 Mb/s."""
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("tc")):
        pytest.skip("a network of its own needs root, ip and tc")
    tag = f"x{os.getpid()}"
    names = [f"{tag}n{i}" for i in range(3)]
    made: list[str] = []
    try:
        for name in (f"{tag}sw", *names):
            command(f"ip netns add {name}")
            made.append(name)
        command(f"ip -n {tag}sw link add br0 type bridge")
        command(f"ip -n {tag}sw link set br0 up")
        for i, name in enumerate(names):
            command(f"ip link add eth0 netns {name} type veth peer name p{i} netns {tag}sw")
            command(f"ip -n {tag}sw link set p{i} master br0 up")
            command(f"ip -n {name} addr add 10.231.7.{i + 1}/24 dev eth0")
            command(f"ip -n {name} link set eth0 up")
            command(f"ip -n {name} link set lo up")
        command(f"tc -n {names[1]} qdisc add dev eth0 root tbf rate 80mbit burst 64kbit latency 400ms")
        yield names
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    finally:
        for name in made:
            command(f"ip netns del {name}")


def on_host(names: list[str], store: str, raw: Raw) -> int:
    """A preflight of this rank on a host of its own, in a group that was made there."""
    rank, world = dist.get_rank(), dist.get_world_size()
    before, there = os.open("/proc/thread-self/ns/net", os.O_RDONLY), os.open(f"/run/netns/{names[rank]}", os.O_RDONLY)

    def begin(number: int) -> None:
        dist.destroy_process_group()
        files = dist.FileStore(f"{store}-{number}", world)
        dist.init_process_group("gloo", store=files, rank=rank, world_size=world, timeout=timedelta(seconds=30))

    try:
        assert LIBC.setns(there, CLONE_NEWNET) == 0
        with patch.dict(os.environ, {"GLOO_SOCKET_IFNAME": "eth0"}):
            begin(0)
        with patch.object(looking, "host_name", lambda: f"node{rank}"):
            return run_preflight(parsed(raw), here())
    finally:
        assert LIBC.setns(before, CLONE_NEWNET) == 0
        begin(1)  # which the pool ends


def test_a_slow_link_is_named_by_its_hosts_and_does_not_keep_the_job_from_starting(
    on_ranks, stream, tmp_path, three_hosts
):
    raw = job(tmp_path / "run", stream)
    assert on_ranks(3, on_host, three_hosts, str(tmp_path / "store"), raw) == [DONE] * 3
    report = json.loads((tmp_path / "run/logs/preflight.json").read_text())
    (slow,) = [f for f in report["findings"] if "node1 - node2" in f["what"]]
    assert slow["level"] == "warn"
    assert re.match(r"slow link node1 - node2: \d\.\d MiB/s from rank 1 to rank 2, the others ", slow["what"])
    rates = {(x["sender"], x["receiver"]): x["size"] / x["seconds"] for x in report["speeds"]["links"]}
    assert rates[1, 2] < 10.5e6 and min(rates, key=lambda pair: rates[pair]) == (1, 2)  # 80 Mb/s are 10e6 bytes/s
    assert "WARN   slow link node1 - node2" in (tmp_path / "run/logs/preflight.txt").read_text()


# ---------------------------------------------------------------- nothing is wrong


@pytest.mark.parametrize(("ranks", "mode", "links"), [(1, "quick", None), (2, "full", 2)])
def test_a_job_trains_the_same_with_and_without_it(ranks, mode, links, on_ranks, stream, tmp_path):
    without, raw = (job(tmp_path / m, stream, run__preflight=m) for m in ("off", mode))
    for one in (without, raw):
        assert all(code == DONE for code, _ in on(on_ranks, ranks, one))
    assert_same_outcome(without, raw)
    assert not (tmp_path / "off/logs").exists()
    report = json.loads((tmp_path / mode / "logs/preflight.json").read_text())
    assert report["ok"] and (report["speeds"] and len(report["speeds"]["links"])) == links


def scorer(folder: str, own: str) -> str:
    raw = {
        "run": {"name": "score", "folder": folder, "device": "cpu"},
        "score": {"teacher": own if dist.get_rank() else "fm"},
    }
    try:
        run_preflight(parse_config(raw, "test", ScoreConfig), here())
    except UserError as error:
        return str(error)
    return ""


def test_a_scorer_is_looked_at_as_a_job_is_without_a_plan(on_ranks, tmp_path):
    assert on_ranks(2, scorer, str(tmp_path / "run"), "fm") == ["", ""]
    report = json.loads((tmp_path / "run/logs/preflight.json").read_text())
    assert report["ok"] and report["needs"] is None and len(report["speeds"]["links"]) == 2
    words = on_ranks(2, scorer, str(tmp_path / "run"), "other")
    assert (
        words[0] == words[1]
        and "config key score.teacher is rank 1 (host" in words[0]
        and '"other", and "fm"' in words[0]
    )


@pytest.mark.gpu
def test_the_free_memory_of_a_gpu_counts_what_torch_keeps_for_itself(stream, tmp_path):
    device = torch.device("cuda", 0)
    before = looking.free_device(device)
    x = torch.zeros(2**28, dtype=torch.uint8, device=device)
    assert before - looking.free_device(device) == pytest.approx(2**28, rel=0.2)
    del x
    assert looking.free_device(device) == pytest.approx(before, rel=0.01)
    assert run_preflight(parsed(job(tmp_path / "run", stream, run__device="cuda")), here()) == DONE
    (fact,) = json.loads((tmp_path / "run/logs/preflight.json").read_text())["facts"]
    assert 0 < fact["device_bytes"] <= torch.cuda.get_device_properties(0).total_memory


def test_it_takes_one_line_to_say_that_all_is_well(stream, tmp_path, capfd):
    run(job(tmp_path / "run", stream), stop_after=1)
    said = [line for line in capfd.readouterr().err.splitlines() if "preflight" in line]
    assert len(said) == 1 and said[0].startswith("[job] preflight: 1 rank on 1 host agrees; disk for ")


def test_the_size_of_a_checkpoint_is_known_before_it_is_written(stream, tmp_path):
    raw = job(tmp_path / "run", stream, tables__item__rows=5000)
    config = parsed(raw)
    expected = checkpoint_bytes(config, plan_here(config, "cpu", 1, 1, None)[0])
    run(raw, stop_after=1)
    state = sum(
        t.numel() * t.element_size() for n, t in last_state(raw).items() if n.startswith(("tables", "dense", "adam"))
    )
    assert expected == pytest.approx(state, rel=0.01)


def test_alone_it_shows_a_page_and_trains_nothing(warm, stream, tmp_path):
    config = tmp_path / "job.yaml"
    config.write_text(yaml.safe_dump(job(tmp_path / "run", stream)))
    line = [sys.executable, "-m", "exfm.launch.cli", "train", str(config), "--nproc", "2", "--preflight-only"]
    done = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    out, err = done.communicate(timeout=60)
    assert done.returncode == 0, err
    assert out == (tmp_path / "run/logs/preflight.txt").read_text() and "2 ranks on 1 host agree" in out
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["lock", "logs"]
    bad = subprocess.Popen(
        [*line, "--set", "checkpoint.folder=/proc"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    out, err = bad.communicate(timeout=60)
    assert bad.returncode == 2 and "/proc" in err

"""One job per folder: the second is refused while the first lives, whatever the clocks say, and not for longer."""

import contextlib
import json
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator

import pytest

from exfm.checkpoints import lease
from exfm.checkpoints.storage import Storage
from exfm.data.errors import UserError

LEASE_S = 3.0

HOLD = """
import sys, time
from exfm.checkpoints.storage import Storage
with Storage(sys.argv[1], lease_s=float(sys.argv[2])).lock("job 7 on host a"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(params=["local", "s3"])
def url(request, tmp_path) -> str:
    return str(tmp_path / "run") if request.param == "local" else request.getfixturevalue("s3_url")


@contextlib.contextmanager
def holder(url: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock."""
    command = [sys.executable, "-c", HOLD, url, str(LEASE_S)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout
        process.stdout.close()


@pytest.mark.timeout(60)
def test_the_second_job_is_refused_while_the_first_lives_and_let_in_after_its_sigkill(url):
    second = Storage(url, lease_s=LEASE_S)
    with holder(url) as first:
        for _ in range(2):
            told = f"job 7 on host a.* is running in {url}; wait for it, stop it"
            with pytest.raises(UserError, match=told), second.lock("job 8"):
                pass
        first.kill()
        first.wait()
        with second.lock("job 8") as held:
            assert not held.lost
            with pytest.raises(UserError, match="job 8"), Storage(url, lease_s=LEASE_S).lock("job 9"):
                pass


@pytest.mark.timeout(60)
def test_a_lock_that_was_let_go_is_free_at_once(url):
    storage = Storage(url, lease_s=LEASE_S)
    with pytest.raises(KeyError), storage.lock("job 1"):
        raise KeyError  # the job's own error comes out as it is
    start = time.monotonic()
    with storage.lock("job 2") as held:
        assert time.monotonic() - start < LEASE_S
        assert not held.lost
    assert lease.LEASE not in storage.names()


@pytest.mark.timeout(60)
def test_a_clock_that_goes_backwards_frees_no_lock_and_keeps_none(s3_url, monkeypatch):
    times = iter(range(10**9, 0, -1000))
    with holder(s3_url) as first:
        monkeypatch.setattr(time, "time", lambda: float(next(times)))
        with pytest.raises(UserError, match="job 7"), Storage(s3_url, lease_s=LEASE_S).lock("job 8"):
            pass
        first.kill()
        first.wait()
        payload = json.loads(Storage(s3_url).read(lease.LEASE))
        assert sorted(payload) == ["beat", "id", "owner"]  # no time in it that could be compared
        with Storage(s3_url, lease_s=LEASE_S).lock("job 8"):
            pass


@pytest.fixture
def memory() -> Storage:
    return Storage(f"memory://{uuid.uuid4().hex}/run", lease_s=1.2)


def foreign(owner: str = "other") -> bytes:
    return json.dumps({"owner": owner, "id": uuid.uuid4().hex, "beat": 0}).encode()


def test_a_holder_notices_within_a_beat_or_two_that_its_lease_was_taken(memory):
    told = threading.Event()
    with memory.lock("job 1", on_lost=told.set) as held:
        assert not told.wait(0.5) and not held.lost
        memory.commit(lease.LEASE, foreign())
        assert told.wait(1.0) and held.lost
    assert b"other" in memory.read(lease.LEASE)  # another's lease is not removed


def test_a_holder_whose_lease_was_removed_has_lost_it(memory):
    with memory.lock("job 1") as held:
        memory.remove(lease.LEASE)
        time.sleep(0.6)
        assert held.lost
    assert memory.names() == []


def test_a_failing_server_loses_no_lease(memory, monkeypatch):
    with memory.lock("job 1") as held:
        before = json.loads(memory.read(lease.LEASE))["beat"]
        with monkeypatch.context() as broken:
            broken.setattr(Storage, "commit", failing)
            time.sleep(0.6)
        time.sleep(0.6)
        assert not held.lost
        assert json.loads(memory.read(lease.LEASE))["beat"] > before


def failing(*args: object) -> None:
    raise ConnectionError("the server is away")


def test_of_two_newcomers_to_a_free_folder_one_at_most_gets_in(memory):
    inside: list[str] = []
    refused: list[str] = []
    done = threading.Event()

    def come(name: str) -> None:
        try:
            with memory.lock(name):
                inside.append(name)
                done.wait(5)
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=come, args=(f"job {n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    done.set()
    for thread in threads:
        thread.join()
    assert len(inside) == 1 and len(refused) == 3
    assert all(inside[0] in message for message in refused)


def test_a_newcomer_overtaken_while_it_waits_is_refused(memory, monkeypatch):
    put = lease._put

    def overtaken(files, mine):
        put(files, mine)
        files.commit(lease.LEASE, foreign("a quicker job"))

    monkeypatch.setattr(lease, "_put", overtaken)
    with pytest.raises(UserError, match="a quicker job"), memory.lock("job 1"):
        pass


@pytest.mark.parametrize(
    "junk",
    [b"", b"not json", b"[1]", b'{"owner": {"a": 1}}', b"\xff\xfe", pytest.param(b"[" * 100_000, id="deep")],
)
def test_a_lease_of_junk_that_nobody_renews_is_dead(memory, junk, capsys):
    memory.commit(lease.LEASE, junk)
    start = time.monotonic()
    with memory.lock("job 1") as held:
        assert time.monotonic() - start >= memory.lease_s
        assert not held.lost
    assert f"exfm: {memory.url} was locked by" in capsys.readouterr().err


def test_the_local_lock_names_its_owner_and_follows_no_link(tmp_path):
    (tmp_path / "precious").write_text("kept")
    storage = Storage(tmp_path / "run")
    with storage.lock("a much longer name of a job"):
        pass
    with storage.lock("job 2"):
        assert (tmp_path / "run/lock").read_text() == "job 2"
    (tmp_path / "run/lock").unlink()
    (tmp_path / "run/lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="symbolic link"), storage.lock("job 3"):
        pass
    assert (tmp_path / "precious").read_text() == "kept"

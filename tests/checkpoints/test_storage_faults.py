"""Full disks, failing and forbidding servers, missing credentials: told with cause and remedy, retried where it helps."""

import ctypes
import errno
import random
import shutil
import uuid
from collections.abc import Iterator

import fsspec
import pytest

from exfm.checkpoints import faults
from exfm.checkpoints.storage import Storage
from exfm.data.errors import UserError
from tests.checkpoints.s3 import PART_BYTES, FaultyProxy, cut, free_port, new_bucket, noise, set_up_s3, small_and_quick


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    small_and_quick(monkeypatch)


@pytest.fixture
def proxy(s3_server, monkeypatch) -> Iterator[FaultyProxy]:
    """Between this process's S3 clients and the server."""
    made = FaultyProxy(s3_server)
    set_up_s3(made.endpoint, monkeypatch)
    yield made
    made.shutdown()
    made.server_close()


def test_a_large_file_goes_up_in_several_parts(proxy):
    seen: list[str] = []
    proxy.fault = lambda method, path: seen.append(f"{method} {path}") or 0  # type: ignore[func-returns-value]
    Storage(f"{new_bucket()}/run").write("file", cut(noise(3 * PART_BYTES + 1)))
    assert len({s for s in seen if s.startswith("PUT") and "partNumber" in s}) == 4


def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_none(small_disk):
    storage = Storage(small_disk)
    storage.commit("before", b"kept")
    with pytest.raises(OSError, match=f"cannot write {small_disk}/big: No space left on device; free") as failed:
        storage.write("big", (bytes(1 << 20) for _ in range(5)))
    assert failed.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match=f"cannot write {small_disk}/big.json: No space left on device; free"):
        storage.commit("big.json", bytes(5 << 20))
    assert storage.names() == ["before"] and storage.read("before") == b"kept"
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    with pytest.raises(UserError, match="No space left on device"):
        storage.check()


def test_a_place_that_cannot_be_used_is_named_with_cause_and_remedy(tmp_path, small_disk):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/file/run: Not a directory"):
        Storage(tmp_path / "file/run").check()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mount(b"exfm", str(small_disk).encode(), b"tmpfs", 32 | 1, None) == 0  # MS_REMOUNT | MS_RDONLY
    with pytest.raises(UserError, match=f"cannot write {small_disk}: Read-only file system"):
        Storage(small_disk).check()
    with pytest.raises(UserError, match=r"nonsense://x is no place for files .*; use a folder or a URL like s3://"):
        Storage("nonsense://x").check()


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    def missing(url, **options):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(UserError, match=r"s3://bucket/run needs .*Install s3fs.*pip install 'exfm\[s3\]'"):
        Storage("s3://bucket/run").check()


def test_s3_without_credentials_says_which_to_set(s3_url, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError, match=f"cannot .*{s3_url}: no credentials .*; set AWS_ACCESS_KEY_ID"):
        Storage(s3_url).check()
    with pytest.raises(PermissionError, match="no credentials"):
        Storage(s3_url).write("file", [b"x"])


def test_a_missing_bucket_is_named_and_not_made(s3_url):
    missing = Storage(f"s3://missing-{uuid.uuid4().hex}/run")
    with pytest.raises(UserError, match=f"cannot write {missing.url}: there is no such bucket; create it"):
        missing.check()
    missing.make()
    with pytest.raises(UserError, match="there is no such bucket"):
        missing.check()
    with pytest.raises(FileNotFoundError, match="there is no such bucket"):
        missing.write("file", cut(noise(2 * PART_BYTES)))


def test_a_forbidden_bucket_is_told_at_once(proxy):
    url = f"{new_bucket()}/run"
    for verb, methods in (("write", ["PUT"]), ("remove from", ["DELETE"]), ("list", ["GET"])):
        proxy.failed.clear()
        proxy.fault = lambda method, path, methods=methods: 403 if method in methods else 0
        with pytest.raises(UserError, match=f"cannot {verb} {url}: .*AccessDenied; use credentials that may"):
            Storage(url).check()
        assert len(proxy.failed) == 1  # no retries


@pytest.mark.timeout(60)
def test_a_server_that_is_down_is_told(s3_url, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(UserError, match=f"{s3_url}: the server does not answer .*AWS_ENDPOINT_URL_S3"):
        Storage(s3_url).check()
    with pytest.raises(ConnectionError, match="the server does not answer"):
        Storage(s3_url, retries=2).read("file")


@pytest.mark.parametrize("status", [500, 503])
def test_a_server_that_fails_some_times_is_asked_again(proxy, status):
    storage = Storage(f"{new_bucket()}/run")
    storage.names()  # the bucket's region is known now
    payload = noise(3 * PART_BYTES + 100)
    acts = {
        "make an upload": ("POST", "uploads", lambda: storage.write("file", cut(payload))),
        "upload a part": ("PUT", "partNumber=2", lambda: storage.write("file", cut(payload))),
        "complete an upload": ("POST", "uploadId", lambda: storage.write("file", cut(payload))),
        "commit": ("PUT", "manifest", lambda: storage.commit("manifest", b"x")),
        "read": ("GET", "file", lambda: storage.read("file", 0, 6_000_000)),
        "look": ("HEAD", "file", lambda: storage.size("file")),
        "list": ("GET", "list-type", lambda: storage.names()),
    }
    for name, (wanted, part, act) in acts.items():
        proxy.failed.clear()
        proxy.times(3, status, lambda method, path, wanted=wanted, part=part: method == wanted and part in path)
        act()
        assert len(proxy.failed) == 3, name
    assert storage.read("file") == payload and storage.names() == ["file", "manifest"]
    proxy.times(3, status, lambda method, path: method in ("POST", "DELETE"))
    storage.remove("file")
    assert storage.names() == ["manifest"]


@pytest.mark.parametrize(("status", "word"), [(503, "the server is failing .HTTP 503"), (507, "InsufficientStorage")])
def test_an_upload_that_fails_for_good_is_aborted_and_told(proxy, status, word):
    storage = Storage(f"{new_bucket()}/run", retries=2)
    proxy.times(1000, status, lambda method, path: "partNumber=2" in path)
    with pytest.raises(OSError, match=f"cannot write {storage.url}/file: .*{word}"):
        storage.write("file", cut(noise(3 * PART_BYTES)))
    assert len(proxy.failed) == (3 if status == 503 else 1)
    proxy.times(0, 0)
    assert storage.names() == []
    fs, root = fsspec.core.url_to_fs(storage.url, skip_instance_cache=True)
    assert fs.call_s3("list_multipart_uploads", Bucket=root.split("/")[0]).get("Uploads", []) == []


@pytest.mark.parametrize(
    ("error", "tries"),
    [
        (TimeoutError("slow"), 4),
        (ConnectionResetError("reset"), 4),
        (OSError(errno.EBUSY, "busy"), 4),
        (PermissionError("no"), 1),
        (OSError(errno.ENOSPC, "full"), 1),
    ],
)
def test_only_errors_that_may_pass_are_tried_again(error, tries, monkeypatch):
    storage = Storage(f"memory://{uuid.uuid4().hex}", retries=3)
    calls = []

    def fails(*args, **kwargs):
        calls.append(args)
        raise error

    monkeypatch.setattr(storage._opened[0], "pipe_file", fails)
    with pytest.raises(OSError, match=f"cannot write {storage.url}/x"):
        storage.commit("x", b"1")
    assert len(calls) == tries


def test_waiting_longer_and_longer_leaves_the_jobs_random_numbers_alone(monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(faults, "BACK_OFF_S", 1.0)
    monkeypatch.setattr(faults.time, "sleep", waits.append)
    state = random.getstate()

    def fails() -> None:
        raise TimeoutError

    with pytest.raises(TimeoutError):
        faults.retried(fails, 8)
    assert random.getstate() == state
    assert len(waits) == 8 and len(set(waits)) == 8  # jitter
    assert all(0.5 * min(30, 2**n) <= wait <= min(30, 2**n) for n, wait in enumerate(waits))

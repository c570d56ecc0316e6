"""Files on a local disk, in memory and on a real S3 server: what is written is read, what leads out is refused."""

import errno
import os
import pickle
import threading
import uuid
from collections.abc import Iterator

import fsspec
import numpy as np
import pytest

from exfm.checkpoints import disk
from exfm.checkpoints.storage import Storage
from exfm.data.errors import UserError
from tests.checkpoints.s3 import PART_BYTES, cut, noise, small_and_quick


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    small_and_quick(monkeypatch)


@pytest.fixture(params=["local", "memory", "s3"])
def url(request, tmp_path) -> str:
    if request.param == "local":
        return str(tmp_path / "run")
    return request.getfixturevalue("s3_url") if request.param == "s3" else f"memory://{uuid.uuid4().hex}/run"


@pytest.fixture
def storage(url) -> Storage:
    made = Storage(url)
    made.make()
    return made


@pytest.mark.parametrize("size", [0, 1, 4096, PART_BYTES, 3 * PART_BYTES + 12_345])
def test_what_is_written_is_read_bit_by_bit(storage, size):
    payload = noise(size)
    storage.write("file", cut(payload, 7, 0, 2 * PART_BYTES, 1000))
    assert storage.read("file") == payload
    assert storage.size("file") == size
    room = bytearray(size)
    storage.read_into("file", 0, memoryview(room))
    assert room == payload


def test_arrays_of_numbers_are_written_and_filled_as_their_bytes(storage):
    numbers = np.arange(12, dtype=np.float32).reshape(3, 4)
    storage.write("file", [numbers.data])
    found = np.zeros((3, 4), dtype=np.float32)
    storage.read_into("file", 0, found.data)
    assert np.array_equal(numbers, found)


def test_a_range_is_the_slice_of_the_file(storage):
    payload = noise(2 * PART_BYTES + 100)
    storage.write("file", cut(payload))
    for start, stop in [(0, 10), (5, 5), (3, 9_000_000), (PART_BYTES, None), (len(payload) - 3, len(payload) + 9)]:
        assert storage.read("file", start, stop) == payload[start:stop]
    room = bytearray(9_000_001)
    storage.read_into("file", 17, memoryview(room))
    assert room == payload[17 : 17 + 9_000_001]


@pytest.mark.parametrize("start", [0, 50, 100, 10_000])
def test_a_file_shorter_than_the_buffer_is_an_error_that_names_it(storage, start):
    storage.write("some/file" if not storage.local else "file", [noise(100)])
    name = "some/file" if not storage.local else "file"
    with pytest.raises(OSError, match=name) as failed:
        storage.read_into(name, start, memoryview(bytearray(101)))
    assert not isinstance(failed.value, FileNotFoundError)


def test_what_does_not_exist_is_told(storage):
    assert storage.names("nothing") == [] and not storage.exists("nothing")
    for act in (storage.size, storage.read, lambda path: storage.read_into(path, 0, memoryview(bytearray(1)))):
        with pytest.raises(FileNotFoundError, match="nothing: it does not exist"):
            act("nothing")
    storage.remove("nothing")


def test_names_are_those_directly_inside_and_fresh(storage):
    storage.make("a")
    assert storage.names("a") == []
    for name in ("a/2", "a/10", "ab"):
        storage.commit(name, b"x")
    storage.commit("a/deep/er", b"x")
    assert storage.names("a") == ["10", "2", "deep"]
    assert storage.names() == ["a", "ab"]
    assert storage.names("a/2") == []
    other = Storage(storage.url)  # another job's view
    assert other.names("a") == ["10", "2", "deep"] and not other.exists("a/3")
    storage.commit("a/3", b"xyz")
    assert other.names("a") == ["10", "2", "3", "deep"] and other.exists("a/3") and other.size("a/3") == 3
    storage.commit("a/3", b"longer")
    assert other.size("a/3") == 6 and other.read("a/3") == b"longer"


def test_a_folder_goes_with_all_in_it_and_nothing_else(storage):
    for name in ("step=1/x", "step=1/y/z", "step=10/x"):
        storage.commit(name, b"x")
    storage.remove("step=1")
    assert not storage.exists("step=1") and storage.names("step=1") == []
    assert storage.read("step=10/x") == b"x"
    storage.remove("step=10/x")
    assert not storage.exists("step=10/x")


def test_a_commit_replaces_the_one_before_and_leaves_no_other_name(storage):
    storage.commit("folder/manifest.json", b"one")
    storage.commit("folder/manifest.json", b"three")
    assert storage.read("folder/manifest.json") == b"three"
    assert storage.names("folder") == ["manifest.json"]


def test_an_interrupted_write_leaves_nothing(storage):
    def dies() -> Iterator[bytes]:
        yield noise(2 * PART_BYTES)
        yield noise(10)
        raise KeyError("in the middle")

    with pytest.raises(KeyError, match="in the middle"):
        storage.write("file", dies())
    assert not storage.exists("file") and storage.names() == []
    if storage.url.startswith("s3"):
        fs, root = fsspec.core.url_to_fs(storage.url)
        assert fs.call_s3("list_multipart_uploads", Bucket=root.split("/")[0]).get("Uploads", []) == []


def test_a_storage_travels_to_another_process_without_its_connections(storage):
    storage.commit("file", b"x")
    assert pickle.loads(pickle.dumps(storage)).read("file") == b"x"


def test_no_storage_uses_the_environment_or_disk_before_it_is_asked(tmp_path):
    Storage(tmp_path / "run")
    Storage("s3://bucket/run")
    Storage("nonsense://x")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("path", ["../x", "a/../../x", "a/../x", "/etc/passwd", "..", "a\0b", "//x"])
def test_a_path_out_of_the_folder_is_refused(storage, path):
    room = memoryview(bytearray(1))
    for act in (
        lambda: storage.names(path),
        lambda: storage.exists(path),
        lambda: storage.size(path),
        lambda: storage.read(path),
        lambda: storage.read_into(path, 0, room),
        lambda: storage.write(path, [b"x"]),
        lambda: storage.commit(path, b"x"),
        lambda: storage.make(path),
        lambda: storage.remove(path),
    ):
        with pytest.raises(UserError, match="leads out of"):
            act()


def test_symbolic_links_are_refused_and_what_they_name_stays(tmp_path):
    storage = Storage(tmp_path / "run")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    storage.make()
    (tmp_path / "run/folder").symlink_to(outside)
    (tmp_path / "run/file").symlink_to(outside / "secret")
    (tmp_path / "run/new").symlink_to(outside / "new")
    room = memoryview(bytearray(1))
    for path in ("folder/secret", "file", "new"):
        for act in (
            lambda path=path: storage.size(path),
            lambda path=path: storage.read(path),
            lambda path=path: storage.read_into(path, 0, room),
            lambda path=path: storage.write(path, [b"x"]),
            lambda path=path: storage.commit(path, b"x"),
        ):
            with pytest.raises(UserError, match="symbolic link"):
                act()
    with pytest.raises(UserError, match="symbolic link"):
        storage.remove("folder/secret")
    (tmp_path / f"run/m.tmp.{os.getpid()}").symlink_to(outside / "secret")
    with pytest.raises(UserError, match="symbolic link"):
        storage.commit("m", b"x")
    storage.remove("folder")
    storage.remove("file")
    assert sorted(os.listdir(outside)) == ["secret"] and (outside / "secret").read_bytes() == b"secret"
    assert storage.names() == ["new"]


def test_a_link_planted_after_the_look_is_not_followed(tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "file").symlink_to(tmp_path / "secret")
    with pytest.raises(OSError) as read:
        disk.read(str(tmp_path / "file"), 0, None)
    with pytest.raises(OSError) as written:
        disk.write(str(tmp_path / "file"), [memoryview(b"x")])
    assert read.value.errno == written.value.errno == errno.ELOOP
    assert (tmp_path / "secret").read_bytes() == b"secret"


@pytest.mark.timeout(20)
def test_what_is_no_regular_file_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    storage = Storage(tmp_path)
    for name in ("pipe", "folder"):
        with pytest.raises(UserError, match="only regular files"):
            storage.size(name)
        with pytest.raises(UserError, match="only regular files"):
            storage.read(name)


def test_a_folder_that_is_itself_reached_by_a_link_is_the_users_choice(tmp_path):
    (tmp_path / "disk2").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk2")
    Storage(tmp_path / "run").write("file", [b"x"])
    assert (tmp_path / "disk2/file").read_bytes() == b"x"


def test_a_place_that_can_be_used_passes_the_check_and_stays_as_it_was(url, tmp_path):
    storage = Storage(f"{url}/deep/er")
    storage.check()
    assert not storage.exists("") and Storage(url).names() == []
    storage.commit("kept", b"x")
    storage.check()
    assert storage.names() == ["kept"]


def test_two_storages_of_one_server_work_from_many_threads(s3_url):
    storage = Storage(s3_url)
    payloads = {f"{n}": noise(1000 + n) for n in range(8)}
    threads = [threading.Thread(target=storage.write, args=(k, [v])) for k, v in payloads.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: storage.read(name) for name in storage.names()} == payloads

"""Fixtures and markers of the whole suite."""

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints.s3 import new_bucket, s3_process, set_up_s3
from tests.ranks import READY_S, RankPool, forking
from tests.warm import SOCKET, Warm, serve


@pytest.fixture
def data_dir() -> Path:
    """The folder of data sets, EXFM_DATA_DIR; without it the test is skipped, or fails where EXFM_REQUIRE_DATA is set."""
    root = os.environ.get("EXFM_DATA_DIR")
    if root and Path(root).is_dir():
        return Path(root)
    message = f"EXFM_DATA_DIR is {root}; it must name a folder with the data sets"
    if os.environ.get("EXFM_REQUIRE_DATA"):
        pytest.fail(message)
    pytest.skip(message)


STRICT = {"trainer", "sharding", "checkpoints", "distillation", "embeddings"}
# what they warn of is theirs to mend
THIRD_PARTIES = ("torch", "torchrec", "torchmetrics", "fbgemm_gpu", "tensorboard")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Warnings are errors in the tests of the training core; what needs a GPU is skipped where there is none."""
    strict = pytest.mark.filterwarnings(
        "error", "ignore::ResourceWarning", *(rf"ignore:::{name}(\.|$)" for name in THIRD_PARTIES)
    )
    for item in items:
        if item.path.parent.name in STRICT:
            item.add_marker(strict)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def rank_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    pool = RankPool(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


@pytest.fixture
def on_ranks(rank_pool: RankPool) -> RankPool:
    """on_ranks(n, fn, *args): the results of a module-level function on n gloo ranks."""
    return rank_pool


@pytest.fixture(scope="session")
def warm_server() -> Iterator[str]:
    """The address of the server behind `warm`."""
    context = forking()
    with tempfile.TemporaryDirectory(prefix="exfm-") as folder:  # a socket's address must be short
        address = f"{folder}/warm"
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(address, theirs), daemon=True)
        process.start()
        theirs.close()
        assert ours.poll(READY_S), f"no server of warm processes within {READY_S:g} s"
        yield address
        ours.close()
        process.join(10)


@pytest.fixture
def warm(warm_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands of Python start without their imports: see tests/warm.py."""
    monkeypatch.setenv(SOCKET, warm_server)
    monkeypatch.setattr(subprocess, "Popen", Warm)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of a real S3 server on loopback."""
    with s3_process(tmp_path_factory.mktemp("s3") / "log") as endpoint:
        yield endpoint


@pytest.fixture
def s3_url(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty folder in a new bucket of that server, with the settings that a user would make for it."""
    set_up_s3(s3_server, monkeypatch)
    return f"{new_bucket()}/run"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB; skipped where mounting is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"exfm", str(folder).encode(), b"tmpfs", 0, b"size=3m") != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        yield folder
    finally:
        libc.umount2(str(folder).encode(), 2)

"""Half-written, truncated and unwritable checkpoints: what was committed before stays, and is named or used."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from exfm.checkpoints import store
from exfm.checkpoints.store import SaveError, committed
from exfm.data.errors import UserError
from exfm.data.manifest import open_stream
from exfm.data.writer import write_part
from exfm.trainer.run import DONE
from tests.trainer.jobs import (
    Raw,
    assert_same_outcome,
    job,
    last_state,
    make_stream,
    on,
    read_checkpoint,
    replaced,
    run,
    same,
    teacher,
)


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> str:
    return make_stream(tmp_path_factory.mktemp("damage") / "stream").root


def folders(raw: Raw) -> list[str]:
    return sorted(p.name for p in (Path(raw["run"]["folder"]) / "checkpoints").iterdir())


def test_a_checkpoint_without_manifest_is_not_resumed_from_and_is_cleaned_up(stream, tmp_path):
    whole, raw = teacher(tmp_path / "whole", stream), teacher(tmp_path / "run", stream)
    run(whole)
    run(raw, 7)
    good = committed(tmp_path / "run/checkpoints")[-1]
    # newer, complete, but never committed; and one that only just began
    shutil.copytree(good.folder, tmp_path / "run/checkpoints/step=00000015")
    (tmp_path / "run/checkpoints/step=00000015/manifest.json").unlink()
    (tmp_path / "run/checkpoints/step=00000017").mkdir()
    assert [c.step for c in committed(tmp_path / "run/checkpoints")] == [good.step]
    assert run(raw)[0] == DONE
    assert_same_outcome(whole, raw)
    assert {"step=00000015", "step=00000017"}.isdisjoint(folders(raw))


def test_only_the_newest_checkpoints_are_kept(stream, tmp_path):
    raw = job(tmp_path / "run", stream, checkpoint={"every_slices": 1, "keep": 2})
    run(raw)
    assert folders(raw) == ["step=00000015", "step=00000020"]


@pytest.mark.parametrize("pattern", ["__0_*.distcp", "rank-00000.npz", ".metadata"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_file_is_refused_by_name(damage, pattern, stream, tmp_path):
    raw = job(tmp_path / "run", stream)
    run(raw, 7)
    path = next(committed(tmp_path / "run/checkpoints")[-1].folder.glob(pattern))
    if damage == "missing":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(
        UserError, match=f"{path.name} is missing or truncated; remove .* to resume from the commit before"
    ):
        run(raw)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_flipped_bit_is_refused_by_name_on_every_rank(ranks, stream, tmp_path, on_ranks):
    raw = job(tmp_path / "run", stream)
    on(on_ranks, ranks, raw, 7)
    path = next(committed(tmp_path / "run/checkpoints")[-1].folder.glob(f"__{ranks - 1}_*.distcp"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    message = rf"{path.name} differs from its checksum; remove .* to resume from the commit before"
    if ranks == 1:
        with pytest.raises(UserError, match=message):
            run(raw)
        return
    with pytest.raises(AssertionError, match=message) as failed:
        on(on_ranks, ranks, raw)
    assert [type(e) for e in failed.value.errors.values()] == [UserError] * ranks


def test_a_damaged_manifest_is_refused_by_name(stream, tmp_path):
    raw = job(tmp_path / "run", stream)
    run(raw, 7)
    path = committed(tmp_path / "run/checkpoints")[-1].folder / "manifest.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(UserError, match=r"manifest.json is damaged"):
        run(raw)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_that_cannot_write_leaves_the_last_commit(ranks, stream, tmp_path, on_ranks):
    """The last rank fails in its own file: every rank is told, and the job then goes on to the undisturbed end."""
    whole = teacher(tmp_path / "whole", stream, checkpoint={"every_slices": 1, "keep": 2})
    raw = replaced(whole, run__folder=str(tmp_path / "run"))
    on(on_ranks, ranks, whole)
    if ranks == 1:
        with pytest.raises(SaveError, match=r"cannot write .*No space left on device.*the last commit is intact"):
            run_without_space(raw)
    else:
        with pytest.raises(AssertionError) as failed:
            on_ranks(ranks, run_without_space, raw)
        assert [type(e) for _, e in sorted(failed.value.errors.items())] == [SaveError] * ranks
    assert [c.step for c in committed(tmp_path / "run/checkpoints")] == [5, 10]
    assert folders(raw) == ["step=00000005", "step=00000010"]  # what could not be finished takes no space
    on(on_ranks, ranks, raw)
    assert_same_outcome(whole, raw)


def run_without_space(raw: Raw) -> None:
    """Run; the third checkpoint cannot be written by the last rank."""
    import torch.distributed as dist

    write, calls = store._write_partials, []

    def full(folder, path, partials):
        calls.append(path)
        if len(calls) == 3 and dist.get_rank() == dist.get_world_size() - 1:
            raise OSError(28, "No space left on device")
        return write(folder, path, partials)

    store._write_partials = full
    try:
        run(raw)
    finally:
        store._write_partials = write


def train(raw: Raw, folder: Path, limit_bytes: int = 0) -> int:
    """`python -m exfm.trainer` in a process of its own, whose files may have limit_bytes at most."""
    (folder / "job.yaml").write_text(yaml.safe_dump(raw))
    prefix = f"ulimit -f {limit_bytes // 1024}; " if limit_bytes else ""
    command = f"{prefix}exec {sys.executable} -m exfm.trainer {folder / 'job.yaml'}"
    with open(folder / "log", "a") as out:
        return subprocess.run(["bash", "-c", command], stdout=out, stderr=out, timeout=100, check=False).returncode


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
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


@pytest.mark.timeout(200)
def test_a_full_disk_ends_the_job_with_1_and_a_resumable_commit(stream, small_disk, tmp_path):
    big = {"rows": 20, "width": 8, "init": 0.1}
    raw = job(small_disk / "run", stream, tables__user=big, checkpoint={"every_slices": 1, "keep": 1})
    assert run(raw, 7)[0] == 75
    before = last_state(raw)
    filler = small_disk / "filler"
    free = shutil.disk_usage(small_disk).free
    filler.write_bytes(b"x" * (free - 40 * 1024))
    assert train(raw, tmp_path) == 1
    word = json.loads((small_disk / "run/exit.json").read_text())
    assert word["exit_code"] == 1 and "No space left on device" in word["message"]
    assert same(before, last_state(raw)) == []
    filler.unlink()
    whole = replaced(raw, run__folder=str(tmp_path / "whole"))
    assert run(raw)[0] == run(whole)[0] == DONE
    assert_same_outcome(whole, raw)


@pytest.mark.timeout(200)
def test_files_limited_in_size_end_the_job_with_1_and_a_resumable_commit(stream, tmp_path):
    raw = job(tmp_path / "run", stream, tables__user={"rows": 20_000, "width": 16}, model={"kind": "dcnv2", "rank": 2})
    assert run(raw, 7)[0] == 75
    before = last_state(raw)
    assert train(raw, tmp_path, limit_bytes=512 * 1024) == 1
    word = json.loads((tmp_path / "run/exit.json").read_text())
    assert word["exit_code"] == 1 and "cannot write" in word["message"] and "last commit is intact" in word["message"]
    assert same(before, last_state(raw)) == []
    assert run(raw)[0] == DONE


def test_a_slice_without_examples_of_the_domain_commits_like_any_other(tmp_path):
    """Nothing is learned, so the step stays: the new commit may not write into the files of the one before."""
    stream = make_stream(tmp_path / "stream", (40, 40, 40)).root
    domains = [{"name": "one", "column": "user", "values": [3]}]
    raw = job(tmp_path / "run", stream, stream__domains=domains, stream__domain="one")
    raw = replaced(raw, checkpoint={"every_slices": 1, "keep": 100})
    only_first = keep_user_in_first_slice(stream, 3)
    assert only_first
    assert run(raw)[0] == DONE
    positions = [c.manifest["position"]["slice"] for c in committed(tmp_path / "run/checkpoints")]
    assert positions == [1, 2, 3]
    states = [c.folder for c in committed(tmp_path / "run/checkpoints")]
    assert same(read_checkpoint(states[0]), read_checkpoint(states[2])) == []


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

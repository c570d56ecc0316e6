"""A job whose checkpoints and snapshots lie in a bucket of a real S3 server: same outcome, same guarantees."""

import os
from pathlib import Path

import pytest
import torch

from benchmarks._kill_jobs import whole_state
from exfm.checkpoints.commits import committed
from exfm.checkpoints.snapshots import load_snapshot
from exfm.checkpoints.storage import Storage
from exfm.trainer.run import DONE, STOPPED
from tests.trainer.jobs import Raw, job, last_state, make_stream, on, replaced, run, same, scores


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> str:
    return make_stream(tmp_path_factory.mktemp("remote") / "stream").root


def weights(url: str) -> dict[str, torch.Tensor]:
    return {n: t for n, t in whole_state(committed(url)[-1]).items() if not n.startswith("rank.")}


def run_there(raw: Raw, stop_after: int, settings: dict[str, str]) -> int:
    """`run` in a rank process, which was started before there was a server."""
    os.environ.update(settings)
    return run(raw, stop_after)[0]


def test_a_job_with_deltas_and_snapshots_in_a_bucket_stops_and_resumes_bitwise(stream, s3_url, tmp_path, on_ranks):
    whole = job(tmp_path / "whole", stream)
    folders = {"folder": f"{s3_url}/checkpoints", "snapshots": {"folder": f"{s3_url}/snapshots", "full_every": 3}}
    section = {"every_slices": 1, "full_every": 4, "keep": 3, **folders}
    raw = replaced(whole, run__folder=str(tmp_path / "run"), checkpoint=section)
    on(on_ranks, 2, whole)
    settings = {k: v for k, v in os.environ.items() if k.startswith("AWS_")}
    for stop_after, code in ((7, STOPPED), (0, DONE)):
        assert set(on_ranks(2, run_there, raw, stop_after, settings)) == {code}
    assert same(last_state(whole), weights(section["folder"])) == []
    assert scores(whole) == scores(raw)
    assert not (tmp_path / "run/checkpoints").exists() and not (tmp_path / "run/snapshots").exists()
    newest = committed(Storage(folders["snapshots"]["folder"]))[-1]
    state = {n: torch.zeros_like(t) for n, t in last_state(whole).items() if n.endswith(".weight") and "tables" in n}
    load_snapshot(newest.storage, newest.name, state)
    assert same(state, {n: last_state(whole)[n] for n in state}) == []


def test_a_commit_damaged_in_the_bucket_is_named_and_passed_over(stream, s3_url, tmp_path, capfd):
    whole = job(tmp_path / "whole", stream)
    section = {"every_slices": 1, "keep": 3, "folder": f"{s3_url}/damaged"}
    raw = replaced(whole, run__folder=str(tmp_path / "run"), checkpoint=section)
    run(whole)
    assert run(raw, 12)[0] == STOPPED
    newest = committed(section["folder"])[-1]
    path = f"{newest.name}/rank-00000.safetensors"
    content = bytearray(newest.storage.read(path))
    content[len(content) // 2] ^= 1
    newest.storage.write(path, [memoryview(content)])
    assert run(raw)[0] == DONE
    assert f"{newest.folder}/rank-00000.safetensors differs from its checksum" in capfd.readouterr().err
    assert same(last_state(whole), weights(section["folder"])) == []
    assert Path(raw["run"]["folder"], "ledger.parquet").exists()

"""Jobs on one CUDA device: both pipelines near the CPU's scores, checkpoints that move between devices, no stalls in a step."""

import warnings
from pathlib import Path

import pytest
import torch

from exfm.checkpoints.commits import committed
from exfm.trainer.env import RankEnv, process_group
from exfm.trainer.loop import Job
from exfm.trainer.run import DONE, STOPPED
from exfm.trainer.steps import Feed
from tests.trainer.jobs import (
    Raw,
    assert_same_outcome,
    last_state,
    make_stream,
    parsed,
    replaced,
    run,
    same,
    student,
    summary,
    teacher,
)

pytestmark = pytest.mark.gpu
PIPELINES = ["base", "sparse_dist"]


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> str:
    return make_stream(tmp_path_factory.mktemp("cuda") / "stream").root


def on_cuda(raw: Raw, folder: Path, **over: object) -> Raw:
    return replaced(raw, run__folder=str(folder), run__device="cuda", **over)


def near(a: Raw, b: Raw) -> None:
    for task, scores in summary(a)["groups"]["all"].items():
        for name in ("ne", "log_loss", "auc", "calibration"):
            assert summary(b)["groups"]["all"][task][name] == pytest.approx(scores[name], abs=2e-3), (task, name)
    assert summary(a)["examples"] == summary(b)["examples"] and summary(a)["covered"] == summary(b)["covered"]


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_teacher_and_student_score_as_on_the_cpu(pipeline, stream, tmp_path):
    on_cpu = teacher(tmp_path / "cpu", stream)
    gpu = on_cuda(on_cpu, tmp_path / "gpu", run__pipeline=pipeline)
    run(on_cpu)
    assert run(gpu)[0] == DONE
    near(on_cpu, gpu)
    small = student(tmp_path / "small", stream, tmp_path / "gpu/supervision/fm", "student_adapter")
    small_gpu = on_cuda(small, tmp_path / "small-gpu", run__pipeline=pipeline)
    run(small)
    assert run(small_gpu)[0] == DONE
    near(small, small_gpu)


@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "data_parallel", "column_wise"])
def test_every_sharding_type_ends_near_the_cpus_weights(kind, stream, tmp_path):
    on_cpu = teacher(tmp_path / "cpu", stream, sharding__allowed=[kind])
    gpu = on_cuda(on_cpu, tmp_path / "gpu")
    run(on_cpu)
    run(gpu)
    a, b = last_state(on_cpu), last_state(gpu)
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[k], b[k].cpu(), atol=1e-3) for k in a)


def held(raw: Raw, device: torch.device) -> dict[str, torch.Tensor]:
    """What a job on `device` holds after restoring, through a checkpoint of its own."""
    from exfm.checkpoints.config import CheckpointConfig
    from exfm.checkpoints.saver import Request, Saver
    from exfm.checkpoints.storage import Storage
    from tests.trainer.jobs import read_checkpoint

    with process_group(RankEnv(), device, 60):
        job = Job(parsed(raw), RankEnv(), device, lambda: False)
        assert job.commits.restore()
        root = Path(raw["run"]["folder"]) / f"held-{device.type}"
        saver = Saver(Storage(root), CheckpointConfig(), device, job.built.kernels, job.built.plan)
        saver.save(Request(job.progress.step, job.commits.state, {}, {}))
        saver.wait()
        saver.close()
        job.close()
    return read_checkpoint(committed(root)[-1].folder)


def test_a_checkpoint_moves_to_the_cpu_and_back_bitwise(stream, tmp_path):
    raw = teacher(tmp_path / "run", stream)
    gpu = on_cuda(raw, tmp_path / "run")
    assert run(gpu, 7)[0] == STOPPED
    saved = last_state(gpu)
    for device in (torch.device("cpu"), torch.device("cuda", 0)):
        assert same({k: v.cpu() for k, v in saved.items()}, {k: v.cpu() for k, v in held(raw, device).items()}) == []
    assert run(raw, 3)[0] == STOPPED  # on the CPU
    assert run(gpu)[0] == DONE  # and on the GPU again


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_stopping_and_resuming_on_a_gpu_changes_nothing(pipeline, stream, tmp_path):
    """FBGEMM's CUDA backward is asked to be exact; what it does with duplicates must not depend on the restart."""
    whole = on_cuda(
        teacher(tmp_path / "whole", stream, stream__global_batch=16), tmp_path / "whole", run__pipeline=pipeline
    )
    halves = replaced(whole, run__folder=str(tmp_path / "halves"))
    run(whole)
    assert run(halves, 12)[0] == STOPPED
    assert run(halves)[0] == DONE
    assert_same_outcome(whole, halves)


def test_a_step_of_the_base_pipeline_never_waits_for_the_gpu(stream, tmp_path):
    raw = on_cuda(teacher(tmp_path / "run", stream), tmp_path / "run")
    device = torch.device("cuda", 0)
    with process_group(RankEnv(), device, 60):
        job = Job(parsed(raw), RankEnv(), device, lambda: False)
        reader = job.open(0)
        for batch, output in job.pipeline.run(Feed(job._batches(reader, 0, 64))):  # first steps allocate
            job.copies.put(batch, output)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for batch, output in job.pipeline.run(Feed(job._batches(reader, 64, reader.examples))):
                    job.copies.put(batch, output)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        job.log.close()
    assert [str(w.message) for w in caught if "synchroniz" in str(w.message)] == []

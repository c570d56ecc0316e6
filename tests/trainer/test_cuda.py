"""Jobs on one CUDA device: both pipelines near the CPU's scores, checkpoints that move between devices, no stalls in a step."""

import dataclasses
import warnings
from pathlib import Path

import pytest
import torch
from torchrec.distributed.planner import ParameterConstraints
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from exfm.checkpoints.commits import committed
from exfm.embeddings.config import FeaturesConfig, TableConfig
from exfm.embeddings.tables import build_collection
from exfm.sharding.fast_planner import TableSharder, plan_model
from exfm.sharding.loopback import loopback_group
from exfm.sharding.plan import read_plan
from exfm.sharding.shards import local_kernels
from exfm.sharding.topology import gpu_topology
from exfm.trainer.dryrun import dry_run, estimate
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
from tests.trainer.large import request

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


@pytest.mark.parametrize("kernel", ["fused_uvm", "fused_uvm_caching"])
@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "column_wise"])
def test_tables_in_host_memory_end_near_the_cpus_weights(kernel, kind, stream, tmp_path):
    on_cpu = teacher(tmp_path / "cpu", stream, sharding__allowed=[kind])
    gpu = on_cuda(on_cpu, tmp_path / "gpu", sharding__kernels=[kernel])
    run(on_cpu)
    assert run(gpu)[0] == DONE
    assert {t.kernel for t in read_plan(tmp_path / "gpu/plan.json").tables} == {kernel}
    a, b = last_state(on_cpu), last_state(gpu)
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[k], b[k].cpu(), atol=1e-3) for k in a)


def test_rows_fetched_ahead_into_a_cache_change_nothing(stream, tmp_path):
    over = {"sharding__kernels": ["fused_uvm_caching"], "sharding__allowed": ["table_wise"]}
    ahead = on_cuda(teacher(tmp_path / "ahead", stream, **over), tmp_path / "ahead", run__pipeline="prefetch")
    plain = on_cuda(teacher(tmp_path / "plain", stream, **over), tmp_path / "plain", run__pipeline="sparse_dist")
    run(ahead)
    run(plain)
    a, b = last_state(ahead), last_state(plain)
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in b)


def test_a_planned_rank_of_many_is_within_a_tenth_of_its_estimate():
    asked = request(
        ("table_wise", "row_wise", "column_wise"),
        world_size=256,
        local_batch=256,
        features=48,
        rows=2_000_000,
        width=128,
    )
    asked = dataclasses.replace(asked, device=torch.device("cuda"))
    expected, found = estimate(asked), dry_run(asked)
    assert abs(expected.total - found.peak_bytes) < 0.1 * found.peak_bytes


def test_a_2d_plan_steps_in_its_sharding_group():
    """Rank 0 of 16 in groups of 8, among loopback peers, by TorchRec's 2D wrapper."""
    from torchrec.distributed.model_parallel import DMPCollection

    features, tables = (
        FeaturesConfig(sparse=[{"name": "f", "table": "t", "ids": "hash"}]),
        {"t": TableConfig(rows=4096, width=32)},
    )
    collection = build_collection(features, tables, weighted=False)
    apply_optimizer_in_backward(RowWiseAdagrad, collection.parameters(), {"lr": 0.1})
    module = torch.nn.ModuleDict({"tables": collection})
    plan = plan_model(
        module,
        [TableSharder()],
        gpu_topology("h100", 16, 8, 2),
        32,
        {"t": ParameterConstraints(sharding_types=["row_wise"])},
    )
    device = torch.device("cuda")
    with loopback_group(0, 16, 8):
        model = DMPCollection(
            module,
            device,
            plan.torchrec(),
            world_size=16,
            sharding_group_size=8,
            global_pg=torch.distributed.group.WORLD,
            sharders=[TableSharder()],
        )
        ids = KeyedJaggedTensor(
            keys=["f"], values=torch.arange(64, device=device), lengths=torch.full((32,), 2, device=device)
        )
        before = torch.cuda.memory_allocated()
        out = model.module["tables"](ids).values()
        out.sum().backward()
        model.sync()
        assert out.shape == (32, 32) and bool(out.isfinite().all()) and torch.cuda.memory_allocated() >= before
        shards = [s for kernel in local_kernels(model) for s in kernel.shards]
        assert [tuple(s.weight.shape) for s in shards] == [(512, 32)]

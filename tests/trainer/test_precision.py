"""16 bits where they are asked for: near the fp32 job, sent and computed as such, refused where the device has not what is asked."""

import functools
from collections.abc import Callable

import pytest
import torch

from exfm.data.errors import UserError
from exfm.sharding.plan import read_plan
from exfm.sharding.topology import gpu_topology
from exfm.trainer import objective
from exfm.trainer.planning import plan_on
from exfm.trainer.precision import PrecisionConfig
from tests.trainer.jobs import Raw, global_losses, last_state, make_stream, on, parsed, replaced, run, student, teacher

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> str:
    return make_stream(tmp_path_factory.mktemp("precision") / "stream").root


ENGINES = {
    "ddp": {"kind": "ddp"},
    "fsdp": {"kind": "fsdp"},
    **{f"zero {stage}": {"kind": "deepspeed", "stage": stage} for stage in (1, 2, 3)},
}


@pytest.fixture(scope="module")
def in_32_bits(stream, tmp_path_factory, rank_pool) -> Callable[..., tuple[Raw, list[float]]]:
    """in_32_bits(engine, kind, pipeline): the finished job of two ranks and its losses; each is run once."""

    @functools.cache
    def finished(engine: str, kind: str, pipeline: str) -> tuple[Raw, list[float]]:
        same = {"sharding__allowed": [kind], "dense_engine": ENGINES[engine], "run__pipeline": pipeline}
        raw = teacher(tmp_path_factory.mktemp("fp32") / "run", stream, **same)
        return raw, global_losses(on(rank_pool, 2, raw))

    return finished


SENT = {"embeddings_forward": "fp16", "embeddings_backward": "fp16"}


@pytest.mark.parametrize("pipeline", [pytest.param("base", marks=pytest.mark.slow), "sparse_dist"])
@pytest.mark.parametrize(
    ("engine", "precision", "kind"),
    [
        *((engine, {"dense": "bf16"}, "table_wise") for engine in ENGINES),
        *((engine, {"gradients": "bf16"}, "table_wise") for engine in ENGINES if engine != "ddp"),
        *(("ddp", SENT, kind) for kind in ("table_wise", "row_wise", "column_wise")),
        ("ddp", SENT | {"dense": "bf16"}, "row_wise"),
        *((engine, SENT | {"dense": "bf16", "gradients": "bf16"}, "row_wise") for engine in ENGINES if engine != "ddp"),
    ],
)
def test_twenty_steps_are_near_those_in_32_bits_and_not_the_same(
    engine, precision, kind, pipeline, in_32_bits, tmp_path, on_ranks
):
    plain, expected = in_32_bits(engine, kind, pipeline)
    low = replaced(plain, run__folder=str(tmp_path / "low"), precision=precision)
    found = global_losses(on(on_ranks, 2, low))
    assert found == pytest.approx(expected, rel=0.02) and found != expected
    a, b = last_state(plain), last_state(low)
    assert {k: v.dtype for k, v in a.items()} == {k: v.dtype for k, v in b.items()}  # what is kept is as before


def seen(raw: Raw) -> set[torch.dtype]:
    """Types of what the served head's last layer gives."""
    found: set[torch.dtype] = set()
    original = objective.Served.forward

    def spy(self: objective.Served, dense: torch.Tensor, pooled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = original(self, dense, pooled)
        if out[0].device.type != "meta":  # where memory is estimated
            found.add(out[0].dtype)
        return out

    objective.Served.forward = spy  # type: ignore[method-assign]
    try:
        run(raw)
    finally:
        objective.Served.forward = original  # type: ignore[method-assign]
    return found


def test_the_dense_part_computes_in_bf16_and_losses_in_fp32(stream, tmp_path):
    raw = teacher(tmp_path / "t", stream)
    assert seen(raw) == {torch.float32}
    low = replaced(raw, run__folder=str(tmp_path / "low"), precision={"dense": "bf16"})
    assert seen(low) == {torch.bfloat16}
    learner = student(
        tmp_path / "s", stream, tmp_path / "low/supervision/fm", "student_adapter", precision={"dense": "bf16"}
    )
    code, recorder = run(learner)
    assert code == 0 and all(loss == loss for loss in recorder.losses)


def test_the_plan_knows_that_less_is_sent(stream, tmp_path):
    """Half the bytes are half the time by TorchRec's perf model, and another plan's input."""
    raw = teacher(tmp_path / "t", stream)
    low = replaced(raw, precision={"embeddings_forward": "fp16", "embeddings_backward": "bf16"})
    plain, half = (plan_on(parsed(r), gpu_topology("h100", 8)) for r in (raw, low))
    assert half.by_rank("fwd_comms").sum() == pytest.approx(plain.by_rank("fwd_comms").sum() / 2)
    assert half.by_rank("bwd_comms").sum() == pytest.approx(plain.by_rank("bwd_comms").sum() / 2)
    assert half.inputs != plain.inputs and half.inputs == plan_on(parsed(low), gpu_topology("h100", 8)).inputs
    run(raw)
    assert "precision" not in read_plan(tmp_path / "t/plan.json").inputs


def test_a_pipeline_that_needs_a_gpus_cache_is_refused_on_a_cpu(stream, tmp_path):
    with pytest.raises(UserError, match=r"run.pipeline is prefetch, .* on CPU use sparse_dist or base"):
        run(teacher(tmp_path / "t", stream, run__pipeline="prefetch"))
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ({"embeddings_backward": "bf16"}, r"precision.embeddings_backward is bf16, .* use fp16 or fp32"),
        ({"gradients": "bf16"}, r"precision.gradients is bf16, .* or dense_engine.kind: fsdp"),
        ({"dense": "tf32"}, r"precision.dense is tf32, .* use fp32 or bf16"),
        ({"stochastic_rounding": True}, r"precision.stochastic_rounding is true, .* train on a GPU"),
    ],
)
def test_what_a_cpu_has_not_is_refused_before_training(precision, message, stream, tmp_path):
    raw = teacher(tmp_path / "t", stream, precision=precision)
    with pytest.raises(UserError, match=message):
        run(raw)
    assert not (tmp_path / "t").exists()
    PrecisionConfig(dense="bf16", gradients="bf16", stochastic_rounding=False).check(CPU, "fsdp")

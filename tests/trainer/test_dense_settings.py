"""torch.compile and activation checkpointing of the dense part under every engine: what is trained stays the same."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from exfm.data.errors import UserError
from exfm.trainer import engines, zero
from exfm.trainer.build import build_dense
from exfm.trainer.config import check_ranks
from exfm.trainer.dense_memory import dense_memory
from exfm.trainer.engines import DenseEngineConfig
from tests.trainer.jobs import Raw, Recorder, global_losses, job, last_state, make_stream, parsed, replaced, run, same

WUKONG = {"kind": "wukong", "layers": 3, "width": 4, "num_fmb": 4, "num_lcb": 4, "rank": 4, "fmb_mlp": [32], "final_mlp": [16]}  # fmt: skip
ENGINES = {
    "ddp": {"kind": "ddp"},
    "fsdp": {"kind": "fsdp"},
    **{f"zero {stage}": {"kind": "deepspeed", "stage": stage} for stage in (1, 2, 3)},
}
SMALL = {**WUKONG, "layers": 1}
COMPILES_S = 600.0  # where other tests share the cores
compiles = pytest.mark.timeout(4 * COMPILES_S)


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> str:
    # last pieces of 1, 8, 2 and 15 examples on 2 ranks
    return make_stream(tmp_path_factory.mktemp("settings") / "stream", (129, 144, 100, 190)).root


def small(raw: Raw) -> tuple[int, Recorder]:
    """`run` where every layer of these small models is a unit, gradients leave in several buckets, and ZeRO-3 keeps biases only."""
    engines.UNIT_PARAMETERS = 200
    zero.BUCKET, zero.PERSISTENT = 700, 50
    return run(raw)


def graphs(raw: Raw, compiler: str) -> tuple[int, Recorder, int]:
    """Of a job: exit code, record, how many graphs were compiled."""
    from torch._dynamo.utils import counters

    engines.COMPILER = compiler
    torch._dynamo.reset()
    counters.clear()
    return *small(raw), counters["stats"]["unique_graphs"]


def traced(raw: Raw) -> tuple[int, Recorder]:
    engines.COMPILER = "aot_eager"
    return small(raw)


@compiles
@pytest.mark.parametrize(
    ("engine", "compiler"),
    [
        ("ddp", "aot_eager"),  # what an engine changes is what can be traced; C++ takes minutes
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (("ddp", "inductor"), ("fsdp", "aot_eager"), ("zero 2", "aot_eager"))
        ),
    ],
)
def test_compiled_it_has_the_losses_of_eager_and_restarts_bit_for_bit(engine, compiler, stream, tmp_path, on_ranks):
    eager = job(tmp_path / "eager", stream, model=SMALL, dense_engine=ENGINES[engine], checkpoint__every_slices=1)
    whole = replaced(eager, run__folder=str(tmp_path / "whole"), dense_engine__compile=True)
    half = replaced(whole, run__folder=str(tmp_path / "half"), stream__last=2)
    expected = global_losses(on_ranks(2, small, eager))
    found = on_ranks(2, graphs, whole, compiler, timeout_s=COMPILES_S)
    assert global_losses([r[:2] for r in found]) == pytest.approx(expected, rel=2e-5)
    # one for any number of examples, and one for 1, which torch always treats as a constant
    assert {r[2] for r in found} == {2} if engine != "fsdp" else max(r[2] for r in found) <= 20
    on_ranks(2, graphs, half, compiler, timeout_s=COMPILES_S)
    on_ranks(2, graphs, replaced(half, stream__last=None), compiler, timeout_s=COMPILES_S)
    assert same(last_state(whole), last_state(half)) == []


@compiles
@pytest.mark.parametrize(
    ("engine", "compile"),
    [
        ("fsdp", False),
        *(pytest.param(engine, False, marks=pytest.mark.slow) for engine in ("ddp", "zero 1", "zero 2", "zero 3")),
        ("ddp", True),
    ],
)
def test_layers_that_are_computed_again_give_the_same_losses(engine, compile, stream, tmp_path, on_ranks):
    plain = job(
        tmp_path / "plain",
        stream,
        model=SMALL if compile else WUKONG,
        dense_engine={**ENGINES[engine], "compile": compile},
    )
    again = replaced(plain, run__folder=str(tmp_path / "again"), dense_engine__activation_checkpointing=True)
    kept, recomputed = ([r[:2] for r in on_ranks(2, traced, raw, timeout_s=COMPILES_S)] for raw in (plain, again))
    assert global_losses(recomputed) == pytest.approx(global_losses(kept), rel=2e-5 if compile else 0, abs=0)


def saved_bytes(raw: Raw) -> tuple[int, list[torch.Tensor]]:
    """What autograd keeps of one forward pass, parameters aside, and the gradients."""
    served, _, _ = build_dense(parsed(raw), torch.device("cpu"))
    known = {p.untyped_storage().data_ptr() for p in served.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(0)
    config = parsed(raw)
    pooled = torch.randn(64, sum(config.tables[f.table].width for f in config.features.sparse), requires_grad=True)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        logits, _ = served(torch.randn(64, len(config.features.dense)), pooled)
    logits.sum().backward()
    return sum(sizes.values()), [pooled.grad, *(p.grad for p in served.parameters())]


def test_less_is_kept_for_backward_and_gradients_are_bitwise_the_same(tmp_path):
    raw = job(tmp_path, "s", model={**WUKONG, "layers": 8, "fmb_mlp": [256, 256]})
    kept, gradients = saved_bytes(raw)
    again, recomputed = saved_bytes(replaced(raw, dense_engine={"activation_checkpointing": True}))
    assert again < kept / 4
    assert all(torch.equal(a, b) for a, b in zip(gradients, recomputed, strict=True))


def test_the_planner_counts_what_is_not_kept(tmp_path):
    raw = job(tmp_path, "s", model={**WUKONG, "layers": 8, "fmb_mlp": [256, 256]})
    kept = dense_memory(parsed(raw), 512, 8)
    again = dense_memory(parsed(replaced(raw, dense_engine={"activation_checkpointing": True})), 512, 8)
    assert again.saved < kept.saved / 4 and again.backward < kept.backward / 2 and again.weights == kept.weights


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"kind": "deepspeed"}, r"kind is deepspeed without a stage; use 1, 2 or 3 \(ZeRO 0 is kind: ddp\)"),
        ({"kind": "fsdp", "stage": 2}, "stage is 2 but kind is fsdp; stage goes with kind: deepspeed"),
        ({"kind": "deepspeed", "stage": 3, "compile": True}, r"compile does not go with deepspeed's stage 3.* use stage 2"),
        ({"kind": "deepspeed", "stage": 2, "shard": 2}, "shard goes with kind: fsdp"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_before_any_rank_starts(engine, message, tmp_path):
    with pytest.raises(UserError, match=message):
        check_ranks(parsed(job(tmp_path, "s", model=WUKONG, dense_engine=engine)), 2)


def test_a_model_without_layers_to_recompute_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"a model of kind dcnv2 has no layers to recompute; .* model.kind: wukong"):
        check_ranks(parsed(job(tmp_path, "s", dense_engine={"activation_checkpointing": True})), 2)


def test_what_is_not_installed_is_refused_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'deepspeed==0\.19\.8'"):
        DenseEngineConfig(kind="deepspeed", stage=1).check_machine("cpu")
    DenseEngineConfig().check_machine("cpu")
    monkeypatch.setattr(engines.shutil, "which", lambda name: None)
    with pytest.raises(
        UserError, match=r"compile is true, but .* is not found; install it \(Debian: apt-get install g\+\+\)"
    ):
        DenseEngineConfig(compile=True).check_machine("cpu")


def test_where_and_how_fast_is_no_part_of_what_is_trained(tmp_path):
    raw = job(tmp_path, "s", model=WUKONG)
    settings = {"kind": "deepspeed", "stage": 2, "compile": True, "activation_checkpointing": True}
    assert parsed(raw).identity() == parsed(replaced(raw, dense_engine=settings)).identity()

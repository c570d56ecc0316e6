"""Dense engines: the same losses and weights as ddp, checkpoints that any engine continues, memory that is cut."""

import functools
from collections.abc import Callable

import pytest
import torch
from typer.testing import CliRunner

from exfm.data.errors import UserError
from exfm.launch.cli import app
from exfm.trainer import engines
from exfm.trainer.build import build_dense
from exfm.trainer.config import check_ranks
from exfm.trainer.engines import DenseEngineConfig, dense_bytes, gathered
from tests.trainer.jobs import (
    Raw,
    Recorder,
    copied,
    global_losses,
    job,
    last_state,
    make_stream,
    parsed,
    replaced,
    run,
    teacher,
)
from tests.trainer.starts import built_here

FSDP = {"kind": "fsdp"}
WIDE = {"model": {"kind": "dcnv2", "cross_layers": 2, "rank": 3, "deep_mlp": [64, 32]}}


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> str:
    # 50 steps of 32
    return make_stream(tmp_path_factory.mktemp("engines") / "stream", (800, 416, 384)).root


def cut(raw: Raw) -> tuple[int, Recorder]:
    """`run` where every layer of these small models is a unit."""
    engines.UNIT_PARAMETERS = 200
    return run(raw)


def near(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Adam divides small gradients by their own size, so what rounding makes of them is a share of the learning rate."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.allclose(value.double(), b[name].double(), rtol=1e-3, atol=2e-4), name


@pytest.mark.parametrize(
    ("ranks", "engine"),
    [(2, FSDP), (3, FSDP), (4, {"kind": "fsdp", "shard": 2})],
    ids=["2 ranks", "3 ranks", "2 copies of 2 shards"],
)
def test_fifty_steps_have_the_losses_of_ddp(ranks, engine, stream, tmp_path, on_ranks):
    plain = teacher(tmp_path / "ddp", stream, **WIDE)
    sharded = replaced(plain, run__folder=str(tmp_path / "cut"), dense_engine=engine)
    losses = [global_losses(on_ranks(ranks, cut, raw)) for raw in (plain, sharded)]
    assert len(losses[0]) == 50 and losses[1] == pytest.approx(losses[0], rel=2e-5)
    near(last_state(plain), last_state(sharded))


def shapes(raw: Raw) -> list[tuple[int, ...]]:
    engines.UNIT_PARAMETERS = 200
    built = built_here(raw)
    return [tuple(p.to_local().shape if hasattr(p, "to_local") else p.shape) for p in built.served.parameters()]


def test_every_rank_holds_a_part_of_every_large_weight(stream, tmp_path, on_ranks):
    raw = job(tmp_path / "run", stream, dense_engine=FSDP, **WIDE)
    whole = shapes_of(raw)
    parts = on_ranks(3, shapes, raw)
    for i, shape in enumerate(whole):
        assert sum(part[i][0] for part in parts) == shape[0] and all(part[i][1:] == shape[1:] for part in parts)


def shapes_of(raw: Raw) -> list[tuple[int, ...]]:
    served, _, _ = build_dense(parsed(raw), torch.device("cpu"))
    return [tuple(p.shape) for p in served.parameters()]


@pytest.fixture(scope="module")
def begun(stream, tmp_path_factory, rank_pool) -> Callable[[int, str], tuple[Raw, Raw]]:
    """begun(ranks, engine): the whole job under ddp and the first two slices of it under the engine; each pair is run once."""

    @functools.cache
    def pair(ranks: int, kind: str) -> tuple[Raw, Raw]:
        root = tmp_path_factory.mktemp("begun")
        whole = job(root / "whole", stream, **WIDE)
        half = job(root / "half", stream, dense_engine={"kind": kind}, stream__last=2, **WIDE)
        for raw in (whole, half):
            rank_pool(ranks, cut, raw)
        return whole, half

    return pair


@pytest.mark.parametrize(("before", "after"), [((2, FSDP), (3, {"kind": "ddp"})), ((3, {"kind": "ddp"}), (2, FSDP)), ((2, FSDP), (3, FSDP))])  # fmt: skip
def test_a_job_continues_under_another_engine(before, after, begun, tmp_path, on_ranks):
    """As one that ran under ddp all along, within rounding."""
    whole, half = begun(before[0], before[1]["kind"])
    then = replaced(copied(half, tmp_path / "then"), dense_engine=after[1], stream__last=None)
    on_ranks(after[0], cut, then)
    near(last_state(whole), last_state(then))


def test_restarted_at_the_same_place_it_goes_on_bit_for_bit(stream, tmp_path, on_ranks):
    whole = job(tmp_path / "whole", stream, dense_engine=FSDP, checkpoint__every_slices=1, **WIDE)
    on_ranks(2, cut, whole)
    half = replaced(whole, run__folder=str(tmp_path / "half"), stream__last=2)
    on_ranks(2, cut, half)
    on_ranks(2, cut, replaced(half, stream__last=None))
    a, b = last_state(whole), last_state(half)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_what_was_trained_in_pieces_and_16_bits_is_verified_published_and_exported_whole(stream, tmp_path, on_ranks):
    snapshots = {"snapshots": {"every_slices": 3}}
    low = {"dense": "bf16", "gradients": "bf16", "embeddings_forward": "fp16"}
    raw = teacher(tmp_path / "run", stream, dense_engine=FSDP, precision=low, checkpoint=snapshots, **WIDE)
    on_ranks(2, cut, raw)
    assert (tmp_path / "run/snapshots/slice=000002/manifest.json").exists()
    for arguments in (["checkpoint", "verify"], ["export", "--out", str(tmp_path / "served")]):
        done = CliRunner().invoke(app, [*arguments, str(tmp_path / "run")], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    assert "bitwise equal to the trained model's" in done.output


def test_what_cannot_be_divided_is_refused_before_any_rank_starts(tmp_path):
    def config(**engine: object) -> object:
        return parsed(job(tmp_path, "s", dense_engine=engine))

    with pytest.raises(UserError, match=r"dense_engine.shard 4 does not divide 6 ranks; use 3, or 0"):
        check_ranks(config(kind="fsdp", shard=4), 6)
    with pytest.raises(UserError, match="shard goes with kind: fsdp"):
        check_ranks(config(kind="ddp", shard=2), 2)
    check_ranks(config(kind="fsdp", shard=3), 6)


def test_the_planner_keeps_a_share_of_the_dense_part_and_what_is_gathered():
    module = torch.nn.Sequential(torch.nn.Linear(1000, 1000, bias=False), torch.nn.Linear(1000, 10, bias=False))
    assert dense_bytes(DenseEngineConfig(), module, 8) == 20 * 1_010_000
    whole = 4 * (2 * 1_000_000 + 2 * 10_000)  # the large layer and its gradient, the small one and its
    assert max(gathered(module)) * 4 == whole
    assert dense_bytes(DenseEngineConfig(kind="fsdp"), module, 10) == 16 * 101_000 + whole
    assert dense_bytes(DenseEngineConfig(kind="fsdp", shard=2), module, 10) == 16 * 505_000 + whole


MODELS = {
    "dcnv2": {"kind": "dcnv2", "cross_layers": 2, "rank": 3, "deep_mlp": [64, 32]},
    "dlrm": {"kind": "dlrm", "width": 8, "bottom_mlp": [16], "top_mlp": [32]},
    "wukong": {"kind": "wukong", "layers": 2, "width": 8, "num_fmb": 4, "num_lcb": 4, "rank": 4, "fmb_mlp": [32], "final_mlp": [16]},
    "attentive": {
        "kind": "wukong", "layers": 2, "width": 8, "num_fmb": 4, "num_lcb": 4, "rank": 4, "fmb_mlp": [32], "final_mlp": [16],
        "interaction": "attentive",
    },
}  # fmt: skip


def difference(raws: list[Raw]) -> list[str]:
    """Names of the dense parameters that start otherwise in pieces than whole."""
    engines.UNIT_PARAMETERS = 200
    names = []
    for raw in raws:
        config = parsed(raw)
        whole, pieces = (build_dense(config, torch.device("cpu"), in_pieces)[0] for in_pieces in (False, True))
        for (name, a), b in zip(whole.named_parameters(), pieces.parameters(), strict=True):
            if not torch.equal(a, b.full_tensor()):
                names.append(f"{config.model.kind}: {name}")
    return names


def test_every_model_starts_from_the_same_weights_whole_and_in_pieces(stream, tmp_path, on_ranks):
    even = {"rows": 30, "width": 8, "pooling": "mean", "init": 0.1}  # dlrm wants tables of one width
    raws = [job(tmp_path / m, stream, dense_engine=FSDP, model=MODELS[m], tables__viewed=even) for m in MODELS]
    assert on_ranks(3, difference, raws) == [[], [], []]

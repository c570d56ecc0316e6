"""Every parameter has exactly one optimiser, and is moved by it."""

from collections import Counter

import pytest
import torch

from exfm.trainer.build import Built
from exfm.trainer.env import process_group
from tests.trainer.jobs import here, last_state, make_stream, run, same, student, teacher
from tests.trainer.starts import CPU, built_here, initial_state

MIXED = {"user": ["table_wise"], "item": ["data_parallel"]}


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> str:
    return make_stream(tmp_path_factory.mktemp("optim") / "stream").root


@pytest.fixture(scope="module")
def log(stream, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("optim") / "teacher"
    run(teacher(folder, stream))
    return f"{folder}/supervision/fm"


def owners(built: Built) -> Counter[int]:
    """How many optimisers own the memory at an address: Adams, the tables' dense Adagrad, FBGEMM's fused one."""
    optimizers = [built.optimizers.dense, *([built.optimizers.tables] if built.optimizers.tables else [])]
    if built.adapter is not None and built.adapter.optimizer is not None:
        optimizers.append(built.adapter.optimizer)
    owned = [p.data_ptr() for o in optimizers for g in o.param_groups for p in g["params"]]
    return Counter(owned + [s.weight.data_ptr() for s in built.shards if s.parameter is None])


@pytest.mark.parametrize("method", ["single_head", "auxiliary_head", "student_adapter"])
def test_each_parameter_of_the_built_model_has_exactly_one_optimiser(method, stream, tmp_path):
    raw = student(tmp_path, stream, "nowhere", method, sharding__tables=MIXED)
    with process_group(here(), CPU, 60):
        built = built_here(raw)
        owned = owners(built)
        parameters = {name: p.data_ptr() for name, p in built.model.named_parameters()}
        assert {name for name, address in parameters.items() if owned[address] != 1} == set()
        assert set(owned) == set(parameters.values())
        tables = 20 * 4 + 50 * 4
        dense = sum(p.numel() for module in built.dense_modules.values() for p in module.parameters())
        assert sum(p.numel() for p in built.model.parameters()) == dense + tables


@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "data_parallel"])
def test_training_moves_every_parameter_and_its_optimiser_state(kind, stream, log, tmp_path):
    raw = student(tmp_path / "run", stream, log, "student_adapter", sharding__allowed=[kind])
    before = initial_state(raw)
    run(raw)
    after = last_state(raw)
    assert before.keys() == after.keys()
    # what starts as a last layer of zeros, too: all of it has moved
    assert same(before, after) == sorted(before)


def test_dense_learning_rate_warms_up_linearly_and_then_stays(stream, tmp_path):
    raw = student(tmp_path, stream, "nowhere", "single_head")
    with process_group(here(), CPU, 60):
        optimizers = built_here(raw).optimizers
        rates = []
        for _ in range(7):
            rates.append(optimizers.lr)
            optimizers.steps += 1
    assert rates == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01, 0.01, 0.01])


@pytest.mark.parametrize("kind", ["table_wise", "data_parallel"])
def test_fp16_tables_keep_their_accumulators_in_fp32(kind, stream, tmp_path):
    raw = teacher(tmp_path / "run", stream, sharding__allowed=[kind], tables__user__dtype="fp16")
    before = initial_state(raw)
    run(raw)
    after = last_state(raw)
    assert after["tables.user.weight"].dtype == torch.float16
    assert after["tables.user.adagrad_sum"].dtype == torch.float32
    assert not torch.equal(before["tables.user.weight"], after["tables.user.weight"])
    # an fp32 twin ends where fp16's rounding of 20 steps can be
    twin = teacher(tmp_path / "twin", stream, sharding__allowed=[kind])
    run(twin)
    distance = (last_state(twin)["tables.user.weight"] - after["tables.user.weight"].float()).abs().max()
    assert 0 < distance < 20 * 2**-11

"""The dense benchmark counts the products that the model says it makes, and its parts are no larger than the whole."""

import pytest
import torch

from benchmarks import dense
from exfm.data.errors import UserError
from exfm.models.config import WukongConfig
from exfm.models.interface import InputSpec
from exfm.models.wukong import Wukong

CPU = torch.device("cpu")


def test_the_products_seen_are_three_times_the_forward_pass_of_the_models_own_account():
    features, numbers, _, fields = dense.SIZES["criteo"]
    config = WukongConfig.model_validate(fields)
    size = Wukong(config, InputSpec(numbers, tuple((f"f{i}", config.width) for i in range(features)))).size()
    found = dense.measure("criteo", CPU, torch.float32, False, repeats=1)
    # the dense features need no gradient
    assert found["gflop_per_example"] * 1e9 == pytest.approx(3 * size.flops_per_example, rel=0.01)
    assert found["parameters"] == size.num_parameters + config.final_mlp[-1] + 1  # the head
    assert 0 < found["products_s"] < 1.5 * found["step_s"] and found["flops_per_s"] > 0


def test_operands_have_the_layout_that_was_seen():
    products = dense.Products()
    a, b = torch.randn(3, 5), torch.randn(7, 5)
    with products:
        a @ b.T
        torch.addmm(torch.zeros(7), a, b.T)
    ((shape, count),) = products.seen.items()
    assert count == 2 and dense.flops(shape) == 2 * 3 * 5 * 7
    left, right = dense.operands(shape, torch.float32, CPU)
    assert (left.shape, right.shape, right.stride()) == (a.shape, b.T.shape, b.T.stride())


def test_an_unknown_size_is_refused():
    with pytest.raises(UserError, match="--sizes names huge; there are: frappe"):
        dense.main(["--sizes", "huge"])

"""The presets against the paper's Table 5. docs/models.md says why most rows cannot be met."""

from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from exfm.models.config import WUKONG_PRESETS
from exfm.models.presets import PAPER_INPUTS, PAPER_ROWS, preset_size
from exfm.models.wukong import Wukong

NAMES = list(PAPER_ROWS)


def parameter_differences():
    """(computed, published) growth in 1e9 parameters of each preset over the one before it."""
    return {
        name: (
            (preset_size(name).num_parameters - preset_size(before).num_parameters) / 1e9,
            PAPER_ROWS[name].params_g - PAPER_ROWS[before].params_g,
        )
        for before, name in pairwise(NAMES)
    }


def within_a_tenth(computed, published):
    return abs(computed / published - 1) <= 0.1


@pytest.mark.parametrize("name", NAMES)
def test_a_presets_size_is_what_runs_without_allocating_it(name):
    with torch.device("meta"):
        model = Wukong(WUKONG_PRESETS[name], PAPER_INPUTS)
        dense, pooled = torch.empty(2, 0), torch.empty(2, PAPER_INPUTS.pooled_width)
    with FlopCounterMode(display=False) as counter:
        model(dense, pooled)
    assert model.size().num_parameters == sum(p.numel() for p in model.parameters())
    assert 2 * model.size().flops_per_example == counter.get_total_flops()


def test_every_row_of_table_5_has_a_preset():
    assert list(WUKONG_PRESETS) == NAMES


def test_parameter_differences_are_the_documented_ones_and_61g_is_within_a_tenth_of_the_paper():
    differences = parameter_differences()
    assert [name for name, pair in differences.items() if within_a_tenth(*pair)] == ["wukong-61g"]
    computed = [round(mine, 3) for mine, _ in differences.values()]
    assert computed == [0.062, 0.088, 0.586, 2.911, 5.851, 9.490]


def test_training_flops_of_the_three_largest_presets_are_within_a_tenth_of_the_paper():
    gflop = {name: 3 * preset_size(name).flops_per_example / 1e9 for name in NAMES}
    fitting = [name for name in NAMES if within_a_tenth(gflop[name], PAPER_ROWS[name].gflop)]
    assert fitting == ["wukong-22g", "wukong-61g", "wukong-108g"]
    assert [round(value, 2) for value in gflop.values()] == [0.39, 0.81, 1.36, 4.99, 22.86, 57.96, 116.27]

"""Sizes of `exfm bench scaling`: Wukong's ladder over two decades of FLOPs, and DLRM and DCN-V2 of equal FLOPs.

A size is made in two steps: shapes (layers, embeddings, rank) rise over the ladder as the paper advises, layers first; then the
width of the MLPs is solved so that training FLOPs per example come as near as whole numbers can to the rung's target.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from exfm.data.errors import UserError
from exfm.models.build import build_backbone
from exfm.models.config import DcnV2Config, DlrmConfig, WukongConfig
from exfm.models.heads import Head
from exfm.models.interface import InputSpec, ModelSize

Raw = dict[str, Any]
CONFIGS = {"wukong": WukongConfig, "dlrm": DlrmConfig, "dcnv2": DcnV2Config}
TRAINING = 3  # FLOPs of forward and backward by those of forward
DECADES = 2.0
TOLERANCE = 0.1
FIRST_WIDTH = 32  # of the smallest Wukong's MLPs: where the ladder begins
# Wukong's (l, n_F = n_L, k)
SHAPES = ((1, 4, 4), (2, 4, 4), (2, 8, 8), (3, 8, 8), (4, 8, 8), (4, 12, 12), (4, 16, 16))


@dataclass(frozen=True)
class Size:
    """One architecture's model of one rung. model: the config's section; flops: training, per example."""

    architecture: str
    rung: int
    model: Raw
    flops: int
    parameters: int

    @property
    def label(self) -> str:
        m = self.model
        if self.architecture == "wukong":
            return f"l={m['layers']} n={m['num_fmb']} k={m['rank']} MLP {_widths(m['fmb_mlp'])}"
        if self.architecture == "dlrm":
            return f"top {_widths(m['top_mlp'])}"
        return f"rank {m['rank']} MLP {_widths(m['deep_mlp'])}"


def _widths(widths: list[int]) -> str:
    return "-".join(map(str, widths))


def wukong(shape: tuple[int, int, int], width: int, h: int) -> Raw:
    layers, num, rank = shape
    return {
        "kind": "wukong", "width": width, "layers": layers, "num_fmb": num, "num_lcb": num, "rank": rank,
        "fmb_mlp": [h], "final_mlp": [h], "dense_mlp": [2 * width],
    }  # fmt: skip


def dlrm(width: int, h: int) -> Raw:
    return {"kind": "dlrm", "width": width, "bottom_mlp": [2 * width], "top_mlp": [h, h, h]}


def dcnv2(inputs: InputSpec, h: int) -> Raw:
    """A rank above half of the inputs' width would cost more than the full matrix."""
    rank = max(1, min(h // 4, (inputs.num_dense + inputs.pooled_width) // 2))
    return {"kind": "dcnv2", "cross_layers": 3, "rank": rank, "deep_mlp": [h, h], "structure": "parallel"}


def size_of(model: Raw, inputs: InputSpec) -> ModelSize:
    """Backbone and head of one task; allocates nothing."""
    with torch.device("meta"):
        backbone = build_backbone(CONFIGS[model["kind"]].model_validate(model), inputs)
        return backbone.size() + Head(backbone.out_width, (), 1).size()


def training_flops(model: Raw, inputs: InputSpec) -> int:
    return TRAINING * size_of(model, inputs).flops_per_example


def solve(make: Callable[[int], Raw], inputs: InputSpec, target: float) -> Raw:
    """The model of the width whose training FLOPs are nearest to `target`, by their ratio; they rise with the width."""
    low, high = 1, 2
    while training_flops(make(high), inputs) < target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if training_flops(make(middle), inputs) < target:
            low = middle
        else:
            high = middle
    best = min((low, high), key=lambda h: abs(math.log(training_flops(make(h), inputs) / target)))
    if abs(training_flops(make(best), inputs) / target - 1) > TOLERANCE:
        found = training_flops(make(best), inputs)
        raise UserError(
            f"{make(best)['kind']} comes no nearer than {found:,} training FLOPs per example to {target:,.0f} on these inputs "
            f"({TOLERANCE:.0%} are allowed); leave it out with --architectures, or take other table widths"
        )
    return make(best)


def targets(inputs: InputSpec, width: int, num: int) -> list[float]:
    """Training FLOPs per example of `num` rungs, equally far apart on a logarithmic axis."""
    first = training_flops(wukong(SHAPES[0], width, FIRST_WIDTH), inputs)
    return [first * 10 ** (DECADES * i / (num - 1)) for i in range(num)]


def ladder(architecture: str, inputs: InputSpec, width: int, num: int) -> list[Size]:
    """`num` sizes of an architecture, the smallest first. width: d, of every embedding that interacts."""
    if architecture not in CONFIGS:
        raise UserError(f"there is no architecture '{architecture}'; there are: {', '.join(CONFIGS)}")
    sizes = []
    for rung, target in enumerate(targets(inputs, width, num)):
        shape = SHAPES[round(rung * (len(SHAPES) - 1) / (num - 1))]
        makers: dict[str, Callable[[int], Raw]] = {
            "wukong": lambda h, shape=shape: wukong(shape, width, h),
            "dlrm": lambda h: dlrm(width, h),
            "dcnv2": lambda h: dcnv2(inputs, h),
        }
        model = solve(makers[architecture], inputs, target)
        size = size_of(model, inputs)
        sizes.append(Size(architecture, rung, model, TRAINING * size.flops_per_example, size.num_parameters))
    return sizes

"""What the rest of exfm knows of a model: its inputs, its output width and its size."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn


@dataclass(frozen=True)
class InputSpec:
    """Inputs of a backbone.

    num_dense: number of dense features D.
    features: (name, width) of every pooled embedding, in the order in which they are concatenated.
    """

    num_dense: int
    features: tuple[tuple[str, int], ...]

    @property
    def pooled_width(self) -> int:
        return sum(width for _, width in self.features)


class ModelSize(NamedTuple):
    """Dense parameters (embedding tables not counted) and forward FLOPs per example (2 per multiply-add, matrix products only)."""

    num_parameters: int
    flops_per_example: int


class Backbone(nn.Module):
    """Shared part of a ranking model; heads are put on its output by the trainer.

    forward(dense [b, D] float32, pooled [b, pooled_width] float32) -> [b, out_width].
    Pure torch: knows no ranks and no feature ids. NaN in `dense` (missing) has been replaced by 0 before.
    """

    out_width: int

    def forward(self, dense: Tensor, pooled: Tensor) -> Tensor:
        raise NotImplementedError

    def size(self) -> ModelSize:
        raise NotImplementedError

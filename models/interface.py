"""What the rest of exfm knows of a model: its inputs, its output width and its size."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from exfm.data.errors import UserError


@dataclass(frozen=True)
class InputSpec:
    """Inputs of a backbone; raises UserError for a width below 1 or a name given twice.

    num_dense: number of dense features D.
    features: (name, width) of every pooled embedding, in the order in which they are concatenated.
    """

    num_dense: int
    features: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        if self.num_dense < 0:
            raise UserError(f"num_dense is {self.num_dense}; it must be 0 or more")
        seen = set()
        for name, width in self.features:
            if width < 1:
                raise UserError(f"feature '{name}' has a pooled width of {width}; it must be 1 or more")
            if name in seen:
                raise UserError(f"feature '{name}' is given twice to the model; name each pooled feature once")
            seen.add(name)

    @property
    def pooled_width(self) -> int:
        return sum(width for _, width in self.features)

    def columns(self) -> dict[str, tuple[int, int]]:
        """Columns [start, stop) of every feature in `pooled`, in order."""
        spans, start = {}, 0
        for name, width in self.features:
            spans[name] = (start, start + width)
            start += width
        return spans


@dataclass(frozen=True)
class ModelSize:
    """Dense parameters (tables not counted) and forward FLOPs per example (2 per multiply-add, matrix products only).

    Sizes add. A backward pass costs twice the forward one, so training takes 3 x flops_per_example.
    """

    num_parameters: int = 0
    flops_per_example: int = 0

    def __add__(self, other: "ModelSize") -> "ModelSize":
        return ModelSize(self.num_parameters + other.num_parameters, self.flops_per_example + other.flops_per_example)


class Backbone(nn.Module):
    """Shared part of a ranking model; heads are put on its output by the trainer.

    forward(dense [b, D] float32, pooled [b, pooled_width] float32) -> [b, out_width].
    Pure torch: knows no ranks and no feature ids. NaN in `dense` (missing) has been replaced by 0 before.
    recompute: keep only the inputs of its layers for backward, and compute the layers again there; for models that can.
    """

    out_width: int
    can_recompute: ClassVar[bool] = False
    recompute = False

    def forward(self, dense: Tensor, pooled: Tensor) -> Tensor:
        raise NotImplementedError

    def size(self) -> ModelSize:
        raise NotImplementedError

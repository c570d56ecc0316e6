"""Layers that every model shares."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from exfm.models.interface import ModelSize


class MLP(nn.Module):
    """Linear layers: a ReLU after each hidden one, none after the output layer.

    [..., in_width] -> [..., self.out_width]. Without `out_width` the last hidden layer is the output (the
    identity where there is no hidden layer either).
    """

    def __init__(self, in_width: int, hidden: Sequence[int], out_width: int | None = None, bias: bool = True) -> None:
        super().__init__()
        self.widths = (in_width, *hidden) if out_width is None else (in_width, *hidden, out_width)
        self.out_width = self.widths[-1]
        self.num_hidden = len(hidden)
        self.bias = bias
        self.linears = nn.ModuleList(
            nn.Linear(width_in, width_out, bias=bias) for width_in, width_out in pairwise(self.widths)
        )

    def forward(self, x: Tensor) -> Tensor:
        for i, linear in enumerate(self.linears):
            x = linear(x)
            if i < self.num_hidden:
                x = x.relu()
        return x

    def size(self) -> ModelSize:
        products = sum(a * b for a, b in pairwise(self.widths))
        return ModelSize(products + self.bias * sum(self.widths[1:]), 2 * products)

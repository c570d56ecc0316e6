"""Heads: from a backbone's output to one logit per task."""

from torch import Tensor, nn

from exfm.models.interface import ModelSize
from exfm.models.layers import MLP


class Head(nn.Module):
    """[b, in_width] -> logits [b, num_tasks] through hidden layers that the tasks share.

    The last layer has a bias whatever `bias` says: it carries a task's base rate.
    """

    def __init__(self, in_width: int, hidden: tuple[int, ...], num_tasks: int, bias: bool = True) -> None:
        super().__init__()
        self.mlp = MLP(in_width, hidden, bias=bias)
        self.logits = nn.Linear(self.mlp.out_width, num_tasks)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.mlp(x))

    def size(self) -> ModelSize:
        products = self.logits.in_features * self.logits.out_features
        return self.mlp.size() + ModelSize(products + self.logits.out_features, 2 * products)

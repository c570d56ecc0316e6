"""DCN-V2 (arXiv 2008.13535): cross layers of low rank, with an MLP on top or beside."""

# b examples, w width of all inputs together, r rank

import torch
from torch import Tensor, nn

from exfm.data.errors import UserError
from exfm.models.config import DcnV2Config
from exfm.models.interface import Backbone, InputSpec, ModelSize
from exfm.models.layers import MLP


class LowRankCross(nn.Module):
    """x0 * (U V^T x + b) + x (equation 2 of section 3.2): [b, w] -> [b, w]."""

    def __init__(self, width: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.width, self.rank = width, rank
        self.v = nn.Linear(width, rank, bias=False)
        self.u = nn.Linear(rank, width, bias=bias)

    def forward(self, x0_bw: Tensor, x_bw: Tensor) -> Tensor:
        return x0_bw * self.u(self.v(x_bw)) + x_bw

    def size(self) -> ModelSize:
        bias = 0 if self.u.bias is None else self.width
        return ModelSize(2 * self.width * self.rank + bias, 4 * self.width * self.rank)


class DcnV2(Backbone):
    """Raw dense features and pooled embeddings of any width, concatenated, through cross layers and an MLP.

    Raises UserError where there are no inputs.
    """

    def __init__(self, config: DcnV2Config, inputs: InputSpec) -> None:
        super().__init__()
        width = inputs.num_dense + inputs.pooled_width
        if width == 0:
            raise UserError("the model has no inputs: it has 0 dense and 0 sparse features; give it at least one")
        crosses = [LowRankCross(width, config.rank, config.bias) for _ in range(config.cross_layers)]
        self.crosses = nn.ModuleList(crosses)
        self.deep_mlp = MLP(width, config.deep_mlp, bias=config.bias)
        self.parallel = config.structure == "parallel"
        self.out_width = self.deep_mlp.out_width + (width if self.parallel else 0)
        self._size = sum((cross.size() for cross in crosses), self.deep_mlp.size())

    def forward(self, dense: Tensor, pooled: Tensor) -> Tensor:
        x0_bw = torch.cat([dense, pooled], dim=1)
        x_bw = x0_bw
        for cross in self.crosses:
            x_bw = cross(x0_bw, x_bw)
        if self.parallel:
            return torch.cat([x_bw, self.deep_mlp(x0_bw)], dim=1)
        return self.deep_mlp(x_bw)

    def size(self) -> ModelSize:
        return self._size

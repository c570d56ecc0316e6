"""Wukong (arXiv 2403.02545, section 3): stacked factorization machines, each layer doubling the interaction order."""

# b examples, n embeddings of a layer's input, m of its output, d width, k rank, c compressed embeddings

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from exfm.models.config import AttentionConfig, WukongConfig
from exfm.models.embedding_layer import EmbeddingLayer
from exfm.models.interface import Backbone, InputSpec, ModelSize
from exfm.models.layers import MLP


def for_each_example(matrix: Tensor, x_bnd: Tensor) -> Tensor:
    """[r, s] -> a view [b, r, s], so that a product with x is batched.

    Left to broadcast it, matmul folds the batch into rows: that copies x transposed and keeps the copy for backward. On
    2 CPU cores, forward and backward took 1.2 to 4 times as long.
    """
    return matrix.expand(x_bnd.shape[0], -1, -1)


class LinearCompress(nn.Module):
    """m mixtures of n embeddings, W X (section 3.5): [b, n, d] -> [b, m, d], one batched matrix product."""

    def __init__(self, num_in: int, num_out: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.empty(num_out, num_in))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within 1/sqrt(n), as nn.Linear does."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x_bnd: Tensor) -> Tensor:
        return for_each_example(self.weight, x_bnd) @ x_bnd

    def size(self) -> ModelSize:
        return ModelSize(self.weight.numel(), 2 * self.weight.numel() * self.width)


# A factorization machine says in `mixing` [num_mixed, n] which mixtures of its input it starts from. Who needs further ones makes all in
# one product and hands over `mixed` [b, r, d]; small batched products are slow, so fewer and wider ones pay.


class PlainFM(nn.Module):
    """All dot products, X X^T: [b, n, d] -> [b, n, n]."""

    def __init__(self, num_in: int, width: int) -> None:
        super().__init__()
        self.num_in, self.width, self.out_width, self.num_mixed = num_in, width, num_in * num_in, 0

    def mixing(self, x_bnd: Tensor) -> Tensor:
        """Of none."""
        return x_bnd.new_empty(0, self.num_in)

    def forward(self, x_bnd: Tensor, mixed_brd: Tensor | None = None) -> Tensor:
        return x_bnd @ x_bnd.mT

    def size(self) -> ModelSize:
        return ModelSize(0, 2 * self.num_in**2 * self.width)


class OptimizedFM(nn.Module):
    """X (X^T Y) with a learned Y [n, k] (section 3.6): [b, n, d] -> [b, n, k] without the n x n products."""

    def __init__(self, num_in: int, width: int, rank: int) -> None:
        super().__init__()
        self.num_in, self.width, self.rank, self.out_width = num_in, width, rank, num_in * rank
        self.num_mixed = rank
        self.y = nn.Parameter(torch.empty(num_in, rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within 1/sqrt(n): a column of Y is one mixture of the embeddings."""
        bound = self.num_in**-0.5
        nn.init.uniform_(self.y, -bound, bound)

    def mixing(self, x_bnd: Tensor) -> Tensor:
        """Y^T [k, n]."""
        return self.y.mT

    def forward(self, x_bnd: Tensor, mixed_bkd: Tensor | None = None) -> Tensor:
        if mixed_bkd is None:
            mixed_bkd = for_each_example(self.mixing(x_bnd), x_bnd) @ x_bnd
        # X (Y^T X)^T, made transposed: with k columns instead of n, on 2 CPU cores the product took twice as long
        return (mixed_bkd @ x_bnd.mT).mT

    def size(self) -> ModelSize:
        return ModelSize(self.num_in * self.rank, 4 * self.num_in * self.width * self.rank)


class AttentiveFM(nn.Module):
    """X (X^T Y) with Y [b, n, k] made by an MLP from the linearly compressed input (section 3.6)."""

    def __init__(self, num_in: int, width: int, rank: int, attention: AttentionConfig, bias: bool) -> None:
        super().__init__()
        self.num_in, self.width, self.rank, self.out_width = num_in, width, rank, num_in * rank
        self.num_mixed = attention.compressed
        self.compress = LinearCompress(num_in, attention.compressed, width)
        self.mlp = MLP(attention.compressed * width, attention.hidden, num_in * rank, bias)

    def mixing(self, x_bnd: Tensor) -> Tensor:
        """The compression [c, n]."""
        return self.compress.weight

    def forward(self, x_bnd: Tensor, mixed_bcd: Tensor | None = None) -> Tensor:
        mixed_bcd = self.compress(x_bnd) if mixed_bcd is None else mixed_bcd
        y_bnk = self.mlp(mixed_bcd.flatten(1)).unflatten(1, (self.num_in, self.rank))
        return x_bnd @ (x_bnd.mT @ y_bnk)

    def size(self) -> ModelSize:
        return self.compress.size() + self.mlp.size() + ModelSize(0, 4 * self.num_in * self.width * self.rank)


def _build_fm(config: WukongConfig, num_in: int) -> PlainFM | OptimizedFM | AttentiveFM:
    match config.interaction:
        case "plain":
            return PlainFM(num_in, config.width)
        case "optimized":
            return OptimizedFM(num_in, config.width, config.rank)
        case "attentive":
            return AttentiveFM(num_in, config.width, config.rank, config.attention, config.bias)


def _norm_size(norm: nn.LayerNorm) -> ModelSize:
    return ModelSize(norm.normalized_shape[0] * (1 if norm.bias is None else 2))


class FactorizationMachineBlock(nn.Module):
    """reshape(MLP(LN(flatten(FM(X))))) (section 3.4): [b, n, d] -> [b, num_fmb, d]."""

    def __init__(self, config: WukongConfig, num_in: int) -> None:
        super().__init__()
        self.shape = (config.num_fmb, config.width)
        self.fm = _build_fm(config, num_in)
        self.norm = nn.LayerNorm(self.fm.out_width, bias=config.bias)
        self.mlp = MLP(self.fm.out_width, config.fmb_mlp, config.num_fmb * config.width, config.bias)

    def forward(self, x_bnd: Tensor, mixed_brd: Tensor | None = None) -> Tensor:
        return self.mlp(self.norm(self.fm(x_bnd, mixed_brd).flatten(1))).unflatten(1, self.shape)

    def size(self) -> ModelSize:
        return self.fm.size() + _norm_size(self.norm) + self.mlp.size()


class WukongLayer(nn.Module):
    """LN(concat(FMB(X), LCB(X)) + X), LN over d; the residual is linearly compressed where m differs from n."""

    def __init__(self, config: WukongConfig, num_in: int) -> None:
        super().__init__()
        self.num_out = config.num_fmb + config.num_lcb
        self.fmb = FactorizationMachineBlock(config, num_in)
        self.lcb = LinearCompress(num_in, config.num_lcb, config.width)
        self.residual = None if num_in == self.num_out else LinearCompress(num_in, self.num_out, config.width)
        self.norm = nn.LayerNorm(config.width, bias=config.bias)

    def forward(self, x_bnd: Tensor) -> Tensor:
        num_mixed, num_fmb = self.fmb.fm.num_mixed, self.fmb.shape[0]
        num_lcb = self.num_out - num_fmb
        own, lcb = self.fmb.fm.mixing(x_bnd), self.lcb.weight
        if self.residual is None:
            mixed, lcb_bmd = (for_each_example(torch.cat([own, lcb]), x_bnd) @ x_bnd).split([num_mixed, num_lcb], dim=1)
            return self.norm(torch.cat([self.fmb(x_bnd, mixed), lcb_bmd], dim=1) + x_bnd)
        # both are mixtures, so where they meet their weights are added instead of them
        above, below = self.residual.weight.split([num_fmb, num_lcb])
        weight = for_each_example(torch.cat([own, above, below + lcb]), x_bnd)
        mixed, above_bmd, below_bmd = (weight @ x_bnd).split([num_mixed, num_fmb, num_lcb], dim=1)
        return self.norm(torch.cat([self.fmb(x_bnd, mixed) + above_bmd, below_bmd], dim=1))

    def size(self) -> ModelSize:
        residual = ModelSize()
        if self.residual is not None:  # below the FMB's rows it is one product with the LCB
            weight = self.residual.weight
            residual = ModelSize(weight.numel(), 2 * self.fmb.shape[0] * weight.shape[1] * self.fmb.shape[1])
        return self.fmb.size() + self.lcb.size() + residual + _norm_size(self.norm)


class Wukong(Backbone):
    """Embedding layer, `layers` Wukong layers, final MLP on the flattened last embeddings.

    Raises UserError where the features' widths do not fit the config (see EmbeddingLayer).
    """

    can_recompute = True

    def __init__(self, config: WukongConfig, inputs: InputSpec) -> None:
        super().__init__()
        dense_mlp = None
        if inputs.num_dense:
            dense_mlp = MLP(inputs.num_dense, config.dense_mlp, config.dense_embeddings * config.width, config.bias)
        self.embedding = EmbeddingLayer(inputs, config.width, dense_mlp, config.groups, config.bias)
        num_out = config.num_fmb + config.num_lcb
        nums_in = [self.embedding.num_embeddings] + [num_out] * (config.layers - 1)
        layers = [WukongLayer(config, num_in) for num_in in nums_in]
        self.layers = nn.ModuleList(layers)
        self.final_mlp = MLP(num_out * config.width, config.final_mlp, bias=config.bias)
        self.out_width = self.final_mlp.out_width
        self._size = sum((layer.size() for layer in layers), self.embedding.size() + self.final_mlp.size())

    def forward(self, dense: Tensor, pooled: Tensor) -> Tensor:
        x_bnd = self.embedding(dense, pooled)
        for layer in self.layers:
            # nothing in a layer is random
            x_bnd = (
                checkpoint(layer, x_bnd, use_reentrant=False, preserve_rng_state=False)
                if self.recompute
                else layer(x_bnd)
            )
        return self.final_mlp(x_bnd.flatten(1))

    def size(self) -> ModelSize:
        return self._size

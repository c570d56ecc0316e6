"""DLRM (arXiv 1906.00091): dot products of all pairs of embeddings, concatenated with the dense one, then an MLP."""

# b examples, n embeddings, d width

import torch
from torch import Tensor

from exfm.data.errors import UserError
from exfm.models.config import DlrmConfig
from exfm.models.embedding_layer import EmbeddingLayer
from exfm.models.interface import Backbone, InputSpec, ModelSize
from exfm.models.layers import MLP


def pairwise_products(x_bnd: Tensor) -> Tensor:
    """Dot products of all pairs i < j, row by row: [b, n, d] -> [b, n(n-1)/2].

    The indices are made here, not kept as a buffer: `to_empty` of a model built on the meta device would leave garbage.
    """
    num = x_bnd.shape[1]
    row, col = torch.triu_indices(num, num, offset=1, device=x_bnd.device).unbind()
    return (x_bnd @ x_bnd.mT).flatten(1).index_select(1, row * num + col)


class Dlrm(Backbone):
    """Bottom MLP to one dense embedding (absent without dense features), n(n-1)/2 interactions, top MLP.

    Raises UserError for a feature whose width is no multiple of the config's, and for fewer than two embeddings.
    """

    def __init__(self, config: DlrmConfig, inputs: InputSpec) -> None:
        super().__init__()
        bottom_mlp = None
        if inputs.num_dense:
            bottom_mlp = MLP(inputs.num_dense, (*config.bottom_mlp, config.width), bias=config.bias)
        self.embedding = EmbeddingLayer(inputs, config.width, bottom_mlp, bias=config.bias)
        num = self.embedding.num_embeddings
        if num < 2:
            raise UserError(f"DLRM needs two embeddings to interact, the model has {num}; add a feature or use dcnv2")
        self.num_dense_embeddings = self.embedding.num_dense_embeddings
        in_width = self.num_dense_embeddings * config.width + num * (num - 1) // 2
        self.top_mlp = MLP(in_width, config.top_mlp, bias=config.bias)
        self.out_width = self.top_mlp.out_width
        self._size = self.embedding.size() + ModelSize(0, 2 * num**2 * config.width) + self.top_mlp.size()

    def forward(self, dense: Tensor, pooled: Tensor) -> Tensor:
        x_bnd = self.embedding(dense, pooled)
        dense_embedding = x_bnd[:, : self.num_dense_embeddings].flatten(1)
        return self.top_mlp(torch.cat([dense_embedding, pairwise_products(x_bnd)], dim=1))

    def size(self) -> ModelSize:
        return self._size

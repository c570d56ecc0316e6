"""One canonical view of sharded tables: where each local shard of rows and of optimiser state lies.

TorchRec's own keys and shapes differ between sharding types; everything that saves, loads or fills tables uses these.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torchrec.distributed.batched_embedding_kernel import BatchedDenseEmbeddingBag, BatchedFusedEmbeddingBag


@dataclass(frozen=True)
class Shard:
    """A live view of a part of a table on this rank.

    weight [r, c] starts at (row, column) of the table; accumulator [r] f32 is its row-wise Adagrad state (None for a
    data-parallel table: its dense optimiser holds it). parameter: the nn.Parameter of a data-parallel table.
    """

    table: str
    weight: Tensor
    accumulator: Tensor | None
    row: int
    column: int
    parameter: nn.Parameter | None = None


def local_shards(model: nn.Module) -> Iterator[Shard]:
    """Every table shard that lives on this rank, data-parallel tables (whole on every rank) included."""
    for module in model.modules():
        if isinstance(module, BatchedFusedEmbeddingBag):
            yield from _fused(module)
        elif isinstance(module, BatchedDenseEmbeddingBag):
            yield from _dense(module)


def _fused(module: BatchedFusedEmbeddingBag) -> Iterator[Shard]:
    weights = module.split_embedding_weights()
    states = module.emb_module.split_optimizer_states()
    for table, weight, state in zip(module.config.embedding_tables, weights, states, strict=True):
        assert table.local_metadata is not None
        row, column = table.local_metadata.shard_offsets
        yield Shard(table.name, weight.detach(), state[0].detach().view(-1), row, column)


def _dense(module: BatchedDenseEmbeddingBag) -> Iterator[Shard]:
    parameters = dict(module.named_parameters())
    for table, weight in zip(module.config.embedding_tables, module.split_embedding_weights(), strict=True):
        parameter = next(p for name, p in parameters.items() if name.split(".")[0] == table.name)
        yield Shard(table.name, weight.detach(), None, 0, 0, parameter)  # type: ignore[arg-type]

"""One canonical view of sharded tables: where each local shard of rows and of optimiser state lies.

TorchRec's own keys and shapes differ between sharding types; everything that saves, loads or fills tables uses these.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torchrec.distributed.batched_embedding_kernel import BatchedDenseEmbeddingBag, BatchedFusedEmbeddingBag
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection


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


@dataclass(frozen=True)
class Kernel:
    """A lookup kernel of this rank: its module takes a KeyedJaggedTensor with features_of_table[i] features of shards[i]."""

    module: nn.Module
    shards: tuple[Shard, ...]
    features_of_table: tuple[int, ...]


def local_kernels(model: nn.Module) -> Iterator[Kernel]:
    """Every lookup kernel of this rank; their shards are those that live here, data-parallel tables (whole) included."""
    for sharded in model.modules():
        if isinstance(sharded, ShardedEmbeddingBagCollection):
            # TorchRec keeps the lookups in a plain list, hidden from modules()
            for lookup in sharded._lookups:
                for kernel in lookup.modules():
                    if isinstance(kernel, BatchedFusedEmbeddingBag):
                        yield _kernel(kernel, _fused(kernel))
                    elif isinstance(kernel, BatchedDenseEmbeddingBag):
                        yield _kernel(kernel, _dense(kernel, sharded))


def _kernel(kernel: BatchedFusedEmbeddingBag | BatchedDenseEmbeddingBag, shards: Iterator[Shard]) -> Kernel:
    return Kernel(kernel, tuple(shards), tuple(t.num_features() for t in kernel.config.embedding_tables))


def _fused(kernel: BatchedFusedEmbeddingBag) -> Iterator[Shard]:
    weights = kernel.split_embedding_weights()
    states = kernel.emb_module.split_optimizer_states()
    for table, weight, state in zip(kernel.config.embedding_tables, weights, states, strict=True):
        assert table.local_metadata is not None
        row, column = table.local_metadata.shard_offsets
        yield Shard(table.name, weight.detach(), state[0].detach().view(-1), row, column)


def _dense(kernel: BatchedDenseEmbeddingBag, sharded: ShardedEmbeddingBagCollection) -> Iterator[Shard]:
    for table, weight in zip(kernel.config.embedding_tables, kernel.split_embedding_weights(), strict=True):
        parameter: Any = sharded.embedding_bags[table.name].weight
        yield Shard(table.name, weight.detach(), None, 0, 0, parameter)


def check_shards(shards: Sequence[Shard], plan: Sequence[dict[str, Any]], rank: int) -> None:
    """Assert that every shard that the plan puts on this rank was found: one that is missed would never be saved."""
    whole = {(row["table"], 0, 0) for row in plan if row["sharding_type"] == "data_parallel"}
    planned = {(row["table"], *s["offsets"]) for row in plan for s in row["shards"] if s["rank"] == rank} | whole
    found = {(s.table, s.row, s.column) for s in shards}
    assert found == planned, (
        f"rank {rank}: planned shards {sorted(planned - found)} not found, {sorted(found - planned)} extra"
    )

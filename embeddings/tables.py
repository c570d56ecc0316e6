"""Table specs to TorchRec collections on the meta device, and initial rows that do not depend on sharding."""

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from exfm.data.hashing import salt_of
from exfm.embeddings.config import FeaturesConfig, TableConfig, Tables

DTYPE = {"fp32": DataType.FP32, "fp16": DataType.FP16}
INIT_CHUNK_ROWS = 1 << 20


def build_collection(features: FeaturesConfig, tables: Tables, weighted: bool) -> EmbeddingBagCollection | None:
    """The collection of all (un)weighted features on the meta device; None if there are none.

    All are pooled as sums; who joins them divides where a table says `mean` (mean_features). TorchRec 1.8 would divide after the
    reduction of row-wise tables, and with them every other table of the collection, also those of sums, unless it is row-wise too.
    """
    configs = []
    for name, table in tables.items():
        users = [f.name for f in features.sparse if f.table == name and f.weighted == weighted]
        if users:
            configs.append(
                EmbeddingBagConfig(
                    name=name,
                    num_embeddings=table.rows,
                    embedding_dim=table.width,
                    feature_names=users,
                    data_type=DTYPE[table.dtype],
                )
            )
    if not configs:
        return None
    return EmbeddingBagCollection(tables=configs, is_weighted=weighted, device=torch.device("meta"))


def pooled_features(features: FeaturesConfig, tables: Tables) -> tuple[tuple[str, int], ...]:
    """(feature, width) in the order in which a model sees the pooled embeddings."""
    return tuple((f.name, tables[f.table].width) for f in features.sparse)


def mean_features(features: FeaturesConfig, tables: Tables) -> frozenset[str]:
    """Those whose pooled sum is to be divided by the number of ids."""
    return frozenset(f.name for f in features.sparse if tables[f.table].pooling == "mean")


@torch.no_grad()
def fill_initial(shard: Tensor, name: str, table: TableConfig, seed: int, row: int, column: int) -> None:
    """Fill a shard [r, c] that starts at (row, column) of a table with its initial values, in place.

    Value (i, j) is a function of (seed, name, i, j) alone: uniform in (-init, init) from a SplitMix64 hash, so any plan
    on any number of ranks starts from the same table.
    """
    rows, columns = shard.shape
    salt = torch.tensor(salt_of("init", seed, name), dtype=torch.int64, device=shard.device)
    j = torch.arange(column, column + columns, device=shard.device)
    for start in range(0, rows, INIT_CHUNK_ROWS):
        stop = min(start + INIT_CHUNK_ROWS, rows)
        i = torch.arange(row + start, row + stop, device=shard.device)
        bits = _mix(_mix(i[:, None] + salt) ^ (j + 1))
        unit = (((bits >> 40) & 0xFFFFFF) + 0.5) / float(1 << 24)
        shard[start:stop] = ((unit * 2 - 1) * table.init).to(shard.dtype)


def _shift(x: Tensor, by: int) -> Tensor:
    """Logical right shift of int64 (torch's is arithmetic)."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64 finaliser on wrapping int64."""
    x = x - 0x61C8864680B583EB
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shift(x, 31)

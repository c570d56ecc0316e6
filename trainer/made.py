"""Made-up batches of a job: as large as real ones, with ids as unevenly spread."""

from collections.abc import Mapping

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from exfm.data.batch import Batch
from exfm.data.hashing import hash64, salt_of
from exfm.embeddings.config import SparseFeature
from exfm.trainer.config import JobConfig


def made_batch(
    config: JobConfig, local_batch: int, pooling: Mapping[str, float], zipf: Mapping[str, float], seed: tuple[int, ...]
) -> Batch:
    """Poisson list lengths and Zipf ids, hashed over the rows of their table; labels 0 or 1, weights 1.

    pooling: ids per example of a feature, on average; zipf: exponent of the distribution of a feature's ids.
    """
    b, rng = local_batch, np.random.default_rng(seed)
    learn = config.distillation.learn
    tasks = len(config.heads.tasks)
    supervision = (
        None if learn is None else torch.from_numpy(rng.normal(size=(b, len(learn.all_teachers), tasks))).float()
    )
    weighted = [f for f in config.features.sparse if f.weighted]

    def jagged(features: list[SparseFeature], with_weights: bool) -> KeyedJaggedTensor:
        return _jagged(config, features, b, pooling, zipf, with_weights, rng)

    index = torch.arange(b)
    return Batch(
        dense=torch.from_numpy(rng.normal(size=(b, len(config.features.dense)))).float(),
        sparse=jagged([f for f in config.features.sparse if not f.weighted], False),
        weighted=jagged(weighted, True) if weighted else None,
        labels=torch.from_numpy(rng.integers(0, 2, (b, tasks))).float(),
        weights=torch.ones(b),
        ids=index,
        timestamps=index,
        users=index,
        rows=index,
        domain=torch.zeros(b, dtype=torch.int32),
        supervision=supervision,
        supervision_mask=None if supervision is None else torch.ones_like(supervision, dtype=torch.bool),
    )


def _jagged(
    config: JobConfig,
    features: list[SparseFeature],
    b: int,
    pooling: Mapping[str, float],
    zipf: Mapping[str, float],
    weighted: bool,
    rng: np.random.Generator,
) -> KeyedJaggedTensor:
    means = np.array([pooling[f.name] for f in features])
    lengths = rng.poisson(means[:, None], (len(features), b)).astype(np.int32)
    values = [
        _rows(f, int(n), config.tables[f.table].rows, zipf[f.name], rng)
        for f, n in zip(features, lengths.sum(axis=1), strict=True)
    ]
    total = int(lengths.sum())
    return KeyedJaggedTensor(
        keys=[f.name for f in features],
        values=torch.from_numpy(np.concatenate(values) if values else np.empty(0, np.int64)),
        lengths=torch.from_numpy(lengths.reshape(-1)),
        weights=torch.ones(total) if weighted else None,
        stride=b,
    )


def _rows(feature: SparseFeature, count: int, rows: int, exponent: float, rng: np.random.Generator) -> np.ndarray:
    """`count` rows of a table: popularity ranks by the inverse of the continuous Zipf distribution, each hashed to a row."""
    u = rng.random(count)
    if abs(exponent - 1) < 1e-6:
        place = np.exp(u * np.log(rows + 1))
    else:
        power = 1 - exponent
        place = (u * ((rows + 1.0) ** power - 1) + 1) ** (1 / power)
    return (hash64(place.astype(np.int64), salt_of(feature.table)) % np.uint64(rows)).astype(np.int64)

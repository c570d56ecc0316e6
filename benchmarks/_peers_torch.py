"""Plain PyTorch around exfm's own Wukong: what a team writes without TorchRec. Same initial weights, same batches, same loss.

dense       nn.Embedding, dense gradients, one Adam over everything: every step reads and writes every row (FuxiCTR's way)
adagrad     nn.EmbeddingBag(sparse=True) with Adagrad, Adam for the rest: a step touches the rows that it looked up
sparse_adam the same with SparseAdam
joined      as `adagrad`, all tables in one nn.EmbeddingBag: one lookup and one sparse gradient instead of 26
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks._peers_data import Held, sizes_of
from exfm.embeddings.tables import fill_initial
from exfm.trainer.build import build_dense
from exfm.trainer.config import JobConfig

KINDS = ("dense", "adagrad", "sparse_adam", "joined")


class Plain(nn.Module):
    """Tables in plain PyTorch under exfm's served model."""

    def __init__(self, config: JobConfig, kind: str, compiled: bool) -> None:
        super().__init__()
        features, sizes = config.features.sparse, sizes_of(config)
        self.served, _, _ = build_dense(config, torch.device("cpu"))
        self.run: Callable[..., tuple[Tensor, Tensor]] = torch.compile(self.served) if compiled else self.served
        starts = torch.tensor([0, *sizes[:-1]]).cumsum(0)
        self.register_buffer("starts", starts if kind == "joined" else torch.zeros_like(starts), persistent=False)
        rows = [sum(sizes)] if kind == "joined" else sizes
        width = config.tables[features[0].table].width
        make = nn.Embedding if kind == "dense" else lambda n, d: nn.EmbeddingBag(n, d, mode="sum", sparse=True)
        self.tables = nn.ModuleList(make(n, width) for n in rows)
        for f, start, size in zip(features, starts.tolist(), sizes, strict=True):
            table = (
                self.tables[0].weight[start : start + size]
                if kind == "joined"
                else self.tables[features.index(f)].weight
            )
            fill_initial(table.detach(), f.table, config.tables[f.table], config.run.seed, 0, 0)

    def forward(self, batch: Held) -> Tensor:
        """Logits [b]."""
        rows = batch.rows + self.starts
        if len(self.tables) == 1 and rows.shape[1] > 1:
            pooled = self.tables[0](rows.view(-1, 1)).view(len(rows), -1)
        elif isinstance(self.tables[0], nn.Embedding):
            pooled = torch.cat([table(own) for table, own in zip(self.tables, rows.T, strict=True)], dim=1)
        else:
            pooled = torch.cat([table(own[:, None]) for table, own in zip(self.tables, rows.T, strict=True)], dim=1)
        return self.run(batch.dense, pooled)[0][:, 0]


class Trainer:
    """Steps a `Plain`; the learning rates are the job's, those of tables under Adam its dense one."""

    def __init__(self, config: JobConfig, kind: str, compiled: bool = False) -> None:
        self.model = Plain(config, kind, compiled)
        dense, tables = config.optim.dense, list(self.model.tables.parameters())
        rest = list(self.model.served.parameters())
        adam = lambda parameters: torch.optim.Adam(parameters, lr=dense.lr, fused=True)  # noqa: E731
        if kind == "dense":
            self.optimizers = [adam([*rest, *tables])]
        elif kind == "sparse_adam":
            self.optimizers = [adam(rest), torch.optim.SparseAdam(tables, lr=dense.lr)]
        else:
            self.optimizers = [adam(rest), torch.optim.Adagrad(tables, lr=config.optim.tables.lr)]

    def loss(self, batch: Held) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(self.model(batch), batch.labels)

    def step(self, batch: Held) -> float:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return float(loss)

    @torch.no_grad()
    def score(self, batch: Held) -> Tensor:
        return self.model(batch)

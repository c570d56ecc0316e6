"""TorchRec as its documentation teaches it, around exfm's own Wukong: its planner, DistributedModelParallel, TrainPipelineSparseDist, the dense stack
eager (or compiled), row-wise Adagrad in the tables' backward pass, Adam for the rest. Same initial weights, same batches, in memory.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from exfm.data.batch import Batch
from exfm.embeddings.tables import build_collection, fill_initial
from exfm.sharding.shards import local_kernels
from exfm.trainer.build import build_dense
from exfm.trainer.config import JobConfig


class Model(nn.Module):
    """(loss, (loss, logits [b])) of a batch, as TorchRec's pipelines want it."""

    def __init__(self, config: JobConfig, device: torch.device) -> None:
        super().__init__()
        tables = build_collection(config.features, config.tables, weighted=False)
        assert tables is not None
        kwargs = {"lr": config.optim.tables.lr, "eps": config.optim.tables.eps}
        apply_optimizer_in_backward(RowWiseAdagrad, tables.parameters(), kwargs)
        self.tables = tables
        self.served, _, _ = build_dense(config, device)
        self.computing = config.precision.computing

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        pooled = self.tables(batch.sparse).values()
        with self.computing(batch.dense.device):
            logits = self.served(batch.dense, pooled)[0][:, 0].float()
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels[:, 0])
        return loss, (loss.detach(), logits.detach())


class TorchRec:
    """Trains on one rank. Needs a process group."""

    def __init__(self, config: JobConfig, device: torch.device, compiled: bool = False) -> None:
        config.precision.set_products()
        own = Model(config, device)
        if compiled:
            own.served.compile()
        self.served, self.device = own.served, device
        self.model = DistributedModelParallel(own, device=device)
        for kernel in local_kernels(self.model):
            for s in kernel.shards:
                fill_initial(s.weight, s.table, config.tables[s.table], config.run.seed, s.row, s.column)
        dense = {name: p for name, p in self.model.named_parameters() if ".served." in f".{name}"}
        adam = KeyedOptimizerWrapper(dense, lambda p: torch.optim.Adam(p, lr=config.optim.dense.lr, fused=True))
        self.pipeline = TrainPipelineSparseDist(self.model, adam, device)

    def train(self, batches: list[Batch]) -> Iterator[tuple[int, Tensor]]:
        """(examples, loss) of every step."""
        feed = iter(batches)
        for batch in batches:
            loss, _ = self.pipeline.progress(feed)
            yield len(batch), loss

"""The module that a train pipeline steps: tables, served model, distillation and the loss of one global batch.

b examples on this rank, w backbone width, t tasks, W ranks.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedTensor

from exfm.data.batch import Batch
from exfm.distillation.config import LearnConfig
from exfm.distillation.heads import StudentAdapter
from exfm.distillation.losses import distillation_loss, label_loss, teacher_target
from exfm.models.heads import Head
from exfm.models.interface import Backbone, ModelSize


@dataclass(frozen=True)
class StepOutput:
    """logits [b, t] before the update; loss: this rank's share of the global loss, scaled by W."""

    logits: Tensor
    loss: Tensor


class Served(nn.Module):
    """Backbone and served head: what is exported and served, with no trace of distillation."""

    def __init__(self, backbone: Backbone, head: Head) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, dense: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """(logits [b, t], backbone output [b, w])."""
        x = self.backbone(dense, pooled)
        return self.head(x), x

    def size(self) -> ModelSize:
        return self.backbone.size() + self.head.size()


class Adapter(nn.Module):
    """The student adapter with its own optimiser: fitted inside the forward pass, before or after it gives the target."""

    def __init__(self, config: LearnConfig, num_tasks: int) -> None:
        super().__init__()
        self.fit_first = config.adapter.fit == "current"
        self.mlp = StudentAdapter(config.adapter.hidden, num_tasks)
        self.optimizer: torch.optim.Optimizer | None = None

    def make_optimizer(self, lr: float) -> None:
        self.optimizer = torch.optim.Adam(self.mlp.parameters(), lr=lr)

    def target(self, batch: Batch, scale: Tensor) -> Tensor:
        """Detached probabilities [b, t] that the second distillation head learns (Algorithm 1 of ExFM)."""
        assert batch.supervision is not None
        logits = batch.supervision[:, 0]
        if not self.training:
            return torch.sigmoid(self.mlp(logits)).detach()
        if self.fit_first:
            self._fit(batch, logits, scale)
            return torch.sigmoid(self.mlp(logits)).detach()
        target = torch.sigmoid(self.mlp(logits)).detach()
        self._fit(batch, logits, scale)
        return target

    def _fit(self, batch: Batch, logits: Tensor, scale: Tensor) -> None:
        assert self.optimizer is not None and batch.supervision_mask is not None
        self.optimizer.zero_grad()
        weights = batch.weights * batch.supervision_mask[:, 0]
        (label_loss(self.mlp(logits), batch.labels, weights) * scale).backward()
        gradient = torch.cat([p.grad.view(-1) for p in self.mlp.parameters() if p.grad is not None])
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
        start = 0
        for p in self.mlp.parameters():
            assert p.grad is not None
            p.grad.copy_(gradient[start : start + p.numel()].view_as(p))
            start += p.numel()
        self.optimizer.step()


class Objective(nn.Module):
    """Loss of this rank's piece of a global batch from pooled embeddings.

    loss = W / (global weight) x sum over local examples of weight x loss; DDP and TorchRec divide gradients by W.
    """

    def __init__(
        self, served: nn.Module, heads: nn.Module | None, adapter: Adapter | None, learn: LearnConfig | None
    ) -> None:
        super().__init__()
        self.served, self.heads, self.adapter, self.learn = served, heads, adapter, learn

    def forward(self, batch: Batch, pooled: Tensor) -> tuple[Tensor, StepOutput]:
        logits, x = self.served(batch.dense, pooled)
        total = batch.weights.sum()
        dist.all_reduce(total)
        # a step whose examples all weigh 0 has loss 0
        scale = torch.where(total > 0, dist.get_world_size() / total, 0.0)
        loss = label_loss(logits, batch.labels, batch.weights)
        if self.learn is not None:
            loss = loss + self.learn.loss_weight * self._distillation(batch, logits, x, scale)
        loss = loss * scale
        return loss, StepOutput(logits.detach(), loss.detach())

    def _distillation(self, batch: Batch, logits: Tensor, x: Tensor, scale: Tensor) -> Tensor:
        assert self.learn is not None and batch.supervision is not None and batch.supervision_mask is not None
        mask = batch.supervision_mask[:, 0]
        target = teacher_target(batch.supervision[:, 0], self.learn.label_scale)
        if self.heads is None:
            return distillation_loss(logits, target, batch.weights, mask)
        by_teacher, by_adapted = self.heads(x)
        loss = distillation_loss(by_teacher, target, batch.weights, mask)
        if self.adapter is not None:
            loss = loss + distillation_loss(by_adapted, self.adapter.target(batch, scale), batch.weights, mask)
        return loss


class TrainModule(nn.Module):
    """Tables and objective. `tables` and `weighted` are sharded by TorchRec; the pipeline traces this module with FX."""

    def __init__(
        self,
        tables: EmbeddingBagCollection | None,
        weighted: EmbeddingBagCollection | None,
        objective: Objective,
        features: tuple[str, ...],
    ) -> None:
        super().__init__()
        self.tables, self.weighted, self.objective = tables, weighted, objective
        self.join = JoinPooled(features)

    def forward(self, batch: Batch) -> tuple[Tensor, StepOutput]:
        pooled = []
        if self.tables is not None:
            pooled.append(self.tables(batch.sparse))
        if self.weighted is not None:
            pooled.append(self.weighted(batch.weighted))
        return self.objective(batch, self.join(pooled))


class JoinPooled(nn.Module):
    """Pooled embeddings of all features side by side, [b, sum of widths] f32, in the order of the config."""

    def __init__(self, features: tuple[str, ...]) -> None:
        super().__init__()
        self.features = features

    def forward(self, pooled: list[KeyedTensor]) -> Tensor:
        found = {key: value for kt in pooled for key, value in kt.to_dict().items()}
        return torch.cat([found[f].float() for f in self.features], dim=1)

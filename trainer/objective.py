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
        self.mlps = nn.ModuleList(StudentAdapter(config.adapter.hidden, num_tasks) for _ in config.all_teachers)
        self.optimizer: torch.optim.Optimizer | None = None

    def make_optimizer(self, lr: float) -> None:
        self.optimizer = torch.optim.Adam(self.mlps.parameters(), lr=lr)

    def targets(self, batch: Batch, logits: Tensor, scale: Tensor) -> Tensor:
        """Detached probabilities [b, s, t] that the adapted heads learn (Algorithm 1 of ExFM) from the teachers' logits [b, s, t]."""
        if self.training and self.fit_first:
            self._fit(batch, logits, scale)
        targets = torch.sigmoid(self._adapted(logits)).detach()
        if self.training and not self.fit_first:
            self._fit(batch, logits, scale)
        return targets

    def _adapted(self, logits: Tensor) -> Tensor:
        return torch.stack([mlp(logits[:, s]) for s, mlp in enumerate(self.mlps)], dim=1)

    def _fit(self, batch: Batch, logits: Tensor, scale: Tensor) -> None:
        assert self.optimizer is not None and batch.supervision_mask is not None
        self.optimizer.zero_grad()
        loss = torch.zeros((), device=logits.device)
        for adapted, mask in zip(self._adapted(logits).unbind(1), batch.supervision_mask.unbind(1), strict=True):
            loss = loss + label_loss(adapted, batch.labels.where(mask, torch.nan), batch.weights)
        (loss * scale).backward()
        gradient = torch.cat([p.grad.view(-1) for p in self.mlps.parameters() if p.grad is not None])
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
        start = 0
        for p in self.mlps.parameters():
            assert p.grad is not None
            p.grad.copy_(gradient[start : start + p.numel()].view_as(p))
            start += p.numel()
        self.optimizer.step()


class Objective(nn.Module):
    """Loss of this rank's piece of a global batch from pooled embeddings.

    loss = W / (global weight) x sum over local examples of weight x loss; DDP and TorchRec divide gradients by W. All logits,
    the student's and its teachers', are of the true world; `offsets` [t] takes them to the down-sampled data. teacher_weights: factor
    of every teacher's losses, set for each slice.
    """

    def __init__(
        self,
        served: nn.Module,
        heads: nn.Module | None,
        adapter: Adapter | None,
        learn: LearnConfig | None,
        offsets: tuple[float, ...],
    ) -> None:
        super().__init__()
        self.served, self.heads, self.adapter, self.learn = served, heads, adapter, learn
        self.offsets: Tensor
        self.register_buffer("offsets", torch.tensor(offsets), persistent=False)
        self.teacher_weights = tuple(learn.loss_weight * t.weight for t in learn.all_teachers) if learn else ()

    def forward(self, batch: Batch, pooled: Tensor) -> tuple[Tensor, StepOutput]:
        logits, x = self.served(batch.dense, pooled)
        total = batch.weights.sum()
        dist.all_reduce(total)
        # a step whose examples all weigh 0 has loss 0
        scale = torch.where(total > 0, dist.get_world_size() / total, 0.0)
        sampled = logits + self.offsets
        loss = label_loss(sampled, batch.labels, batch.weights)
        if self.learn is not None:
            loss = loss + self._distillation(self.learn, batch, sampled, x, scale)
        loss = loss * scale
        return loss, StepOutput(logits.detach(), loss.detach())

    def _distillation(self, learn: LearnConfig, batch: Batch, logits: Tensor, x: Tensor, scale: Tensor) -> Tensor:
        """Sum over teachers of weight x loss. logits [b, t] of the served head, x [b, w]."""
        assert batch.supervision is not None and batch.supervision_mask is not None
        supervision = batch.supervision + self.offsets  # the teachers' logits through the student's own correction
        by_teacher, by_adapted = (None, None) if self.heads is None else self.heads(x)
        adapted = None if self.adapter is None else self.adapter.targets(batch, supervision, scale)
        loss = torch.zeros((), device=x.device)
        for s, weight in enumerate(self.teacher_weights):
            mask, target = batch.supervision_mask[:, s], teacher_target(supervision[:, s], learn.label_scale)
            own = logits if by_teacher is None else by_teacher[:, s]
            loss = loss + weight * distillation_loss(own, target, batch.weights, mask)
            if learn.auxiliary_labels:
                loss = loss + label_loss(own, batch.labels, batch.weights)
            if adapted is not None and by_adapted is not None:
                loss = loss + weight * distillation_loss(by_adapted[:, s], adapted[:, s], batch.weights, mask)
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

"""The module that a train pipeline steps: tables, served model, distillation and the loss of one global batch.

b examples on this rank, w backbone width, n heads for each of s teachers, t tasks, W ranks.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adam import adam
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from exfm.data.batch import Batch
from exfm.distillation.config import LearnConfig
from exfm.distillation.heads import StudentAdapter
from exfm.distillation.losses import label_loss, observed, soft_loss, teacher_target
from exfm.models.heads import Head
from exfm.models.interface import Backbone, ModelSize
from exfm.trainer.optim import adam_state

Computing = Callable[[torch.device], AbstractContextManager[Any]]


def full(device: torch.device) -> AbstractContextManager[Any]:
    """As the tensors are: fp32."""
    return nullcontext()


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
        self.mlps = StudentAdapter(config.adapter.hidden, len(config.all_teachers) * num_tasks)
        self.optimizer: torch.optim.Optimizer | None = None

    def make_optimizer(self, lr: float) -> None:
        self.optimizer = torch.optim.Adam(self.mlps.parameters(), lr=lr, fused=True)

    @torch.no_grad()
    def targets(self, logits: Tensor, labels: Tensor, weights: Tensor, scale: Tensor) -> Tensor:
        """Probabilities [b, s, t] that the adapted heads learn (Algorithm 1 of ExFM) from the teachers' logits.

        logits, labels, weights [b, s, t]: weight 0 where a label or a prediction is missing. scale: of the sum of the losses.
        """
        flat, adapted = logits.flatten(1), logits
        if self.training:
            adapted = self._fit(flat, labels.flatten(1), weights.flatten(1), scale)
        if not self.training or self.fit_first:
            adapted = self.mlps(flat)
        return torch.sigmoid(adapted).view_as(logits)

    def _fit(self, logits: Tensor, labels: Tensor, weights: Tensor, scale: Tensor) -> Tensor:
        """The adapted logits before this step."""
        assert self.optimizer is not None
        adapted, gradient = self.mlps.gradient(logits, labels, weights)
        world = dist.get_world_size()
        if world > 1:
            dist.all_reduce(gradient)
        self._step(gradient * (scale / world))
        return adapted

    def _step(self, gradient: Tensor) -> None:
        """What `optimizer.step()` would do, by the function under it: half of the time for so few parameters."""
        assert self.optimizer is not None
        group, state = self.optimizer.param_groups[0], adam_state(self.optimizer, self.mlps.parameter)
        beta1, beta2 = group["betas"]
        adam(
            [self.mlps.parameter], [gradient], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]],
            fused=True, amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
            maximize=False,
        )  # fmt: skip


class Objective(nn.Module):
    """Loss of this rank's piece of a global batch from pooled embeddings.

    loss = W / (global weight) x sum over local examples of weight x loss; DDP and TorchRec divide gradients by W. All logits,
    the student's and its teachers', are of the true world; `offsets` [t] takes them to the down-sampled data. teacher_weights [s]:
    factor of every teacher's losses, set for each slice.
    """

    def __init__(
        self,
        served: nn.Module,
        heads: nn.Module | None,
        adapter: Adapter | None,
        learn: LearnConfig | None,
        offsets: tuple[float, ...],
        computing: Computing = full,
    ) -> None:
        """computing: in which the served model and the heads run, by device."""
        super().__init__()
        self.computing = computing
        self.served, self.heads, self.adapter, self.learn = served, heads, adapter, learn
        self.offsets: Tensor
        self.register_buffer("offsets", torch.tensor(offsets), persistent=False)
        self.teacher_weights: Tensor
        weights = [learn.loss_weight * t.weight for t in learn.all_teachers] if learn else []
        self.register_buffer("teacher_weights", torch.tensor(weights), persistent=False)

    def weigh(self, weights: Sequence[float]) -> None:
        """Set the factor of every teacher's losses."""
        self.teacher_weights.copy_(torch.tensor(weights))

    def forward(self, batch: Batch, pooled: Tensor) -> tuple[Tensor, StepOutput]:
        with self.computing(pooled.device):
            logits, x = self.served(batch.dense, pooled)
        logits = logits.float()  # losses are fp32
        total, world = batch.weights.sum(), dist.get_world_size()
        if world > 1:
            dist.all_reduce(total)
        # a step whose examples all weigh 0 has loss 0
        scale = torch.where(total > 0, world / total, 0.0)
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
        mask, weights = batch.supervision_mask, batch.weights
        soft_weights = mask * (weights[:, None] * self.teacher_weights)[:, :, None]
        target = teacher_target(supervision, learn.label_scale)
        if self.heads is None:
            return soft_loss(logits[:, None].expand_as(target), target, soft_weights)
        with self.computing(x.device):
            own = self.heads(x).float()  # [b, n, s, t]
        if self.adapter is None and not learn.auxiliary_labels:
            return soft_loss(own[:, 0], target, soft_weights)
        labels, hard_weights = observed(batch.labels, weights)
        labels, hard_weights = labels[:, None].expand_as(target), hard_weights[:, None] * mask
        hard = soft_loss(own[:, 0], labels, hard_weights) if learn.auxiliary_labels else 0.0
        if self.adapter is None:
            return hard + soft_loss(own[:, 0], target, soft_weights)
        adapted = self.adapter.targets(supervision, labels, hard_weights, scale)
        both = torch.stack([target, adapted], 1)
        return hard + soft_loss(own, both, soft_weights[:, None].expand_as(both))


class ScoreObjective(nn.Module):
    """Logits alone, in the form that pipelines want."""

    def __init__(self, served: Served) -> None:
        super().__init__()
        self.served = served

    def forward(self, batch: Batch, pooled: Tensor) -> tuple[Tensor, StepOutput]:
        logits, _ = self.served(batch.dense, pooled)
        loss = logits.new_zeros(())
        return loss, StepOutput(logits, loss)


class TrainModule(nn.Module):
    """Tables and objective. `tables` and `weighted` are sharded by TorchRec; the pipeline traces this module with FX."""

    def __init__(
        self,
        tables: EmbeddingBagCollection | None,
        weighted: EmbeddingBagCollection | None,
        objective: nn.Module,
        features: tuple[str, ...],
        mean: frozenset[str] = frozenset(),
        once: tuple[str, ...] = (),
    ) -> None:
        """mean: features whose sum of embeddings is divided by the number of ids. once: those of Batch.repeats."""
        super().__init__()
        self.tables, self.weighted, self.objective = tables, weighted, objective
        self.join = JoinPooled(features, mean, once)

    def forward(self, batch: Batch) -> tuple[Tensor, StepOutput]:
        pooled, ids = [], []
        if self.tables is not None:
            pooled.append(self.tables(batch.sparse))
            ids.append(batch.sparse)
        if self.weighted is not None:
            pooled.append(self.weighted(batch.weighted))
            ids.append(batch.weighted)
        return self.objective(batch, self.join(pooled, ids, batch.repeats))


class JoinPooled(nn.Module):
    """Pooled embeddings of all features side by side, [b, sum of widths] f32, in the order of the config."""

    def __init__(self, features: tuple[str, ...], mean: frozenset[str], once: tuple[str, ...]) -> None:
        super().__init__()
        self.features, self.mean = features, mean
        self.once = tuple(f for f in features if f in once)

    def forward(self, pooled: list[KeyedTensor], ids: list[KeyedJaggedTensor], repeats: Tensor | None) -> Tensor:
        if len(pooled) == 1 and not self.mean and not self.once and tuple(pooled[0].keys()) == self.features:
            return pooled[0].values().float()  # side by side already
        found = {key: value.float() for kt in pooled for key, value in kt.to_dict().items()}
        for kjt in ids if self.mean else []:
            share = 1.0 / kjt.lengths().view(len(kjt.keys()), -1).clamp(min=1).float()  # [features, b]
            for own, key in zip(share, kjt.keys(), strict=True):
                if key in self.mean:
                    found[key] = found[key] * own[:, None]
        assert len(self.once) == (0 if repeats is None else len(repeats)), "the batch was read for other features"
        for key, holders in zip(self.once, () if repeats is None else repeats, strict=True):
            found[key] = found[key].index_select(0, holders)
        return torch.cat([found[f] for f in self.features], dim=1)

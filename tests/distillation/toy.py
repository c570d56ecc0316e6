"""A student small enough to write its losses down: b = 12 examples, t = 2 tasks, w = 5."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from exfm.data.batch import Batch
from exfm.distillation.config import LearnConfig, LogConfig, TeacherConfig
from exfm.distillation.heads import DistillationHeads
from exfm.trainer.objective import Adapter, Objective

B, T, W = 12, 2, 5
METHODS = ["single_head", "auxiliary_head", "student_adapter"]
bce = F.binary_cross_entropy_with_logits
TWO = tuple(TeacherConfig(name=n, logs=(LogConfig(path=n),)) for n in "ab")


class Toy(nn.Module):
    """A served model: linear backbone, linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(3, W), nn.Linear(W, T)

    def forward(self, dense: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        x = self.backbone(dense)
        return self.head(x), x


def a_batch(labels: bool = True, masked: tuple[int, ...] = (2, 7)) -> Batch:
    g = torch.Generator().manual_seed(1)
    y = (torch.rand(B, T, generator=g) < 0.4).float()
    y[3, 1] = float("nan")
    mask = torch.ones(B, 1, T, dtype=torch.bool)
    mask[list(masked)] = False
    whole = torch.arange(B)
    return Batch(
        dense=torch.randn(B, 3, generator=g),
        sparse=KeyedJaggedTensor(
            keys=[], values=torch.empty(0, dtype=torch.long), lengths=torch.empty(0, dtype=torch.int)
        ),
        weighted=None,
        labels=y if labels else torch.full((B, T), float("nan")),
        weights=torch.rand(B, generator=g) + 0.5,
        ids=whole,
        timestamps=whole,
        users=whole,
        rows=whole,
        domain=whole.int(),
        supervision=torch.randn(B, 1, T, generator=g) * mask,
        supervision_mask=mask,
    )


def objective(method: str, **settings: Any) -> Objective:
    """The same weights for the same method, whatever the settings."""
    learn = LearnConfig(supervision="log", method=method, **settings)  # type: ignore[arg-type]
    torch.manual_seed(0)
    served = Toy()
    heads = None if method == "single_head" else DistillationHeads(learn, W, T)
    adapter = None
    if method == "student_adapter":
        adapter = Adapter(learn, T)
        adapter.make_optimizer(learn.adapter.lr)
        for p in adapter.parameters():
            nn.init.normal_(p, std=0.3)
    return Objective(served, heads, adapter, learn, (0.0,) * T)


def step(o: Objective, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """(loss, gradients by name) of one forward and backward."""
    loss, _ = o(batch, torch.empty(B, 0))
    loss.backward()
    grads = {n: p.grad for n, p in o.named_parameters() if p.grad is not None and not n.startswith("adapter")}
    return loss.item(), grads


def label_part(o: Objective, batch: Batch) -> Tensor:
    logits, _ = o.served(batch.dense, torch.empty(B, 0))
    total = torch.zeros(())
    for i in range(B):
        for t in range(T):
            if not batch.labels[i, t].isnan():
                total = total + batch.weights[i] * bce(logits[i, t], batch.labels[i, t])
    return total


def soft_part(logits: Tensor, targets: Tensor, batch: Batch) -> Tensor:
    assert batch.supervision_mask is not None
    rows = [i for i in range(B) if batch.supervision_mask[i, 0].all()]
    return sum((batch.weights[i] * bce(logits[i], targets[i], reduction="sum") for i in rows), torch.zeros(()))

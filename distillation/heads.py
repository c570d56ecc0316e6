"""Auxiliary head and student adapter (ExFM sections on AH and SA). Pure torch: knows no ranks.

b examples, s teachers, t tasks, w backbone width.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from exfm.distillation.config import LearnConfig
from exfm.models.heads import Head


class _ScaleGradient(torch.autograd.Function):
    """Identity forward, gradient times beta backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: float) -> Tensor:
        ctx.beta = beta
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.beta, None


class DistillationHeads(nn.Module):
    """The heads that learn from the teachers and are never served, one pair for each of s teachers.

    forward(x [b, w]) -> (y^D, y^D2), logits [b, s, t]: y^D learns the teacher's prediction (equation 4), y^D2 the adapted one
    (equation 7; None without a student adapter). Only the backbone's share of their gradient is scaled by beta.
    """

    def __init__(self, config: LearnConfig, in_width: int, num_tasks: int) -> None:
        super().__init__()
        self.gradient_scale = config.gradient_scale

        def heads() -> nn.ModuleList:
            return nn.ModuleList(Head(in_width, config.hidden, num_tasks) for _ in config.all_teachers)

        self.teacher = heads()
        self.adapted = heads() if config.method == "student_adapter" else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x = _ScaleGradient.apply(x, self.gradient_scale)
        return _each(self.teacher, x), None if self.adapted is None else _each(self.adapted, x)


def _each(heads: nn.ModuleList, x: Tensor) -> Tensor:
    return torch.stack([head(x) for head in heads], dim=1)


class StudentAdapter(nn.Module):
    """y^SA = y^F + MLP(y^F), one small MLP per task on the scalar teacher logit (equation 6).

    ExFM does not print its form. The sum starts as the identity because the last layer starts at 0, so the first targets
    are the teacher's own.
    """

    def __init__(self, hidden: tuple[int, ...], num_tasks: int) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(self._mlp(hidden) for _ in range(num_tasks))

    @staticmethod
    def _mlp(hidden: tuple[int, ...]) -> nn.Sequential:
        widths = (1, *hidden)
        layers: list[nn.Module] = []
        for i, o in pairwise(widths):
            layers += [nn.Linear(i, o), nn.ReLU()]
        last = nn.Linear(widths[-1], 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        return nn.Sequential(*layers, last)

    def forward(self, logits: Tensor) -> Tensor:
        """Teacher logits [b, t] -> adapted logits [b, t]."""
        return logits + torch.cat([mlp(logits[:, i : i + 1]) for i, mlp in enumerate(self.mlps)], dim=1)

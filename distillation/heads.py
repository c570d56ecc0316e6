"""Auxiliary head and student adapter (ExFM sections on AH and SA). Pure torch: knows no ranks.

b examples, s teachers, n targets of each (its prediction; with a student adapter the adapted one, too), t tasks, w backbone width.
What exists once for each of several heads or units k is computed by one batched product: they are too small to be called one by one.
"""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from exfm.distillation.config import LearnConfig


class _ScaleGradient(torch.autograd.Function):
    """Identity forward, gradient times beta backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: float) -> Tensor:
        ctx.beta = beta
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.beta, None


def _uniform(shape: tuple[int, ...], fan_in: int) -> Tensor:
    """As nn.Linear starts."""
    bound = 1 / math.sqrt(fan_in)
    return torch.empty(shape).uniform_(-bound, bound)


class DistillationHeads(nn.Module):
    """The heads that learn from the teachers and are never served: n for each of s teachers, nothing shared.

    forward(x [b, w]) -> logits [b, n, s, t]: [:, 0] is y^D, which learns the teachers' predictions (equation 4), [:, 1] the one that
    learns the adapted ones (equation 7). Only the backbone's share of their gradient is scaled by beta.
    """

    def __init__(self, config: LearnConfig, in_width: int, num_tasks: int) -> None:
        super().__init__()
        self.gradient_scale = config.gradient_scale
        self.shape = (2 if config.method == "student_adapter" else 1, len(config.all_teachers), num_tasks)
        self.heads = self.shape[0] * self.shape[1]
        widths = (*config.hidden, num_tasks)
        # all read the same x: their first layers are one
        self.first = nn.Linear(in_width, self.heads * widths[0])
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for i, o in pairwise(widths):
            self.weights.append(nn.Parameter(_uniform((self.heads, i, o), i)))
            self.biases.append(nn.Parameter(_uniform((self.heads, 1, o), i)))

    def forward(self, x: Tensor) -> Tensor:
        if self.gradient_scale != 1:
            x = _ScaleGradient.apply(x, self.gradient_scale)
        y = self.first(x)
        if len(self.weights):
            y_kbi = y.view(len(x), self.heads, -1).transpose(0, 1)
            for weight, bias in zip(self.weights, self.biases, strict=True):
                y_kbi = torch.baddbmm(bias, y_kbi.relu(), weight)
            y = y_kbi.transpose(0, 1)
        return y.reshape(len(x), *self.shape)


class StudentAdapter(nn.Module):
    """y^SA = y^F + MLP(y^F), one small MLP per teacher and task (k of them) on the scalar teacher logit (equation 6).

    ExFM does not print its form. The sum starts as the identity because the last layer starts at 0, so the first targets
    are the teacher's own. All parameters lie in one vector, for one step of Adam and one sum over ranks.
    """

    def __init__(self, hidden: tuple[int, ...], k: int) -> None:
        super().__init__()
        layers = list(pairwise((1, *hidden, 1)))
        self.shapes = [shape for i, o in layers for shape in ((k, o, i), (k, o, 1))]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        started = [_uniform(shape, layers[n // 2][0]) for n, shape in enumerate(self.shapes)]
        for last in started[-2:]:
            last.zero_()
        self.parameter = nn.Parameter(torch.cat([part.flatten() for part in started]))

    def forward(self, logits: Tensor) -> Tensor:
        """Teacher logits [b, k] -> adapted logits [b, k]."""
        _, values = self._values(logits)
        return logits + values[-1][:, 0].t()

    def _values(self, logits: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Weights [k, out, in] of every layer; the input [k, in, b] of every layer and last the output."""
        parts = [p.view(shape) for p, shape in zip(self.parameter.split(self.sizes), self.shapes, strict=True)]
        values = [logits.t()[:, None]]
        for weight, bias in zip(parts[::2], parts[1::2], strict=True):
            x_kib = values[-1].relu_() if len(values) > 1 else values[0]
            values.append(torch.baddbmm(bias, weight, x_kib))
        return parts[::2], values

    @torch.no_grad()
    def gradient(self, logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """(adapted logits [b, k]; gradient of their summed cross-entropy with labels), logits, labels, weights all [b, k].

        By hand: autograd takes longer to set up than so small a net takes to compute.
        """
        layers, values = self._values(logits)
        adapted = logits + values[-1][:, 0].t()
        d_kob = ((torch.sigmoid(adapted) - labels) * weights).t()[:, None]
        parts: list[Tensor] = []
        for number in reversed(range(len(layers))):
            x_kib = values[number]
            parts = [(d_kob @ x_kib.mT).flatten(), d_kob.sum(2).flatten(), *parts]
            if number:
                d_kob = (layers[number].mT @ d_kob) * (x_kib > 0)
        return adapted, torch.cat(parts)

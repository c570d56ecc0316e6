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


class _Layers(nn.Module):
    """k independent linear layers after one another's ReLU: weights [k, in, out], biases [k, 1, out], started as nn.Linear's."""

    def __init__(self, k: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for i, o in pairwise(widths):
            bound = 1 / math.sqrt(i)
            self.weights.append(nn.Parameter(torch.empty(k, i, o).uniform_(-bound, bound)))
            self.biases.append(nn.Parameter(torch.empty(k, 1, o).uniform_(-bound, bound)))

    def forward(self, x_kbi: Tensor) -> list[Tensor]:
        """The input of every layer, [k, b, in], and last the output."""
        values = [x_kbi]
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            values.append(torch.baddbmm(bias, values[-1].relu_() if number else x_kbi, weight))
        return values


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
        self.rest = _Layers(self.heads, widths) if config.hidden else None

    def forward(self, x: Tensor) -> Tensor:
        if self.gradient_scale != 1:
            x = _ScaleGradient.apply(x, self.gradient_scale)
        y = self.first(x)
        if self.rest is not None:
            y_kbi = y.relu().view(len(x), self.heads, -1).transpose(0, 1)
            y = self.rest(y_kbi)[-1].transpose(0, 1)
        return y.reshape(len(x), *self.shape)


class StudentAdapter(nn.Module):
    """y^SA = y^F + MLP(y^F), one small MLP per teacher and task (k of them) on the scalar teacher logit (equation 6).

    ExFM does not print its form. The sum starts as the identity because the last layer starts at 0, so the first targets
    are the teacher's own.
    """

    def __init__(self, hidden: tuple[int, ...], k: int) -> None:
        super().__init__()
        self.layers = _Layers(k, (1, *hidden, 1))
        nn.init.zeros_(self.layers.weights[-1])
        nn.init.zeros_(self.layers.biases[-1])

    def forward(self, logits: Tensor) -> Tensor:
        """Teacher logits [b, k] -> adapted logits [b, k]."""
        return logits + self.layers(logits.t()[:, :, None])[-1][:, :, 0].t()

    @torch.no_grad()
    def gradients(self, logits: Tensor, labels: Tensor, weights: Tensor) -> list[Tensor]:
        """Of the summed cross-entropy between adapted logits and labels, all [b, k], in the order of parameters().

        By hand: autograd takes longer to set up than so small a net takes to compute.
        """
        values = self.layers(logits.t()[:, :, None])
        adapted = logits + values[-1][:, :, 0].t()
        d_kbo = ((torch.sigmoid(adapted) - labels) * weights).t()[:, :, None]
        by_weight, by_bias = [], []
        for value_kbi, weight in zip(reversed(values[:-1]), reversed(list(self.layers.weights)), strict=True):
            by_weight.append(value_kbi.mT @ d_kbo)
            by_bias.append(d_kbo.sum(1, keepdim=True))
            if len(by_weight) < len(self.layers.weights):
                d_kbo = (d_kbo @ weight.mT) * (value_kbi > 0)
        return by_weight[::-1] + by_bias[::-1]

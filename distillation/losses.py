"""Losses of label and distillation, as sums over examples: the caller divides by the step's global weight.

b examples, t tasks. Logits are raw; ExFM prints log-likelihoods, these are their negatives.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def label_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Weighted binary cross-entropy summed over observed labels. logits, labels [b, t] (NaN: not observed), weights [b]."""
    observed = ~labels.isnan()
    losses = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(0.0), reduction="none")
    return (losses * observed * weights[:, None]).sum()


def teacher_target(teacher_logits: Tensor, label_scale: float) -> Tensor:
    """Label scaling: min(alpha x probability, 1), [b, t]."""
    return (torch.sigmoid(teacher_logits) * label_scale).clamp(max=1.0)


def distillation_loss(logits: Tensor, targets: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """Weighted cross-entropy against soft targets, summed over the examples that have a prediction.

    logits, targets, mask [b, t]: whether the example has a prediction; weights [b].
    """
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (losses * mask * weights[:, None]).sum()

"""Losses of label and distillation, as sums over examples: the caller divides by the step's global weight.

b examples, s teachers, t tasks. Logits are raw; ExFM prints log-likelihoods, these are their negatives.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def observed(labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Labels [b, t] (NaN: not observed) and weights [b] as (labels with 0 for NaN, weights [b, t] that are 0 there)."""
    return labels.nan_to_num(0.0), weights[:, None] * ~labels.isnan()


def label_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Weighted binary cross-entropy summed over observed labels. logits, labels [b, t] (NaN: not observed), weights [b]."""
    return soft_loss(logits, *observed(labels, weights))


def soft_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted cross-entropy against probabilities, summed. Three of one shape; where there is no target, the weight is 0."""
    return F.binary_cross_entropy_with_logits(logits, targets, weights, reduction="sum")


def teacher_target(teacher_logits: Tensor, label_scale: float) -> Tensor:
    """Label scaling: min(alpha x probability, 1)."""
    probability = torch.sigmoid(teacher_logits)
    return probability if label_scale == 1 else (probability * label_scale).clamp(max=1.0)

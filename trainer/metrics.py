"""Progressive metrics in bounded memory: sums, AUC histograms and bootstrap replicates that add up over ranks and restarts.

d groups (0 = all traffic, then one per domain), t tasks, r bootstrap replicates. Sums are (examples, weight, weight x label,
weight x prediction, weight x log loss) of the progressive evaluation: each prediction was made before its example was learned.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exfm.data.hashing import hash64

F64 = NDArray[np.float64]
BINS = 16_384
LOGIT_LIMIT = 16.0
NUM, WEIGHT, LABEL, PREDICTION, LOSS = range(5)

_CUMULATIVE = np.cumsum([np.exp(-1.0) / f for f in np.cumprod([1, *range(1, 9)])])
# Poisson(1) by inverse transform of a 16-bit uniform
_POISSON = np.searchsorted(_CUMULATIVE, (np.arange(65536) + 0.5) / 65536).astype(np.float32)


@dataclass(frozen=True)
class Predictions:
    """One rank's scored examples on the host, padding removed. logits, labels [b, t]; weights, domain, users [b]."""

    logits: NDArray[np.float32]
    labels: NDArray[np.float32]
    weights: NDArray[np.float32]
    domain: NDArray[np.int32]
    users: NDArray[np.int64]


class Metrics:
    """Accumulates one rank's share; states of several ranks or attempts are merged by adding them."""

    def __init__(self, num_domains: int, num_tasks: int, replicates: int) -> None:
        groups = num_domains + 1
        self.slice = np.zeros((groups, num_tasks, 5))
        self.total = np.zeros((groups, num_tasks, 5))
        self.histogram = np.zeros((groups, num_tasks, 2, BINS))
        self.replicates = np.zeros((replicates, groups, num_tasks, 4))

    def add(self, p: Predictions, evaluated: bool) -> None:
        """Count a batch; `evaluated`: also into the totals, the AUC and the bootstrap."""
        observed = ~np.isnan(p.labels)
        labels = np.nan_to_num(p.labels).astype(np.float64)
        logits = p.logits.astype(np.float64)
        # logits of a diverging job may be anything until it is restored
        with np.errstate(over="ignore", invalid="ignore"):
            probability = 1.0 / (1.0 + np.exp(-logits))
            loss = np.logaddexp(0.0, logits) - labels * logits
        w = p.weights[:, None].astype(np.float64) * observed
        sums = np.stack([observed.astype(np.float64), w, w * labels, w * probability, w * loss], axis=2)
        # all examples of a user are drawn alike, so their sums are
        users, of_user = np.unique(p.users, return_inverse=True)
        draws = self._draws(users) if evaluated and len(self.replicates) else None
        for group in range(len(self.slice)):
            rows = slice(None) if group == 0 else p.domain == group - 1
            part = sums[rows]
            self.slice[group] += part.sum(axis=0)
            if not evaluated:
                continue
            self.total[group] += part.sum(axis=0)
            self._add_histogram(group, logits[rows], labels[rows], w[rows])
            if draws is not None:
                columns = part[:, :, 1:].reshape(len(part), 4 * part.shape[1]).T
                by_user = np.stack([np.bincount(of_user[rows], column, len(users)) for column in columns])
                self.replicates[:, group] += (by_user @ draws).T.reshape(self.replicates[:, group].shape)

    def _draws(self, users: NDArray[np.int64]) -> F64:
        """Poisson(1) weights [u, r], a function of (user, replicate): equal for every job, clustered by user."""
        words = -(-len(self.replicates) // 4)
        keys = hash64(users)[:, None] + np.arange(words, dtype=np.uint64)[None, :]
        bits = hash64(keys.view(np.int64)).view(np.uint16)[:, : len(self.replicates)]
        return _POISSON[bits].astype(np.float64)

    def _add_histogram(self, group: int, logits: F64, labels: F64, weights: F64) -> None:
        position = (np.clip(logits, -LOGIT_LIMIT, LOGIT_LIMIT) + LOGIT_LIMIT) / (2 * LOGIT_LIMIT) * (BINS - 1)
        bins = np.nan_to_num(position).astype(np.int64)
        for task in range(logits.shape[1]):
            for label in (0, 1):
                chosen = labels[:, task] == label
                self.histogram[group, task, label] += np.bincount(bins[chosen, task], weights[chosen, task], BINS)

    def state(self) -> dict[str, F64]:
        return {"slice": self.slice, "total": self.total, "histogram": self.histogram, "replicates": self.replicates}

    def merge(self, state: dict[str, Any]) -> None:
        for name, own in self.state().items():
            own += state[name]


def summarise(sums: F64) -> dict[str, float]:
    """NE, log loss, calibration and base rate of one [5] vector of sums; NaN where nothing or one class was seen."""
    weight = sums[WEIGHT]
    nan = float("nan")
    if weight <= 0:
        return {"examples": float(sums[NUM]), "ne": nan, "log_loss": nan, "calibration": nan, "base_rate": nan}
    rate = sums[LABEL] / weight
    loss = sums[LOSS] / weight
    return {
        "examples": float(sums[NUM]),
        "ne": float(loss / entropy(rate)) if 0 < rate < 1 else nan,
        "log_loss": float(loss),
        "calibration": float(sums[PREDICTION] / sums[LABEL]) if sums[LABEL] > 0 else nan,
        "base_rate": float(rate),
    }


def entropy(rate: Any) -> Any:
    """Entropy of a Bernoulli rate in nats."""
    return -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))


def auc(histogram: F64) -> float:
    """Area under the ROC curve from [2, bins] weights of negatives and positives; ties inside a bin count half."""
    negatives, positives = histogram
    if negatives.sum() <= 0 or positives.sum() <= 0:
        return float("nan")
    below = np.cumsum(negatives) - negatives
    return float((positives * (below + negatives / 2)).sum() / (positives.sum() * negatives.sum()))


def replicate_ne(replicates: F64) -> F64:
    """NE of every bootstrap replicate from [r, 4] sums (weight, label, prediction, loss)."""
    weight, label, _, loss = np.moveaxis(replicates, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (loss / weight) / entropy(label / weight)


def replicate_calibration(replicates: F64) -> F64:
    """Calibration, predictions over labels, of every bootstrap replicate from [r, 4] sums (weight, label, prediction, loss)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(replicates[..., 2] / replicates[..., 1])

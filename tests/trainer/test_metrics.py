"""Metrics against exact formulas, TorchRec's own NE and a simulation of the bootstrap."""

import numpy as np
import pytest
import torch
from torchrec.metrics.ne import compute_cross_entropy, compute_ne

from exfm.trainer.metrics import Metrics, Predictions, auc, replicate_ne, summarise


def drawn(n: int = 4000, seed: int = 0, missing: float = 0.2) -> Predictions:
    rng = np.random.default_rng(seed)
    truth = rng.normal(-1, 1.2, (n, 2))
    labels = (rng.random((n, 2)) < 1 / (1 + np.exp(-truth))).astype(np.float32)
    labels[rng.random((n, 2)) < missing] = np.nan
    return Predictions(
        logits=(truth + rng.normal(0, 0.5, (n, 2))).astype(np.float32),
        labels=labels,
        weights=rng.uniform(0, 3, n).astype(np.float32),
        domain=rng.integers(-1, 2, n).astype(np.int32),
        users=rng.integers(0, 300, n),
    )


def part(p: Predictions, rows: np.ndarray | slice) -> Predictions:
    return Predictions(p.logits[rows], p.labels[rows], p.weights[rows], p.domain[rows], p.users[rows])


def exact(p: Predictions, task: int) -> dict[str, float]:
    """By the definitions, in float64; AUC by comparing all pairs."""
    seen = ~np.isnan(p.labels[:, task])
    y, z, w = (a[seen].astype(np.float64) for a in (p.labels[:, task], p.logits[:, task], p.weights))
    q = 1 / (1 + np.exp(-z))
    loss = -(w * (y * np.log(q) + (1 - y) * np.log(1 - q))).sum() / w.sum()
    base = (w * y).sum() / w.sum()
    order = np.sign(z[y == 1][:, None] - z[y == 0][None, :]) / 2 + 0.5
    pairs = w[y == 1][:, None] * w[y == 0][None, :]
    return {
        "examples": seen.sum(),
        "log_loss": loss,
        "ne": loss / -(base * np.log(base) + (1 - base) * np.log(1 - base)),
        "calibration": (w * q).sum() / (w * y).sum(),
        "base_rate": base,
        "auc": (order * pairs).sum() / pairs.sum(),
    }


def filled(p: Predictions, replicates: int = 0, batch: int = 500) -> Metrics:
    metrics = Metrics(2, 2, replicates)
    for start in range(0, len(p.weights), batch):
        metrics.add(part(p, slice(start, start + batch)), True)
    return metrics


@pytest.mark.parametrize("task", [0, 1])
@pytest.mark.parametrize("group", [0, 1, 2])
def test_sums_and_auc_equal_their_definitions_in_every_group(group, task):
    p = drawn()
    metrics = filled(p)
    wanted = exact(p if group == 0 else part(p, p.domain == group - 1), task)
    got = summarise(metrics.total[group, task])
    area = wanted.pop("auc")
    assert got == pytest.approx(wanted, rel=1e-9)
    assert auc(metrics.histogram[group, task]) == pytest.approx(area, abs=1e-3)


def test_ne_equals_torchrecs():
    p = drawn(missing=0)
    y, w = torch.from_numpy(p.labels[:, 0]), torch.from_numpy(p.weights)
    entropy = compute_cross_entropy(y, torch.from_numpy(p.logits[:, 0]).sigmoid(), w, 1e-12).sum()
    theirs = compute_ne(entropy, w.double().sum(), (w * y).double().sum(), (w * (1 - y)).double().sum(), 1e-12)
    assert summarise(filled(p).total[0, 0])["ne"] == pytest.approx(theirs.item(), rel=1e-5)


def test_shares_of_ranks_add_up_to_a_single_pass():
    p = drawn()
    whole, merged = filled(p, 16), Metrics(2, 2, 16)
    for rank in range(3):
        merged.merge(filled(part(p, np.arange(rank, 4000, 3)), 16, batch=77).state())
    for name, value in whole.state().items():
        np.testing.assert_allclose(merged.state()[name], value, rtol=1e-9, atol=1e-9)


def test_perfect_and_useless_predictions_have_known_scores():
    y = np.tile(np.array([[0.0], [1.0]], np.float32), (50, 1))
    w, ids = np.ones(100, np.float32), np.arange(100)
    domain = np.full(100, -1, np.int32)

    def scored(logits: np.ndarray) -> tuple[float, float]:
        metrics = Metrics(0, 1, 0)
        metrics.add(Predictions(logits.astype(np.float32), y, w, domain, ids), True)
        return summarise(metrics.total[0, 0])["ne"], auc(metrics.histogram[0, 0])

    assert scored(np.zeros((100, 1))) == (pytest.approx(1), 0.5)
    assert scored(40 * (y - 0.5)) == (pytest.approx(0, abs=1e-8), 1.0)
    assert scored(-40 * (y - 0.5))[1] == 0.0


def test_one_class_or_nothing_gives_nan_and_no_error():
    metrics = Metrics(0, 1, 0)
    assert np.isnan(summarise(metrics.total[0, 0])["ne"]) and np.isnan(auc(metrics.histogram[0, 0]))
    ones = np.ones((3, 1), np.float32)
    metrics.add(Predictions(ones, ones, ones[:, 0], np.full(3, -1, np.int32), np.arange(3)), True)
    assert np.isnan(summarise(metrics.total[0, 0])["ne"]) and summarise(metrics.total[0, 0])["base_rate"] == 1


def test_examples_before_the_evaluated_slices_count_in_the_slice_alone():
    metrics = Metrics(2, 2, 4)
    metrics.add(drawn(100), False)
    assert metrics.slice.any() and not (metrics.total.any() or metrics.histogram.any() or metrics.replicates.any())


# ---------------------------------------------------------------- bootstrap


def test_bootstrap_weights_are_poisson_of_the_user():
    draws = Metrics(0, 1, 200)._draws(np.arange(5000))
    assert draws.mean() == pytest.approx(1, abs=0.005) and draws.var() == pytest.approx(1, abs=0.01)
    shares = [(draws == k).mean() for k in range(4)]
    assert shares == pytest.approx([0.3679, 0.3679, 0.1839, 0.0613], abs=0.002)
    # replicates, and users, are uncorrelated
    assert np.abs(np.corrcoef(draws.T)[np.triu_indices(200, 1)]).max() < 0.08
    again = Metrics(3, 2, 200)._draws(np.array([17, 4, 17]))
    assert np.array_equal(again, draws[[17, 4, 17]])


def test_fewer_replicates_are_a_prefix_of_more():
    assert np.array_equal(Metrics(0, 1, 7)._draws(np.arange(50)), Metrics(0, 1, 200)._draws(np.arange(50))[:, :7])


def test_replicates_equal_resampled_sums():
    p = drawn(600)
    metrics = filled(p, 5)
    draws = metrics._draws(p.users)
    for r in range(5):
        resampled = Predictions(p.logits, p.labels, p.weights * draws[:, r].astype(np.float32), p.domain, p.users)
        assert replicate_ne(metrics.replicates[:, 0, 0])[r] == pytest.approx(exact(resampled, 0)["ne"], rel=1e-6)


def test_intervals_cover_the_truth_where_users_cluster():
    """Each user repeats one label: an interval that took examples as independent would be 3 times too narrow."""
    rng, covered, width, trials = np.random.default_rng(0), 0, [], 60
    rate, logit, n_users, each = 0.3, np.float32(-0.4), 400, 9
    q = 1 / (1 + np.exp(-logit))
    truth = -(rate * np.log(q) + (1 - rate) * np.log(1 - q))
    for trial in range(trials):
        users = np.repeat(np.arange(n_users) + 1000 * trial, each)
        y = np.repeat(rng.random(n_users) < rate, each).astype(np.float32)[:, None]
        metrics = Metrics(0, 1, 200)
        n = len(users)
        metrics.add(
            Predictions(np.full((n, 1), logit), y, np.ones(n, np.float32), np.full(n, -1, np.int32), users), True
        )
        weight, _, _, loss = metrics.replicates[:, 0, 0].T
        low, high = np.quantile(loss / weight, [0.025, 0.975])
        covered += low <= truth <= high
        width.append(high - low)
    assert 0.87 <= covered / trials <= 1.0
    independent = 2 * 1.96 * np.abs(np.log(q / (1 - q))) * np.sqrt(rate * (1 - rate) / (n_users * each))
    assert np.mean(width) == pytest.approx(3 * independent, rel=0.1)

"""The three distillation methods against their formulas in plain torch. b = 12 examples, t = 2 tasks, w = 5."""

import pytest
import torch
from torch import Tensor, nn

from exfm.distillation.config import AdapterConfig, LearnConfig
from exfm.distillation.heads import DistillationHeads, StudentAdapter
from exfm.trainer.env import RankEnv, process_group
from exfm.trainer.objective import Adapter
from tests.distillation.toy import METHODS, TWO, B, T, W, a_batch, bce, label_part, objective, soft_part, step


@pytest.fixture(autouse=True)
def group():
    with process_group(RankEnv(), torch.device("cpu"), 60):
        yield


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.7])
def test_single_head_adds_the_scaled_teacher_loss_to_the_served_head(alpha):
    o, batch = objective("single_head", loss_weight=3.0, label_scale=alpha), a_batch()
    assert batch.supervision is not None
    target = torch.tensor(
        [[min(alpha / (1 + torch.exp(-v).item()), 1.0) for v in row] for row in batch.supervision[:, 0]]
    )
    logits, _ = o.served(batch.dense, torch.empty(B, 0))
    wanted = (label_part(o, batch) + 3.0 * soft_part(logits, target, batch)) / batch.weights.sum()
    loss, grads = step(o, batch)
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    reference = torch.autograd.grad(wanted, list(o.served.parameters()))
    for got, want in zip(grads.values(), reference, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("beta", [1.0, 0.25])
def test_auxiliary_head_learns_the_teacher_and_scales_its_share_of_the_backbone(beta):
    o, batch = objective("auxiliary_head", loss_weight=2.0, gradient_scale=beta, hidden=(4,)), a_batch()
    assert o.heads is not None and batch.supervision is not None
    _, x = o.served(batch.dense, torch.empty(B, 0))
    x = beta * x + (1 - beta) * x.detach()
    by_teacher = o.heads.forward(x)
    scale = 1 / batch.weights.sum()
    soft = 2.0 * soft_part(by_teacher[:, 0, 0], batch.supervision[:, 0].sigmoid(), batch) * scale
    # DistillationHeads scales by beta itself: undo it in this reference
    backbone = torch.autograd.grad(soft, list(o.served.backbone.parameters()), retain_graph=True)
    heads = torch.autograd.grad(soft, list(o.heads.parameters()))
    hard = label_part(o, batch) * scale
    labels = torch.autograd.grad(hard, list(o.served.backbone.parameters()))
    loss, grads = step(o, batch)
    assert loss == pytest.approx((hard + soft).item(), rel=1e-5)
    for i, name in enumerate(("weight", "bias")):
        torch.testing.assert_close(grads[f"served.backbone.{name}"], labels[i] + backbone[i] / beta)
    for got, want in zip([g for n, g in grads.items() if n.startswith("heads.")], heads, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("method", METHODS[1:])
def test_distillation_never_reaches_the_served_head(method):
    _, grads = step(objective(method), a_batch(labels=False))
    assert all((grads[f"served.head.{n}"] == 0).all() for n in ("weight", "bias"))
    assert all((grads[f"served.backbone.{n}"] != 0).any() for n in ("weight", "bias"))


@pytest.mark.parametrize("method", METHODS[1:])
def test_gradient_scale_changes_the_backbones_share_alone(method):
    losses, grads = zip(
        *(step(objective(method, gradient_scale=b), a_batch(labels=False)) for b in (1, 0.5, 4, 0)), strict=True
    )
    assert len(set(losses)) == 1
    for beta, got in zip((1, 0.5, 4, 0), grads, strict=True):
        for name, gradient in got.items():
            factor = beta if name.startswith("served.backbone") else 1
            # powers of two: exact
            assert torch.equal(gradient, grads[0][name] * factor), (beta, name)


@pytest.mark.parametrize("fit", ["current", "previous"])
def test_student_adapter_follows_algorithm_1(fit):
    """Fit y^SA on labels, then use its detached value as target of the second head; `previous` uses it before the fit."""
    o, batch = objective("student_adapter", adapter=AdapterConfig(fit=fit, lr=0.05, hidden=(3,))), a_batch()
    assert (
        o.adapter is not None
        and o.heads is not None
        and batch.supervision is not None
        and batch.supervision_mask is not None
    )
    mine = [p.detach().clone().requires_grad_() for p in o.adapter.parameters()]
    adam = torch.optim.Adam(mine, lr=0.05)
    logits, weights = batch.supervision[:, 0], batch.weights
    for _ in range(3):
        targets = [adapted(mine, logits).sigmoid().detach()]
        hard = torch.zeros(())
        for i in range(B):
            for t in range(T):
                if batch.supervision_mask[i, 0, t] and not batch.labels[i, t].isnan():
                    hard = hard + weights[i] * bce(adapted(mine, logits)[i, t], batch.labels[i, t])
        adam.zero_grad()
        (hard / weights.sum()).backward()
        adam.step()
        targets.append(adapted(mine, logits).sigmoid().detach())
        target = targets[1] if fit == "current" else targets[0]
        _, x = o.served(batch.dense, torch.empty(B, 0))
        first, second = o.heads(x)[:, :, 0].unbind(1)
        wanted = label_part(o, batch) + soft_part(first, logits.sigmoid(), batch) + soft_part(second, target, batch)
        loss, _ = o(batch, torch.empty(B, 0))
        assert loss.item() == pytest.approx((wanted / weights.sum()).item(), rel=1e-5)
        for got, want in zip(o.adapter.parameters(), mine, strict=True):
            torch.testing.assert_close(got, want)
    assert (targets[0] - targets[1]).abs().max() > 1e-3  # the two orders differ


def adapted(parameters: list[Tensor], logits: Tensor) -> Tensor:
    """y^SA [b, t] = y^F + MLP_t(y^F): one vector of in weights [t, 3], in biases, out weights, out biases [t]."""
    (vector,) = parameters
    w1, b1, w2 = (part.view(T, 3) for part in vector[: 9 * T].split(3 * T))
    hidden = (logits[:, :, None] * w1 + b1).relu()
    return logits + (hidden * w2).sum(2) + vector[9 * T :]


@pytest.mark.parametrize("method", METHODS)
def test_a_row_without_a_prediction_learns_from_its_label_alone(method):
    batch, other = a_batch(), a_batch()
    assert other.supervision is not None
    other.supervision[[2, 7]] = 5.0  # what lies under the mask
    results = []
    for b in (batch, other):
        o = objective(method)
        loss, grads = step(o, b)
        results.append((loss, grads, list(o.parameters())))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][n], results[1][1][n]) for n in results[0][1])
    assert all(torch.equal(a, b) for a, b in zip(results[0][2], results[1][2], strict=True))
    # all rows masked: exactly the undistilled loss
    o = objective(method)
    loss, _ = step(o, a_batch(masked=tuple(range(B))))
    assert loss == pytest.approx((label_part(o, batch) / batch.weights.sum()).item(), rel=1e-6)


@pytest.mark.parametrize("hidden", [(), (4,), (3, 5)])
def test_the_adapters_gradient_by_hand_is_autograds(hidden):
    k, g = 6, torch.Generator().manual_seed(3)
    mlps = StudentAdapter(hidden, k).double()
    nn.init.normal_(mlps.parameter, generator=g)
    logits = torch.randn(9, k, generator=g).double()
    labels, weights = (torch.rand(9, k, generator=g) < 0.5).double(), torch.rand(9, k, generator=g).double()
    wanted = torch.autograd.grad(bce(mlps(logits), labels, weights, reduction="sum"), mlps.parameter)[0]
    adapted, gradient = mlps.gradient(logits, labels, weights)
    assert torch.equal(adapted, mlps(logits))
    torch.testing.assert_close(gradient, wanted)


def test_each_distillation_head_is_a_head_of_its_own():
    """Against Linear and ReLU, head by head."""
    learn = LearnConfig(teachers=TWO, hidden=(4, 3))
    heads, x = DistillationHeads(learn, W, T), torch.randn(B, W)
    y = heads(x)
    assert y.shape == (B, 2, 2, T)
    for k in range(4):
        value = (x @ heads.first.weight[4 * k : 4 * k + 4].T + heads.first.bias[4 * k : 4 * k + 4]).relu()
        value = (value @ heads.weights[0][k] + heads.biases[0][k]).relu()
        torch.testing.assert_close(y[:, k // 2, k % 2], value @ heads.weights[1][k] + heads.biases[1][k])


def test_the_adapter_starts_as_the_identity():
    learn = LearnConfig(supervision="log", method="student_adapter")
    logits = torch.randn(5, T)
    assert torch.equal(Adapter(learn, T).mlps(logits), logits)

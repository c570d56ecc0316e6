"""The three distillation methods against their formulas in plain torch. b = 12 examples, t = 2 tasks, w = 5."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from exfm.data.batch import Batch
from exfm.distillation.config import AdapterConfig, LearnConfig
from exfm.distillation.heads import DistillationHeads
from exfm.trainer.env import RankEnv, process_group
from exfm.trainer.objective import Adapter, Objective

B, T, W = 12, 2, 5
METHODS = ["single_head", "auxiliary_head", "student_adapter"]
bce = F.binary_cross_entropy_with_logits


class Toy(nn.Module):
    """A served model: linear backbone, linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(3, W), nn.Linear(W, T)

    def forward(self, dense: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        x = self.backbone(dense)
        return self.head(x), x


@pytest.fixture(autouse=True)
def group():
    with process_group(RankEnv(), torch.device("cpu"), 60):
        yield


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
    by_teacher, _ = o.heads.forward(x)
    scale = 1 / batch.weights.sum()
    soft = 2.0 * soft_part(by_teacher[:, 0], batch.supervision[:, 0].sigmoid(), batch) * scale
    # DistillationHeads scales by beta itself: undo it in this reference
    backbone = torch.autograd.grad(soft, list(o.served.backbone.parameters()), retain_graph=True)
    heads = torch.autograd.grad(soft, list(o.heads.teacher.parameters()))
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
        first, second = o.heads(x)
        wanted = label_part(o, batch) + soft_part(first[:, 0], logits.sigmoid(), batch)
        wanted = wanted + soft_part(second[:, 0], target, batch)
        loss, _ = o(batch, torch.empty(B, 0))
        assert loss.item() == pytest.approx((wanted / weights.sum()).item(), rel=1e-5)
        for got, want in zip(o.adapter.parameters(), mine, strict=True):
            torch.testing.assert_close(got, want)
    assert (targets[0] - targets[1]).abs().max() > 1e-3  # the two orders differ


def adapted(parameters: list[Tensor], logits: Tensor) -> Tensor:
    """y^SA [b, t] = y^F + MLP_t(y^F): for each task in, out weights and biases."""
    columns = []
    for t in range(T):
        w1, b1, w2, b2 = parameters[4 * t : 4 * t + 4]
        y = logits[:, t : t + 1]
        columns.append(y + (y @ w1.T + b1).relu() @ w2.T + b2)
    return torch.cat(columns, 1)


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


def test_the_adapter_starts_as_the_identity():
    learn = LearnConfig(supervision="log", method="student_adapter")
    logits = torch.randn(5, T)
    assert torch.equal(Adapter(learn, T).mlps[0](logits), logits)

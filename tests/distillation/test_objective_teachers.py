"""Several teachers in one loss, and Rec-Distill's forms of it, against their formulas. b = 12 examples, t = 2 tasks, w = 5."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from exfm.data.batch import Batch
from exfm.distillation.config import LearnConfig
from exfm.distillation.heads import DistillationHeads
from exfm.trainer.env import RankEnv, process_group
from exfm.trainer.objective import Adapter, Objective
from tests.distillation.toy import METHODS, TWO, B, T, Toy, W, a_batch, bce, label_part, objective, step


@pytest.fixture(autouse=True)
def group():
    with process_group(RankEnv(), torch.device("cpu"), 60):
        yield


# ---------------------------------------------------------------- several teachers


def two_teachers(method: str, offsets: tuple[float, ...] = (0.0,) * T, **settings: Any) -> tuple[Objective, Batch]:
    """Teachers a, b; b knows task 0 alone. Distillation only: no labels."""
    learn = LearnConfig(teachers=TWO, method=method, **settings)  # type: ignore[arg-type]
    torch.manual_seed(0)
    served = Toy()
    heads = None if method == "single_head" else DistillationHeads(learn, W, T)
    adapter = Adapter(learn, T) if method == "student_adapter" else None
    if adapter is not None:
        adapter.make_optimizer(0.05)
    batch = a_batch(masked=())
    mask = torch.ones(B, 2, T, dtype=torch.bool)
    mask[:, 1, 1] = False
    both = torch.randn(B, 2, T, generator=torch.Generator().manual_seed(5)) * mask
    return Objective(served, heads, adapter, learn, offsets), replace(batch, supervision=both, supervision_mask=mask)


@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize("hidden", [(), (4,)])
def test_a_teachers_loss_reaches_its_own_heads_alone(method, hidden):
    o, batch = two_teachers(method, hidden=hidden)
    o.weigh((1.0, 0.0))
    _, grads = step(o, batch)
    width = hidden[0] if hidden else T
    own = grads["heads.first.weight"].view(-1, 2, width, W)
    assert (own[:, 0] != 0).any() and (own[:, 1] == 0).all()
    for name in [n for n in grads if n.startswith(("heads.weights", "heads.biases"))]:
        by_head = grads[name].view(-1, 2, *grads[name].shape[1:])
        assert (by_head[:, 0] != 0).any() and (by_head[:, 1] == 0).all()


@pytest.mark.parametrize("method", METHODS[1:])
def test_a_task_that_a_teacher_does_not_have_trains_no_head(method):
    o, batch = two_teachers(method)
    _, grads = step(o, batch)
    own = grads["heads.first.weight"].view(-1, 2, T, W)
    assert (own[:, 1, 1] == 0).all() and all((own[:, s, t] != 0).any() for s, t in ((0, 0), (0, 1), (1, 0)))


def test_a_single_head_learns_every_teacher_by_its_weight():
    o, batch = two_teachers("single_head", loss_weight=2.0)
    o.weigh((0.5, 3.0))
    assert batch.supervision is not None and batch.supervision_mask is not None
    logits, _ = o.served(batch.dense, torch.empty(B, 0))
    wanted = label_part(o, batch)
    for s, weight in ((0, 0.5), (1, 3.0)):
        for t in (0, 1) if s == 0 else (0,):
            losses = bce(logits[:, t], batch.supervision[:, s, t].sigmoid(), reduction="none")
            wanted = wanted + weight * (losses * batch.weights).sum()
    assert step(o, batch)[0] == pytest.approx((wanted / batch.weights.sum()).item(), rel=1e-5)


def test_every_teacher_has_an_adapter_of_its_own():
    """Teacher b's logits change nothing of what teacher a's adapter becomes."""
    states = []
    for shift in (0.0, 2.0):
        o, batch = two_teachers("student_adapter")
        assert batch.supervision is not None and o.adapter is not None
        moved = batch.supervision + shift * torch.tensor([[[0.0], [1.0]]])
        for _ in range(3):
            step(o, replace(batch, supervision=moved))
        parts = zip(o.adapter.mlps.parameter.split(o.adapter.mlps.sizes), o.adapter.mlps.shapes, strict=True)
        states.append([part.view(2, T, -1) for part, _ in parts])
    for first, second in zip(*states, strict=True):
        assert torch.equal(first[0], second[0])
    assert any(not torch.equal(first[1], second[1]) for first, second in zip(*states, strict=True))


# ---------------------------------------------------------------- Rec-Distill


@pytest.mark.parametrize("method", METHODS[1:])
def test_the_label_part_of_an_auxiliary_head_keeps_weight_1(method):
    """aux = task + alpha x distill, of the examples that have a prediction; the served head learns labels alone."""
    o, batch = objective(method, loss_weight=3.0, auxiliary_labels=True), a_batch()
    plain = objective(method, loss_weight=3.0)
    assert o.heads is not None and batch.supervision_mask is not None
    own = o.heads(o.served(batch.dense, torch.empty(B, 0))[1])[:, 0, 0]
    rows = [i for i in range(B) if batch.supervision_mask[i].all()]
    hard = torch.zeros(())
    for i in rows:
        for t in range(T):
            if not batch.labels[i, t].isnan():
                hard = hard + batch.weights[i] * bce(own[i, t], batch.labels[i, t])
    (loss, grads), (without, _) = step(o, batch), step(plain, a_batch())
    assert loss - without == pytest.approx((hard / batch.weights.sum()).item(), rel=1e-4)
    zero = objective(method, loss_weight=0.0, auxiliary_labels=True)
    undistilled = objective(method, loss_weight=0.0)
    backbone = "served.backbone.weight"
    assert not torch.equal(step(zero, a_batch())[1][backbone], step(undistilled, a_batch())[1][backbone])
    assert not torch.equal(grads[backbone], torch.zeros_like(grads[backbone]))


@pytest.mark.parametrize("method", METHODS)
def test_teachers_go_through_the_students_own_correction(method):
    """With negatives kept at rate r all logits get -log r inside the loss; label scaling acts on that probability."""
    rates = (0.25, 1.0)
    offsets = tuple(-math.log(r) + 0.0 for r in rates)
    o, shifted = objective(method, label_scale=1.5), objective(method, label_scale=1.5)
    o.offsets = torch.tensor(offsets)
    batch = a_batch()
    assert batch.supervision is not None
    given = step(o, batch)[0]
    with torch.no_grad():
        shifted.served.head.bias += torch.tensor(offsets)
    sampled = replace(batch, supervision=batch.supervision + torch.tensor(offsets))
    assert given == pytest.approx(step(shifted, sampled)[0], rel=1e-6)
    assert given != pytest.approx(step(objective(method, label_scale=1.5), batch)[0], rel=1e-3)

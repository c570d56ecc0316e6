"""Many students at once: the product's own modules, with the parameters of m students stacked.

They differ in their teacher's logits and their distillation alone, so they see the same batches and one batched product serves
them all: a hundred students in the time of a few. Each does what its job would do in one process (tests/benchmarks/test_optimum.py
holds it against `run_job`). m students, f features, b examples, w backbone width, d embedding width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from exfm.data.batch import Batch
from exfm.data.manifest import open_stream
from exfm.data.reader import open_slice
from exfm.distillation.heads import StudentAdapter
from exfm.embeddings.tables import fill_initial
from exfm.trainer.build import build_dense
from exfm.trainer.columns import batch_columns
from exfm.trainer.config import JobConfig

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Student:
    """logits [s, n]: what its teacher says of every example; None: no teacher. method, weight, fit: as in LearnConfig.

    fit `never` is an adapter of learning rate 0: the adapted head, too, learns what the teacher says.
    """

    logits: NDArray[np.float32] | None = None
    method: str = ""
    weight: float = 0.0
    fit: str = "current"


class Fleet:
    """Students of one job config, whose own distillation section is not looked at. adapted: a config with a student adapter."""

    def __init__(
        self, config: JobConfig, adapted: JobConfig, auxiliary: JobConfig, students: Sequence[Student]
    ) -> None:
        self.config, self.students, m = config, students, len(students)
        self.served, _, _ = build_dense(config, CPU)
        self.dense = {
            n: nn.Parameter(p.detach().expand(m, *p.shape).clone()) for n, p in self.served.named_parameters()
        }
        # what a method lacks has weights too, which no loss reaches
        parts = {"student_adapter": build_dense(adapted, CPU), "auxiliary_head": build_dense(auxiliary, CPU)}
        first = {name: built[1].first for name, built in parts.items() if built[1] is not None}
        width = self.served.backbone.out_width
        self.head_w, self.head_b = nn.Parameter(torch.zeros(m, width, 2)), nn.Parameter(torch.zeros(m, 2))
        with torch.no_grad():
            for i, student in enumerate(students):
                if student.method in first:
                    own = first[student.method]
                    self.head_w[i, :, : own.out_features], self.head_b[i, : own.out_features] = own.weight.t(), own.bias
        one = parts["student_adapter"][2]
        assert one is not None and adapted.distillation.learn is not None
        self.adapter = StudentAdapter(adapted.distillation.learn.adapter.hidden, m)
        pieces = one.mlps.parameter.detach().split(one.mlps.sizes)
        self.adapter.parameter = nn.Parameter(torch.cat([piece.repeat(m) for piece in pieces]))
        d = config.optim.dense
        dense = [*self.dense.values(), self.head_w, self.head_b]
        self.optimizers = [
            torch.optim.Adam(dense, lr=d.lr, betas=d.betas, eps=d.eps, fused=True),
            torch.optim.Adam([self.adapter.parameter], lr=adapted.distillation.learn.adapter.lr, fused=True),
        ]
        self.weights = {
            method: torch.tensor([s.weight * (s.method in methods) for s in students])[:, None]
            for method, methods in {
                "served": ("single_head",),
                "teacher": ("auxiliary_head", "student_adapter"),
                "adapted": ("student_adapter",),
            }.items()
        }
        self.fit_first, self.fits = (
            torch.tensor([s.fit in fits for s in students])[:, None] for fits in (("current",), ("current", "previous"))
        )

    def train(self) -> NDArray[np.float64]:
        """Logits [m, s, n] made before each example was learned; NaN where an example is none of the domain's."""
        stream, config = open_stream(self.config.stream.path), self.config.stream
        num_slices = stream.info.num_slices
        assert num_slices is not None
        columns = batch_columns(self.config, stream)
        slices = range(config.first, num_slices)
        batches = {i: list(open_slice(stream, config, columns, i, 0, 0, 1).batches()) for i in slices}
        self._make_tables([b for own in batches.values() for b in own])
        features = [stream.manifest(i, "features") for i in range(num_slices)]
        rows = max(sum(p.rows for p in f.parts) for f in features if f is not None)
        found = np.full((len(self.students), num_slices, rows), np.nan)
        for index, own in batches.items():
            for batch in own:
                found[:, index, batch.rows.numpy()] = self._step(batch, index).numpy()
        return found

    # ---------------------------------------------------------------- tables: only rows that are looked up

    def _make_tables(self, batches: Sequence[Batch]) -> None:
        ids = torch.cat([b.sparse.values().view(len(self.config.features.sparse), -1) for b in batches], 1)
        self.tables, self.sums, self.known = [], [], []
        for feature, own in zip(self.config.features.sparse, ids, strict=True):
            table, known = self.config.tables[feature.table], own.unique()
            whole = torch.empty(table.rows, table.width)
            fill_initial(whole, feature.table, table, self.config.run.seed, 0, 0)
            self.tables.append(whole[known].expand(len(self.students), -1, -1).clone())
            self.sums.append(torch.zeros(len(self.students), len(known), 1))
            self.known.append(known)

    def _update_tables(self, rows: Sequence[Tensor], gradient: Tensor) -> None:
        """Row-wise Adagrad of the looked-up rows from the gradient of pooled embeddings [m, b, f x d]."""
        optim, start = self.config.optim.tables, 0
        for table, total, own in zip(self.tables, self.sums, rows, strict=True):
            width = table.shape[2]
            g = torch.zeros_like(table).index_add_(1, own, gradient[:, :, start : start + width])
            start += width
            total += g.square().mean(dim=2, keepdim=True)
            table.addcdiv_(g, total.sqrt().add_(optim.eps), value=-optim.lr)

    # ---------------------------------------------------------------- a step

    def _step(self, batch: Batch, index: int) -> Tensor:
        """Train on one batch; logits [m, b] before the update."""
        ids = batch.sparse.values().view(len(self.known), -1)
        rows = [torch.searchsorted(known, own) for known, own in zip(self.known, ids, strict=True)]
        pooled = torch.cat([t[:, own] for t, own in zip(self.tables, rows, strict=True)], 2).requires_grad_()
        forward = torch.func.vmap(
            lambda p, x: torch.func.functional_call(self.served, p, (batch.dense, x)), randomness="error"
        )
        logits, x = forward(self.dense, pooled)
        logits, heads = logits[:, :, 0], torch.baddbmm(self.head_b[:, None], x, self.head_w)
        labels = batch.labels[:, 0].expand_as(logits)
        z = torch.from_numpy(np.stack([self._says(s, index, batch.rows.numpy()) for s in self.students]))
        target, adapted, w = torch.sigmoid(z), self._adapt(z, labels), self.weights
        bce = F.binary_cross_entropy_with_logits
        losses = bce(logits, labels, reduction="none") + w["served"] * bce(logits, target, reduction="none")
        losses = losses + w["teacher"] * bce(heads[:, :, 0], target, reduction="none")
        losses = losses + w["adapted"] * bce(heads[:, :, 1], adapted, reduction="none")
        self.optimizers[0].zero_grad()
        losses.mean(dim=1).sum().backward()
        self.optimizers[0].step()
        assert pooled.grad is not None
        self._update_tables(rows, pooled.grad)
        return logits.detach()

    def _says(self, student: Student, index: int, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return np.zeros(len(rows), np.float32) if student.logits is None else student.logits[index, rows]

    @torch.no_grad()
    def _adapt(self, z: Tensor, labels: Tensor) -> Tensor:
        """Fit every adapter; its targets [m, b], from after the fit or from before it."""
        flat = z.t().contiguous()
        weights = torch.full_like(flat, 1 / len(flat))
        before, gradient = self.adapter.gradient(flat, labels.t(), weights)
        self.adapter.parameter.grad = gradient
        self.optimizers[1].step()
        adapted = torch.where(self.fit_first, self.adapter(flat).t(), before.t())
        return torch.sigmoid(torch.where(self.fits, adapted, z))

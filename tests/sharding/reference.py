"""The small job of tests/trainer/jobs.py once more: one process, plain torch, nothing of exfm but the ids' hash.

Embedding bags by index_add, a DCN-V2 written out, its own row-wise Adagrad, torch's Adam, warm-up and clipping, in any float
type. b examples, f features.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from exfm.embeddings.config import SparseFeature, TableConfig
from exfm.embeddings.ids import IdMap


class Reference:
    """State under canonical names, as in a checkpoint; accumulators have one column per column shard of their table."""

    def __init__(self, raw: dict[str, Any], initial: dict[str, Tensor], dtype: torch.dtype) -> None:
        self.raw, self.dtype, self.steps = raw, dtype, 0
        self.tables = {n: initial[f"tables.{n}.weight"].to(dtype).clone() for n in raw["tables"]}
        self.sums = {n: initial[f"tables.{n}.adagrad_sum"].to(dtype).clone() for n in raw["tables"]}
        prefix = "dense.served."
        self.dense = {
            k.removeprefix(prefix): v.to(dtype).clone().requires_grad_()
            for k, v in initial.items()
            if k.startswith(prefix)
        }
        optim = raw["optim"]["dense"]
        self.adam = torch.optim.Adam(self.dense.values(), lr=optim["lr"], eps=optim["eps"])

    def step(self, rows: pa.Table) -> float:
        """One update on one global batch; the loss before it."""
        leaves = {n: t.clone().requires_grad_() for n, t in self.tables.items()}
        logits = self._model(self._dense(rows), torch.cat([self._pool(f, leaves, rows) for f in self._features()], 1))
        weights = torch.tensor(rows.column("importance").to_numpy()).to(self.dtype)
        loss = torch.zeros((), dtype=self.dtype)
        for t, task in enumerate(self.raw["heads"]["tasks"]):
            label = torch.from_numpy(np.array(rows.column(task).to_pylist(), dtype=np.float64)).to(self.dtype)
            seen = ~label.isnan()
            loss = loss + (
                F.binary_cross_entropy_with_logits(logits[seen, t], label[seen], weights[seen], reduction="sum")
            )
        loss = loss / weights.sum()
        loss.backward()
        self._update_dense()
        self._update_tables(leaves)
        self.steps += 1
        return loss.item()

    def _features(self) -> list[dict[str, Any]]:
        return self.raw["features"]["sparse"]

    def _dense(self, rows: pa.Table) -> Tensor:
        price = [v or 0.0 for v in rows.column("price").to_pylist()]
        age = np.log1p(np.array(rows.column("age_s").to_pylist(), np.float32))
        return torch.tensor(np.stack([np.array(price, np.float32), age], axis=1)).to(self.dtype)

    def _pool(self, feature: dict[str, Any], leaves: dict[str, Tensor], rows: pa.Table) -> Tensor:
        """[b, width]: the sum or mean over an example's list, 0 for an empty one."""
        spec = self.raw["tables"][feature["table"]]
        cells = rows.column(feature["name"]).to_pylist()
        ids = [cell if isinstance(cell, list) else [] if cell is None else [cell] for cell in cells]
        flat = np.array([i for row in ids for i in row], np.int64)
        to_rows = IdMap(SparseFeature(**feature), TableConfig(**spec))
        lengths = np.array([len(row) for row in ids])
        found = leaves[feature["table"]][torch.from_numpy(to_rows(flat, lengths, np.arange(len(ids))))]
        if feature.get("weighted"):
            weights = [w for row in rows.column("tag_weights").to_pylist() for w in row]
            found = found * torch.tensor(weights, dtype=torch.float32).to(self.dtype)[:, None]
        owner = torch.from_numpy(np.repeat(np.arange(len(ids)), lengths))
        out = torch.zeros(len(ids), spec["width"], dtype=self.dtype).index_add(0, owner, found)
        if spec.get("pooling") == "mean":
            out = out / torch.from_numpy(np.maximum(lengths, 1)).to(self.dtype)[:, None]
        return out

    def _model(self, dense: Tensor, pooled: Tensor) -> Tensor:
        p = self.dense
        x0 = x = torch.cat([dense, pooled], 1)
        for i in range(self.raw["model"]["cross_layers"]):
            c = f"backbone.crosses.{i}"
            x = x0 * (x @ p[f"{c}.v.weight"].T @ p[f"{c}.u.weight"].T + p[f"{c}.u.bias"]) + x
        deep = (x0 @ p["backbone.deep_mlp.linears.0.weight"].T + p["backbone.deep_mlp.linears.0.bias"]).relu()
        out = torch.cat([x, deep], 1)
        hidden = (out @ p["head.mlp.linears.0.weight"].T + p["head.mlp.linears.0.bias"]).relu()
        return hidden @ p["head.logits.weight"].T + p["head.logits.bias"]

    def _update_dense(self) -> None:
        optim = self.raw["optim"]["dense"]
        norm = torch.sqrt(sum((p.grad**2).sum() for p in self.dense.values()))  # type: ignore[operator, arg-type, misc]
        for p in self.dense.values():
            assert p.grad is not None
            p.grad *= min(1.0, optim["clip_norm"] / (norm.item() + 1e-6))
        self.adam.param_groups[0]["lr"] = optim["lr"] * min(1.0, (self.steps + 1) / optim["warmup_steps"])
        self.adam.step()
        self.adam.zero_grad()

    def _update_tables(self, leaves: dict[str, Tensor]) -> None:
        optim = self.raw["optim"]["tables"]
        for name, leaf in leaves.items():
            assert leaf.grad is not None
            segments = self.sums[name].shape[1]
            self.sums[name] += leaf.grad.unflatten(1, (segments, -1)).square().mean(2)
            scale = (self.sums[name].sqrt() + optim["eps"]).repeat_interleave(leaf.shape[1] // segments, 1)
            self.tables[name] -= optim["lr"] * leaf.grad / scale

    def state(self) -> dict[str, Tensor]:
        return (
            {f"tables.{n}.weight": t for n, t in self.tables.items()}
            | {f"tables.{n}.adagrad_sum": t for n, t in self.sums.items()}
            | {f"dense.served.{n}": t.detach() for n, t in self.dense.items()}
        )

"""Section `optim` and the optimisers: every parameter has exactly one.

Sharded tables: row-wise Adagrad fused into backward by FBGEMM. Data-parallel tables: the same rule as a dense optimiser,
because TorchRec drops the fused one there without a word. Dense part: Adam or AdamW with linear warm-up and clipping.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from exfm.sharding.shards import Shard

Beta = Annotated[float, Field(ge=0, lt=1)]


class DenseOptimConfig(BaseModel):
    """warmup_steps: the learning rate rises linearly from lr / warmup_steps. clip_norm: 0 does not clip."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["adam", "adamw"] = "adam"
    lr: float = Field(0.001, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0)
    clip_norm: float = Field(0.0, ge=0)


class TableOptimConfig(BaseModel):
    """Row-wise Adagrad: G += mean(g^2) per row, w -= lr g / (sqrt(G) + eps)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    lr: float = Field(0.1, gt=0)
    eps: float = Field(1e-8, gt=0)


class OptimConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    dense: DenseOptimConfig = DenseOptimConfig()
    tables: TableOptimConfig = TableOptimConfig()


class RowWiseAdagrad(torch.optim.Optimizer):
    """Row-wise Adagrad of whole tables, in fp32 whatever the dtype of the rows, as FBGEMM's fused one.

    TorchRec's keeps the accumulators in the dtype of the rows: in fp16 squares of small gradients become 0.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], lr: float, eps: float) -> None:
        super().__init__(parameters, {"lr": lr, "eps": eps})
        for p in parameters:
            self.state[p]["sum"] = torch.zeros(p.shape[0], 1, dtype=torch.float32, device=p.device)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                gradient, total = p.grad.float(), self.state[p]["sum"]
                total += gradient.square().mean(dim=1, keepdim=True)
                p.copy_(p.float().addcdiv(gradient, total.sqrt().add_(group["eps"]), value=-group["lr"]))


def dense_optimizer(config: DenseOptimConfig, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    kind = torch.optim.AdamW if config.kind == "adamw" else torch.optim.Adam
    # Adam takes DTensors and others together, but not in one group
    kinds = [[p for p in parameters if isinstance(p, DTensor) == is_sharded] for is_sharded in (True, False)]
    return kind(
        [{"params": own} for own in kinds if own],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


class Zero(Protocol):
    """What steps a model that DeepSpeed keeps: see exfm.trainer.zero."""

    def step(self, lr: float) -> None: ...

    def zero_grad(self) -> None: ...


class Optimizers:
    """What the train pipeline steps after backward.

    groups: dense modules, each clipped by its own norm, so that distillation heads cannot disturb the served model; one
    optimiser steps them all, because to call it takes longer than small heads take. shards: local table shards; those of
    data-parallel tables are stepped here. zero: the served model under DeepSpeed, which is then in no group.
    """

    def __init__(
        self, config: OptimConfig, groups: Sequence[nn.Module], shards: Sequence[Shard], zero: Zero | None = None
    ) -> None:
        self.config, self.zero = config, zero
        self.groups = [list(g.parameters()) for g in groups]
        parameters = [p for group in self.groups for p in group]
        self.dense = dense_optimizer(config.dense, parameters) if parameters else None
        self.table_parameters = [s.parameter for s in shards if s.parameter is not None]
        self.tables = (
            RowWiseAdagrad(self.table_parameters, lr=config.tables.lr, eps=config.tables.eps)
            if self.table_parameters
            else None
        )
        self.steps = 0

    @property
    def lr(self) -> float:
        """Dense learning rate of the next step."""
        d = self.config.dense
        return d.lr * min(1.0, (self.steps + 1) / d.warmup_steps) if d.warmup_steps else d.lr

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self._all():
            optimizer.zero_grad(set_to_none=set_to_none)
        if self.zero is not None:
            self.zero.zero_grad()

    def step(self) -> None:
        if self.config.dense.clip_norm:
            for parameters in self.groups:
                torch.nn.utils.clip_grad_norm_(parameters, self.config.dense.clip_norm)
        if self.zero is not None:
            self.zero.step(self.lr)
        if self.dense is not None:
            for group in self.dense.param_groups:
                group["lr"] = self.lr
            self.dense.step()
        if self.tables is not None:
            self.tables.step()
        self.steps += 1

    def _all(self) -> list[torch.optim.Optimizer]:
        return [optimizer for optimizer in (self.dense, self.tables) if optimizer is not None]

    def accumulator(self, parameter: nn.Parameter) -> Tensor:
        """Row-wise Adagrad state [rows] of a data-parallel table, a live view."""
        assert self.tables is not None
        return self.tables.state[parameter]["sum"].view(-1)


def adam_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Live Adam state (step, exp_avg, exp_avg_sq) of a parameter; made, as the first step would, where it is missing."""
    state: dict[str, Any] = optimizer.state[parameter]
    if not state:
        # a fused optimiser reads the step beside the parameter
        device = parameter.device if optimizer.defaults["fused"] else None
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    return state

"""What the dense part of a job takes on one rank, found by one traced step on the meta device: nothing is allocated."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from exfm.sharding.memory import DenseMemory
from exfm.trainer.build import build_dense
from exfm.trainer.config import JobConfig
from exfm.trainer.engines import gathered, zero_held, zero_passing

META = torch.device("meta")
FLOAT = 4


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations made and that something still holds, and the most since `restart`."""

    def __init__(self, others: Iterable[Tensor]) -> None:
        """others: tensors whose storages do not count, though operations return views of them."""
        super().__init__()
        self.bytes = self.peak = 0
        self.known = WeakIdKeyDictionary()
        for tensor in others:
            self.known[tensor.untyped_storage()] = 0

    def watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self.known:
            return
        size = storage.nbytes()
        self.known[storage] = size
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.bytes -= size

    def restart(self) -> None:
        self.peak = self.bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.watch(leaf)
        return out


class _Entrance(torch.autograd.Function):
    """Where the gradient leaves the dense part: its storage's size is noted, the gradient dropped."""

    @staticmethod
    def forward(ctx: Any, pooled: Tensor, anchor: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        return pooled.view_as(pooled)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        ctx.sizes.append(gradients[0].untyped_storage().nbytes())
        return None, None, None


def dense_memory(config: JobConfig, local_batch: int, world_size: int) -> DenseMemory:
    """Of the served model under its dense engine and the distillation heads under DDP, for so many examples of a rank and step."""
    with META:
        served, heads, _ = build_dense(config, META)
        pooled_width = sum(config.tables[f.table].width for f in config.features.sparse)
        modules = nn.ModuleList([served] if heads is None else [served, heads])
        anchor, sizes = torch.zeros((), requires_grad=True), list[int]()
        # DDP copies every gradient into its bucket as soon as it is there
        for p in modules.parameters():
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        dense = torch.empty(local_batch, len(config.features.dense))
        with Alive([*modules.parameters(), dense, anchor]) as alive:
            pooled = torch.empty(local_batch, pooled_width)
            entered = _Entrance.apply(pooled, anchor, sizes)
            logits, x = served(dense, entered)
            outputs = [logits.sum()] + ([] if heads is None else [heads(x).sum()])
            del pooled, entered, logits, x
            forward, saved = alive.peak, alive.bytes
            alive.restart()
            torch.autograd.backward(outputs)
            backward = alive.peak
    if config.dense_engine.kind == "ddp":
        weights = FLOAT * sum(p.numel() for p in modules.parameters())
        return DenseMemory(weights, weights, 2 * weights, saved, forward, backward, sizes[0])
    engine = config.dense_engine
    if engine.kind == "deepspeed":
        held = zero_held(engine.stage, served, world_size)
        of_heads = 0 if heads is None else sum(p.numel() for p in heads.parameters())
        weights, gradients, optimiser = (FLOAT * (n + k * of_heads) for n, k in zip(held, (1, 1, 2), strict=True))
        in_forward, in_backward, in_update = (FLOAT * n for n in zero_passing(engine.stage, served, world_size))
        largest = FLOAT * max(p.numel() for p in served.parameters())  # its gradient is counted with what is sent
        backward = max(max(backward - largest, saved) + in_backward, in_update)
        return DenseMemory(weights, gradients, optimiser, saved, forward + in_forward, backward, sizes[0])
    shards = engine.shards(world_size)
    # cut by the first dimension, so that a bias of 7 over 8 ranks is 1 on each
    own = sum(-(-p.shape[0] // shards) * p[0].numel() for p in served.parameters())
    weights = FLOAT * (own + sum(p.numel() for p in (heads.parameters() if heads is not None else ())))
    in_forward, in_backward = (FLOAT * n for n in gathered(served))
    largest = FLOAT * max(p.numel() for p in served.parameters())  # its gradient is counted with what is gathered
    backward = max(backward - largest, saved) + in_backward
    return DenseMemory(weights, weights, 2 * weights, saved, forward + in_forward, backward, sizes[0])

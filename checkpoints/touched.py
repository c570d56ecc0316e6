"""Which rows of sharded tables training has changed, known before it changes them.

A hook on every lookup sees the rows that the step will update: it marks them (deltas) and, while a copy-on-write save runs,
keeps what they held. Rows of data-parallel tables change on every rank with any rank's lookups: marks are united over ranks.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from exfm.checkpoints.sources import Guard
from exfm.sharding.shards import Kernel, Shard


class _Group:
    """The tables of one kernel, their rows numbered one after the other."""

    def __init__(self, kernel: Kernel) -> None:
        self.shards = kernel.shards
        device = self.shards[0].weight.device
        rows = [len(s.weight) for s in self.shards]
        self.first = [sum(rows[:i]) for i in range(len(rows) + 1)]
        # the KeyedJaggedTensor of a kernel has the features of its first table, then of the second, ...
        by_feature = [self.first[i] for i, n in enumerate(kernel.features_of_table) for _ in range(n)]
        self.base = torch.tensor(by_feature, dtype=torch.int64, device=device)
        self.marks = torch.zeros(self.first[-1], dtype=torch.bool, device=device)
        self.guards: list[Guard | None] = [None] * len(rows)

    def before_lookup(self, module: nn.Module, args: tuple[KeyedJaggedTensor, ...]) -> None:
        if not torch.is_grad_enabled():
            return
        features = args[0]
        values, lengths = features.values(), features.lengths()
        per_list = self.base.repeat_interleave(len(lengths) // len(self.base))
        # output_size is known on the host: no synchronisation
        rows = values + per_list.repeat_interleave(lengths, output_size=len(values))
        self.marks[rows] = True
        for i, guard in enumerate(self.guards):
            if guard is not None and not guard.finished:
                own = rows[(rows >= self.first[i]) & (rows < self.first[i + 1])]
                guard.before_update(own - self.first[i])


class Touched:
    """Marks of all shards of this rank, since the last `clear`."""

    def __init__(self, kernels: Sequence[Kernel]) -> None:
        self._groups = [_Group(k) for k in kernels if k.shards]
        self._hooks = [
            k.module.register_forward_pre_hook(g.before_lookup)
            for k, g in zip([k for k in kernels if k.shards], self._groups, strict=True)
        ]
        self.shards: list[Shard] = [s for g in self._groups for s in g.shards]
        self.marks: list[Tensor] = [
            g.marks[g.first[i] : g.first[i + 1]] for g in self._groups for i in range(len(g.shards))
        ]

    def rows(self) -> list[Tensor]:
        """Rows [n] i64, ascending, that each of `shards` may have changed in. All ranks call."""
        for shard, marks in zip(self.shards, self.marks, strict=True):
            if shard.parameter is not None:
                united = marks.to(torch.uint8)
                dist.all_reduce(united, op=dist.ReduceOp.MAX)
                marks.copy_(united)
        return [marks.nonzero().view(-1) for marks in self.marks]

    def clear(self) -> None:
        for group in self._groups:
            group.marks.zero_()

    def guard(self, guards: Sequence[Guard | None]) -> None:
        """Have these guards, one per shard or none, asked before every update."""
        left = list(guards)
        for group in self._groups:
            group.guards, left = left[: len(group.shards)], left[len(group.shards) :]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

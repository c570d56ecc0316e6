"""A process group of many ranks in one process: every collective answers as if all peers held what this rank holds.

So one rank of a large plan builds its real tables and takes real steps on one machine. Memory and compute are real; nothing
is communicated, and values are not those of a real job. W ranks of a group; r this rank in it.

What r gets: of an all-gather, W copies of its tensor; of an all-to-all, from every peer what r itself would send to rank r;
of a reduction, its own tensor: the mean, and not W times it, so that values stay finite over steps.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torchrec.distributed import comm

BACKEND = "exfm_loopback"


class Done(dist._Work):
    """Work that was finished before it was asked for. result: what its future holds."""

    def __init__(self, result: object) -> None:
        super().__init__()
        self.future: Future = Future()
        self.future.set_result(result)

    def wait(self, timeout: object = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def get_future(self) -> Future:
        return self.future


class LoopbackGroup(dist.ProcessGroup):
    """Rank `rank` of `size` ranks, all played by this process."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self.mine, self.count, self.title = rank, size, ""

    # ---------------------------------------------------------------- who it is; C++ asks by the second names

    def rank(self) -> int:
        return self.mine

    def size(self) -> int:
        return self.count

    @property
    def group_name(self) -> str:  # type: ignore[override]
        return self.title

    def name(self) -> str:
        return BACKEND

    getRank, getSize, getBackendName = rank, size, name

    def getGroupName(self) -> str:
        return self.title

    def setGroupName(self, name: str) -> None:
        self.title = name

    _set_group_name = setGroupName

    # ---------------------------------------------------------------- collectives; torch 2.13 renamed several

    def barrier(self, *_: object, **__: object) -> Done:
        return Done([])

    def broadcast(self, tensors: list[Tensor], *_: object) -> Done:  # type: ignore[override]
        return Done(tensors)

    def allreduce(self, tensors: list[Tensor], *_: object) -> Done:  # type: ignore[override]
        return Done(tensors)

    allreduce_coalesced = reduce = allreduce  # type: ignore[assignment]

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], *_: object) -> Done:  # type: ignore[override]
        for parts, own in zip(outputs, inputs, strict=True):
            for part in parts:
                _tile(part, own)
        return Done(outputs)

    gather = allgather  # type: ignore[assignment]

    def allgather_coalesced(self, outputs: list[list[Tensor]], inputs: list[Tensor], *_: object) -> Done:
        for parts in outputs:
            for part, own in zip(parts, inputs, strict=True):
                _tile(part, own)
        return Done(outputs)

    def all_gather_single(self, output: Tensor, own: Tensor, *_: object) -> Done:
        _tile(output, own)
        return Done([output])

    _allgather_base = all_gather_single  # type: ignore[assignment]

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], *_: object) -> Done:
        for output, own in zip(outputs, inputs, strict=True):
            _tile(output, own)
        return Done(outputs)

    allgather_into_tensor_coalesced = all_gather_single_coalesced  # type: ignore[assignment]

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], *_: object) -> Done:  # type: ignore[override]
        for output, parts in zip(outputs, inputs, strict=False):  # only the root has inputs
            output.copy_(parts[self.mine])
        return Done(outputs)

    reduce_scatter = scatter  # type: ignore[assignment]

    def reduce_scatter_single(self, output: Tensor, whole: Tensor, *_: object) -> Done:
        output.view(-1).copy_(whole.reshape(-1).chunk(self.count)[self.mine])
        return Done([output])

    _reduce_scatter_base = reduce_scatter_single  # type: ignore[assignment]

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], wholes: list[Tensor], *_: object) -> Done:
        for output, whole in zip(outputs, wholes, strict=True):
            self.reduce_scatter_single(output, whole)
        return Done(outputs)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced  # type: ignore[assignment]

    def all_to_all_single(
        self, output: Tensor, sent: Tensor, output_sizes: Sequence[int], sizes: Sequence[int], *_: object
    ) -> Done:
        own = sent.split(list(sizes))[self.mine] if sizes else sent.chunk(self.count)[self.mine]
        for part in output.split(list(output_sizes)) if output_sizes else output.chunk(self.count):
            _tile(part, own)
        return Done([output])

    alltoall_base = all_to_all_single  # type: ignore[assignment]

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], *_: object) -> Done:
        for output in outputs:
            _tile(output, inputs[self.mine])
        return Done(outputs)


def _tile(output: Tensor, own: Tensor) -> None:
    """Fill a contiguous output with copies of `own`, the last one cut; with 0 where `own` is empty: peers may hold more."""
    output, own = output.view(-1), own.reshape(-1).to(output.dtype)
    if not own.numel():
        output.zero_()
        return
    if own.untyped_storage().data_ptr() == output.untyped_storage().data_ptr():  # FSDP gathers in place
        own = own.clone()
    whole = output.numel() // own.numel() * own.numel()
    output[:whole].view(-1, own.numel()).copy_(own)
    output[whole:].copy_(own[: output.numel() - whole])


@contextmanager
def loopback_group(rank: int, world_size: int, ranks_per_node: int | None = None) -> Iterator[dist.ProcessGroup]:
    """This process is rank `rank` of `world_size` until the end: torch's default group, those made from it, TorchRec's nodes.

    ranks_per_node: all ranks are on one node where it is not given. ValueError for a rank or a node that cannot be.
    """
    ranks_per_node = world_size if ranks_per_node is None else ranks_per_node
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not among {world_size} ranks; give one from 0 to {world_size - 1}")
    if ranks_per_node < 1 or world_size % ranks_per_node:
        raise ValueError(f"{world_size} ranks do not fill nodes of {ranks_per_node}; give a divisor of {world_size}")
    dist.Backend.register_backend(BACKEND, _make, devices=["cpu", "cuda"])
    # TorchRec reads the size of a node from the environment, and keeps the groups within and across nodes; a pickle that rank 0
    # would send has a size that this rank cannot know: what it would receive stays None
    with (
        patch.object(dist, "broadcast_object_list", lambda *_, **__: None),
        patch.dict("os.environ", LOCAL_WORLD_SIZE=str(ranks_per_node)),
        patch.multiple(comm, _INTRA_PG=None, _CROSS_PG=None),
    ):
        dist.init_process_group(BACKEND, store=dist.HashStore(), rank=rank, world_size=world_size)
        try:
            assert dist.group.WORLD is not None
            yield dist.group.WORLD
        finally:
            dist.destroy_process_group()


def _make(store: object, rank: int, size: int, timeout: object) -> LoopbackGroup:
    return LoopbackGroup(rank, size)

"""Dense engines: how the dense part is kept equal over ranks. It is wrapped after the tables are sharded, and never sees them.

ddp: every rank has a copy, gradients are averaged. fsdp: weights, gradients and Adam's state are cut over `shard` ranks
(PyTorch's FSDP2); where those are fewer than all, the shards are copied (HSDP). Distillation heads are small: always ddp.
"""

from collections.abc import Callable, Iterator
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from exfm.data.errors import UserError

M = TypeVar("M", bound=nn.Module)
UNIT_PARAMETERS = 1_000_000  # a linear layer of so many is gathered by itself, smaller ones together with the rest
DDP_BYTES = 20  # of a parameter: fp32 weight, gradient, bucket and Adam's two moments
FSDP_BYTES = 16  # of a rank's own: weight, gradient and Adam's two moments


class DenseEngineConfig(BaseModel):
    """Section `dense_engine`: how the dense part is kept equal over ranks."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["ddp", "fsdp"] = "ddp"
    shard: int = Field(0, ge=0, description="fsdp: ranks over which one copy is cut; 0: all of them")

    def check(self, world_size: int) -> None:
        """UserError where the ranks cannot be divided so."""
        if self.shard and self.kind != "fsdp":
            raise UserError(f"dense_engine.shard is {self.shard} but kind is {self.kind}; shard goes with kind: fsdp")
        if self.shard and world_size % self.shard:
            near = max(n for n in range(1, self.shard) if world_size % n == 0)
            raise UserError(
                f"dense_engine.shard {self.shard} does not divide {world_size} ranks; use {near}, or 0 for all"
            )

    def shards(self, world_size: int) -> int:
        """Ranks that have one copy together."""
        return (self.shard or world_size) if self.kind == "fsdp" else 1


def units(module: nn.Module) -> Iterator[nn.Module]:
    """What fsdp gathers by itself, the whole module last: it has what the others have not."""
    for child in module.modules():
        if isinstance(child, nn.Linear) and sum(p.numel() for p in child.parameters()) >= UNIT_PARAMETERS:
            yield child
    yield module


def gathered(module: nn.Module) -> tuple[int, int]:
    """Parameters that fsdp has whole on a rank at most, in forward and in backward, gradients among them.

    In forward a unit twice, as it is received and as it is used. In backward a unit and its gradient, the next unit, which is
    gathered ahead, and the gradient of the last one, which is being sent. What is no unit's stays whole all the time.
    """
    *inner, _ = (sum(p.numel() for p in unit.parameters()) for unit in units(module))
    rest = sum(p.numel() for p in module.parameters()) - sum(inner)
    around = [0, *inner, 0]
    backward = max(
        (before + 2 * own + after for before, own, after in zip(around, inner, around[2:], strict=False)), default=0
    )
    return rest + 2 * max(inner, default=0), 2 * rest + backward


def dense_bytes(engine: DenseEngineConfig, module: nn.Module, world_size: int) -> int:
    """What the dense part takes on one rank at most, activations not counted: weights, gradients, Adam's state, what is gathered."""
    parameters = sum(p.numel() for p in module.parameters())
    if engine.kind == "ddp":
        return DDP_BYTES * parameters
    return FSDP_BYTES * -(-parameters // engine.shards(world_size)) + 4 * max(gathered(module))


def ddp(module: nn.Module, device: torch.device) -> nn.Module:
    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)


def made_in_pieces(
    engine: DenseEngineConfig, make: Callable[[], M], device: torch.device, gradients: torch.dtype = torch.float32
) -> M:
    """A module of DTensors with the values that `make()` gives it: unit after unit is made whole, filled and cut, never all at once.

    gradients: what they are sent as. Every parameter must be filled by a `reset_parameters` of the module that has it, called by its constructor.
    """
    from torch.distributed.fsdp import (  # takes a second, and whoever reads a config needs none of it
        MixedPrecisionPolicy,
        fully_shard,
    )

    world = dist.get_world_size()
    shards = engine.shards(world)
    shape = (world,) if shards == world else (world // shards, shards)
    policy = MixedPrecisionPolicy(reduce_dtype=None if gradients == torch.float32 else gradients)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("shard",) if len(shape) == 1 else ("copy", "shard"))
    with torch.device("meta"):
        module = make()
    *inner, _ = units(module)
    for part in module.modules():  # the order in which they were made, and so that of random numbers
        fill = getattr(part, "reset_parameters", None)
        if fill is not None:
            part.to_empty(device="cpu", recurse=False)
            fill()  # type: ignore[operator]
        if any(part is unit for unit in inner):
            fully_shard(part, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    return module

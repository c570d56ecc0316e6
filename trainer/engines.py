"""Dense engines: how the dense part is kept equal over ranks. It is wrapped after the tables are sharded, and never sees them.

ddp: every rank has a copy, gradients are averaged. fsdp: weights, gradients and Adam's state are cut over `shard` ranks
(PyTorch's FSDP2); where those are fewer than all, the shards are copied (HSDP). deepspeed: ZeRO, see exfm.trainer.zero.
Distillation heads are small: always ddp.
"""

import shutil
import sysconfig
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from exfm.data.errors import UserError
from exfm.models.build import BACKBONES

DEEPSPEED = "deepspeed==0.19.8"
M = TypeVar("M", bound=nn.Module)
UNIT_PARAMETERS = 1_000_000  # a linear layer of so many is gathered by itself, smaller ones together with the rest
BUCKET = 25_000_000  # gradients that DeepSpeed sends at once, and weights that ZeRO-3 gathers ahead, at most
PERSISTENT = 100_000  # a weight smaller than this stays gathered under ZeRO-3
DDP_BYTES = 20  # of a parameter: fp32 weight, gradient, bucket and Adam's two moments
SHARD_BYTES = 16  # of a rank's own: weight, gradient and Adam's two moments


class DenseEngineConfig(BaseModel):
    """Section `dense_engine`: how the dense part is kept equal over ranks, and how it is run. Nothing here changes what is trained.

    compile: the served model by torch.compile. activation_checkpointing: layers are computed again in backward.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["ddp", "fsdp", "deepspeed"] = "ddp"
    shard: int = Field(0, ge=0, description="fsdp: ranks over which one copy is cut; 0: all of them")
    stage: Literal[0, 1, 2, 3] = Field(0, description="deepspeed: ZeRO's, 1, 2 or 3; 0 for the other kinds")
    compile: bool = False
    activation_checkpointing: bool = False

    def check(self, world_size: int, model: str) -> None:
        """UserError where the ranks cannot be divided so, or a setting does not go with another or with this kind of model."""
        if self.shard and self.kind != "fsdp":
            raise UserError(f"dense_engine.shard is {self.shard} but kind is {self.kind}; shard goes with kind: fsdp")
        if self.shard and world_size % self.shard:
            near = max(n for n in range(1, self.shard) if world_size % n == 0)
            raise UserError(
                f"dense_engine.shard {self.shard} does not divide {world_size} ranks; use {near}, or 0 for all"
            )
        if self.stage and self.kind != "deepspeed":
            raise UserError(
                f"dense_engine.stage is {self.stage} but kind is {self.kind}; stage goes with kind: deepspeed"
            )
        if self.kind == "deepspeed" and not self.stage:
            raise UserError("dense_engine.kind is deepspeed without a stage; use 1, 2 or 3 (ZeRO 0 is kind: ddp)")
        if self.stage == 3 and self.compile:
            raise UserError(
                "dense_engine.compile does not go with deepspeed's stage 3, whose gathering of weights breaks the graph at every module; use "
                "stage 2, or kind: fsdp"
            )
        if self.activation_checkpointing and not BACKBONES[model].can_recompute:
            able = ", ".join(kind for kind, backbone in BACKBONES.items() if backbone.can_recompute)
            raise UserError(
                f"dense_engine.activation_checkpointing is true, but a model of kind {model} has no layers to recompute; leave it out, "
                f"or use model.kind: {able}"
            )

    def check_machine(self, device: str) -> None:
        """UserError, with what to install, where this machine lacks what the engine needs."""
        if self.kind == "deepspeed" and find_spec("deepspeed") is None:
            raise UserError(
                f"dense_engine.kind is deepspeed, which is not installed; run: pip install '{DEEPSPEED}', or use kind: fsdp"
            )
        if not self.compile:
            return
        from torch._inductor.config import cpp  # takes seconds

        compiler = cpp.cxx[-1] if device == "cpu" else "gcc"
        if shutil.which(compiler) is None:
            raise UserError(
                f"dense_engine.compile is true, but {compiler} is not found; install it (Debian: apt-get install g++), or set "
                "dense_engine.compile: false"
            )
        if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
            raise UserError(
                "dense_engine.compile is true, but Python.h is missing; install Python's headers (Debian: apt-get install python3-dev), "
                "or set dense_engine.compile: false"
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


def zero_held(stage: int, module: nn.Module, world_size: int) -> tuple[int, int, int]:
    """Values that DeepSpeed keeps on a rank all the time: weights, gradients, what updates the weights (in stages 1 and 2 a copy of
    the rank's weights among it)."""
    parameters = sum(p.numel() for p in module.parameters())
    own = -(-parameters // world_size)
    if stage < 3:
        return parameters, 0, 3 * own
    kept = sum(p.numel() for p in module.parameters() if p.numel() < PERSISTENT)
    return own + kept, own, 2 * own


def zero_passing(stage: int, module: nn.Module, world_size: int) -> tuple[int, int, int]:
    """Values more that it has at most in forward, in backward and in the update."""
    sizes = [p.numel() for p in module.parameters()]
    parameters, largest, own = sum(sizes), max(sizes), -(-sum(sizes) // world_size)
    if stage == 1:  # all gradients, of which one bucket after the other is copied and sent
        return 0, parameters + _fullest(sizes), 3 * own
    if stage == 2:  # a bucket, the copy that is sent, and the next gradient or those of the rank's own
        return 0, 2 * _fullest(sizes) + max(own, largest), 3 * own
    bucket = max(largest, min(BUCKET, parameters))
    gathered = min(bucket + largest, parameters)
    return gathered + 2 * largest, gathered + bucket + largest, 2 * own


def _fullest(sizes: list[int]) -> int:
    """Of the buckets that gradients fill from the last one on; one that is larger than a bucket goes alone."""
    fullest = fill = 0
    for size in reversed(sizes):
        fill = size if fill + size > BUCKET else fill + size
        fullest = max(fullest, fill)
    return fullest


def dense_bytes(engine: DenseEngineConfig, module: nn.Module, world_size: int) -> int:
    """What the dense part takes on one rank at most, activations not counted: weights, gradients, Adam's state, what is gathered."""
    parameters = sum(p.numel() for p in module.parameters())
    if engine.kind == "ddp":
        return DDP_BYTES * parameters
    if engine.kind == "deepspeed":
        return 4 * (
            sum(zero_held(engine.stage, module, world_size)) + max(zero_passing(engine.stage, module, world_size))
        )
    return SHARD_BYTES * -(-parameters // engine.shards(world_size)) + 4 * max(gathered(module))


COMPILER = "inductor"


def compiled(module: nn.Module) -> None:
    """Compile a module's forward in place, once for any number of examples: an engine's own hooks stay outside."""
    module.forward = torch.compile(module.forward, dynamic=True, backend=COMPILER)  # type: ignore[method-assign]


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

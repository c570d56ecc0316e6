"""Canonical form of a model's state: the same keys and global shapes for every plan, number of ranks and device.

    tables.<name>.weight [rows, width]     tables.<name>.adagrad_sum [rows, segments] f32
    dense.<part>.<parameter>               adam.<part>.<parameter>.{step, exp_avg, exp_avg_sq}

Sharded tables are DTensors over this rank's shards, dense tensors under fsdp DTensors cut by their first dimension, under ZeRO
cut anywhere; whole (data-parallel) ones are plain, written once by DCP.
segments is 1 except under column-wise sharding, where row-wise Adagrad keeps one accumulator per column shard.
Arrays of one rank (metrics, random states) are rank.<number>.<name>.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as RowShard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torchrec.distributed.shards_wrapper import LocalShardsWrapper

from exfm.sharding.shards import Shard

Piece = tuple[Tensor, tuple[int, ...]]
Run = tuple[Tensor, int]  # consecutive values [n] of a tensor, live, and the place of the first in it


def table_state(
    shards: Sequence[Shard],
    plan: Sequence[dict[str, Any]],
    shapes: dict[str, tuple[int, int]],
    accumulator: Callable[[nn.Parameter], Tensor],
    device_type: str,
) -> dict[str, Tensor]:
    """Live views of all tables and their optimiser state.

    shapes: (rows, width) by table. accumulator: state [rows] of a data-parallel table's parameter.
    """
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    state: dict[str, Tensor] = {}
    for row in plan:
        name = str(row["table"])
        mine = [s for s in shards if s.table == name]
        starts = column_starts(row)
        if row["sharding_type"] == "data_parallel":
            parameter = mine[0].parameter
            assert parameter is not None
            state[f"tables.{name}.weight"] = mine[0].weight
            state[f"tables.{name}.adagrad_sum"] = accumulator(parameter).view(-1, 1)
            continue
        weights: list[Piece] = [(s.weight, (s.row, s.column)) for s in mine]
        sums: list[Piece] = [
            (s.accumulator.view(-1, 1), (s.row, starts.index(s.column))) for s in mine if s.accumulator is not None
        ]
        state[f"tables.{name}.weight"] = distributed(weights, shapes[name], mesh)
        state[f"tables.{name}.adagrad_sum"] = distributed(sums, (shapes[name][0], len(starts)), mesh)
    return state


def column_starts(row: dict[str, Any]) -> list[int]:
    """First columns of a planned table's column shards, ascending; a shard's place in it is its segment."""
    return sorted({s["offsets"][1] for s in row["shards"]}) or [0]


def boxes(tensor: Tensor) -> list[tuple[tuple[int, ...], Tensor]]:
    """(offsets, live tensor) of what this rank holds of a canonical tensor."""
    if not isinstance(tensor, DTensor):
        return [((0,) * tensor.dim(), tensor)]
    local: Any = tensor.to_local()
    if not isinstance(local, LocalShardsWrapper):  # of the dense part, under fsdp
        _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        return [(tuple(offset), local)] if local.numel() else []
    shards = local.local_shards()
    # a rank without pieces has none, though torch keeps an offset (0,) for it
    offsets = local.local_offsets()[: len(shards)]
    return [(tuple(o), t) for o, t in zip(offsets, shards, strict=True) if t.numel()]


def pieces_of(run: Run, shape: Sequence[int]) -> list[Piece]:
    """Views of a run of a tensor with one or two dimensions as boxes: the end of a row, whole rows, the beginning of one."""
    values, start = run
    if not len(values):
        return []
    if len(shape) == 1:
        return [(values, (start,))]
    width, end = shape[1], start + len(values)
    cuts = sorted({start, end, *(at for at in (-(-start // width) * width, end // width * width) if start < at < end)})
    return [
        (values[a - start : b - start].view(-1, min(width, b - a)), (a // width, a % width)) for a, b in pairwise(cuts)
    ]


def like(tensor: Tensor, rows: int, columns: int | None = None) -> Tensor:
    """New memory for a tensor's boxes over a checkpoint of `columns` columns, or views of the boxes themselves, cut to `rows`."""

    def fit(offsets: tuple[int, ...], box: Tensor) -> tuple[tuple[int, ...], Tensor]:
        cut = box[: max(0, min(len(box), rows - offsets[0]))]
        return (offsets, cut) if columns is None else ((offsets[0], 0), cut.new_empty(len(cut), columns))

    fitted = [fit(offsets, box) for offsets, box in boxes(tensor)]
    if not isinstance(tensor, DTensor):
        return fitted[0][1]
    pieces = {offsets: box for offsets, box in fitted if len(box)}
    shape = (rows, tensor.shape[1] if columns is None else columns)
    return distributed([(t, (o[0], o[1])) for o, t in pieces.items()], shape, tensor.device_mesh)


def distributed(pieces: Sequence[Piece], shape: tuple[int, ...], mesh: DeviceMesh) -> Tensor:
    """A DTensor of a global shape whose local part is any set of pieces at (row, column) offsets, or of one dimension at (place,)."""
    if not pieces and len(shape) == 1:  # without one the wrapper says that it has two dimensions
        pieces = [(torch.empty(0), (shape[0],))]  # where no other piece begins
    wrapper = LocalShardsWrapper([tensor for tensor, _ in pieces], [offset for _, offset in pieces])
    stride = (*shape[1:], 1)
    return DTensor.from_local(wrapper, mesh, [RowShard(0)], run_check=False, shape=torch.Size(shape), stride=stride)


def dense_state(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Parameters and buffers of the dense parts, live."""
    return {f"dense.{part}.{name}": t for part, module in modules.items() for name, t in module.state_dict().items()}


def adam_state(
    modules: dict[str, nn.Module], state_of: Callable[[nn.Parameter], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Adam's state of every dense parameter, live. state_of(parameter) -> step, exp_avg, exp_avg_sq."""
    return {
        f"adam.{part}.{name}.{key}": value
        for part, module in modules.items()
        for name, parameter in module.named_parameters()
        for key, value in state_of(parameter).items()
    }


def convert_segments(saved: Tensor, segments: int) -> Tensor:
    """Row-wise Adagrad sums [r, saved segments] for another number of column shards.

    One accumulator per column shard is the mean of g^2 over its columns, so one for the whole row is the mean of equal
    shards' (exact). The other way every shard starts from the row's (its own history was never kept).
    """
    if saved.shape[1] == segments:
        return saved
    if segments == 1:
        return saved.mean(dim=1, keepdim=True)
    if saved.shape[1] == 1:
        return saved.expand(-1, segments)
    return convert_segments(convert_segments(saved, 1), segments)

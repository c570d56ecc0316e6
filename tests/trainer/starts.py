"""A job before its first step."""

from typing import Any

import torch
from torch import Tensor

from exfm.trainer.build import Built, build
from exfm.trainer.env import process_group
from exfm.trainer.state import canonical_state
from tests.trainer.jobs import Raw, here, parsed

CPU = torch.device("cpu")


def whole(tensor: Tensor) -> Tensor:
    """A copy of a tensor; of a DTensor over one rank, its pieces put together."""
    if not hasattr(tensor, "to_local"):
        return tensor.detach().clone()
    out = torch.zeros(tensor.shape, dtype=tensor.dtype)
    local: Any = tensor.to_local()
    for piece, (row, column) in zip(local.local_shards(), local.local_offsets(), strict=True):
        out[row : row + piece.shape[0], column : column + piece.shape[1]] = piece
    return out


def initial_state(raw: Raw) -> dict[str, Tensor]:
    """Everything a job on one rank would train, as it starts, under canonical names."""
    with process_group(here(), CPU, 60):
        config = parsed(raw)
        built = build(config, here(), CPU, (0.0,) * len(config.heads.tasks))
        return {k: whole(v) for k, v in canonical_state(built, config, CPU).items()}


def built_here(raw: Raw) -> Built:
    """The model of a job on this rank; needs a process group."""
    config = parsed(raw)
    return build(config, here(), CPU, (0.0,) * len(config.heads.tasks))

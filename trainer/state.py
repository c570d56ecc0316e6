"""What a checkpoint of a job holds, and putting it back."""

import hashlib
import platform
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from exfm.checkpoints.canonical import adam_state, dense_state, distributed, pieces_of, table_state
from exfm.checkpoints.commits import Committed
from exfm.checkpoints.store import Partials
from exfm.data.errors import UserError
from exfm.trainer.build import Built
from exfm.trainer.config import JobConfig
from exfm.trainer.optim import adam_state as state_of_adam
from exfm.trainer.zero import Zero

LAYERS = ("data", "embeddings", "models", "distillation", "sharding", "checkpoints", "trainer")


def canonical_state(built: Built, config: JobConfig, device: torch.device) -> dict[str, Tensor]:
    """Live views of everything trained, under canonical names."""
    shapes = {name: (t.rows, t.width) for name, t in config.tables.items()}
    tables = table_state(built.shards, built.plan, shapes, built.optimizers.accumulator, device.type)
    dense = built.optimizers.dense
    owner = {id(p): dense for group in built.optimizers.groups for p in group if dense is not None}
    if built.adapter is not None and built.adapter.optimizer is not None:
        owner |= {id(p): built.adapter.optimizer for p in built.adapter.parameters()}

    def state_of(parameter: nn.Parameter) -> dict[str, Tensor]:
        return state_of_adam(owner[id(parameter)], parameter)

    modules = built.dense_modules
    state = tables | dense_state(modules)
    if built.zero is not None:
        del modules["served"]
        state |= zero_state(built.zero, device)
    return state | adam_state(modules, state_of)


def zero_state(zero: Zero, device: torch.device) -> dict[str, Tensor]:
    """What ranks have parts of under ZeRO."""
    state: dict[str, Tensor] = {}
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in zero.parts():
        runs = {
            f"adam.served.{part.name}.exp_avg": part.exp_avg,
            f"adam.served.{part.name}.exp_avg_sq": part.exp_avg_sq,
        }
        if part.weight is not None:
            runs[f"dense.served.{part.name}"] = part.weight
        state |= {name: distributed(pieces_of(run, part.shape), part.shape, mesh) for name, run in runs.items()}
        state[f"adam.served.{part.name}.step"] = part.step
    return state


def random_state(device: torch.device) -> Partials:
    """This rank's random states as arrays."""
    state = {"random/cpu": torch.get_rng_state().numpy()}
    if device.type == "cuda":
        state["random/cuda"] = torch.cuda.get_rng_state(device).numpy()
    return state


def restore_random(state: Partials, device: torch.device) -> None:
    torch.set_rng_state(torch.from_numpy(np.asarray(state["random/cpu"])))
    if device.type == "cuda" and "random/cuda" in state:
        torch.cuda.set_rng_state(torch.from_numpy(np.asarray(state["random/cuda"])), device)


def check_identity(found: Committed, config: JobConfig) -> None:
    """UserError lists the settings in which a checkpoint's job and this one differ."""
    # evaluation decides no weights, but its sums so far are in the checkpoint
    saved = found.manifest["identity"] | {"evaluation": found.manifest["config"]["evaluation"]}
    own = config.identity() | {"evaluation": config.evaluation.model_dump(mode="json")}
    differing = _differences(saved | {"tables": _convertible(saved["tables"], own)}, own)
    if differing:
        raise UserError(
            f"checkpoint {found.folder} is of another config; differing keys: {'; '.join(differing)}; restore these values or "
            f"choose another run.folder than {config.run.folder}"
        )


def _convertible(saved: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The saved tables with what a restore converts as it is now: type of the rows, and more rows of an identity table.

    Under `ids: hash` another number of rows would send every id elsewhere.
    """
    hashed = {f["table"] for f in own["features"]["sparse"] if f["ids"] == "hash"}
    result = {}
    for name, table in saved.items():
        now = own["tables"].get(name, table)
        grows = name not in hashed and now["rows"] > table["rows"]
        result[name] = table | {"dtype": now["dtype"]} | ({"rows": now["rows"]} if grows else {})
    return result


@cache
def versions() -> dict[str, str]:
    """What wrote a checkpoint: libraries, and a digest of exfm's own code."""
    root = Path(__file__).resolve().parents[1]
    code = hashlib.sha256()
    for path in sorted(p for layer in LAYERS for p in (root / layer).rglob("*.py")):
        code.update(path.read_bytes())
    libraries = {name: version(name) for name in ("exfm", "torch", "torchrec")}
    return libraries | {"python": platform.python_version(), "code": code.hexdigest()[:16]}


def _differences(a: Any, b: Any, key: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for k in sorted({*a, *b}) for d in _differences(a.get(k), b.get(k), f"{key}.{k}" if key else k)]
    return [] if a == b else [f"{key} (checkpoint {a!r}, config {b!r})"]

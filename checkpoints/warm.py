"""Warm start: begin a new job from tensors of another job's commit, chosen by name, under other names if need be."""

import re
from contextlib import ExitStack

from torch import Tensor

from exfm.checkpoints.commits import chain, committed
from exfm.checkpoints.config import WarmStartConfig
from exfm.checkpoints.holding import reading
from exfm.checkpoints.storage import Storage
from exfm.checkpoints.store import agreed, from_rank_0, load_from
from exfm.data.errors import UserError


def warm_start(config: WarmStartConfig, state: dict[str, Tensor]) -> str:
    """Read what `config` chooses into the live tensors; one line about it. All ranks call.

    UserError where there is no commit, or where a chosen tensor is not in it or has another shape.
    """
    everything = from_rank_0(lambda: committed(Storage(config.path)))
    if not everything:
        raise UserError(f"checkpoint.warm_start.path {config.path} holds no commit; give a run's checkpoints folder")
    links = chain(everything[-1], everything)
    chosen = {theirs(config, name): t for name, t in state.items() if _included(config, name)}
    if not chosen:
        raise UserError(f"checkpoint.warm_start.include {list(config.include)} chooses none of {', '.join(state)}")
    with ExitStack() as stack:
        agreed(lambda: stack.enter_context(reading(links[-1].storage, links[-1].name)))
        load_from(agreed(lambda: [c.open() for c in links]), chosen)
    tables = len({n.split(".")[1] for n in chosen if n.startswith("tables.")})
    return f"warm start from {links[-1].folder}: {len(chosen)} tensors, {tables} tables among them; {len(state) - len(chosen)} start anew"


def _included(config: WarmStartConfig, name: str) -> bool:
    """Optimiser state follows its weights: adam.X.<key> the parameter dense.X, <table>.adagrad_sum the table's weight."""
    weight = name
    if name.startswith("adam."):
        weight = "dense." + name.removeprefix("adam.").rsplit(".", 1)[0]
    elif name.endswith(".adagrad_sum"):
        weight = name.removesuffix("adagrad_sum") + "weight"
    return any(re.fullmatch(pattern, weight) for pattern in config.include)


def theirs(config: WarmStartConfig, name: str) -> str:
    """The checkpoint's name of one of this job's tensors."""
    for pattern, replacement in config.rename.items():
        name = re.sub(pattern, replacement, name)
    return name

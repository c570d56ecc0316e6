"""Warm start: begin a new job from tensors of another job's commit, chosen by name, under other names if need be."""

import re
from collections.abc import Collection, Sequence
from contextlib import ExitStack

from torch import Tensor

from exfm.checkpoints.commits import Committed, chain, committed
from exfm.checkpoints.config import WarmStartConfig
from exfm.checkpoints.holding import reading
from exfm.checkpoints.reader import Folder
from exfm.checkpoints.storage import Storage
from exfm.checkpoints.store import agreed, load_from
from exfm.data.errors import UserError


def warm_source(config: WarmStartConfig) -> list[Committed]:
    """The chain that a warm start would read, the newest commit last. UserError where there is none."""
    everything = committed(Storage(config.path))
    if not everything:
        raise UserError(f"checkpoint.warm_start.path {config.path} holds no commit; give a run's checkpoints folder")
    return chain(everything[-1], everything)


def warm_start(
    config: WarmStartConfig, links: Sequence[Committed], state: dict[str, Tensor], hashed: Collection[str] = ()
) -> str:
    """Read what `config` chooses of a source into the live tensors; one line about it. All ranks call. hashed: tables under
    `ids: hash`.

    UserError where a chosen tensor is not in it or has another shape.
    """
    chosen: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if _included(config, name):
            if theirs(config, name) in chosen:
                raise UserError(
                    f"checkpoint.warm_start.rename gives two tensors {theirs(config, name)}, one of them {name}"
                )
            chosen[theirs(config, name)] = tensor
    if not chosen:
        raise UserError(f"checkpoint.warm_start.include {list(config.include)} chooses none of {', '.join(state)}")
    with ExitStack() as stack:
        agreed(lambda: stack.enter_context(reading(links[-1].storage, links[-1].name)))
        folders = agreed(lambda: [c.open() for c in links])
        _check_hashed(config, folders[0], state, hashed)
        load_from(folders, chosen)
    tables = len({n.split(".")[1] for n in chosen if n.startswith("tables.")})
    return f"warm start from {links[-1].folder}: {len(chosen)} tensors, {tables} tables among them; {len(state) - len(chosen)} start anew"


def _check_hashed(config: WarmStartConfig, folder: Folder, state: dict[str, Tensor], hashed: Collection[str]) -> None:
    for table in hashed:
        name = f"tables.{table}.weight"
        saved = folder.index.get(theirs(config, name))
        if _included(config, name) and saved is not None and saved.shape[0] != state[name].shape[0]:
            raise UserError(
                f"table '{table}' has {state[name].shape[0]} rows, in {folder.storage.url}/{folder.folder} {saved.shape[0]}: under ids: "
                "hash every id would move; use as many rows, or leave it out of checkpoint.warm_start.include"
            )


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

"""The sharding plan of a job, made by every rank alone before there is a process group: nobody waits in a collective for it."""

import time
from pathlib import Path

import torch
from torch import nn
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from exfm.data.errors import UserError
from exfm.embeddings.tables import build_collection, pooled_features
from exfm.models.build import build_backbone
from exfm.models.heads import Head
from exfm.models.interface import InputSpec
from exfm.sharding.fast_planner import TableSharder
from exfm.sharding.plan import Plan, read_plan
from exfm.sharding.planner import changes, plan_job, topology_of
from exfm.sharding.topology import Topology
from exfm.trainer.config import JobConfig
from exfm.trainer.engines import dense_bytes

PLAN = "plan.json"


def served_on_meta(config: JobConfig) -> nn.Module:
    """Backbone and served head; distillation heads are small beside them."""
    inputs = InputSpec(len(config.features.dense), pooled_features(config.features, config.tables))
    with torch.device("meta"):  # the largest presets would not fit here
        backbone = build_backbone(config.model, inputs)
        return nn.ModuleList([backbone, Head(backbone.out_width, config.heads.hidden, len(config.heads.tasks))])


def plan_on(config: JobConfig, topology: Topology, cached: Plan | None = None, dense: int | None = None) -> Plan:
    """The plan of a job on given machines. dense: bytes of the dense part on every rank; default: as its engine takes them.

    UserError where there is none, or the plan file of the config is of something else.
    """
    module = nn.ModuleDict()  # named as in TrainModule
    for name, weighted in (("tables", False), ("weighted", True)):
        collection = build_collection(config.features, config.tables, weighted)
        if collection is not None:
            # the estimator of memory looks for it
            apply_optimizer_in_backward(RowWiseAdagrad, collection.parameters(), {"lr": 0.0})
            module[name] = collection
    local_batch = -(-config.stream.global_batch // topology.world_size)
    if dense is None:
        dense = dense_bytes(config.dense_engine, served_on_meta(config), topology.world_size)
    return plan_job(
        module,
        config.features,
        config.tables,
        config.sharding,
        topology,
        local_batch,
        dense,
        cached,
        TableSharder(None, config.precision.codecs(topology.device)),
    )


def plan_here(
    config: JobConfig, device_type: str, world_size: int, ranks_per_node: int, folder: Path | None
) -> tuple[Plan, str]:
    """The plan of a launched job, and where it comes from, in words. folder: the run's, whose plan is taken if it was made from the
    same.
    """
    topology = topology_of(config.sharding, device_type, world_size, ranks_per_node)
    cached, path = None, None if folder is None else folder / PLAN
    if path is not None and path.exists() and not config.sharding.plan:
        try:
            cached = read_plan(path)
        except UserError:
            cached = None  # of another version; it is written anew
    begun = time.monotonic()
    plan = plan_on(config, topology, cached)
    if config.sharding.plan:
        return plan, f"plan of {config.sharding.plan}"
    if cached is plan:
        return plan, f"plan of {path}"
    why = "" if cached is None else f"; that of {path} was made from other {', '.join(changes(cached, plan))}"
    return plan, f"planned in {time.monotonic() - begun:.1f} s for {topology.name}{why}"

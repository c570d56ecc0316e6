"""From a configuration to a sharded, wrapped, optimised model on this rank."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torchrec.distributed.comm_ops import get_gradient_division
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from exfm.data.batch import Batch
from exfm.data.hashing import salt_of
from exfm.distillation.heads import DistillationHeads
from exfm.embeddings.tables import build_collection, fill_initial, mean_features, pooled_features
from exfm.models.build import build_backbone
from exfm.models.heads import Head
from exfm.models.interface import InputSpec
from exfm.sharding.plan import Plan
from exfm.sharding.planner import TableSharder, describe
from exfm.sharding.shards import Kernel, Shard, check_shards, local_kernels
from exfm.trainer.config import JobConfig
from exfm.trainer.engines import DenseEngineConfig, compiled, ddp, made_in_pieces
from exfm.trainer.env import RankEnv
from exfm.trainer.objective import Adapter, Objective, ScoreObjective, Served, TrainModule
from exfm.trainer.optim import Optimizers
from exfm.trainer.planning import plan_here
from exfm.trainer.precision import PrecisionConfig
from exfm.trainer.replicas import Replicas, groups_mesh, sharding_env
from exfm.trainer.zero import Zero

T = TypeVar("T")
REHEARSALS = (
    3  # DDP lays its buckets out anew after the first backward pass, TorchRec's with a static graph after the second
)


@dataclass
class Built:
    """The parts of a job's model that the loop and the checkpoints need; dense modules are the unwrapped ones."""

    model: nn.Module
    objective: Objective
    served: Served
    heads: DistillationHeads | None
    adapter: Adapter | None
    optimizers: Optimizers
    kernels: list[Kernel]
    plan: list[dict[str, Any]]  # row by row, as checkpoints keep it
    planned: Plan
    replicas: Replicas
    zero: Zero | None = None  # what keeps the served model under DeepSpeed

    @property
    def shards(self) -> list[Shard]:
        return [shard for kernel in self.kernels for shard in kernel.shards]

    @property
    def dense_modules(self) -> dict[str, nn.Module]:
        """Name -> module of every dense part, in canonical naming."""
        named = {"served": self.served, "heads": self.heads, "adapter": self.adapter}
        return {name: module for name, module in named.items() if module is not None}

    def dense_weights(self) -> list[torch.Tensor]:
        """Of the dense parts, as far as this rank has them."""
        zero = self.zero
        modules = [m for name, m in self.dense_modules.items() if zero is None or name != "served"]
        own = [p.to_local() if isinstance(p, DTensor) else p for m in modules for p in m.parameters()]
        return own + (zero.weights() if zero is not None else [])

    def restored(self) -> None:
        """After the live state was overwritten. All ranks call."""
        if self.zero is not None:
            self.zero.refresh()

    def close(self) -> None:
        if self.zero is not None:
            self.zero.close()


def build(
    config: JobConfig, env: RankEnv, device: torch.device, offsets: tuple[float, ...], plan: Plan | None = None
) -> Built:
    """Build, shard and wrap; plan where no plan is given. Needs an initialised process group. UserError where no plan is possible."""
    served, heads, adapter = build_dense(config, device, in_pieces=config.dense_engine.kind == "fsdp")
    objective = Objective(served, heads, adapter, config.distillation.learn, offsets, config.precision.computing).to(
        device
    )
    module = TrainModule(
        build_collection(config.features, config.tables, weighted=False),
        build_collection(config.features, config.tables, weighted=True),
        objective,
        tuple(f.name for f in config.features.sparse),
        mean_features(config.features, config.tables),
        config.stream.once,
    )
    model, kernels, plan, mesh = shard_tables(module, config, env, device, plan)
    shards = [shard for kernel in kernels for shard in kernel.shards]
    for shard in shards:
        fill_initial(shard.weight, shard.table, config.tables[shard.table], config.run.seed, shard.row, shard.column)
    if config.dense_engine.compile:
        compiled(served)
    # engines come after the tables are sharded: they must not see their parameters
    zero = None
    groups: list[nn.Module] = [served]
    if config.dense_engine.kind == "ddp" and env.world_size > 1:
        objective.served = ddp(served, device)
        config.precision.compress(objective.served)
    elif config.dense_engine.kind == "deepspeed":
        zero = Zero(config.dense_engine, config.optim.dense, config.precision, served, env, device)
        objective.served, groups = zero.engine, []
    if heads is not None:
        objective.heads = ddp(heads, device) if env.world_size > 1 else heads
        groups.append(heads)
    optimizers = Optimizers(config.optim, groups, shards, zero)
    replicas = Replicas(config.sharding, mesh, shards)
    return Built(model, objective, served, heads, adapter, optimizers, kernels, describe(plan), plan, replicas, zero)


@dataclass
class Scoring:
    """The parts of a frozen model that a scorer needs."""

    model: nn.Module
    served: Served
    shards: list[Shard]
    plan: list[dict[str, Any]]


def build_scoring(config: JobConfig, env: RankEnv, device: torch.device, plan: Plan | None = None) -> Scoring:
    """Build and shard what scores: tables once, and the served model without heads, adapter or dense engine, in fp32 whatever it was trained in."""
    sharding = config.sharding.model_copy(update={"replicas": 1})
    config = config.model_copy(
        update={"precision": PrecisionConfig(), "dense_engine": DenseEngineConfig(), "sharding": sharding}
    )
    served, _, _ = build_dense(config, device)
    module = TrainModule(
        build_collection(config.features, config.tables, weighted=False),
        build_collection(config.features, config.tables, weighted=True),
        ScoreObjective(served),
        tuple(f.name for f in config.features.sparse),
        mean_features(config.features, config.tables),
        config.stream.once,
    )
    model, kernels, plan, _ = shard_tables(module, config, env, device, plan)
    return Scoring(model.eval(), served, [shard for kernel in kernels for shard in kernel.shards], describe(plan))


def shard_tables(
    module: TrainModule, config: JobConfig, env: RankEnv, device: torch.device, plan: Plan | None
) -> tuple[nn.Module, list[Kernel], Plan, DeviceMesh | None]:
    """Shard a module's `tables` and `weighted`: the module, its lookup kernels here, the plan, and the mesh of replicas."""
    # set before sharding: FBGEMM takes the optimiser into its backward kernel
    for collection in (module.tables, module.weighted):
        if collection is not None:
            kwargs = {"lr": config.optim.tables.lr, "eps": config.optim.tables.eps}
            apply_optimizer_in_backward(RowWiseAdagrad, collection.parameters(), kwargs)
    plan = plan or plan_here(config, device.type, env.world_size, env.local_world_size, None)[0]
    _check_equal(plan)
    assert get_gradient_division(), "TorchRec must divide embedding gradients by the number of ranks of a group"
    mesh = groups_mesh(config.sharding.replicas, device.type) if config.sharding.replicas > 1 else None
    own = sharding_env(env, mesh)
    model = DistributedModelParallel(
        module,
        env=own,
        device=device,
        plan=plan.torchrec(
            stochastic_rounding=config.precision.stochastic_rounding,
            first_rank=env.rank - own.rank,
            prefetch=config.run.pipeline == "prefetch",
        ),
        sharders=[TableSharder(None, config.precision.codecs(device.type))],  # type: ignore[list-item]
        init_data_parallel=False,
    )
    kernels = list(local_kernels(model))
    check_shards([shard for kernel in kernels for shard in kernel.shards], describe(plan), own.rank)
    return model, kernels, plan, mesh


def rehearse(built: Built, batch: Batch, device: torch.device) -> None:
    """Forward and backward passes on padding alone, which change no weight.

    After a backward pass or two DDP lays out its buckets anew, and gloo's sum of 3 ranks rounds by a value's place in the
    buffer: without this the first step after a restart would differ in the last bit from the same step of a job that never
    stopped.
    """
    adapter = built.adapter
    if adapter is not None:
        adapter.eval()  # it would fit itself
    for _ in range(REHEARSALS):
        loss, _ = built.model(batch.to(device))
        loss.backward()
        built.optimizers.zero_grad()
    if adapter is not None:
        adapter.train()


def build_dense(
    config: JobConfig, device: torch.device, in_pieces: bool = False
) -> tuple[Served, DistillationHeads | None, Adapter | None]:
    """Dense modules, each from its own random stream: what one has does not change how another starts.

    in_pieces: the served one cut over ranks by fsdp; needs a process group.
    """
    inputs = InputSpec(len(config.features.dense), pooled_features(config.features, config.tables))
    num_tasks = len(config.heads.tasks)

    def make_served() -> Served:
        backbone = build_backbone(config.model, inputs)
        backbone.recompute = config.dense_engine.activation_checkpointing
        return Served(backbone, Head(backbone.out_width, config.heads.hidden, num_tasks))

    gradients = torch.bfloat16 if config.precision.gradients == "bf16" else torch.float32

    def make_in_pieces() -> Served:
        return made_in_pieces(config.dense_engine, make_served, device, gradients)

    served = _seeded(make_in_pieces if in_pieces else make_served, config.run.seed, "served").to(device)
    learn = config.distillation.learn
    heads = adapter = None
    if learn is not None and learn.method != "single_head":
        width = served.backbone.out_width
        heads = _seeded(lambda: DistillationHeads(learn, width, num_tasks), config.run.seed, "heads").to(device)
        if learn.method == "student_adapter":
            adapter = _seeded(lambda: Adapter(learn, num_tasks), config.run.seed, "adapter").to(device)
            adapter.make_optimizer(learn.adapter.lr)
    return served, heads, adapter


def _seeded(make: Callable[[], T], *names: Any) -> T:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(salt_of(*names))
        return make()


def _check_equal(plan: Plan) -> None:
    """Every rank has planned alone, so that nobody waits in a collective."""
    mine = salt_of(plan.model_dump_json())
    same = torch.tensor([mine, -mine], dtype=torch.int64)
    dist.all_reduce(same, op=dist.ReduceOp.MAX)
    assert same[0] == -same[1] == mine, "ranks made different sharding plans"

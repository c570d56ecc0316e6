"""2D parallelism: several groups of ranks hold all tables each, learn from their own part of every batch, and are averaged.

Consecutive ranks are a sharding group, equal places in all groups a replica group. A group's gradient of a sharded table is that of its part, scaled up to
the whole batch; between two averages every group goes its own way. Data-parallel tables are stepped by all ranks together, as without groups.
TorchRec's DMPCollection does the same but refuses CPUs; its ShardingEnv2D does not.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torchrec.distributed.types import ShardingEnv, ShardingEnv2D

from exfm.sharding.config import ShardingConfig
from exfm.sharding.shards import Shard
from exfm.trainer.env import RankEnv


def groups_mesh(replicas: int, device_type: str) -> DeviceMesh:
    """[replicas, ranks of a group]; all ranks call."""
    shape = replicas, dist.get_world_size() // replicas
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def sharding_env(env: RankEnv, mesh: DeviceMesh | None) -> ShardingEnv:
    """The ranks among which one copy of all tables is cut: of this rank's group, or all where there is no mesh."""
    world = dist.group.WORLD
    assert world is not None
    if mesh is None:
        return ShardingEnv.from_process_group(world)
    return ShardingEnv2D(
        sharding_pg=mesh.get_group("shard"),
        replica_pg=mesh.get_group("replicate"),
        global_pg=world,
        device_mesh=mesh,
        node_group_size=min(env.local_world_size, mesh.size(1)),
        use_inter_host_allreduce=True,  # groups are of consecutive ranks
    )


class Replicas:
    """Averages weights and row-wise Adagrad sums of this rank's shards with their copies in the other groups."""

    def __init__(self, config: ShardingConfig, mesh: DeviceMesh | None, shards: Sequence[Shard]) -> None:
        self.every, self.count = config.sync_steps, config.replicas
        self.group = None if mesh is None else mesh.get_group("replicate")
        self.behind = 0  # steps since the last average
        self.tensors = [
            t for shard in shards if shard.accumulator is not None for t in (shard.weight, shard.accumulator)
        ]

    def after_step(self) -> None:
        """Average where it is due."""
        self.behind += 1
        if self.behind == self.every:
            self.sync()

    @torch.no_grad()
    def sync(self) -> None:
        """Make all replicas equal. All ranks call."""
        if self.group is not None and self.behind:
            for tensor in self.tensors:
                dist.all_reduce(tensor, group=self.group)
                tensor /= self.count
        self.behind = 0

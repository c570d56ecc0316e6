"""What a dry run is asked, and its form in JSON: it goes to another process."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torchrec.distributed.sharding_plan import placement
from torchrec.distributed.types import (
    CacheParams,
    EmbeddingModuleShardingPlan,
    EnumerableShardingSpec,
    ParameterSharding,
    ShardingPlan,
    ShardMetadata,
)

from exfm.trainer.config import JobConfig


@dataclass(frozen=True)
class Request:
    """Rank `rank` of a plan. pooling: ids per example of a feature, on average; zipf: exponent of its ids' distribution."""

    config: JobConfig
    plan: ShardingPlan
    rank: int
    world_size: int
    ranks_per_node: int
    local_batch: int
    steps: int
    pooling: Mapping[str, float]
    zipf: Mapping[str, float]
    device: torch.device

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"a dry run of {self.steps} steps measures nothing; take at least 1")

    def to_json(self) -> str:
        plan = {
            path: {name: _row(parameter) for name, parameter in module.items()}  # type: ignore[attr-defined]
            for path, module in self.plan.plan.items()
        }
        fields = vars(self) | {"plan": plan, "config": self.config.model_dump(mode="json"), "device": str(self.device)}
        return json.dumps(fields, default=dict)

    @staticmethod
    def from_json(text: str) -> "Request":
        fields = json.loads(text)
        device = torch.device(fields.pop("device"))
        plan: Any = {
            path: EmbeddingModuleShardingPlan({name: _parameter(row, device.type) for name, row in module.items()})
            for path, module in fields.pop("plan").items()
        }
        config = JobConfig.model_validate(fields.pop("config"))
        return Request(config=config, plan=ShardingPlan(plan), device=device, **fields)


def _row(parameter: ParameterSharding) -> dict[str, Any]:
    """shards: rows, columns, first row, first column and rank of each."""
    spec, cache = parameter.sharding_spec, parameter.cache_params
    shards = [] if spec is None else spec.shards  # type: ignore[attr-defined]
    return {
        "type": parameter.sharding_type,
        "kernel": parameter.compute_kernel,
        "ranks": parameter.ranks,
        "cache": cache and cache.load_factor,
        "shards": [[*s.shard_sizes, *s.shard_offsets, s.placement.rank()] for s in shards],
    }


def _parameter(row: dict[str, Any], device_type: str) -> ParameterSharding:
    # a node of one rank: whichever rank is played, its device is the first one here
    shards = [
        ShardMetadata(
            shard_sizes=[rows, columns],
            shard_offsets=[row, column],
            placement=placement(device_type, rank, 1),
        )
        for rows, columns, row, column, rank in row["shards"]
    ]
    return ParameterSharding(
        sharding_type=row["type"],
        compute_kernel=row["kernel"],
        ranks=row["ranks"],
        sharding_spec=EnumerableShardingSpec(shards) if shards else None,
        cache_params=None if row["cache"] is None else CacheParams(load_factor=row["cache"]),
    )

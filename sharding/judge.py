"""TorchRec's estimators of what a shard costs in time and memory, as torchrec 1.8 and 1.6 have them."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator, EmbeddingStorageEstimator
from torchrec.distributed.planner.types import ShardingOption
from torchrec.distributed.planner.utils import sharder_name
from torchrec.distributed.types import ModuleSharder

try:
    from torchrec.distributed.planner.estimator import EmbeddingPerfEstimatorFactory
    from torchrec.distributed.planner.estimator.config import EmbeddingPerfEstimatorConfig
    from torchrec.distributed.planner.utils import build_sharder_data_map

    class _DefaultConfig(EmbeddingPerfEstimatorConfig):
        """TorchRec's default hardware config. For every number of every shard TorchRec looks through all attributes of its config
        for methods with annotations, of which the default one has none: not to show it any is eight times as fast.
        """

        def __dir__(self) -> list[str]:
            return []

    def _perf_estimator(topology: Topology, constraints: dict[str, ParameterConstraints]) -> Any:
        return EmbeddingPerfEstimatorFactory.create_with_config(
            config=_DefaultConfig(), topology=topology, constraints=constraints
        )

except ImportError:  # torchrec 1.6

    def _perf_estimator(topology: Topology, constraints: dict[str, ParameterConstraints]) -> Any:
        return EmbeddingPerfEstimator(topology=topology, constraints=constraints)

    def build_sharder_data_map(sharder_map: Any) -> Any:  # type: ignore[misc]
        return sharder_map


def estimate(
    options: list[ShardingOption],
    sharders: Sequence[ModuleSharder[nn.Module]],
    topology: Topology,
    constraints: Mapping[str, ParameterConstraints],
) -> None:
    """Put TorchRec's perf and storage into every shard of the options."""
    data = build_sharder_data_map({sharder_name(s.module_type): s for s in sharders})
    known = dict(constraints)
    for estimator in (_perf_estimator(topology, known), EmbeddingStorageEstimator(topology, constraints=known)):
        estimator.estimate(options, data)

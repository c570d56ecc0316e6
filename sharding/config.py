"""Section `sharding`: what the planner may choose for each table, and the machines that it plans for."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

ShardingName = Literal[
    "data_parallel", "table_wise", "column_wise", "row_wise", "table_row_wise", "table_column_wise", "grid_shard"
]
KernelName = Literal["fused", "fused_uvm", "fused_uvm_caching"]


class TableSharding(BaseModel):
    """Of one table, where it differs from the others. In YAML a list is `types` alone. ranks: where its shards may lie; column_shard:
    width of its column shards, else the planner's choice.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    types: tuple[ShardingName, ...] | None = Field(None, min_length=1)
    kernels: tuple[KernelName, ...] | None = Field(None, min_length=1)
    ranks: tuple[int, ...] | None = Field(None, min_length=1)
    column_shard: int | None = Field(None, gt=0, multiple_of=4)


class ShardingConfig(BaseModel):
    """Sharding types and kernels allowed for all tables and, by name, for single ones; the planner chooses among them.

    kernels: where rows live: fused: device memory; fused_uvm: host memory; fused_uvm_caching: host memory, with a share (cache_loads)
    kept on the device. topology: a GPU's name (h100, ...) or a YAML file of `exfm bench topology`; default: this machine.
    stats: a file of `exfm data stats`. plan: a file of `exfm plan --out`, to be used as it is.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    allowed: tuple[ShardingName, ...] = Field(("data_parallel", "table_wise", "row_wise"), min_length=1)
    kernels: tuple[KernelName, ...] = Field(("fused",), min_length=1)
    cache_loads: tuple[float, ...] = Field((0.05, 0.1, 0.2, 0.4), min_length=1)
    tables: dict[str, TableSharding] = Field(default_factory=dict)
    min_column_shard: int = Field(
        32, gt=0, description="narrowest column shard; TorchRec's own default of 128 splits nothing here"
    )
    topology: str = ""
    hbm_gib: float | None = Field(None, gt=0, description="device memory per rank, GiB; default: the topology's")
    host_gib: float | None = Field(
        None, gt=0, description="host memory per rank, GiB; default: the topology's, or 16 where there is no GPU"
    )
    reserved: float = Field(
        0.15, ge=0, lt=1, description="share of a rank's memory kept for activations, batches and libraries"
    )
    replicas: int = Field(
        1,
        gt=0,
        description="2D parallelism: so many groups of ranks hold all tables each, and learn from their part of a batch",
    )
    sync_steps: int = Field(
        1, gt=0, description="steps after which replicas are averaged; also before every commit and slice's end"
    )
    stats: str = ""
    plan: str = ""

    @field_validator("tables", mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: {"types": own} if isinstance(own, list | tuple) else own for name, own in value.items()}

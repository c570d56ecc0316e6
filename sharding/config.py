"""Section `sharding`: what the planner may choose for each table."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

ShardingName = Literal[
    "data_parallel", "table_wise", "column_wise", "row_wise", "table_row_wise", "table_column_wise", "grid_shard"
]


class ShardingConfig(BaseModel):
    """Sharding types allowed for all tables and, by name, for single ones; the planner chooses among them."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    allowed: tuple[ShardingName, ...] = ("data_parallel", "table_wise", "row_wise")
    tables: dict[str, tuple[ShardingName, ...]] = Field(default_factory=dict)
    min_column_shard: int = Field(
        32, description="narrowest column shard; TorchRec's own default of 128 splits nothing here"
    )
    hbm_gib: float = Field(80.0, gt=0, description="device memory per rank that the planner may use, GiB")
    host_gib: float = Field(16.0, gt=0, description="host memory per rank that the planner may use, GiB")

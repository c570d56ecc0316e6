"""Sections `features` and `tables`: which columns are looked up, in which table, and how raw ids become rows."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from exfm.data.errors import UserError


class DenseFeature(BaseModel):
    """A dense column; log1p maps x to sign(x) log(1 + |x|)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    log1p: bool = False


class SparseFeature(BaseModel):
    """A named lookup. ids: `hash` maps any integer to a row, `identity` takes ids in [0, rows) as they are."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    table: str
    ids: Literal["hash", "identity"]
    column: str = Field("", description="column of the stream; default: the feature's name")
    weighted: bool = Field(False, description="multiply every looked-up row by the column's weights")

    @property
    def source(self) -> str:
        return self.column or self.name


class FeaturesConfig(BaseModel):
    """Section `features`. A dense feature may be given by its name alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    dense: tuple[DenseFeature, ...] = ()
    sparse: tuple[SparseFeature, ...]

    @field_validator("dense", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        return [{"name": v} if isinstance(v, str) else v for v in value] if isinstance(value, list | tuple) else value


class TableConfig(BaseModel):
    """One embedding table. init: rows start uniform in (-init, init). dtype: of the rows; optimiser state is fp32."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    rows: int = Field(gt=0)
    width: int = Field(gt=0, multiple_of=4, description="FBGEMM wants a multiple of 4")
    pooling: Literal["sum", "mean"] = "sum"
    dtype: Literal["fp32", "fp16"] = "fp32"
    init: float = Field(0.01, ge=0)


Tables = dict[str, TableConfig]


def check_features(features: FeaturesConfig, tables: Tables) -> None:
    """UserError for a feature without its table, a table without features, names given twice, mixed weighting."""
    names = [f.name for f in features.sparse] + [d.name for d in features.dense]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise UserError(f"feature(s) {', '.join(twice)} are named twice; give each lookup its own name")
    for feature in features.sparse:
        if feature.table not in tables:
            raise UserError(
                f"feature '{feature.name}' looks up table '{feature.table}', which is not among tables ({', '.join(tables)})"
            )
    for table in tables:
        users = [f for f in features.sparse if f.table == table]
        if not users:
            raise UserError(f"table '{table}' is looked up by no feature; remove it or name it in a feature")
        if len({f.weighted for f in users}) > 1:
            raise UserError(
                f"table '{table}' has weighted and unweighted features; give the weighted ones their own table"
            )

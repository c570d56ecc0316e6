"""A job's configuration: one YAML file, checked before any rank starts."""

import difflib
import hashlib
import json
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, ValidationInfo, field_validator

from exfm.checkpoints.config import CheckpointConfig
from exfm.data.errors import UserError
from exfm.data.manifest import Stream
from exfm.data.reader import StreamConfig, slices_of
from exfm.data.yamls import parse_yaml
from exfm.distillation.config import DistillationConfig
from exfm.embeddings.config import FeaturesConfig, TableConfig, check_features
from exfm.embeddings.ids import sparse_inputs
from exfm.models.config import ModelConfig
from exfm.sharding.config import ShardingConfig
from exfm.trainer.engines import DenseEngineConfig
from exfm.trainer.env import DeviceChoice
from exfm.trainer.learning import check_learning
from exfm.trainer.optim import OptimConfig
from exfm.trainer.precision import PrecisionConfig

M = TypeVar("M", bound=BaseModel)


class TraceConfig(BaseModel):
    """Steps of each attempt that torch.profiler follows; a Chrome trace per rank in <run>/logs. first: counted from 0."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    first: int = Field(20, ge=1, description="the first steps are slower than all others")
    steps: int = Field(10, gt=0)


class RunConfig(BaseModel):
    """Section `run`. folder: everything the job writes. pipeline: TorchRec's TrainPipelineBase, TrainPipelineSparseDist or
    PrefetchTrainPipelineSparseDist, which also fetches the next batch's rows from host memory (fused_uvm_caching).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    folder: str
    seed: int = 0
    device: DeviceChoice = "auto"
    pipeline: Literal["base", "sparse_dist", "prefetch"] = "base"
    threads_per_rank: int = Field(1, gt=0)
    log_every_s: float = Field(5.0, gt=0)
    timeout_s: float = Field(600.0, gt=0, description="of every collective")
    hang_s: float = Field(300.0, gt=0, description="a rank still for so long ends the job, naming who it waits for")
    preflight: Literal["full", "quick", "off"] = Field(
        "full",
        description="what is looked at before the model is built; quick: all but how fast ranks reach each other",
    )
    nan_check_steps: int = Field(
        16, gt=0, description="a non-finite loss is noticed at most twice this many steps late"
    )
    on_bad_loss: Literal["fail", "restore", "skip"] = Field(
        "restore",
        description="go back to the last commit; skip: and leave out the examples from it to where it was noticed",
    )
    max_restores: int = Field(1, ge=0, description="restores of the last commit after a bad loss, then exit 1")
    spike_factor: float = Field(
        0.0, ge=0, description="a global batch's loss above so many times its running mean is bad too; 0: off"
    )

    trace: TraceConfig | None = None

    @field_validator("preflight", mode="before")
    @classmethod
    def _yaml_off(cls, value: Any) -> Any:
        """YAML takes `off` for false."""
        return "off" if value is False else value

    @field_validator("hang_s")
    @classmethod
    def _within_timeout(cls, value: float, info: ValidationInfo) -> float:
        if value > (limit := info.data.get("timeout_s", value)):
            raise ValueError(f"more than run.timeout_s {limit:g}, after which collectives fail anyway; lower it")
        return value

    @field_validator("spike_factor")
    @classmethod
    def _off_or_above_1(cls, value: float) -> float:
        if 0 < value <= 1:
            raise ValueError("the factor of a spike is above 1, or 0 for off")
        return value


class HeadsConfig(BaseModel):
    """Section `heads`: the served head. tasks: label columns in order."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    tasks: tuple[str, ...] = Field(min_length=1)
    hidden: tuple[PositiveInt, ...] = ()


class EvaluationConfig(BaseModel):
    """Section `evaluation`: progressive, from the forward pass before each update. skip: first share of slices left out."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    skip: float = Field(0.2, ge=0, lt=1)
    bootstrap: int = Field(200, ge=0, description="Poisson bootstrap replicates; 0 for none")


class JobConfig(BaseModel):
    """One job: teacher or student."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    run: RunConfig
    stream: StreamConfig
    features: FeaturesConfig
    tables: dict[str, TableConfig]
    model: ModelConfig
    heads: HeadsConfig
    optim: OptimConfig = OptimConfig()
    dense_engine: DenseEngineConfig = DenseEngineConfig()
    precision: PrecisionConfig = PrecisionConfig()
    sharding: ShardingConfig = ShardingConfig()
    distillation: DistillationConfig = DistillationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @property
    def checkpoint_folder(self) -> str:
        """Folder or URL of the job's commits."""
        return self.checkpoint.folder or str(Path(self.run.folder) / "checkpoints")

    @property
    def teaches(self) -> bool:
        """Whether others get its predictions, from its own forward pass or through snapshots that a scorer reads."""
        return self.distillation.publish is not None or self.checkpoint.snapshots is not None

    def identity(self) -> dict[str, Any]:
        """What must be equal to continue a checkpoint: all that decides weights, nothing about where or how fast."""
        keep = self.model_dump(mode="json", include={"features", "tables", "model", "heads", "optim", "distillation"})
        keep["run"] = {"seed": self.run.seed}
        keep["stream"] = self.stream.model_dump(
            mode="json", include={"first", "global_batch", "shuffle_window", "domains", "domain"}
        )
        if self.stream.labels != "first":
            keep["stream"]["labels"] = self.stream.labels
        if self.distillation.publish is not None:
            del keep["distillation"]["publish"]["ttl_s"]
        if self.distillation.learn is not None:
            keep["distillation"]["learn"] = self.distillation.learn.identity()
        return keep

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()


def load_config(path: str | Path, sets: list[str], kind: type[M]) -> M:
    """Read a YAML file, apply `a.b=c` overrides and check it. UserError names the key, its value and what is allowed."""
    return parse_config(read_raw(path, sets), str(path), kind)


def read_raw(path: str | Path, sets: list[str]) -> dict[str, Any]:
    """The sections of a YAML file after overrides, unchecked. UserError where it is no mapping."""
    try:
        raw = parse_yaml(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"config {path} does not exist; see configs/ for examples") from None
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"config {path} cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"config {path} is not a mapping of sections; see configs/ for examples")
    for item in sets:
        _set(raw, item)
    return raw


def parse_config(raw: dict[str, Any], where: str, kind: type[M]) -> M:
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(e, kind) for e in error.errors()]
        raise UserError(f"config {where}: " + "; ".join(dict.fromkeys(lines))) from None


def _set(raw: dict[str, Any], item: str) -> None:
    key, sign, value = item.partition("=")
    if not sign:
        raise UserError(f"--set {item} is not of the form section.key=value")
    *path, last = key.split(".")
    node = raw
    for part in path:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise UserError(f"--set {item}: '{part}' is not a section")
    try:
        node[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"--set {item}: the value is no YAML ({' '.join(str(error).split())})") from None


def _explain(error: Any, kind: type[BaseModel]) -> str:
    """One line for one pydantic error: key, value, what is allowed, nearest right spelling."""
    known, allowed = _locate(kind, error["loc"][:-1])
    name = str(error["loc"][-1])
    key = ".".join([*known, name])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, allowed, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else f"; allowed: {', '.join(allowed)}" if allowed else ""
        return f"unknown key '{key}'{hint}"
    if error["type"] == "missing":
        return f"key '{key}' is missing"
    return f"'{key}' is {error.get('input')!r}: {error['msg']}"


def _locate(kind: Any, loc: tuple[Any, ...]) -> tuple[list[str], list[str]]:
    """The keys of a pydantic location, without the tags of unions, and the fields that a mapping there may have."""
    kinds, keys = _models(kind), []
    for part in loc:
        tagged = [k for k in kinds if len(kinds) > 1 and part == k.model_fields["kind"].default]
        if tagged:
            kinds = tagged
            continue
        keys.append(str(part))
        found = [m for k in kinds if part in k.model_fields for m in _models(k.model_fields[part].annotation)]
        # an index of a list or a name in a dict stays at the same models
        kinds = found or [k for k in kinds if part not in k.model_fields]
    return keys, sorted({f for k in kinds for f in k.model_fields})


def _models(kind: Any) -> list[Any]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind]
    return [m for arg in get_args(kind) for m in _models(arg)]


def check_against_stream(config: JobConfig, stream: Stream) -> None:
    """UserError for columns, tasks or domains that the stream lacks, or tasks that a teacher does; before any rank starts."""
    check_features(config.features, config.tables)
    schema = stream.schema
    sparse_inputs(config.features, config.tables, schema)
    if missing := [d.name for d in config.features.dense if d.name not in schema.dense]:
        raise UserError(
            f"stream '{schema.name}' has no dense column(s) {', '.join(missing)}; it has {', '.join(schema.dense)}"
        )
    if missing := [t for t in config.heads.tasks if t not in schema.labels]:
        raise UserError(
            f"stream '{schema.name}' has no label(s) {', '.join(missing)}; it has {', '.join(schema.labels)}"
        )
    for domain in config.stream.domains:
        if schema.sparse_column(domain.column).list:
            raise UserError(
                f"domain '{domain.name}' is cut by '{domain.column}', a list column; use a column with one id"
            )
    names = [d.name for d in config.stream.domains]
    if len(set(names)) < len(names) or "all" in names:
        raise UserError(f"stream.domains are named {', '.join(names)}; give each its own name, other than 'all'")
    config.stream.own_domain()
    slices = slices_of(stream, config.stream)
    if config.distillation.learn is not None:
        check_learning(config.distillation.learn, config.heads.tasks, stream, slices)
    if config.distillation.publish and config.stream.shuffle_window > 1:
        raise UserError(
            f"stream.shuffle_window is {config.stream.shuffle_window} and the teacher publishes its forward pass: an example "
            "would be scored after later ones were learned; set stream.shuffle_window: 0"
        )


def check_ranks(config: JobConfig, world_size: int) -> None:
    """UserError for more ranks than a global batch has examples, and for what so many ranks cannot be divided into."""
    config.dense_engine.check(world_size, config.model.kind)
    check_replicas(config)
    if world_size > config.stream.global_batch:
        raise UserError(
            f"{world_size} ranks share a global batch of {config.stream.global_batch} examples; use at most "
            f"{config.stream.global_batch} ranks or raise stream.global_batch"
        )


def check_replicas(config: JobConfig) -> None:
    """UserError for what does not go with replicas of tables: whatever follows single rows, and types that need a node to themselves."""
    if config.sharding.replicas == 1:
        return
    c = config.checkpoint
    by_row: list[tuple[str, Any, Any]] = [("checkpoint.full_every", c.full_every, 1)] if c.full_every > 1 else []
    if c.staging == "copy_on_write":
        by_row.append(("checkpoint.staging", c.staging, "full"))
    if c.snapshots is not None and c.snapshots.full_every > 1:
        by_row.append(("checkpoint.snapshots.full_every", c.snapshots.full_every, 1))
    for key, value, fits in by_row:
        raise UserError(
            f"{key} is {value}, but sharding.replicas {config.sharding.replicas} are averaged row by row without a trace of which "
            f"rows changed; use {fits}, or replicas: 1"
        )
    kinds = {*config.sharding.allowed, *(k for t in config.sharding.tables.values() for k in t.types or ())}
    if on_nodes := sorted(kinds & {"table_row_wise", "table_column_wise", "grid_shard"}):
        raise UserError(
            f"sharding allows {', '.join(on_nodes)}, which can be planned with {config.sharding.replicas} replicas but not trained; "
            "leave them out, or set replicas: 1"
        )

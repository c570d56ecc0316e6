"""`exfm export`: a run's newest commit as a folder to serve from, checked against the trained model's own forward pass."""

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast, get_args
from urllib.parse import quote

import pyarrow as pa
import torch
from torch import Tensor

from exfm.checkpoints.commits import Committed
from exfm.checkpoints.layout import bytes_of, header
from exfm.checkpoints.reader import Folder
from exfm.checkpoints.sources import SCALE_BYTES
from exfm.checkpoints.store import load_from
from exfm.checkpoints.view import View
from exfm.data.batch import Batch
from exfm.data.columns import make_batch
from exfm.data.commit import commit_json, open_folder
from exfm.data.errors import UserError
from exfm.data.manifest import Stream, open_stream
from exfm.data.reader import open_slice
from exfm.data.schema import Schema
from exfm.distillation.config import DistillationConfig
from exfm.embeddings.ids import IdMap
from exfm.embeddings.tables import pooled_features
from exfm.launch.checkpoint_export import Out
from exfm.launch.checkpoints import Place, Progress, place
from exfm.sharding.config import ShardingConfig
from exfm.trainer.build import Built, build
from exfm.trainer.columns import batch_columns
from exfm.trainer.config import JobConfig, check_against_stream, load_config, parse_config
from exfm.trainer.engines import DenseEngineConfig
from exfm.trainer.env import RankEnv, process_group
from exfm.trainer.export import (
    PROGRAM,
    SERVING,
    DenseProgram,
    DenseSpec,
    FeatureSpec,
    FileSpec,
    Rows,
    ServingModel,
    ServingSpec,
    TableSpec,
    program_bytes,
)
from exfm.trainer.metrics import Metrics, Predictions, summarise
from exfm.trainer.precision import PrecisionConfig
from exfm.trainer.state import canonical_state, check_identity, versions

CHECKED_EXAMPLES, CHECK_BATCH = 4096, 1000
# largest difference of a logit; what rows of that type lose is measured in docs/export.md
TOLERANCE: dict[Rows, float] = {"fp32": 1e-5, "fp16": 0.02, "int8": 0.2}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.uint8}

Batches = list[tuple[pa.Table, Batch]]
# torch.export warns of what libraries beneath it ask
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)


class ExportFailed(RuntimeError):
    """What was written is not what was trained; there is no serving.json."""


def export_model(where: str, folder: Path, rows: str, progress: Progress) -> dict[str, Any]:
    """Write the newest commit of a run, or of a config's run, into a new local folder; what serving.json says.

    UserError for a run without commits, unknown rows or a folder that is not empty. ExportFailed where the exported
    model's logits differ from the trained one's by more than TOLERANCE.
    """
    if rows not in get_args(Rows):
        raise UserError(f"--rows is '{rows}'; use {', '.join(get_args(Rows))}")
    stored = cast(Rows, rows)
    fs, root = open_folder(folder)
    if fs.exists(root) and (not fs.isdir(root) or fs.ls(root, detail=False)):
        raise UserError(f"{folder} is not an empty folder; export into a new one")
    commits, given = _commits_of(where)
    with commits.opened() as (found, folders):
        config = _config(found, given)
        stream = open_stream(config.stream.path)
        check_against_stream(config, stream)
        view = View(folders)
        out = Out(fs, root, progress, sum(view.bytes(f"tables.{t}.weight") for t in config.tables))
        cpu = torch.device("cpu")
        with process_group(RankEnv(), cpu, config.run.timeout_s):
            built = _trained(config, stream.schema, folders, cpu)
            index, batches = _newest(config, stream, found)
            spec = _write(out, view, built, config, stream.schema, found, stored)
            offsets = torch.tensor(stream.schema.logit_offsets(config.heads.tasks))
            check = _check(ServingModel(root, spec), built, batches, offsets, TOLERANCE[stored], progress)
    spec = spec.model_copy(update={"check": check | {"slice": index}})
    commit_json(fs, f"{root}/{SERVING}", spec.model_dump(mode="json"))
    return spec.model_dump(mode="json")


def lines(out: Path, spec: dict[str, Any]) -> list[str]:
    """What was written and how the check went, for people."""
    files, check = [t["file"] for t in spec["tables"].values()], spec["check"]
    size = sum(f["bytes"] for f in files) / 2**20
    stored = ", ".join(sorted({t["stored"] for t in spec["tables"].values()}))
    how = f"differ by at most {check['largest_difference']:.3g} ({check['tolerance']:g} allowed) from"
    how = "are bitwise equal to" if check["bitwise_equal"] else how
    result = [
        f"{out}: {spec['of']['name']} of {spec['run']}; {PROGRAM} {spec['program']['bytes'] / 2**20:,.2f} MiB, {len(files)} "
        f"table(s) with {stored} rows {size:,.2f} MiB",
        f"logits of {check['examples']:,} examples of slice {check['slice']} {how} the trained model's",
    ]
    for task, ne in check["ne"].items():
        result.append(
            f"NE of {task}: {ne['trained']:.6f} trained, {ne['exported']:.6f} exported ({ne['difference']:+.4%})"
        )
    return result


def _commits_of(where: str) -> tuple[Place, JobConfig | None]:
    """The commits of a run's folder, or of the run that a config file describes, and that config."""
    if not Path(where).is_file():
        return place(where), None
    config = load_config(where, [], JobConfig)
    return place(config.checkpoint_folder), config


def _config(found: Committed, given: JobConfig | None) -> JobConfig:
    """The config inside the commit; the stream may have moved to where a given one says."""
    if "config" not in found.manifest:
        raise UserError(f"{found.folder} is not a job's commit; give the run's folder or its config")
    config = parse_config(found.manifest["config"], f"of {found.folder}", JobConfig)
    if given is None:
        return config
    check_identity(found, given)
    return config.model_copy(update={"stream": given.stream})


def _trained(config: JobConfig, schema: Schema, folders: list[Folder], device: torch.device) -> Built:
    """The job's model without distillation, on one rank, with the commit's weights. Needs a process group."""
    plain = config.model_copy(
        update={
            "distillation": DistillationConfig(),
            "dense_engine": DenseEngineConfig(),  # whole on its one rank
            "precision": PrecisionConfig(),  # as it is served
            # any plan holds the same weights; whether they fit is the machine's to say
            "sharding": ShardingConfig(allowed=("table_wise",), host_gib=2.0**30),
        }
    )
    built = build(plain, RankEnv(), device, schema.logit_offsets(config.heads.tasks))
    state = canonical_state(built, plain, device)
    # what is served: neither optimisers' state nor, the model having none, distillation heads
    load_from(folders, {n: t for n, t in state.items() if n.startswith("dense.") or n.endswith(".weight")})
    built.model.eval()
    return built


# ------------------------------------------------------------------------------------------------ writing


def _write(
    out: Out, view: View, built: Built, config: JobConfig, schema: Schema, found: Committed, stored: Rows
) -> ServingSpec:
    """Everything but serving.json."""
    width = sum(w for _, w in pooled_features(config.features, config.tables))
    module = DenseProgram(built.served.backbone, built.served.head)
    program = program_bytes(module, len(config.features.dense), width)
    offsets = schema.logit_offsets(config.heads.tasks)
    manifest, domain = found.manifest, config.stream.own_domain()
    return ServingSpec(
        run=config.run.name,
        of={"folder": found.folder, "name": found.name} | {k: manifest[k] for k in ("sum", "position", "version")},
        domain=domain.model_dump(mode="json") if domain else None,
        tasks=config.heads.tasks,
        dense=tuple(DenseSpec(column=d.name, log1p=d.log1p) for d in config.features.dense),
        features=_features(config, schema),
        program=_file(out, PROGRAM, iter([memoryview(program)])),
        tables={t: _table(out, view, config, t, stored) for t in config.tables},
        calibration={
            "logits": "true",
            "negative_rates": {t: schema.negative_rates.get(t, 1.0) for t in config.heads.tasks},
            "offsets_in_training": dict(zip(config.heads.tasks, offsets, strict=True)),
        },
        versions=versions(),
        check={},
    )


def _features(config: JobConfig, schema: Schema) -> tuple[FeatureSpec, ...]:
    return tuple(
        FeatureSpec(
            name=f.name,
            column=f.source,
            list=schema.sparse_column(f.source).list,
            weights=schema.sparse_column(f.source).weights if f.weighted else None,
            table=f.table,
            ids=f.ids,
            salt=str(IdMap(f, config.tables[f.table]).salt) if f.ids == "hash" else None,
        )
        for f in config.features.sparse
    )


def _table(out: Out, view: View, config: JobConfig, name: str, stored: Rows) -> TableSpec:
    rows, width = view.shape(f"tables.{name}.weight")
    shape = (rows, width + SCALE_BYTES * (stored == "int8"))

    def parts() -> Iterator[memoryview]:
        yield memoryview(header([("weight", DTYPES[stored], shape)])[0])
        for first, last in view.parts(f"tables.{name}.weight"):
            part = view.rows(f"tables.{name}.weight", first, last)
            yield bytes_of(_converted(part, stored, name))
            out.count(part.numel() * part.element_size())

    # quoted, a table's name cannot leave the folder
    file = _file(out, f"tables/{quote(name, safe='')}.safetensors", parts())
    return TableSpec(rows=rows, width=width, pooling=config.tables[name].pooling, stored=stored, file=file)


def _converted(part: Tensor, stored: Rows, name: str) -> Tensor:
    """Rows as they are stored. ExportFailed for what that type cannot hold."""
    if stored == "int8":
        result = torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(part.float())
        finite = part.isfinite().all()
    else:
        result = part.to(DTYPES[stored])
        finite = result.isfinite().all()
    if not finite:
        raise ExportFailed(
            f"table '{name}' has values that are not finite as {stored}; use --rows fp32, or an older commit"
        )
    return result


def _file(out: Out, path: str, parts: Iterator[memoryview]) -> FileSpec:
    digest, size = hashlib.sha256(), 0
    with out.file(path) as f:
        for part in parts:
            f.write(part)
            digest.update(part)
            size += len(part)
    return FileSpec(path=path, bytes=size, sha256=digest.hexdigest())


# ------------------------------------------------------------------------------------------------ checking


def _check(
    model: ServingModel, built: Built, batches: Batches, offsets: Tensor, tolerance: float, progress: Progress
) -> dict[str, Any]:
    """Both models on the same examples; what serving.json says of it. offsets [t]: from the true world to the stream's."""
    sums = [Metrics(0, len(offsets), 0) for _ in range(2)]
    equal, largest, done = True, 0.0, 0
    for table, batch in batches:
        with torch.no_grad():
            trained = built.model(batch)[1].logits
        exported = model.logits_of(table)
        equal &= torch.equal(trained, exported)
        # a NaN must not hide behind a maximum
        largest = max(largest, float((trained - exported).abs().nan_to_num(torch.inf).max()))
        for metrics, logits in zip(sums, (trained, exported), strict=True):
            metrics.add(_predictions(logits + offsets, batch), evaluated=False)
        done += len(batch)
        progress("checking, examples", done, sum(len(b) for _, b in batches))
    if largest > tolerance:
        raise ExportFailed(
            f"logits differ by up to {largest:.6g} from the trained model's on {done} examples, {tolerance:g} is allowed; "
            f"there is no {SERVING}; use --rows fp32, and if that fails too, report it"
        )
    ne = {}
    for t, task in enumerate(model.spec.tasks):
        a, b = (summarise(m.slice[0, t])["ne"] for m in sums)
        ne[task] = {"trained": a, "exported": b, "difference": b / a - 1}
    found = {"examples": done, "bitwise_equal": equal, "largest_difference": largest, "tolerance": tolerance}
    return found | {"ne": ne}


def _newest(config: JobConfig, stream: Stream, found: Committed) -> tuple[int, Batches]:
    """The newest slice that the commit has trained of and that has examples of the job's domain, and its first batches."""
    position = found.manifest["position"]
    columns = batch_columns(config.model_copy(update={"distillation": DistillationConfig()}), stream)
    wanted = config.stream.model_copy(update={"on_missing": "refuse"})
    for index in range(position["slice"] - (position["consumed"] == 0), config.stream.first - 1, -1):
        reader = open_slice(stream, wanted, columns, index, config.run.seed)
        if reader.examples:
            break
    else:
        raise UserError(f"{found.folder} has trained no example to check an export on; train a slice first")
    batches, last = [], min(reader.examples, CHECKED_EXAMPLES)
    for start in range(0, last, CHECK_BATCH):
        rows = reader.order.rows(start, min(start + CHECK_BATCH, last))
        table = reader.source.take(rows)
        batches.append((table, make_batch(table, rows, len(rows), columns, f"slice {index} of {stream.root}")))
    return index, batches


def _predictions(logits: Tensor, batch: Batch) -> Predictions:
    parts = (logits, batch.labels, batch.weights, batch.domain, batch.users)
    return Predictions(*(x.numpy() for x in parts))

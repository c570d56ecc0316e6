"""A served model for other programs: what an exported folder holds, and the reference reader of it in plain torch.

    DIR/dense.pt2                     torch.export program: dense [b, d] f32, pooled [b, p] f32 -> logits [b, t]
    DIR/tables/<table>.safetensors    weight [r, w] f32 or f16, or u8 [r, w + 8]: w codes, then scale and bias f32
    DIR/serving.json                  how an example becomes dense and pooled, and checksums; written last

Reading needs neither torchrec, fbgemm nor a process group.
b examples, d dense features, n ids of one feature, w width of a table, p width of all features, t tasks.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from exfm.data.errors import UserError
from exfm.data.hashing import hash64
from exfm.data.manifest import column_array

SERVING, PROGRAM = "serving.json", "dense.pt2"
Rows = Literal["fp32", "fp16", "int8"]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileSpec(_Frozen):
    path: str
    bytes: int
    sha256: str


class DenseSpec(_Frozen):
    """A dense column: missing is 0; log1p maps x to sign(x) log(1 + |x|)."""

    column: str
    log1p: bool


class FeatureSpec(_Frozen):
    """A lookup. salt: of `ids: hash`, in decimal digits, because many JSON readers round so large a number."""

    name: str
    column: str
    list: bool
    weights: str | None
    table: str
    ids: Literal["hash", "identity"]
    salt: str | None


class TableSpec(_Frozen):
    rows: int
    width: int
    pooling: Literal["sum", "mean"]
    stored: Rows
    file: FileSpec


class ServingSpec(_Frozen):
    """serving.json. dense and features in the order in which the program takes them; of: the commit that was exported."""

    format: Literal[1] = 1
    run: str
    of: dict[str, Any]
    domain: dict[str, Any] | None
    tasks: tuple[str, ...]
    dense: tuple[DenseSpec, ...]
    features: tuple[FeatureSpec, ...]
    tables: dict[str, TableSpec]
    program: FileSpec
    calibration: dict[str, Any]
    versions: dict[str, str]
    check: dict[str, Any]


class DenseProgram(nn.Module):
    """What is exported of a model: backbone and served head."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, dense: Tensor, pooled: Tensor) -> Tensor:
        return self.head(self.backbone(dense, pooled))


def program_bytes(module: DenseProgram, num_dense: int, pooled_width: int) -> bytes:
    """The module as a torch.export program that takes any number of examples."""
    batch = torch.export.Dim("batch")
    # the program keeps its example inputs: zeros tell nothing
    inputs = (torch.zeros(2, num_dense), torch.zeros(2, pooled_width))
    program = torch.export.export(module.eval(), inputs, dynamic_shapes=({0: batch}, {0: batch}))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths and source lines of this machine
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


@dataclass(frozen=True)
class Lists:
    """Raw ids of one feature: of all examples one after the other [n] i64, ids per example [b], their weights [n] f32 where
    the feature is weighted."""

    ids: NDArray[np.int64]
    lengths: NDArray[np.int64]
    weights: NDArray[np.float32] | None = None


class ServingModel:
    """An exported model. All logits are of the true world: the sigmoid is the probability, nothing is to be added.

    Every byte is checked when it is opened; tables stay on disk and are paged in as they are looked up. UserError names a
    file that is missing or differs from its checksum.
    """

    def __init__(self, folder: str | Path, spec: ServingSpec | None = None) -> None:
        """spec: for a folder whose serving.json is not written yet."""
        self.folder = Path(folder)
        self.spec = spec or _read_spec(self.folder)
        # the bytes that were checked are the ones that run
        program = io.BytesIO(self._checked(self.spec.program, whole=True))
        self.program = torch.export.load(program).module()
        self.tables = {name: self._table(table) for name, table in self.spec.tables.items()}

    def logits_of(self, rows: pa.Table) -> Tensor:
        """Logits [b, t] of Arrow rows with the columns of the stream; further columns do not matter."""
        wanted = [d.column for d in self.spec.dense]
        wanted += [c for f in self.spec.features for c in (f.column, f.weights) if c]
        if missing := sorted(set(wanted) - set(rows.column_names)):
            raise UserError(f"the rows lack column(s) {', '.join(missing)}, which the model of {self.folder} reads")
        dense = np.empty((rows.num_rows, len(self.spec.dense)), np.float32)
        for i, d in enumerate(self.spec.dense):
            dense[:, i] = rows.column(d.column).to_numpy()
        return self.logits(dense, {f.name: _lists(rows, f) for f in self.spec.features})

    def logits(self, dense: NDArray[np.float32], ids: Mapping[str, Lists]) -> Tensor:
        """Logits [b, t] of raw dense values [b, d], NaN where missing, and raw ids by feature.

        UserError for an id outside an identity table.
        """
        columns = np.empty_like(dense)
        for i, d in enumerate(self.spec.dense):
            values = np.nan_to_num(np.ascontiguousarray(dense[:, i]), nan=0.0)
            columns[:, i] = np.sign(values) * np.log1p(np.abs(values)) if d.log1p else values
        with torch.no_grad():
            pooled = torch.cat([self.pooled(f, ids[f.name]) for f in self.spec.features], dim=1)
            return self.program(torch.from_numpy(columns), pooled)

    def pooled(self, feature: FeatureSpec, lists: Lists) -> Tensor:
        """The pooled embedding [b, w] of one feature; zeros for an example without ids."""
        table = self.spec.tables[feature.table]
        rows = self._rows(table, self.tables[feature.table], torch.from_numpy(self._row_numbers(feature, lists)))
        lengths = torch.from_numpy(np.ascontiguousarray(lists.lengths, np.int64))
        if not len(rows):
            return torch.zeros(len(lengths), table.width)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        weights = None
        if feature.weights is not None:
            if lists.weights is None:
                raise UserError(f"feature '{feature.name}' is weighted; give the weights of its ids")
            weights = torch.from_numpy(np.array(lists.weights, np.float32))
        numbers = torch.arange(len(rows))
        out = embedding_bag(numbers, rows, offsets, mode="sum", include_last_offset=True, per_sample_weights=weights)
        # as FBGEMM does it, to the last bit: times 1/length, not divided by it
        return out * (1.0 / lengths.clamp(min=1).float())[:, None] if table.pooling == "mean" else out

    def _row_numbers(self, feature: FeatureSpec, lists: Lists) -> NDArray[np.int64]:
        """Rows [n] of raw ids, as embeddings/ids.py maps them."""
        ids, rows = np.ascontiguousarray(lists.ids, np.int64), self.spec.tables[feature.table].rows
        if feature.salt is not None:
            return (hash64(ids, int(feature.salt)) % np.uint64(rows)).astype(np.int64)
        if len(ids) and (ids.min() < 0 or ids.max() >= rows):
            first = ids[np.argmax((ids < 0) | (ids >= rows))]
            raise UserError(
                f"feature '{feature.name}': id {first} is outside the identity table '{feature.table}' of {rows} rows; "
                "leave it out, or serve a model that was trained with it"
            )
        return ids.copy()  # Arrow's memory may be read-only

    @staticmethod
    def _rows(table: TableSpec, weight: Tensor, numbers: Tensor) -> Tensor:
        """The given rows [n, w] in fp32."""
        found = weight.index_select(0, numbers)
        if table.stored != "int8":
            return found.float()
        scale, bias = found[:, table.width :].contiguous().view(torch.float32).split(1, dim=1)
        return found[:, : table.width].float() * scale + bias

    def _table(self, table: TableSpec) -> Tensor:
        self._checked(table.file)
        with safe_open(str(self.folder / table.file.path), "pt") as file:
            weight = file.get_tensor("weight")  # mapped, not read
        wanted = (table.rows, table.width + 8 * (table.stored == "int8"))
        if tuple(weight.shape) != wanted:
            raise UserError(f"{self.folder / table.file.path} has rows of {tuple(weight.shape)}, {wanted} are declared")
        return weight

    def _checked(self, file: FileSpec, whole: bool = False) -> bytes:
        """Check a file against its size and checksum; its bytes where they are wanted `whole`."""
        path = self.folder / file.path
        try:
            with open(path, "rb") as f:
                content = f.read() if whole else b""
                digest = hashlib.sha256(content) if whole else hashlib.file_digest(f, "sha256")
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error}); copy the exported folder again, whole") from None
        if digest.hexdigest() != file.sha256:
            raise UserError(f"{path} differs from its checksum in {SERVING}; copy the exported folder again, whole")
        return content


def _read_spec(folder: Path) -> ServingSpec:
    try:
        return ServingSpec.model_validate(json.loads((folder / SERVING).read_bytes()))
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no {SERVING}: it is no exported model, or its export failed; see `exfm export`"
        ) from None
    except ValueError as error:
        raise UserError(f"{folder / SERVING} is damaged or of another format: {error}") from None


def _lists(rows: pa.Table, feature: FeatureSpec) -> Lists:
    """The ids of a column, one or a list per example; a null is no id."""
    array = column_array(rows, feature.column)
    if pa.types.is_list(array.type):
        lengths = pc.list_value_length(array).fill_null(0).to_numpy().astype(np.int64)
        ids = array.flatten().to_numpy(zero_copy_only=False)
    else:
        lengths = array.is_valid().to_numpy(zero_copy_only=False).astype(np.int64)
        ids = array.drop_null().to_numpy()
    if feature.weights is None:
        return Lists(ids, lengths)
    weights = column_array(rows, feature.weights).flatten().to_numpy(zero_copy_only=False)
    return Lists(ids, lengths, weights)

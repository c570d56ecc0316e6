"""What differs between two commits or snapshots, whatever their sharding: tensors row by row, and what their manifests say."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exfm.checkpoints.layout import DTYPE_NAMES
from exfm.checkpoints.view import View
from exfm.launch.checkpoints import Place, Progress

FIELDS = ("position", "config", "versions", "world_size", "step", "version", "rows")


@dataclass
class Difference:
    """Of one tensor's rows. max_abs and l2 (of the difference) are NaN where a number met a NaN."""

    rows_differ: int = 0
    max_abs: float = 0.0
    square: float = 0.0

    def add(self, a: Tensor, b: Tensor) -> None:
        """Rows of both; NaN equals NaN."""
        if a.dtype == b.dtype and torch.equal(a, b):
            return
        a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
        if a.is_floating_point() or b.is_floating_point():
            a, b = a.double(), b.double()
        differ = (a != b) & ~((a != a) & (b != b))
        rows = differ.any(dim=1)
        self.rows_differ += int(rows.sum())
        if bool(rows.any()):
            gap = torch.where(differ[rows], a[rows].double() - b[rows].double(), 0.0)
            largest = float(gap.abs().max())
            self.max_abs = largest if math.isnan(largest) else max(self.max_abs, largest)
            self.square += float(gap.square().sum())

    def as_dict(self) -> dict[str, Any]:
        return {"rows_differ": self.rows_differ, "max_abs": self.max_abs, "l2": math.sqrt(self.square)}


def diff(a: Place, b: Place, progress: Progress) -> dict[str, Any]:
    """Tensors and manifest fields in which two commits differ; deltas count as the state that they make up."""
    with a.opened() as (left, left_folders), b.opened() as (right, right_folders):
        x, y = View(left_folders), View(right_folders)
        common = [n for n in x.names if n in y.names and x.shape(n) == y.shape(n)]
        total, done = sum(x.bytes(n) for n in common), 0
        tensors: list[dict[str, Any]] = []
        for name in sorted({*x.names, *y.names}):
            found = _told_apart(x, y, name)
            if name in common:
                numbers = Difference()
                for first, last in x.parts(name):
                    numbers.add(x.rows(name, first, last), y.rows(name, first, last))
                    done += (last - first) * x.bytes(name) // max(_rows(x, name), 1)
                    progress("comparing, bytes", min(done, total), total)
                if numbers.rows_differ:
                    found |= {"rows": _rows(x, name)} | numbers.as_dict()
            if found:
                tensors.append({"name": name} | found)
        fields = [d for key in FIELDS for d in differences(left.manifest.get(key), right.manifest.get(key), key)]
    return {
        "a": left.folder,
        "b": right.folder,
        "equal": not tensors and not fields,
        "compared": len(common),
        "tensors": tensors,
        "fields": fields,
    }


def _rows(view: View, name: str) -> int:
    shape = view.shape(name)
    return shape[0] if shape else 1


def _told_apart(x: View, y: View, name: str) -> dict[str, Any]:
    """In what the descriptions of a tensor differ."""
    if name not in y.names:
        return {"only_in": "a"}
    if name not in x.names:
        return {"only_in": "b"}
    found: dict[str, Any] = {}
    if x.shape(name) != y.shape(name):
        found["shape"] = [list(x.shape(name)), list(y.shape(name))]
    if x.dtype(name) != y.dtype(name):
        found["dtype"] = [DTYPE_NAMES[x.dtype(name)], DTYPE_NAMES[y.dtype(name)]]
    return found


def differences(a: Any, b: Any, key: str) -> list[dict[str, Any]]:
    """{key, a, b} for every leaf in which two nested mappings differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for k in sorted({*a, *b}) for d in differences(a.get(k), b.get(k), f"{key}.{k}")]
    return [] if a == b else [{"key": key, "a": a, "b": b}]

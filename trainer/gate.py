"""Whether a snapshot may be published: the newest slice's progressive evaluation must lie inside the configured bands."""

import math
from typing import Any

from exfm.checkpoints.config import GateConfig


def refusal(gate: GateConfig | None, metrics: dict[str, dict[str, Any]]) -> str:
    """Why not, or "". metrics: of each task, `ne` and `calibration` over all examples of the slice."""
    if gate is None:
        return ""
    for task, values in metrics.items():
        for name, (low, high) in (("ne", gate.ne), ("calibration", gate.calibration)):
            value = values[name]
            if not math.isfinite(value) or not low <= value <= high:
                return (
                    f"{name} of '{task}' is {value:.4f}, outside checkpoint.snapshots.gate.{name} [{low:g}, {high:g}]"
                )
    return ""

"""Statistics of `exfm bench distill`: paired over users (Poisson bootstrap) and over seeds.

Replicate k of two runs resampled the same users, and run i of two arms has the same seed and the same teacher. So a replicate
of a mean difference takes users and seeds alike from both: its interval says what other users and other seeds would do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
LIMIT = 0.01  # of calibration: distillation must not worsen it by more


@dataclass(frozen=True)
class Run:
    """One finished job's numbers on one domain. cpu_seconds: of the whole job; replicates, calibrations [r]: bootstrap NE and calibration."""

    ne: float
    auc: float
    log_loss: float
    calibration: float
    cpu_seconds: float
    examples: int
    replicates: F64
    calibrations: F64
    table_parameters: int = 0
    dense_parameters: int = 0
    flops: int = 0


def gain(before: Sequence[Run], after: Sequence[Run]) -> dict[str, Any]:
    """Mean NE of `before` minus `after`, runs paired by seed, positive is better; its 95% interval and deviation over seeds."""
    by_seed = [b.ne - a.ne for b, a in zip(before, after, strict=True)]
    replicates = [b.replicates - a.replicates for b, a in zip(before, after, strict=True)]
    return described(by_seed, over_seeds(replicates))


def calibration_change(before: Sequence[Run], after: Sequence[Run]) -> dict[str, Any]:
    """Mean of |log calibration| of `after` minus that of `before`: above 0 is worse, 0.01 is 1% further from 1.

    verdict: `holds` where the whole interval is below LIMIT, `violated` where it is above, else `open`.
    """
    by_seed = [off(a.calibration) - off(b.calibration) for b, a in zip(before, after, strict=True)]
    replicates = [off(a.calibrations) - off(b.calibrations) for b, a in zip(before, after, strict=True)]
    result = described(by_seed, over_seeds(replicates))
    low, high = result["interval"]
    return result | {"verdict": "holds" if high < LIMIT else "violated" if low > LIMIT else "open"}


def transfer(before: Sequence[Run], after: Sequence[Run], teachers: Sequence[Run]) -> dict[str, Any]:
    """Transfer ratio: mean gain of `after` over the teachers' mean advantage, both against `before` on the domain."""
    gains = gain(before, after)
    advantages = gain(before, teachers)
    # the same seeds are drawn for both, so that a lucky undistilled run counts in numerator and denominator
    ratio = gains["replicates"] / advantages["replicates"]
    return described([gains["value"] / advantages["value"]], ratio)


def pooled(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean of one estimate over domains, whose users are disjoint; every domain counts the same."""
    return described([p["value"] for p in parts], np.mean([p["replicates"] for p in parts], axis=0))


def pooled_ratio(gains: Sequence[dict[str, Any]], advantages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Transfer ratio over domains: mean gain by mean advantage."""
    top, bottom = pooled(gains), pooled(advantages)
    return described([top["value"] / bottom["value"]], top["replicates"] / bottom["replicates"])


def over_seeds(replicates: Sequence[F64]) -> F64:
    """[seeds] arrays [r] -> [r] means over seeds drawn with replacement; the same draws in every call."""
    stacked = np.asarray(replicates)
    seeds, r = stacked.shape
    drawn = np.random.default_rng(0).integers(0, seeds, (seeds, r))
    return np.asarray(np.take_along_axis(stacked, drawn, axis=0).mean(axis=0))


def described(values: Sequence[float], replicates: F64) -> dict[str, Any]:
    """The mean of values, their deviation and the replicates' 95% percentile interval."""
    low, high = np.nanpercentile(replicates, [2.5, 97.5]) if len(replicates) else (float("nan"), float("nan"))
    return {
        "value": float(np.mean(values)),
        "sd": deviation(values),
        "interval": [float(low), float(high)],
        "replicates": replicates,
    }


def means(runs: Sequence[Run]) -> dict[str, Any]:
    """Mean and deviation over seeds of what a table shows; of the CPU seconds, the median."""
    out: dict[str, Any] = {}
    for name in ("ne", "auc", "log_loss", "calibration"):
        values = [float(getattr(r, name)) for r in runs]
        out |= {name: float(np.mean(values)), f"{name}_sd": deviation(values)}
    first = runs[0]
    sizes = {
        "table_parameters": first.table_parameters,
        "dense_parameters": first.dense_parameters,
        "flops": first.flops,
    }
    return out | sizes | {"cpu_seconds": float(np.median([r.cpu_seconds for r in runs])), "examples": first.examples}


def deviation(values: Sequence[float]) -> float | None:
    """Of the sample; None for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def off(calibration: Any) -> Any:
    """Distance of a calibration from 1, the same for twice as much and half as much."""
    return np.abs(np.log(calibration))


def plain(value: Any) -> Any:
    """The value without replicates, for JSON."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k != "replicates"}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value

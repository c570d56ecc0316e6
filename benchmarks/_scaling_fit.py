"""Scaling laws: NE = offset + scale x (FLOPs / reference) ** -exponent, fitted by least squares, and what they predict.

Two forms: "offset" has a floor that more FLOPs do not get under; "paper" is Wukong's (arXiv 2403.02545), whose relative log loss
-100 + 99.56 x ** -0.00071, in per cent, is a plain power of FLOPs, with no floor above 0.

n points, e exponents tried.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exfm.data.errors import UserError

Floats = NDArray[np.float64]
FORMS = ("offset", "paper")
MIN_SIZES = 3
EXPONENTS = np.geomspace(1e-4, 3.0, 500)
RESAMPLES = 400


@dataclass(frozen=True)
class Law:
    """reference: FLOPs at which the power is 1, the geometric mean of the fitted ones. rms: of the residuals, in NE."""

    form: str
    offset: float
    scale: float
    exponent: float
    reference: float
    rms: float

    def at(self, flops: Floats | float) -> Any:
        return self.offset + self.scale * (np.asarray(flops) / self.reference) ** -self.exponent


def fit(flops: Sequence[float], ne: Sequence[float], form: str = "offset", floor: float = 0.0) -> Law:
    """The law of smallest squared error. floor: the offset is no lower (Bayes NE, where it is known).

    UserError where there are fewer than 3 sizes.
    """
    if form not in FORMS:
        raise UserError(f"there is no form '{form}' of a scaling law; there are: {', '.join(FORMS)}")
    if (sizes := len(set(flops))) < MIN_SIZES:
        raise UserError(f"a law is fitted to {sizes} sizes; at least {MIN_SIZES} are needed: run more (--sizes)")
    x_n, y_n = np.array(flops, np.float64), np.array(ne, np.float64)
    reference = float(np.exp(np.log(x_n).mean()))
    u_en = (x_n / reference) ** -EXPONENTS[:, None]
    if form == "paper":
        offset_e, scale_e = np.zeros(len(EXPONENTS)), (u_en @ y_n) / (u_en**2).sum(axis=1)
    else:
        offset_e, scale_e = _lines(u_en, y_n, floor)
    error_e = ((offset_e[:, None] + scale_e[:, None] * u_en - y_n) ** 2).sum(axis=1)
    best = int(error_e.argmin())
    rms = float(np.sqrt(error_e[best] / len(y_n)))
    return Law(form, float(offset_e[best]), float(scale_e[best]), float(EXPONENTS[best]), reference, rms)


def _lines(u_en: Floats, y_n: Floats, floor: float) -> tuple[Floats, Floats]:
    """Offset and scale of least squares for every exponent, with offset >= floor and scale >= 0."""
    centred = u_en - u_en.mean(axis=1, keepdims=True)
    scale = (centred @ y_n) / (centred**2).sum(axis=1)
    offset = y_n.mean() - scale * u_en.mean(axis=1)
    scale, offset = np.where(scale < 0, 0.0, scale), np.where(scale < 0, max(floor, y_n.mean()), offset)
    at_floor = np.maximum(0.0, u_en @ (y_n - floor)) / (u_en**2).sum(axis=1)
    low = offset < floor
    return np.where(low, floor, offset), np.where(low, at_floor, scale)


def predict(flops: Sequence[float], ne: Sequence[float], at: float, form: str, floor: float = 0.0) -> dict[str, Any]:
    """The law of the points, the NE that it predicts `at` FLOPs, and 95% of predictions with residuals resampled.

    Residuals are those of the fit, widened for its parameters; they are drawn for the points and for what is predicted.
    """
    law = fit(flops, ne, form, floor)
    x_n, y_n = np.array(flops, np.float64), np.array(ne, np.float64)
    free = 3 if form == "offset" else 2
    residuals = (y_n - law.at(x_n)) * (len(y_n) / max(1, len(y_n) - free)) ** 0.5
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(RESAMPLES):
        again = fit(flops, (law.at(x_n) + rng.choice(residuals, len(y_n))).tolist(), form, floor)
        drawn.append(float(again.at(at)) + rng.choice(residuals))
    low, high = np.quantile(drawn, [0.025, 0.975]).tolist()
    return {"law": asdict(law), "predicted": float(law.at(at)), "interval": [low, high]}

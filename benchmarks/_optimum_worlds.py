"""Worlds of `exfm bench optimum`, what of a teacher is known beforehand in them, and how predictions are measured.

s slices, n examples of a slice, k latent width.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from exfm.data.synth import World, entropy, generate, rotate, synth

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

WORLD: dict[str, Any] = {
    "num_slices": 10,
    "rows_per_slice": 16_000,
    "num_users": 400,
    "num_items": 100,
    "drift": 0.0,
    "domain_effect": 1.5,
}
FIRST, EVALUATED = 4, 5  # the student's first slice, and the first that counts
D3 = {"name": "d3", "column": "domain", "values": [3]}


def users(modulo: int) -> dict[str, Any]:
    return {"name": f"users{modulo}", "column": "user_id", "modulo": modulo, "values": [1]}


@dataclass(frozen=True)
class Condition:
    """What differs from the plain case: a teacher that knows the truth, in a world without drift.

    Its logits z become scale x z + shift, and + swing or - swing in turns. lag: it knows the preferences of so many slices ago.
    blind: it sees no domain, and knows their mean.
    """

    family: str
    name: str
    world: dict[str, Any] = field(default_factory=dict)
    domain: dict[str, Any] = field(default_factory=lambda: D3)
    scale: float = 1.0
    shift: float = 0.0
    swing: float = 0.0
    lag: int = 0
    blind: bool = False

    @property
    def key(self) -> str:
        return f"{self.family}, {self.name}"

    @property
    def group(self) -> str:
        """Conditions of one group have the same examples in the same order."""
        return f"{sorted(self.world.items())} {self.domain}"

    def settings(self, seed: int) -> World:
        return World(**(WORLD | self.world | {"seed": seed}))


@dataclass(frozen=True)
class Truth:
    """True probabilities [s, n] and ids of a stream's examples."""

    probability: Floats
    domain: Ints
    user: Ints
    item: Ints

    @property
    def logits(self) -> Floats:
        return np.asarray(np.log(self.probability) - np.log1p(-self.probability), np.float64)

    def mask(self, domain: dict[str, Any]) -> NDArray[np.bool_]:
        column = self.domain if domain["column"] == "domain" else self.user
        return np.isin(column % domain.get("modulo", 1 << 40), domain["values"])


def make_place(folder: Path, world: World) -> None:
    """Write a world's stream and truth, unless they are there."""
    if (folder / "truth.npz").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    synth(str(folder / "stream"), **vars(world))
    slices = list(generate(world))
    names = {"domain": "domain", "user": "user_id", "item": "item_id"}
    ids: dict[str, Any] = {n: np.stack([s.table.column(c).to_numpy() for s in slices]) for n, c in names.items()}
    np.savez(folder / "truth.npz", probability=np.stack([s.probability[:, 0] for s in slices]), **ids)


def read_truth(folder: Path) -> Truth:
    with np.load(folder / "truth.npz") as arrays:
        return Truth(**arrays)


def known_logits(condition: Condition, world: World, truth: Truth) -> Floats:
    """Logits [s, n] of a teacher that knows the truth, but as it was `lag` slices ago or, where blind, of the mean domain."""
    bias, gain = world.domain_effects
    share = 1 / np.arange(1, world.num_domains + 1)
    mean_bias, mean_gain = (np.average(x, axis=0, weights=share) for x in (bias, gain))
    logits = truth.logits
    for index in range(world.num_slices):
        user, item, domain = (x[index] for x in (truth.user, truth.item, truth.domain))
        now = world.latent("user", index)
        then = rotate(now, -world.drift * condition.lag)
        strength = world.affinity * np.sqrt(world.width) * world.latent("item", index)[item]
        own = mean_gain if condition.blind else gain[domain]
        logits[index] += (strength * (then[user] * own - now[user] * gain[domain])).sum(axis=1)
        if condition.blind:
            logits[index] += mean_bias - bias[domain]
    return logits


def biased(condition: Condition, logits: Floats) -> Floats:
    """Logits [s, n] as a teacher of another level and scale would have them."""
    turns = np.where(np.arange(len(logits)) % 2, 1.0, -1.0)[:, None]
    return condition.scale * logits + condition.shift + condition.swing * turns


def score(logits: Floats, p: Floats) -> dict[str, float]:
    """Expected NE of logits under the true probabilities, how far it is above the best, calibration."""
    base = float(entropy(p.mean()))
    ne = float(np.mean(np.logaddexp(0, logits) - p * logits)) / base
    return {
        "ne": ne,
        "excess": ne - float(entropy(p).mean()) / base,
        "calibration": float(np.mean(1 / (1 + np.exp(-logits))) / p.mean()),
    }


def logged(log: Path, first: int, last: int) -> Floats:
    """The logits of slices [first, last) in a log, [s, n]; NaN: not scored."""
    parts = [sorted((log / f"slice={i:06d}").glob("part-*.parquet")) for i in range(first, last)]
    slices = [np.concatenate([pq.read_table(f).column(0).to_numpy() for f in files]) for files in parts]
    return np.stack(slices).astype(np.float64)

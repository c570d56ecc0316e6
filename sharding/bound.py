"""How fast any plan can be at best, and how much memory any plan needs: relaxations of the planning problem.

A plan chooses one candidate per table. Whatever it chooses, its slowest rank takes at least the mean of all ranks' loads and at
least its largest shard; its memory is at least the sum over tables. For a step time T only candidates without a shard above T
count; the memory limits enter with multipliers (Lagrange), of which any give a lower bound. The bound is the smallest T that
does not refute itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from exfm.sharding.candidates import Candidate

# t tables, c candidates of a table (padded)
STEPS = 40  # of each bisection


@dataclass(frozen=True)
class Totals:
    """Of every candidate [t, c]: load (ms summed over ranks) and that of its largest shard, bytes of device and of host memory and
    those of its largest shard; inf: padding.
    """

    load: np.ndarray
    largest: np.ndarray
    hbm: np.ndarray
    host: np.ndarray
    largest_hbm: np.ndarray
    largest_host: np.ndarray

    @classmethod
    def of(cls, tables: Sequence[Sequence[Candidate]]) -> "Totals":
        width = max(map(len, tables))

        def matrix(value: Callable[[Candidate], float]) -> np.ndarray:
            out = np.full((len(tables), width), np.inf)
            for t, own in enumerate(tables):
                out[t, : len(own)] = [value(c) for c in own]
            return out

        return cls(
            matrix(lambda c: c.total("load")), matrix(lambda c: c.largest), matrix(lambda c: c.total("hbm")),
            matrix(lambda c: c.total("host")), matrix(lambda c: c.most("hbm")), matrix(lambda c: c.most("host")),
        )  # fmt: skip


@dataclass(frozen=True)
class Bound:
    """ms: no plan's slowest rank is faster; inf where the memory does not suffice. prices: ms per byte of device and of host
    memory at which the bound is found, [2].
    """

    ms: float
    prices: np.ndarray


def lower_bound(totals: Totals, ranks: int, hbm: float, host: float) -> Bound:
    """hbm, host: bytes that all ranks have together."""
    # the step time lies between the largest shards that tables need at least and that of the plan without limits
    low = float(totals.largest.min(axis=1).max())
    found = relaxed(totals, low, ranks, hbm, host)
    if found.ms <= low:
        return Bound(low, found.prices)
    high = low
    while found.ms > high:
        if high > 1e12:
            return Bound(np.inf, found.prices)
        low, high = high, max(2 * high, 1e-6)
        found = relaxed(totals, high, ranks, hbm, host)
    for _ in range(STEPS):
        middle = (low + high) / 2
        if relaxed(totals, middle, ranks, hbm, host).ms > middle:
            low = middle
        else:
            high = middle
    return Bound(low, relaxed(totals, high, ranks, hbm, host).prices)


def relaxed(totals: Totals, limit: float, ranks: int, hbm: float, host: float) -> Bound:
    """The mean load per rank at least, of plans without a shard above `limit` ms."""
    allowed = totals.largest <= limit * (1 + 1e-12)
    if not allowed.any(axis=1).all():
        return Bound(np.inf, np.zeros(2))
    load = np.where(allowed, totals.load, np.inf) / ranks
    sizes = np.stack(
        [np.where(allowed, totals.hbm, 0.0) / max(hbm, 1.0), np.where(allowed, totals.host, 0.0) / max(host, 1.0)]
    )
    need = (
        np.stack([np.where(allowed, totals.hbm, np.inf), np.where(allowed, totals.host, np.inf)])
        .min(axis=2)
        .sum(axis=1)
    )
    if need[0] > hbm or need[1] > host:
        return Bound(np.inf, np.zeros(2))
    best, prices = _value(load, sizes, np.zeros(2)), np.zeros(2)
    cheapest = load.argmin(axis=1)[None, :, None]
    if (np.take_along_axis(sizes, cheapest, axis=2).sum(axis=(1, 2)) <= 1).all():
        return Bound(best, prices)  # memory is no matter
    scale = max(best, 1e-9)
    for _ in range(3):  # one price after the other, each by golden section: the value is concave in it
        for which in (0, 1):
            best, prices[which] = _maximise(load, sizes, prices, which, scale, best)
    return Bound(best, prices / np.array([max(hbm, 1.0), max(host, 1.0)]))


def _value(load: np.ndarray, sizes: np.ndarray, prices: np.ndarray) -> float:
    """The Lagrangian: every table's cheapest candidate, less what the memory is worth."""
    return float((load + prices[0] * sizes[0] + prices[1] * sizes[1]).min(axis=1).sum() - prices.sum())


def _maximise(
    load: np.ndarray, sizes: np.ndarray, prices: np.ndarray, which: int, scale: float, best: float
) -> tuple[float, float]:
    """The best value and the price that gives it, the other price fixed."""

    def at(price: float) -> float:
        trial = prices.copy()
        trial[which] = price
        return _value(load, sizes, trial)

    found = (best, float(prices[which]))
    high = scale
    while at(2 * high) > at(high) and high < scale * 1e9:
        high *= 2
    low, high = 0.0, 2 * high
    for _ in range(STEPS):
        left, right = low + 0.382 * (high - low), low + 0.618 * (high - low)
        values = at(left), at(right)
        found = max(found, (values[0], left), (values[1], right))
        low, high = (low, right) if values[0] >= values[1] else (left, high)
    return found

"""Choosing a candidate per table and ranks for its shards, so that the slowest rank is fast and memory suffices.

Candidates are priced by load and memory (the prices come from the lower bound), shards are placed from the largest on the least
loaded rank that has room, and then the slowest rank is relieved: one of its tables moves, changes its candidate or trades places
with another. All of it is deterministic, because every rank of a job plans for itself.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np
from torchrec.distributed.types import ShardingType

from exfm.sharding.bound import Bound, Totals, lower_bound
from exfm.sharding.candidates import EVERYWHERE, ON_NODES, Candidate

# step times to aim at, by the lower bound
SLACKS = (
    *(1 + k / 200 for k in range(11)), 1.06, 1.08, 1.12, 1.17, 1.25, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0, 10.0, 30.0, math.inf,
)  # fmt: skip
PRICE_FACTORS = (1.0, 1.01, 0.0, 1.5, 4.0, 20.0)  # of the bound's prices; at 1.0 those tie that it splits
GRAINS = (1.0, 0.55, 0.35, 0.25)  # largest shard that is preferred, by the step time aimed at: small ones pack better
STARTS = 3  # of the best packings, how many are improved
EQUAL = 1.002  # step times by a perf model, one by the other, that are worth less than a third of the peak memory
PROMISING = 1.03  # of a packing's step time, by the one wanted: what relieving the slowest rank mends
LIGHTER = 0.7  # of the fullest rank's memory, tried again and again
TIE = 1e-9
LOOSE = (ShardingType.TABLE_WISE.value, ShardingType.COLUMN_WISE.value)  # whose shards lie anywhere


@dataclass(frozen=True)
class Problem:
    """tables: their candidates. hbm, host: bytes that each rank may use, [ranks]; local: ranks of a node. pins: of some tables
    (by number), the ranks that their shards may lie on.
    """

    tables: Sequence[Sequence[Candidate]]
    local: int
    hbm: np.ndarray
    host: np.ndarray
    pins: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        return len(self.hbm)


@dataclass
class Solution:
    """chosen[t]: the number of table t's candidate; ranks[t]: where its shards lie. load [ranks] in ms."""

    chosen: list[int]
    ranks: list[np.ndarray]
    load: np.ndarray
    hbm: np.ndarray
    host: np.ndarray

    @property
    def cost(self) -> tuple[float, float]:
        """The slowest rank's ms; then, among equals, how uneven loads are and how full the fullest rank is."""
        return float(self.load.max()), float(np.square(self.load).sum()) * (1 + 1e-6 * float(self.hbm.max()) / 2**40)

    def copy(self) -> "Solution":
        return Solution(list(self.chosen), list(self.ranks), self.load.copy(), self.hbm.copy(), self.host.copy())


class Board:
    """A solution being made: shards are put down and taken up."""

    def __init__(self, problem: Problem) -> None:
        self.p = problem
        zeros = np.zeros(problem.ranks)
        n = len(problem.tables)
        self.now = Solution([-1] * n, [np.empty(0, int)] * n, zeros.copy(), zeros.copy(), zeros.copy())
        self.on_rank: list[set[int]] = [set() for _ in range(problem.ranks)]  # tables with a shard that lies only there

    def put(self, t: int, c: int, ranks: np.ndarray) -> None:
        self._change(t, c, ranks, 1.0)
        self.now.chosen[t], self.now.ranks[t] = c, ranks

    def take(self, t: int) -> tuple[int, np.ndarray]:
        c, ranks = self.now.chosen[t], self.now.ranks[t]
        self._change(t, c, ranks, -1.0)
        self.now.chosen[t], self.now.ranks[t] = -1, np.empty(0, int)
        return c, ranks

    def shift(self, t: int, shard: int, to: int) -> None:
        """Move one shard to another rank."""
        s, candidate, ranks = self.now, self.p.tables[t][self.now.chosen[t]], self.now.ranks[t].copy()
        for total, own in ((s.load, candidate.load), (s.hbm, candidate.hbm), (s.host, candidate.host)):
            total[ranks[shard]] -= own[shard]
            total[to] += own[shard]
        self.on_rank[ranks[shard]].discard(t)
        self.on_rank[to].add(t)
        ranks[shard] = to
        s.ranks[t] = ranks

    def _change(self, t: int, c: int, ranks: np.ndarray, sign: float) -> None:
        candidate, s = self.p.tables[t][c], self.now
        for total, own in ((s.load, candidate.load), (s.hbm, candidate.hbm), (s.host, candidate.host)):
            np.add.at(total, ranks, sign * own)
        if candidate.sharding_type not in EVERYWHERE:
            for rank in ranks.tolist():
                (self.on_rank[rank].add if sign > 0 else self.on_rank[rank].discard)(t)

    @property
    def fullness(self) -> float:
        """Share of its memory that is taken on the fullest rank, of the kind of which less is left."""
        s, p = self.now, self.p
        return float(np.maximum(s.hbm / p.hbm.clip(1), s.host / p.host.clip(1)).max())

    def place(self, t: int, c: int, limit: float = math.inf, rule: "Rule | None" = None) -> np.ndarray | None:
        """Ranks for a candidate's shards on the present board, such that no load rises above `limit`; None where there are none."""
        candidate = self.p.tables[t][c]
        kind, world, local = candidate.sharding_type, self.p.ranks, self.p.local
        allowed = self.p.pins.get(t)
        if kind in EVERYWHERE:
            ranks = np.arange(world)
            fits = self._fits(candidate, limit) and (allowed is None or len(allowed) == world)
            return ranks if fits else None
        load, hbm, host = candidate.largest, candidate.hbm.max(), candidate.host.max()
        key = (rule or least_loaded)(self, load, hbm, host, limit)
        if kind in ON_NODES:
            return self._on_nodes(candidate, key, limit, allowed)
        s, p = self.now, self.p
        roomy = (s.load + load <= limit) & (s.hbm + hbm <= p.hbm) & (s.host + host <= p.host)
        if allowed is not None:
            roomy &= np.isin(np.arange(world), allowed)
        key = np.where(roomy, key, np.inf)
        if kind == ShardingType.TABLE_COLUMN_WISE.value:
            return self._in_one_node(candidate.num_shards, key, local)
        if candidate.num_shards <= world:
            return least(key, candidate.num_shards)
        return self._in_turn(candidate, key)

    def _in_turn(self, candidate: Candidate, key: np.ndarray) -> np.ndarray | None:
        """More column shards than ranks: each rank in turn, from the first by `key`; None where they do not fit there."""
        order = np.argsort(key, kind="stable")
        ranks = order[np.arange(candidate.num_shards) % len(order)]
        s, p = self.now, self.p
        hbm, host = s.hbm.copy(), s.host.copy()
        np.add.at(hbm, ranks, candidate.hbm)
        np.add.at(host, ranks, candidate.host)
        return ranks if np.isfinite(key).all() and (hbm <= p.hbm).all() and (host <= p.host).all() else None

    def _fits(self, candidate: Candidate, limit: float) -> bool:
        """Whether every rank has room for its shard of a candidate that has one on each."""
        s, p = self.now, self.p
        return bool(
            (s.load + candidate.load <= limit).all()
            and (s.hbm + candidate.hbm <= p.hbm).all()
            and (s.host + candidate.host <= p.host).all()
        )

    def _on_nodes(
        self, candidate: Candidate, key: np.ndarray, limit: float, allowed: np.ndarray | None
    ) -> np.ndarray | None:
        """Row blocks over the ranks of a node: of a whole table on one node, of every column shard on a node of its own."""
        s, p, local = self.now, self.p, self.p.local
        nodes, block = (-1, local), slice(0, local)
        roomy = (
            (s.load.reshape(nodes) + candidate.load[block] <= limit)
            & (s.hbm.reshape(nodes) + candidate.hbm[block] <= p.hbm.reshape(nodes))
            & (s.host.reshape(nodes) + candidate.host[block] <= p.host.reshape(nodes))
        )
        if allowed is not None:
            roomy &= np.isin(np.arange(p.ranks), allowed).reshape(nodes)
        found = least(
            np.where(roomy.all(axis=1), key.reshape(nodes).max(axis=1), np.inf), candidate.num_shards // local
        )
        return None if found is None else (np.sort(found)[:, None] * local + np.arange(local)).reshape(-1)

    @staticmethod
    def _in_one_node(num: int, key: np.ndarray, local: int) -> np.ndarray | None:
        """The node on which the most loaded of the `num` least loaded ranks is the least loaded."""
        if num > local:
            return None
        by_node = np.sort(key.reshape(-1, local), axis=1)[:, num - 1]
        node = int(by_node.argmin())
        if not np.isfinite(by_node[node]):
            return None
        found = least(key[node * local : (node + 1) * local], num)
        return None if found is None else found + node * local


def least(key: np.ndarray, num: int) -> np.ndarray | None:
    """The `num` places with the smallest finite keys, the first ones among equals, smallest first; None where there are fewer."""
    if num == 1:
        place = int(key.argmin())
        return np.array([place]) if np.isfinite(key[place]) else None
    if num > len(key):
        return None
    found = np.argsort(key, kind="stable")[:num]
    return found if np.isfinite(key[found[-1]]) else None


@dataclass(frozen=True)
class Recipe:
    """How to pack: price of every candidate [t, c], step time aimed at in ms, which rank, largest shard that is preferred."""

    prices: np.ndarray
    limit: float
    rule: "Rule"
    grain: float


def solve(problem: Problem, rounds: int = 400) -> tuple[Solution | None, Bound]:
    """The best plan found, None where none was, and the lower bound. rounds: of relieving the slowest rank, per start."""
    totals = Totals.of(problem.tables)
    bound = lower_bound(totals, problem.ranks, float(problem.hbm.sum()), float(problem.host.sum()))
    if not math.isfinite(bound.ms):
        return None, bound
    made = sorted(_packings(problem, totals, bound), key=lambda pair: pair[0].now.cost)
    if not made:
        return None, bound
    starts = [board for board, _ in made[:STARTS]]
    for board in starts:
        relieve(board, totals, bound, rounds)
    best = min(starts, key=lambda board: board.now.cost)
    return _lighter(problem, best, [recipe for _, recipe in made], totals, bound, rounds).now, bound


def _lighter(
    problem: Problem, best: Board, recipes: Sequence[Recipe], totals: Totals, bound: Bound, rounds: int
) -> Board:
    """Pack again as if there were less memory, as long as the step time stays what it is."""
    limit = best.now.cost[0] * EQUAL
    share = best.fullness
    while True:
        share *= LIGHTER
        less = replace(problem, hbm=problem.hbm * share, host=problem.host * share)
        for recipe in (replace(r, limit=r.limit * room) for r in recipes for room in (1.0, 1.01)):
            board = pack(less, totals, recipe)
            if board is not None and board.now.cost[0] <= limit * PROMISING:
                relieve(board, totals, bound, rounds)
                if board.now.cost[0] <= limit:
                    best = board
                    break
        else:
            return best


# which of the ranks with room a shard goes to: that with the smallest key [ranks]. load, hbm, host: of the shard
Rule = Callable[[Board, float, float, float, float], np.ndarray]


def least_loaded(board: Board, load: float, hbm: float, host: float, limit: float) -> np.ndarray:
    return board.now.load


def fullest(board: Board, load: float, hbm: float, host: float, limit: float) -> np.ndarray:
    """Best fit: leave the emptier ranks to larger shards."""
    return -board.now.load


def alike(board: Board, load: float, hbm: float, host: float, limit: float) -> np.ndarray:
    """Where what is left of time and memory is most like what the shard needs (the dot product of vector bin packing)."""
    s, p = board.now, board.p
    left = load / limit * (1 - s.load / limit) if math.isfinite(limit) else 0.0
    left = (
        left + hbm / p.hbm.clip(1) * (1 - s.hbm / p.hbm.clip(1)) + host / p.host.clip(1) * (1 - s.host / p.host.clip(1))
    )
    return -left


RULES: tuple[Rule, ...] = (alike, least_loaded, fullest)


def _packings(problem: Problem, totals: Totals, bound: Bound) -> Iterator[tuple[Board, Recipe]]:
    """For every rule, grain and price of memory, the packing with the smallest step time aimed at that succeeds, as far as it is
    about as small as the best one so far.
    """
    factors = PRICE_FACTORS if bound.prices.any() else (1.0,)
    best = math.inf
    for factor, grain, rule in product(factors, GRAINS, RULES):
        prices = prices_of(totals, problem.ranks, bound.prices * factor)
        slacks = [s for s in SLACKS if s <= best * 1.02]
        found = None
        low, high = 0, len(slacks) - 1
        middle = high  # what fails there fails below, or nearly always
        while low <= high:
            recipe = Recipe(prices, max(bound.ms, 1e-9) * slacks[middle], rule, grain)
            board = pack(problem, totals, recipe)
            if board is not None:
                found, high, best = (board, recipe), middle - 1, min(best, slacks[middle])
            else:
                low = middle + 1
            middle = (low + high) // 2
        if found is not None:
            yield found


def prices_of(totals: Totals, ranks: int, prices: np.ndarray) -> np.ndarray:
    """ms per rank of every candidate [t, c], memory counted in."""
    price = totals.load / ranks
    for size, own in ((totals.hbm, prices[0]), (totals.host, prices[1])):
        price = price + own * np.where(np.isfinite(size), size, 0.0)
    return price


def pack(problem: Problem, totals: Totals, recipe: Recipe) -> Board | None:
    """Place table after table, the largest first, each as its cheapest candidate that finds room below the step time aimed at; those
    with shards of up to the grain of it before the others.
    """
    prices, limit, rule, grain = recipe.prices, recipe.limit, recipe.rule, recipe.grain
    board = Board(problem)
    within = np.where(totals.largest <= limit, prices, np.inf)
    coarse = (
        (totals.largest > limit * grain)
        | (totals.largest_hbm > problem.hbm.max() * grain)
        | (totals.largest_host > problem.host.max() * grain)
    )
    order = np.argsort(
        np.where(coarse, prices.max(initial=0.0, where=np.isfinite(prices)) + within, within), axis=1, kind="stable"
    )
    first = order[:, 0]
    t = np.arange(len(first))
    if not np.isfinite(within[t, first]).all():
        return None
    everywhere = np.array([problem.tables[n][c].sharding_type in EVERYWHERE for n, c in enumerate(first)])
    per_load = totals.largest[t, first] / (
        limit if math.isfinite(limit) else max(totals.largest[t, first].max(), 1e-12)
    )
    biggest = np.maximum(
        totals.largest_hbm[t, first] / problem.hbm.max().clip(1),
        totals.largest_host[t, first] / problem.host.max().clip(1),
    )
    size = per_load + biggest if rule is alike else np.maximum(per_load, biggest)
    # what needs room on many ranks at once goes first
    spread = np.array([problem.tables[n][c].sharding_type in ON_NODES for n, c in enumerate(first)])
    for n in sorted(t.tolist(), key=lambda n: (not everywhere[n], not spread[n], -size[n], n)):
        for c in order[n].tolist():
            if not math.isfinite(within[n, c]):
                return None
            if (ranks := board.place(n, c, limit, rule)) is not None:
                board.put(n, c, ranks)
                break
        else:
            return None
    return board


def relieve(board: Board, totals: Totals, bound: Bound, rounds: int) -> None:
    """Improve a board in place until the slowest rank cannot be relieved any more."""
    for _ in range(rounds):
        swap(board, bound.ms)
        if board.now.load.max() <= bound.ms * (1 + TIE) or not _move(board, totals):
            return


def swap(board: Board, enough: float) -> None:
    """Move single shards away from the slowest rank, or exchange them for smaller ones, as long as that helps."""
    s, p = board.now, board.p
    loose = [t for t, c in enumerate(s.chosen) if p.tables[t][c].sharding_type in LOOSE]
    if not loose:
        return
    table = np.concatenate([np.full(len(s.ranks[t]), t) for t in loose])
    shard = np.concatenate([np.arange(len(s.ranks[t])) for t in loose])
    rank = np.concatenate([s.ranks[t] for t in loose])
    load, hbm, host = (
        np.concatenate([getattr(p.tables[t][s.chosen[t]], what) for t in loose]) for what in ("load", "hbm", "host")
    )
    pinned = np.array([t in p.pins for t in table])
    table, shard, rank, load, hbm, host = (x[~pinned] for x in (table, shard, rank, load, hbm, host))
    for _ in range(4 * len(table)):
        slowest = int(s.load.argmax())
        if s.load[slowest] <= enough * (1 + TIE):
            return
        own = np.flatnonzero(rank == slowest)
        best = _best_exchange(board, slowest, own, table, rank, load, hbm, host)
        if best is None:
            return
        mine, other, to = best
        for item, target in ((mine, to), (other, slowest)):
            if item >= 0:
                board.shift(int(table[item]), int(shard[item]), target)
                rank[item] = target


def _best_exchange(
    board: Board, slowest: int, own: np.ndarray, table: np.ndarray, rank: np.ndarray, load: np.ndarray, hbm: np.ndarray, host: np.ndarray
) -> tuple[int, int, int] | None:  # fmt: skip
    """(shard of the slowest rank, shard to come for it or -1, where the first one goes), after which the slower of the two ranks is
    fastest; None where that would not be faster than now. Shards are numbers into the arrays.
    """
    s, p = board.now, board.p
    best: tuple[float, int, int, int] | None = None
    there = np.arange(len(s.load))
    homes = {int(t): set(rank[table == t].tolist()) for t in np.unique(table[own])}
    for mine in own.tolist():
        taken = list(homes[int(table[mine])])
        # alone to another rank
        after = np.where(there == slowest, np.inf, np.maximum(s.load + load[mine], s.load[slowest] - load[mine]))
        after[(s.hbm + hbm[mine] > p.hbm) | (s.host + host[mine] > p.host)] = np.inf
        after[taken] = np.inf
        to = int(after.argmin())
        if best is None or after[to] < best[0]:
            best = (float(after[to]), mine, -1, to)
        # for a smaller one
        after = np.maximum(s.load[slowest] - load[mine] + load, s.load[rank] - load + load[mine])
        fits = (
            (rank != slowest)
            & (load < load[mine])
            & (s.hbm[slowest] - hbm[mine] + hbm <= p.hbm[slowest])
            & (s.host[slowest] - host[mine] + host <= p.host[slowest])
            & (s.hbm[rank] - hbm + hbm[mine] <= p.hbm[rank])
            & (s.host[rank] - host + host[mine] <= p.host[rank])
            & ~np.isin(rank, taken)
            & ~np.isin(table, table[own])
        )
        after = np.where(fits, after, np.inf)
        other = int(after.argmin())
        if after[other] < best[0]:
            best = (float(after[other]), mine, other, int(rank[other]))
    if best is None or best[0] >= s.load[slowest] * (1 - TIE):
        return None
    return best[1:]


def better(cost: tuple[float, float], before: tuple[float, float]) -> bool:
    """Whether a cost is smaller by more than rounding, which would go round in circles."""
    if abs(cost[0] - before[0]) > TIE * before[0]:
        return cost[0] < before[0]
    return cost[1] < before[1] * (1 - 1e-6)


def _order(board: Board) -> list[int]:
    """Tables of the slowest rank: those on it alone from the most costly, then those everywhere."""
    rank = int(board.now.load.argmax())
    own = sorted(board.on_rank[rank])
    everywhere = [t for t, c in enumerate(board.now.chosen) if board.p.tables[t][c].sharding_type in EVERYWHERE]
    cost = [board.p.tables[t][board.now.chosen[t]].largest for t in (*own, *everywhere)]
    return [t for _, t in sorted(zip(cost, (*own, *everywhere), strict=True), key=lambda pair: (-pair[0], pair[1]))]


def _move(board: Board, totals: Totals, most: int = 24) -> bool:
    """Give one table of the slowest rank another place or another candidate, whichever helps most."""
    before = board.now.cost
    best: tuple[tuple[float, float], int, int, np.ndarray] | None = None
    for t in _order(board)[:most]:
        was = board.take(t)
        for c in np.argsort(totals.load[t, : len(board.p.tables[t])], kind="stable"):
            ranks = board.place(t, int(c))
            if ranks is None:
                continue
            board.put(t, int(c), ranks)
            cost = board.now.cost
            if better(cost, before) and (best is None or cost < best[0]):
                best = (cost, t, int(c), ranks)
            board.take(t)
        board.put(t, *was)
    if best is None:
        return False
    _, t, c, ranks = best
    board.take(t)
    board.put(t, c, ranks)
    return True

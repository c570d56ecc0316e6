"""A synthetic stream whose true probabilities are known, and so the lowest normalised entropy that can be reached.

u users, i items, n examples of a slice, k latent width. Everything random is a hash of (seed, what it is, number), so a
slice is the same on every machine. The logit of an example of slice t is

  base + domain + user + item            main effects of ids, part of them shared by a user's segment and an item's category
  + affinity x sum_k gain[domain, k] R(t)user_k item_k     R(t) rotates preferences by t x drift radians: old tables go stale
  + history x mean cosine of the item and the user's recent positives, of earlier slices
  + context x context_a x context_b      an interaction of two dense features
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from exfm.data.cut import Progress, new_stream
from exfm.data.errors import UserError
from exfm.data.hashing import hash64, salt_of
from exfm.data.manifest import Stream, commit_stream
from exfm.data.schema import Schema, SparseColumn
from exfm.data.writer import write_slice

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

TASKS = ("click", "convert")
START = 1_700_000_000


class SynthSlice(NamedTuple):
    """One slice: its table, and the true probability [n, tasks] of every label."""

    table: pa.Table
    probability: Floats


@dataclass(frozen=True)
class World:
    """What a synthetic stream is drawn from.

    num_users, num_items: ids of slice 0; `growth` x as many new ones arrive in every later slice. skew: exponent of the
    Zipf law of popularity. drift: radians per slice by which preferences rotate. affinity, history, context: strengths, in
    logits. domain_effect, domain_gain: deviations over domains of their main effects, in logits, and of their gains around
    1. num_tasks: 1 (click) or 2 (click, convert).
    """

    num_slices: int = 20
    rows_per_slice: int = 20_000
    seed: int = 0
    num_users: int = 1_000
    num_items: int = 300
    num_domains: int = 4
    num_tasks: int = 1
    width: int = 4
    num_groups: int = 20
    growth: float = 0.03
    skew: float = 0.7
    drift: float = 0.03
    affinity: float = 1.2
    history: float = 1.5
    context: float = 0.5
    domain_effect: float = 0.3
    domain_gain: float = 0.7
    max_recent: int = 10
    slice_s: int = 3_600

    def __post_init__(self) -> None:
        for name in (
            "num_slices",
            "rows_per_slice",
            "num_users",
            "num_items",
            "num_domains",
            "num_groups",
            "max_recent",
            "slice_s",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; at least 1 is needed")
        if self.num_tasks not in (1, 2):
            raise UserError(f"num_tasks is {self.num_tasks}; 1 ({TASKS[0]}) or 2 ({', '.join(TASKS)}) are offered")
        if self.width < 2 or self.width % 2:
            raise UserError(f"width is {self.width}; an even number of at least 2 is needed")
        for name in ("growth", "skew"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; 0 to 1 are allowed")

    @property
    def schema(self) -> Schema:
        ids = ("user_id", "item_id", "segment", "category", "domain")
        return Schema(
            name="synth",
            user="user_id",
            labels=TASKS[: self.num_tasks],
            dense=("context_a", "context_b", "user_count", "noise"),
            sparse=(*(SparseColumn(name=n) for n in ids), SparseColumn(name="recent_items", list=True)),
        )

    def num_ids(self, kind: str, index: int) -> int:
        """How many users or items exist in slice `index`: ids 0 .. that - 1."""
        first = {"user": self.num_users, "item": self.num_items}[kind]
        return first + int(first * self.growth * index)

    def group(self, kind: str, ids: Ints) -> Ints:
        """Segment of users, category of items: observable, and explains a part of their latents."""
        return (self._hash(f"{kind} group", ids) % np.uint64(self.num_groups)).astype(np.int64)

    def latent(self, kind: str, index: int) -> Floats:
        """Latents [ids of slice, k] of unit expected square, those of users rotated to slice `index`."""
        ids = np.arange(self.num_ids(kind, index))
        centres = self._normal(f"{kind} centre", np.arange(self.num_groups), self.width)
        own = self._normal(f"{kind} latent", ids, self.width)
        latent = (0.6 * centres[self.group(kind, ids)] + 0.8 * own) / np.sqrt(self.width)
        return latent if kind == "item" else rotate(latent, self.drift * index)

    def effect(self, kind: str, index: int) -> Floats:
        """Main effects [ids of slice], in logits."""
        ids = np.arange(self.num_ids(kind, index))
        centres = self._normal(f"{kind} group effect", np.arange(self.num_groups), 1)[:, 0]
        return 0.4 * centres[self.group(kind, ids)] + 0.5 * self._normal(f"{kind} effect", ids, 1)[:, 0]

    def pick(self, kind: str, index: int, examples: Ints) -> Ints:
        """Ids of the examples, by popularity; which ids are popular does not depend on when they arrive."""
        ids = np.arange(self.num_ids(kind, index))
        cumulative = np.cumsum(np.maximum(self._uniform(f"{kind} rank", ids), 1e-6) ** -self.skew)
        drawn = self._uniform(f"{kind} pick", examples) * cumulative[-1]
        return np.minimum(np.searchsorted(cumulative, drawn, side="right"), len(ids) - 1)

    @cached_property
    def domain_effects(self) -> tuple[Floats, Floats]:
        """Main effect [domains] and gain [domains, k] of every domain."""
        domains = np.arange(self.num_domains)
        effect = self.domain_effect * self._normal("domain", domains, 1)[:, 0]
        return effect, 1 + self.domain_gain * self._normal("gain", domains, self.width)

    def domain(self, examples: Ints) -> Ints:
        """Domain of the examples: domain d has a share in proportion to 1 / (d + 1)."""
        cumulative = np.cumsum(1 / np.arange(1, self.num_domains + 1))
        return np.searchsorted(cumulative, self._uniform("domain pick", examples) * cumulative[-1], side="right")

    def logit(self, index: int, user: Ints, item: Ints, domain: Ints, closeness: Floats, context: Floats) -> Floats:
        """True click logits [n] in slice `index`; closeness: see History, context: context_a x context_b."""
        bias, gain = self.domain_effects
        match = self.latent("user", index)[user] * self.latent("item", index)[item] * gain[domain]
        main = bias[domain] + self.effect("user", index)[user] + self.effect("item", index)[item]
        interaction = self.affinity * np.sqrt(self.width) * match.sum(axis=1)
        return -1.2 + main + interaction + self.history * closeness + self.context * context

    def label(self, task: str, examples: Ints, probability: Floats) -> NDArray[np.float32]:
        return (self._uniform(f"label {task}", examples) < probability).astype(np.float32)

    def _hash(self, what: str, numbers: Ints) -> NDArray[np.uint64]:
        return hash64(numbers, salt_of("synth", self.seed, what))

    def _uniform(self, what: str, numbers: Ints) -> Floats:
        return (self._hash(what, numbers) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def _normal(self, what: str, numbers: Ints, width: int) -> Floats:
        """About normal [n, width], as the sum of four uniforms: exact on every machine, as exp and log are not."""
        bits = self._hash(what, numbers[:, None] * width + np.arange(width))
        parts = [(bits >> np.uint64(shift)) & np.uint64(0xFFFF) for shift in (0, 16, 32, 48)]
        total = (parts[0] + parts[1] + parts[2] + parts[3]).astype(np.float64) / 2**16
        return np.round((total - 2) * np.sqrt(3.0) * 1024) / 1024


def rotate(latent: Floats, angle: float) -> Floats:
    """Rotate the planes of coordinates (0, 1), (2, 3), ... by `angle` radians."""
    even, odd = latent[:, 0::2], latent[:, 1::2]
    turned = np.empty_like(latent)
    turned[:, 0::2] = np.cos(angle) * even - np.sin(angle) * odd
    turned[:, 1::2] = np.sin(angle) * even + np.cos(angle) * odd
    return turned


class History:
    """Every user's last positives and number of examples up to the end of the slice before."""

    def __init__(self, num_users: int, depth: int) -> None:
        self.items = np.full((num_users, depth), -1, np.int64)
        self.examples = np.zeros(num_users, np.int64)

    def closeness(self, user: Ints, item: Ints, latent: Floats) -> Floats:
        """Mean cosine [n] of the item and the user's recent positives; 0 for a user without any."""
        unit = latent / np.linalg.norm(latent, axis=1, keepdims=True)
        recent = self.items[user]
        known = recent >= 0
        mean = (unit[recent] * known[:, :, None]).sum(axis=1) / np.maximum(known.sum(axis=1), 1)[:, None]
        return (mean * unit[item]).sum(axis=1)

    def lists(self, user: Ints) -> pa.Array:
        """The recent positives, newest first, as id lists."""
        recent = self.items[user]
        known = recent >= 0
        offsets = np.concatenate([[0], np.cumsum(known.sum(axis=1))]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(recent[known]))

    def add(self, user: Ints, item: Ints, positive: NDArray[np.bool_]) -> None:
        """Take in a slice's examples, in order of time."""
        num_users, depth = self.items.shape
        self.examples += np.bincount(user, minlength=num_users)
        user, item = user[positive], item[positive]
        new = np.bincount(user, minlength=num_users)
        moved = np.full_like(self.items, -1)
        for column in range(depth):
            stays = np.flatnonzero(column + new < depth)
            moved[stays, column + new[stays]] = self.items[stays, column]
        order = np.argsort(user, kind="stable")
        age = np.cumsum(new)[user[order]] - 1 - np.arange(len(order))
        kept = age < depth
        moved[user[order][kept], age[kept]] = item[order][kept]
        self.items = moved


def generate(world: World) -> Iterator[SynthSlice]:
    """The slices of a world, in order."""
    history = History(world.num_ids("user", world.num_slices), world.max_recent)
    for index in range(world.num_slices):
        examples = index * world.rows_per_slice + np.arange(world.rows_per_slice)
        user, item, domain = (
            world.pick("user", index, examples),
            world.pick("item", index, examples),
            world.domain(examples),
        )
        dense = world._normal("dense", examples, 3)
        context = dense[:, 0] * dense[:, 1]
        closeness = history.closeness(user, item, world.latent("item", index))
        click = world.logit(index, user, item, domain, closeness, context)
        logits = {"click": click, "convert": 0.6 * click - 1.0 + 0.8 * (world.effect("item", index)[item] + context)}
        probability = {task: 1 / (1 + np.exp(-logits[task])) for task in TASKS[: world.num_tasks]}
        labels = {task: world.label(task, examples, p) for task, p in probability.items()}
        seconds = np.sort(world._hash("second", examples) % np.uint64(world.slice_s)).astype(np.int64)
        columns = {
            "example_id": examples, "timestamp": START + index * world.slice_s + seconds,
            "user_id": user, "item_id": item, "domain": domain,
            "segment": world.group("user", user), "category": world.group("item", item),
            "recent_items": history.lists(user), "context_a": dense[:, 0], "context_b": dense[:, 1],
            "user_count": history.examples[user], "noise": dense[:, 2],
        } | labels  # fmt: skip
        types = world.schema.feature_types() | world.schema.label_types()
        table = pa.table({name: pa.array(columns[name]).cast(kind) for name, kind in types.items()})
        yield SynthSlice(table, np.stack(list(probability.values()), axis=1))
        history.add(user, item, labels["click"] > 0)


def entropy(probability: Floats | float) -> Floats:
    """Entropy, in nats, of events of these probabilities: the expected log loss of predicting them."""
    p = np.clip(probability, 1e-12, 1 - 1e-12)
    return np.asarray(-(p * np.log(p) + (1 - p) * np.log1p(-p)), np.float64)


def bayes_ne(probability: Floats) -> float:
    """The lowest reachable NE: mean entropy of the true probabilities / entropy of their mean.

    This is the expected log loss of predicting the truth over that of predicting the true base rate. A prediction's own
    NE, on labels drawn from these probabilities, differs from it by sampling error.
    """
    return float(entropy(probability).mean() / entropy(probability.mean()))


def synth(out: str, *, progress: Progress | None = None, **settings: Any) -> Stream:
    """Write the synthetic stream of World(**settings). UserError for a wrong setting or where `out` holds a stream.

    Each slice's labels manifest has in `extra`: bayes_ne and base_rate per task. stream.json's `extra` has the settings, and
    bayes_ne of the whole stream, per task, of all and by domain.
    """
    if unknown := sorted(set(settings) - {f.name for f in fields(World)}):
        raise UserError(f"unknown setting {', '.join(unknown)}; there are {', '.join(f.name for f in fields(World))}")
    world = World(**settings)
    stream = new_stream(out, world.schema, world.num_slices)
    probability, domain = [], []
    for index, (table, p) in enumerate(generate(world)):
        extra = {
            task: {"bayes_ne": bayes_ne(p[:, t]), "base_rate": float(p[:, t].mean())}
            for t, task in enumerate(world.schema.labels)
        }
        start = START + index * world.slice_s
        write_slice(stream, index, start, start + world.slice_s, table, extra)
        probability.append(p)
        domain.append(table.column("domain").to_numpy())
        if progress:
            progress("writing slices", index + 1, world.num_slices)
    summary = _summary(world, np.concatenate(probability), np.concatenate(domain))
    return commit_stream(out, world.schema, world.num_slices, summary)


def _summary(world: World, probability: Floats, domain: Ints) -> dict[str, Any]:
    by_task = {
        task: {
            "bayes_ne": bayes_ne(probability[:, t]),
            "bayes_ne_by_domain": {str(d): bayes_ne(probability[domain == d, t]) for d in np.unique(domain).tolist()},
        }
        for t, task in enumerate(world.schema.labels)
    }
    return {"settings": {f.name: getattr(world, f.name) for f in fields(World)}, "tasks": by_task}

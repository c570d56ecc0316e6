"""What one rank of a plan holds at most during a training step, from the plan alone.

A step is replayed as the allocations and releases that TorchRec 1.8, FBGEMM's CPU kernels and DDP make, in their order, as
torch's memory profiler shows them. Tables and optimiser state are there all the time. What the collective library holds for
itself is not counted, nor Python's own objects (10 MiB, and 50 MiB for 720 tables over 1,024 ranks).
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torchrec.distributed.types import ParameterSharding, ShardingPlan

from exfm.embeddings.config import FeaturesConfig, Tables
from exfm.sharding.kinds import FLOAT, ON_NODES, PERMUTED, ROW, Kind, Ranks, own_shards

BATCHES = {
    "base": 2,
    "sparse_dist": 3,
    "prefetch": 4,
}  # local batches in memory: those of the pipeline, and one read ahead


@dataclass(frozen=True)
class DenseMemory:
    """Bytes of the dense part. saved: held from forward to backward; forward and backward: the most during each, what is saved
    and the forward's input included; pooled_gradient: what holds the gradient of that input.
    """

    weights: int
    gradients: int
    optimiser: int
    saved: int
    forward: int
    backward: int
    pooled_gradient: int


@dataclass(frozen=True)
class RankMemory:
    """Bytes at the moment of the peak. tables and their optimiser state; dense: weights, gradients (DDP's buckets), Adam's state;
    activations: of the dense part; input: id lists; output: pooled embeddings, their copies and gradients; when: the moment.
    """

    tables_bytes: int
    table_state_bytes: int
    dense_bytes: int
    activations_bytes: int
    input_bytes: int
    output_bytes: int
    when: str

    @property
    def total(self) -> int:
        return sum(v for v in vars(self).values() if isinstance(v, int))


def rank_memory(
    plan: ShardingPlan,
    rank: int,
    features: FeaturesConfig,
    tables: Tables,
    local_batch: int,
    world_size: int,
    ranks_per_node: int,
    pooling: Mapping[str, float],
    dense: DenseMemory,
    pipeline: Literal["base", "sparse_dist", "prefetch"] = "base",
) -> RankMemory:
    """pooling: ids per example of every feature, on average."""
    ranks = Ranks(rank, world_size, ranks_per_node, local_batch, pooling)
    weights = state = update = 0
    collections: list[list[Kind]] = []
    for module in plan.plan.values():
        sharded: dict[str, ParameterSharding] = dict(module)  # type: ignore[call-overload]
        kinds: dict[str, dict[str, ParameterSharding]] = {}
        for name, parameter in sharded.items():
            kinds.setdefault(parameter.sharding_type, {})[name] = parameter
        collections.append([ranks.kind(kind, own, features, tables) for kind, own in kinds.items()])
        for name, parameter in sharded.items():
            for rows, columns in own_shards(parameter, rank, tables[name]):
                size = rows * columns * ROW[tables[name].dtype]
                weights += size
                state += rows * FLOAT
                if parameter.sharding_type == "data_parallel":
                    state += size  # DDP's bucket
                    copies = 1 if tables[name].dtype == "fp32" else 3  # fp16: gradient, rows and new rows in fp32
                    update = max(update, copies * rows * columns * FLOAT)
    width = sum(tables[f.table].width for f in features.sparse) * FLOAT * local_batch
    mean = sum(tables[f.table].width for f in features.sparse if tables[f.table].pooling == "mean")
    step = _Step(collections, dense, ahead=pipeline != "base")
    step.run(ranks.batch(features) * BATCHES[pipeline], width + mean * FLOAT * local_batch, update)
    held: Counter[str] = Counter()
    for (category, _), size in step.at_peak[0].items():
        held[category] += size
    dense_bytes = dense.weights + dense.gradients + dense.optimiser
    return RankMemory(weights, state, dense_bytes, held["activations"], held["input"], held["output"], step.at_peak[1])


class _Step:
    """Replays a step; held: bytes of what is alive, by (category, name)."""

    def __init__(self, collections: list[list[Kind]], dense: DenseMemory, ahead: bool) -> None:
        """ahead: the pipeline sends the next batch's ids during a step."""
        self.collections, self.dense, self.ahead = collections, dense, ahead
        self.held: Counter[tuple[str, str]] = Counter()
        self.peak, self.at_peak, self.when = -1, (self.held, ""), ""

    def add(self, category: str, name: str, size: int) -> None:
        self.held[category, name] += size
        if (total := self.held.total()) > self.peak:
            self.peak = total
            self.at_peak = self.held.copy(), self.when

    def drop(self, category: str, name: str) -> None:
        del self.held[category, name]

    def pass_by(self, category: str, size: int) -> None:
        """Held for a moment."""
        self.add(category, "passing", size)
        self.drop(category, "passing")

    def run(self, batches: int, width: int, update: int) -> None:
        """Bytes of the batches in memory, of what joining all pooled embeddings of one makes, and of what the optimiser makes."""
        self.add("input", "batches", batches)
        numbered = list(enumerate(self.collections))
        if self.ahead:
            self.send_ahead()
        for i, kinds in numbered:
            self.when = "input distribution"
            self.distribute(i, kinds)
            self.when = "lookup"
            self.look_up(i, kinds)
        self.when = "output distribution"
        for i, kinds in numbered:
            self.receive(i, kinds)
        self.when = "dense forward"
        self.pass_by("output", width)  # joined
        self.pass_by("activations", self.dense.forward)
        for i, _ in numbered:
            self.drop("output", f"pooled {i}")
        self.when = "dense backward"
        if self.ahead:
            self.add("input", "next", sum(k.lists + k.lengths for _, kinds in numbered for k in kinds))
        self.pass_by("activations", self.dense.backward)
        self.when = "backward of the output distribution"
        self.add("output", "pooled gradient", self.dense.pooled_gradient)
        for i, kinds in reversed(numbered):
            self.send_back(i, kinds, last=i == 0)
        self.when = "backward of the lookup"
        for i, kinds in reversed(numbered):
            self.look_up_backward(i, kinds)
        self.when = "optimiser"
        self.pass_by("output", update)

    def send_ahead(self) -> None:
        """The step's id lists have been received during the last one; the next batch's are made ready to send."""
        for i, kinds in enumerate(self.collections):
            self.add("input", f"sent {i}", sum(k.lists + k.lengths for k in kinds))
            self.add("input", "local", sum(k.prepared for k in kinds))

    def distribute(self, i: int, kinds: list[Kind]) -> None:
        """In order of features, cut by rows, sent; then once more in order of features."""
        if not self.ahead:
            self.add("input", f"local {i}", sum(k.prepared for k in kinds))
            self.add("input", f"sent {i}", sum(k.lists + k.lengths for k in kinds))
        for k in kinds:
            self.add("input", f"lists {i} {k.name}", k.lists)
            self.add("input", f"lengths {i}", k.lengths)
            self.pass_by("input", 2 * k.lengths)  # their sum, in 64 bits
        self.drop("input", f"local {i}")
        if not self.ahead:  # that pipeline keeps them until the lookup is done
            self.drop("input", f"sent {i}")

    def look_up(self, i: int, kinds: list[Kind]) -> None:
        before = 0  # the last kind's pooled embeddings live until the next kind's are there
        for k in kinds:
            self.add("input", f"lengths {i}", k.lengths)  # offsets in 32 bits
            self.add("input", f"lists {i} {k.name}", 2 * k.lengths)  # in 64 bits: kept with the ids for backward
            self.add("output", "looked up", k.pooled)
            if k.split:
                self.pass_by("output", k.pooled)
            self.add("output", "looked up", -before)
            before = k.pooled
            if k.name == "data_parallel":  # what was looked up is not sent
                self.add("output", "looked up", -k.pooled)
                before = 0
            self.add("output", "reduced", k.reduced)
            self.add("output", f"received {i}", k.received)
            if k.name not in ("row_wise", "data_parallel"):
                self.pass_by("output", k.reduced or k.pooled)  # the all-to-all sends a copy
            self.drop("output", "reduced")
        self.drop("output", "looked up")
        self.drop("input", f"lengths {i}")
        self.drop("input", f"sent {i}")

    def receive(self, i: int, kinds: list[Kind]) -> None:
        """From blocks of ranks to columns of features."""
        for k in kinds:
            if k.name not in ("row_wise", "data_parallel"):
                self.pass_by("output", k.received)
        whole = sum(k.received for k in kinds)
        if len(kinds) > 1:
            self.pass_by("output", whole)
        self.drop("output", f"received {i}")
        self.add("output", f"pooled {i}", whole)

    def send_back(self, i: int, kinds: list[Kind], last: bool) -> None:
        whole = sum(k.received for k in kinds)
        self.add("output", f"gradient {i}", whole)
        if last:
            self.drop("output", "pooled gradient")
        several = len(kinds) > 1
        for k in reversed(kinds):
            if k.name == "row_wise":
                self.add("output", f"backward {i} {k.name}", k.pooled)
                self.pass_by("output", k.received if several else 0)
            elif k.name != "data_parallel":
                # made contiguous, cut into the ranks' columns, joined again rank by rank
                copies = (several or k.name in PERMUTED) + (not k.alone) + 1
                self.pass_by("output", copies * k.received)
                self.add("output", "to send", k.received)
                self.add("output", f"backward {i} {k.name}", k.reduced or k.pooled)
                self.drop("output", "to send")
        if all(k.name != "data_parallel" for k in kinds):  # theirs is a part of it
            self.drop("output", f"gradient {i}")

    def look_up_backward(self, i: int, kinds: list[Kind]) -> None:
        for k in reversed(kinds):
            if k.name in ON_NODES:
                self.add("output", f"backward {i} {k.name}", k.pooled)
                self.add("output", f"backward {i} {k.name}", -k.reduced)
            self.pass_by("output", k.gradient)
            self.pass_by("input", k.sorting)
            if k.name == "data_parallel":
                self.drop("output", f"gradient {i}")
            self.drop("output", f"backward {i} {k.name}")
            self.drop("input", f"lists {i} {k.name}")

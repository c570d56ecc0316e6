"""How fast ranks reach each other: one all-reduce, one all-to-all, and messages between single ranks that name a slow link.

Links: in rounds k = 1, 2, 4, ... rank r sends to rank r + k. A round has phases, so that in each a rank only sends or only
receives: the time that a receiver sees is then that of one link. Every host's way out and in is measured, not every pair.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd

import torch
import torch.distributed as dist

from exfm.sharding.topology import Topology
from exfm.trainer.facts import gather

MIB = 2**20
FIRST_BYTES = {"cpu": MIB, "cuda": 4 * MIB}
MOST_BYTES = {"cpu": 16 * MIB, "cuda": 64 * MIB}  # between hosts, if the slowest link carries it in MESSAGE_S
MESSAGE_S = 0.25
MOST_ROUNDS = 10
AGAIN = 2  # times that a round with a slow link is measured once more before it is believed
SLOW = 4.0  # times slower than its like
NOISE_S = {"cpu": 0.05, "cuda": 0.005}  # of one message, where ranks share cores with others
# between hosts, in any case: half of 1 Gb/s Ethernet, and of 10 Gb/s
LEAST = {"cpu": 60e6, "cuda": 600e6}


@dataclass(frozen=True)
class Link:
    """From one rank to another, in round `step`."""

    sender: int
    receiver: int
    step: int
    size: int
    seconds: float

    @property
    def bytes_per_s(self) -> float:
        return self.size / self.seconds


@dataclass(frozen=True)
class Speeds:
    """All-reduce and all-to-all in bytes per second that every rank sends; the links, none on one rank."""

    all_reduce: float
    all_to_all: float
    links: tuple[Link, ...] = ()


@dataclass(frozen=True)
class SlowLink:
    """expected: bytes per second, by what `why` says."""

    link: Link
    expected: float
    why: str


# ---- measuring


def measure(device: torch.device, hosts: Sequence[str], topology: Topology | None) -> Speeds:
    """All ranks call, with the same arguments; the same result on all of them."""
    kind, world = device.type, len(hosts)
    size = FIRST_BYTES[kind]
    rounds = steps(world)
    if kind == "cuda":
        _links(device, rounds, 1)  # NCCL connects two ranks when they first meet
    links = _links(device, rounds, size)
    if kind == "cuda" or len(set(hosts)) > 1:
        slowest = min(link.bytes_per_s for link in links)
        larger = int(min(MOST_BYTES[kind], MESSAGE_S * slowest))
        if larger > 2 * size:
            size = larger
            links = _links(device, rounds, size)
    for _ in range(AGAIN):
        doubtful = sorted({s.link.step for s in slow_links(links, hosts, kind, topology)})
        again = {(link.sender, link.receiver): link for link in _links(device, doubtful, size)}
        links = [min(link, again.get((link.sender, link.receiver), link), key=lambda x: x.seconds) for link in links]
    speeds = Speeds(*_collectives(device, world, size), tuple(links))
    if kind == "cuda":
        torch.cuda.empty_cache()  # the model is built next
    return speeds


def steps(world_size: int) -> list[int]:
    """Distances 1, 2, 4, ... up to half of the ranks, the largest MOST_ROUNDS of them."""
    return [2**i for i in range(max(1, world_size.bit_length())) if 2**i <= world_size // 2][-MOST_ROUNDS:]


def phase(rank: int, step: int, world_size: int) -> int:
    """In which of a round's phases 0, 1, 2 a rank sends: never in one in which it receives from rank - step."""
    g = gcd(step, world_size)
    length = world_size // g  # of the ring r, r + step, r + 2 step, ...
    place = (rank // g) * pow(step // g, -1, length) % length
    return 2 if length % 2 and place == length - 1 else place % 2


def send(x: torch.Tensor, to: int) -> None:
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, x, to)]):
        work.wait()


def receive(x: torch.Tensor, sender: int) -> None:
    for work in dist.batch_isend_irecv([dist.P2POp(dist.irecv, x, sender)]):
        work.wait()


def _links(device: torch.device, rounds: Sequence[int], size: int) -> list[Link]:
    """Of the given rounds; none for no rounds, without a word between the ranks."""
    if not rounds:
        return []
    rank, world = dist.get_rank(), dist.get_world_size()
    x = torch.zeros(size, dtype=torch.uint8, device=device)
    found: list[Link] = []
    for step in rounds:
        sender, receiver = (rank - step) % world, (rank + step) % world
        for number in range(3 if (world // gcd(step, world)) % 2 else 2):
            _meet(device)
            begun = time.perf_counter()
            if phase(rank, step, world) == number:
                send(x, receiver)
            elif phase(sender, step, world) == number:
                receive(x, sender)
                _wait(device)
                found.append(Link(sender, rank, step, size, time.perf_counter() - begun))
    return [link for links in gather(found) for link in links]


def _collectives(device: torch.device, world: int, size: int) -> tuple[float, float]:
    """Bytes per second that a rank sends in each, by the slowest rank and the faster of two tries."""
    x = torch.zeros(-(-size // (4 * world)) * world, device=device)
    y = torch.empty_like(x)
    acts: list[Callable[[], object]] = [lambda: dist.all_reduce(x), lambda: dist.all_to_all_single(y, x)]
    seconds = []
    for act in acts:
        tries = []
        for _ in range(2):
            _meet(device)
            begun = time.perf_counter()
            act()
            _wait(device)
            tries.append(time.perf_counter() - begun)
        seconds.append(tries)
    of_all = gather(seconds)
    reduce_s, exchange_s = (min(max(s[i][n] for s in of_all) for n in range(2)) for i in range(2))
    share = 4 * x.numel() * (world - 1) / world
    return 2 * share / reduce_s, share / exchange_s


def _meet(device: torch.device) -> None:
    """A common start: a barrier by another name, which needs no device to be chosen."""
    dist.all_reduce(torch.zeros(1, device=device))
    _wait(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- judging


def slow_links(
    links: Sequence[Link], hosts: Sequence[str], kind: str, topology: Topology | None = None
) -> list[SlowLink]:
    """Links that take SLOW times as long as their like, and longer by more than noise. topology: given by the user, with figures."""
    found = []
    for link in links:
        across = hosts[link.sender] != hosts[link.receiver]
        alike = [
            other.bytes_per_s
            for other in links
            if other.step == link.step
            and other is not link
            and (hosts[other.sender] != hosts[other.receiver]) == across
        ]
        references = [(statistics.median(alike), "others")] if alike else []
        if topology is not None:
            figure = topology.network_bytes_per_s if across else topology.nvlink_bytes_per_s
            references.append((figure, f"topology {topology.name}"))
        if across:
            references.append((SLOW * LEAST[kind], "Ethernet"))
        late = [
            SlowLink(link, expected, why)
            for expected, why in references
            if link.bytes_per_s < expected / SLOW and link.seconds - link.size / expected > NOISE_S[kind]
        ]
        found += late[:1]
    return found

"""A job's start judged from facts alone: who is named, what is compared with what, and one page whatever the number of ranks."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from exfm.sharding.topology import cpu_topology
from exfm.trainer.facts import Facts
from exfm.trainer.fits import Needs
from exfm.trainer.links import Link, phase, slow_links, steps
from exfm.trainer.readiness import Report, Storing, judge

MIB, GIB = 2**20, 2**30


def some_facts(hosts: int, per_host: int = 8, **over: Any) -> list[Facts]:
    fact = Facts(0, "", 1, "d", 100 * GIB, 80 * GIB, disk_bytes=100 * GIB, **over)
    return [replace(fact, rank=r, host=f"n{r // per_host}") for r in range(hosts * per_host)]


def whats(found: list[Any]) -> list[str]:
    return [f"{f.level}: {f.what}" for f in found]


def test_the_page_of_a_thousand_ranks_is_one_page_with_the_first_cause_on_top():
    facts = some_facts(128)
    facts = [
        replace(f, clock_s=2.0) if f.rank % 8 else replace(f, trouble=("cannot write in /run: No space left",))
        for f in facts
    ]
    needs = Needs((90 * GIB,) * 1024, (GIB,) * 1024, GIB)
    found = judge(facts, needs, Storing("/run", 0, 2, 1))
    page = Report(tuple(facts), tuple(found), needs, None, None, 3.0).page()
    assert len(page.splitlines()) < 66 and max(map(len, page.splitlines())) < 200
    assert page.splitlines()[2].startswith(
        "ERROR  ranks 0, 8, 16, 24, 32, 40 and 122 more (hosts n0, n1, n2, n3 and 124 more) cannot"
    )


def test_memory_is_compared_rank_by_rank_on_gpus_and_host_by_host_beside_them():
    facts = some_facts(2, 2)
    assert judge(facts, Needs((GIB,) * 4, (50 * GIB,) * 4, 1)) == []
    assert whats(judge(facts, Needs((GIB, 81 * GIB, GIB, GIB), (10 * GIB, 10 * GIB, 60 * GIB, 41 * GIB), 1))) == [
        "error: rank 1 (host n0) has 80.00 GiB of GPU memory free, the plan puts 81.00 GiB there",
        "error: host n1 has 100.00 GiB of memory free, the plan puts 101.00 GiB there on 2 rank(s)",
    ]


@pytest.mark.parametrize(("ahead", "level"), [(0.9, None), (1.1, "warn"), (-4.9, "warn"), (5.1, "error")])
def test_a_clock_may_be_a_second_off_and_must_not_be_five(ahead, level):
    facts = [replace(f, clock_s=ahead) if f.rank != 0 else f for f in some_facts(1)]  # it is rank 0's that differs
    found = judge(facts)
    assert [f.level for f in found] == ([level] if level else [])
    assert all("rank 0 (host n0)" in f.what for f in found)


@pytest.mark.parametrize(
    ("commits", "keep", "full_every", "ahead"), [(0, 2, 1, 2), (1, 2, 1, 2), (2, 2, 1, 1), (0, 2, 4, 1)]
)
def test_a_commit_that_makes_room_for_the_next_is_counted(commits, keep, full_every, ahead):
    storing, facts = Storing("/run", commits, keep, full_every), some_facts(1, 1)
    assert judge(facts, Needs((0,), (0,), 100 * GIB // ahead), storing) == []
    (found,) = judge(facts, Needs((0,), (0,), 100 * GIB // ahead + 1), storing)
    assert found.level == "error" and f"the next {ahead} checkpoint(s)" in found.what


@pytest.mark.parametrize("world", [*range(2, 40), 64, 96, 1000, 1024])
def test_in_no_phase_of_a_round_does_a_rank_send_and_receive(world):
    assert steps(world)[-1] <= world // 2 and len(steps(world)) <= 10
    for step in steps(world):
        phases = [phase(r, step, world) for r in range(world)]
        assert set(phases) <= {0, 1, 2}
        assert all(phases[r] != phases[(r + step) % world] for r in range(world))


def ring(world: int, rates: Callable[[int, int], float], size: int = 16 * MIB) -> list[Link]:
    return [
        Link(r, (r + k) % world, k, size, size / rates(r, (r + k) % world)) for k in steps(world) for r in range(world)
    ]


def test_links_are_compared_with_their_like():
    """NVLink with NVLink, the network with the network: it is slower by nature."""
    hosts = [f"n{r // 8}" for r in range(32)]

    def rate(a: int, b: int) -> float:
        return 400e9 if a // 8 == b // 8 else 0.7e9 if {a // 8, b // 8} == {1, 2} else 40e9

    found = slow_links(ring(32, rate, 64 * MIB), hosts, "cuda")
    assert found and {frozenset((s.link.sender // 8, s.link.receiver // 8)) for s in found} == {frozenset((1, 2))}


def test_a_network_that_is_slow_everywhere_is_seen_by_a_topology_with_figures_or_against_ethernet():
    hosts = ["a", "a", "b", "b"]
    slow = ring(4, lambda a, b: 1e9 if a // 2 == b // 2 else 100e6)
    assert slow_links(slow, hosts, "cpu") == []
    topology = cpu_topology(4, 2)
    assert {s.why for s in slow_links(slow, hosts, "cpu", topology)} == {"topology cpu"}
    slower = ring(4, lambda a, b: 1e9 if a // 2 == b // 2 else 10e6)
    assert {s.why for s in slow_links(slower, hosts, "cpu")} == {"Ethernet"}

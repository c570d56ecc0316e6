"""The rank processes of the tests themselves: a hung or failing call fails its test and harms no later one."""

import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankFailed


def total(value: float) -> tuple[int, int, float]:
    x = torch.tensor([value + dist.get_rank()])
    dist.all_reduce(x)
    return dist.get_rank(), dist.get_world_size(), x.item()


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank 1 cannot go on")
    dist.barrier()


def hang_on_rank_1() -> None:
    if dist.get_rank() == 1:
        time.sleep(100)


def test_results_come_back_in_rank_order_from_any_number_of_ranks(on_ranks):
    assert on_ranks(3, total, 1.0) == [(0, 3, 6.0), (1, 3, 6.0), (2, 3, 6.0)]
    assert on_ranks(2, total, 5.0) == [(0, 2, 11.0), (1, 2, 11.0)]


def test_a_failing_rank_is_named_and_its_peers_do_not_wait(on_ranks):
    begun = time.monotonic()
    with pytest.raises(RankFailed, match=r"rank 1 raised:[\s\S]*rank 1 cannot go on") as failed:
        on_ranks(2, fail_on_rank_1)
    assert isinstance(failed.value.errors[1], ValueError) and time.monotonic() - begun < 8
    assert on_ranks(2, total, 0.0) == [(0, 2, 1.0), (1, 2, 1.0)]


def test_a_hung_rank_is_killed_and_its_stack_shown(on_ranks):
    with pytest.raises(RankFailed, match=r"rank\(s\) \[1\] died or hung[\s\S]*hang_on_rank_1"):
        on_ranks(2, hang_on_rank_1, timeout_s=2)
    assert on_ranks(2, total, 0.0) == [(0, 2, 1.0), (1, 2, 1.0)]

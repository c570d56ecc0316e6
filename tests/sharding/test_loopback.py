"""A process group whose peers all hold what this rank holds."""

import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed import comm

from exfm.sharding.loopback import loopback_group

RANK, RANKS, NODE = 17, 1024, 8


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    with loopback_group(RANK, RANKS, NODE) as pg:
        yield pg


def own(n: int) -> torch.Tensor:
    return torch.arange(float(n)) + 1


def test_it_is_the_default_group_with_the_asked_rank_and_size(group):
    assert (dist.get_rank(), dist.get_world_size(), dist.get_backend()) == (RANK, RANKS, "exfm_loopback")
    assert group is dist.group.WORLD


def test_an_all_gather_gives_a_copy_per_rank_in_every_form(group):
    whole = own(3).repeat(RANKS)
    out = torch.empty(3 * RANKS)
    dist.all_gather_into_tensor(out, own(3))
    assert out.equal(whole)
    parts = [torch.empty(3) for _ in range(RANKS)]
    dist.all_gather(parts, own(3))
    assert torch.cat(parts).equal(whole)
    objects = [None] * RANKS
    dist.all_gather_object(objects, {"a": RANK})
    assert objects == [{"a": RANK}] * RANKS
    sizes = [torch.empty(n) for n in (2, 3, 7)] + [torch.empty(0)] * (RANKS - 3)
    dist.all_gather(sizes, own(3))  # peers whose sizes differ: cut or repeated
    assert [t.tolist() for t in sizes[:3]] == [[1, 2], [1, 2, 3], [1, 2, 3, 1, 2, 3, 1]]


def test_a_reduction_gives_the_mean_of_equal_tensors_and_a_scatter_this_rank_its_part(group):
    x = own(5)
    work = dist.all_reduce(x, async_op=True)
    assert work.wait() and work.get_future().value() is not None and x.equal(own(5))
    dist.reduce(x, dst=3)
    dist.broadcast(x, src=3)
    assert x.equal(own(5))
    whole, mine = own(2 * RANKS), own(2 * RANKS)[2 * RANK : 2 * RANK + 2]
    out = torch.empty(2)
    dist.reduce_scatter_tensor(out, whole)
    assert out.equal(mine)
    out = torch.empty(2)
    dist.reduce_scatter(out, list(whole.chunk(RANKS)))
    assert out.equal(mine)


def test_an_all_to_all_gives_from_every_peer_what_this_rank_sends_to_itself(group):
    sizes = [i % 3 for i in range(RANKS)]
    mine = own(sum(sizes)).split(sizes)[RANK]
    received = torch.empty(RANKS * len(mine))
    dist.all_to_all_single(received, own(sum(sizes)), [len(mine)] * RANKS, sizes)
    assert len(mine) == 2 and received.equal(mine.repeat(RANKS))
    equal = torch.empty(RANKS)
    dist.all_to_all_single(equal, own(RANKS))
    assert equal.equal(torch.full((RANKS,), RANK + 1.0))
    outputs = [torch.empty(1) for _ in range(RANKS)]
    dist.all_to_all(outputs, list(own(RANKS).split(1)))
    assert torch.cat(outputs).equal(equal)
    nothing = torch.full((RANKS,), 7.0)
    dist.all_to_all_single(nothing, torch.empty(0), [1] * RANKS, [0] * RANKS)
    assert not nothing.any()


def test_groups_within_and_across_nodes_have_their_sizes_and_torchrec_knows_the_nodes(group):
    within, across = comm.intra_and_cross_node_pg(torch.device("cpu"))
    assert (within.size(), within.rank(), across.size(), across.rank()) == (8, 1, 128, 2)
    out = torch.empty(8 * 3)
    dist.all_gather_into_tensor(out, own(3), group=within)
    assert out.equal(own(3).repeat(8))
    assert dist.new_group([0, 1]) is dist.GroupMember.NON_GROUP_MEMBER


def test_ddp_runs_in_it(group):
    model = DistributedDataParallel(nn.Linear(3, 1), gradient_as_bucket_view=True)
    model(torch.ones(2, 3)).sum().backward()
    assert model.module.weight.grad.tolist() == [[2 / RANKS] * 3]


def test_it_leaves_no_group_and_no_node_behind():
    before, groups = os.environ.get("LOCAL_WORLD_SIZE"), (comm._INTRA_PG, comm._CROSS_PG)
    with loopback_group(3, 4, 2):
        comm.intra_and_cross_node_pg(torch.device("cpu"))
    assert not dist.is_initialized() and groups == (comm._INTRA_PG, comm._CROSS_PG)
    assert os.environ.get("LOCAL_WORLD_SIZE") == before


@pytest.mark.parametrize(("rank", "ranks", "node", "word"), [(4, 4, 2, "rank 4"), (0, 6, 4, "do not fill nodes of 4")])
def test_a_rank_or_node_that_cannot_be_is_refused(rank, ranks, node, word):
    with pytest.raises(ValueError, match=word), loopback_group(rank, ranks, node):
        pass

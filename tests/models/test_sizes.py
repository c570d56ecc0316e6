"""Analytic sizes against counted parameters and against the FLOPs that PyTorch counts while the model runs."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from exfm.models.build import build_backbone
from exfm.models.config import AttentionConfig, DcnV2Config, DlrmConfig, EmbeddingGroup, WukongConfig
from exfm.models.heads import Head
from exfm.models.interface import InputSpec

small = st.integers(1, 5)
hidden = st.lists(small, max_size=2).map(tuple)
interactions = st.sampled_from(["optimized", "plain", "attentive"])
NUM_EXAMPLES = 3


def assert_size_is_what_runs(module, *arguments):
    size = module.size()
    assert size.num_parameters == sum(p.numel() for p in module.parameters())
    with FlopCounterMode(display=False) as counter:
        module(*arguments)
    assert NUM_EXAMPLES * size.flops_per_example == counter.get_total_flops()


def assert_backbone_size_is_what_runs(config, inputs):
    with torch.device("meta"):
        dense, pooled = torch.empty(NUM_EXAMPLES, inputs.num_dense), torch.empty(NUM_EXAMPLES, inputs.pooled_width)
        assert_size_is_what_runs(build_backbone(config, inputs), dense, pooled)


@st.composite
def wukong_models(draw):
    width = draw(st.sampled_from([2, 4]))
    odd = draw(st.lists(small, max_size=2))
    features = [(f"multiple_{i}", width * draw(st.integers(1, 3))) for i in range(draw(st.integers(1, 4)))]
    features += [(f"odd_{i}", w) for i, w in enumerate(odd)]
    groups = tuple(EmbeddingGroup(features=(f"odd_{i}",), outputs=draw(small)) for i in range(len(odd)))
    config = WukongConfig(
        width=width, layers=draw(st.integers(1, 3)), num_fmb=draw(small), num_lcb=draw(small), rank=draw(small),
        fmb_mlp=draw(hidden), interaction=draw(interactions), bias=draw(st.booleans()), dense_mlp=draw(hidden),
        attention=AttentionConfig(compressed=draw(small), hidden=draw(hidden)), dense_embeddings=draw(small),
        groups=groups, final_mlp=draw(hidden),
    )  # fmt: skip
    return config, InputSpec(draw(st.integers(0, 3)), tuple(draw(st.permutations(features))))


@settings(max_examples=40, deadline=None)
@given(wukong_models())
def test_size_of_any_wukong_is_what_runs(model):
    assert_backbone_size_is_what_runs(*model)


@settings(max_examples=20, deadline=None)
@given(hidden, hidden, st.booleans(), st.integers(0, 3), st.integers(2, 5))
def test_size_of_any_dlrm_is_what_runs(bottom_mlp, top_mlp, bias, num_dense, num_features):
    config = DlrmConfig(width=4, bottom_mlp=bottom_mlp, top_mlp=top_mlp, bias=bias)
    assert_backbone_size_is_what_runs(config, InputSpec(num_dense, tuple((f"f{i}", 4) for i in range(num_features))))


@settings(max_examples=20, deadline=None)
@given(small, small, hidden, st.sampled_from(["parallel", "stacked"]), st.booleans(), st.integers(0, 3))
def test_size_of_any_dcnv2_is_what_runs(cross_layers, rank, deep_mlp, structure, bias, num_dense):
    config = DcnV2Config(cross_layers=cross_layers, rank=rank, deep_mlp=deep_mlp, structure=structure, bias=bias)
    assert_backbone_size_is_what_runs(config, InputSpec(num_dense, (("a", 3), ("b", 5))))


@settings(max_examples=10, deadline=None)
@given(small, hidden, small, st.booleans())
def test_size_of_any_head_is_what_runs(in_width, widths, num_tasks, bias):
    assert_size_is_what_runs(Head(in_width, widths, num_tasks, bias), torch.ones(NUM_EXAMPLES, in_width))

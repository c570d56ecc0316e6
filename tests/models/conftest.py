"""One small case of every backbone and of every option of Wukong: (config, inputs)."""

import pytest
import torch

from exfm.models.config import AttentionConfig, DcnV2Config, DlrmConfig, EmbeddingGroup, WukongConfig
from exfm.models.interface import InputSpec

INPUTS = InputSpec(num_dense=3, features=(("user", 4), ("item", 8), ("country", 4)))
NO_DENSE = InputSpec(num_dense=0, features=INPUTS.features)
ODD_WIDTHS = InputSpec(num_dense=2, features=(("hour", 3), ("user", 4), ("device", 2), ("item", 8), ("os", 5)))
GROUPS = (EmbeddingGroup(features=("os", "hour"), outputs=2, hidden=(6,)), EmbeddingGroup(features=("device",)))


def small_wukong(**fields: object) -> WukongConfig:
    small = dict(width=4, layers=2, num_fmb=2, num_lcb=3, rank=2, fmb_mlp=(7,), dense_mlp=(5,), final_mlp=(6,))
    return WukongConfig.model_validate(small | fields)


ATTENTION = AttentionConfig(compressed=3, hidden=(6,))
WUKONG_CASES = {
    "optimized": (small_wukong(), INPUTS),
    "optimized without bias": (small_wukong(bias=False), INPUTS),
    "plain": (small_wukong(interaction="plain"), INPUTS),
    "plain without bias": (small_wukong(interaction="plain", bias=False), INPUTS),
    "attentive": (small_wukong(interaction="attentive", attention=ATTENTION), INPUTS),
    "attentive without bias": (small_wukong(interaction="attentive", attention=ATTENTION, bias=False), INPUTS),
    "as many embeddings out as in": (small_wukong(num_lcb=2), NO_DENSE),
    "groups and several dense embeddings": (small_wukong(groups=GROUPS, dense_embeddings=2), ODD_WIDTHS),
    "linear everywhere": (small_wukong(layers=3, fmb_mlp=(), dense_mlp=(), final_mlp=()), INPUTS),
}
DLRM_CASES = {
    "dlrm": (DlrmConfig(width=4, bottom_mlp=(5,), top_mlp=(6, 3)), INPUTS),
    "dlrm without bias": (DlrmConfig(width=4, bottom_mlp=(5,), top_mlp=(6, 3), bias=False), INPUTS),
    "dlrm without dense features": (DlrmConfig(width=4, top_mlp=(6,)), NO_DENSE),
    "dlrm without MLPs": (DlrmConfig(width=4, bottom_mlp=(), top_mlp=()), INPUTS),
}
DCNV2_CASES = {
    "dcnv2 parallel": (DcnV2Config(cross_layers=2, rank=3, deep_mlp=(6, 5)), ODD_WIDTHS),
    "dcnv2 stacked": (DcnV2Config(cross_layers=2, rank=3, deep_mlp=(6, 5), structure="stacked"), ODD_WIDTHS),
    "dcnv2 without bias": (DcnV2Config(cross_layers=3, rank=2, deep_mlp=(6,), bias=False), ODD_WIDTHS),
    "dcnv2 without dense features": (DcnV2Config(cross_layers=1, rank=2, deep_mlp=()), NO_DENSE),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    families = {"wukong_case": WUKONG_CASES, "dlrm_case": DLRM_CASES, "dcnv2_case": DCNV2_CASES}
    families["case"] = WUKONG_CASES | DLRM_CASES | DCNV2_CASES
    for argument, cases in families.items():
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, cases.values(), ids=cases.keys())


@pytest.fixture(autouse=True)
def _seed_and_one_thread():
    torch.manual_seed(17)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def agree():
    """Holds a float64 model against `reference(parameters by name, dense, pooled)`: output and every gradient."""

    def check(model, inputs, reference, atol=1e-9, num_examples=3):
        model = model.double()
        parameters = dict(model.named_parameters())
        with torch.no_grad():  # LayerNorms start at 1 and 0, which would hide a mistake in their use
            for parameter in parameters.values():
                parameter.add_(0.3 * torch.randn_like(parameter))
        dense = torch.randn(num_examples, inputs.num_dense, dtype=torch.float64, requires_grad=True)
        pooled = torch.randn(num_examples, inputs.pooled_width, dtype=torch.float64, requires_grad=True)
        got, expected = model(dense, pooled), reference(parameters, dense, pooled)
        assert got.shape == (num_examples, model.out_width)
        torch.testing.assert_close(got, expected, rtol=0, atol=atol)
        leaves = [pooled, *parameters.values()] + ([dense] if inputs.num_dense else [])
        cotangent = torch.randn_like(got)
        for mine, theirs in zip(
            torch.autograd.grad(got, leaves, cotangent), torch.autograd.grad(expected, leaves, cotangent), strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=atol)

    return check

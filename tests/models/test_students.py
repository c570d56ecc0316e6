"""DLRM, DCN-V2 and the head against their equations, written out example by example."""

import torch

from exfm.models.dcnv2 import DcnV2
from exfm.models.dlrm import Dlrm
from exfm.models.heads import Head


def linear(x, p, name):
    y = torch.einsum("i,oi->o", x, p[f"{name}.weight"])
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def relu_layers(x, p, name, count):
    for i in range(count):
        x = torch.clamp(linear(x, p, f"{name}.linears.{i}"), min=0)
    return x


def test_dlrm_and_its_gradients_equal_the_equations(dlrm_case, agree):
    config, inputs = dlrm_case

    def one(p, dense, pooled):
        rows = list(pooled.split(config.width))
        first = []
        if inputs.num_dense:
            first = [relu_layers(dense, p, "embedding.dense_mlp", len(config.bottom_mlp) + 1)]
            rows = first + rows
        dots = [(rows[i] * rows[j]).sum() for i in range(len(rows)) for j in range(i + 1, len(rows))]
        return relu_layers(torch.cat([*first, torch.stack(dots)]), p, "top_mlp", len(config.top_mlp))

    def reference(p, dense, pooled):
        return torch.stack([one(p, dense[b], pooled[b]) for b in range(len(pooled))])

    agree(Dlrm(config, inputs), inputs, reference)


def test_dcnv2_and_its_gradients_equal_the_equations(dcnv2_case, agree):
    config, inputs = dcnv2_case

    def one(p, dense, pooled):
        x0 = x = torch.cat([dense, pooled])
        for i in range(config.cross_layers):
            w = (
                p[f"crosses.{i}.u.weight"] @ p[f"crosses.{i}.v.weight"]
            )  # the full matrix that the two factors stand for
            x = x0 * (w @ x + p.get(f"crosses.{i}.u.bias", 0)) + x
        if config.structure == "parallel":
            return torch.cat([x, relu_layers(x0, p, "deep_mlp", len(config.deep_mlp))])
        return relu_layers(x, p, "deep_mlp", len(config.deep_mlp))

    def reference(p, dense, pooled):
        return torch.stack([one(p, dense[b], pooled[b]) for b in range(len(pooled))])

    agree(DcnV2(config, inputs), inputs, reference)


def test_a_head_equals_its_equations_and_keeps_its_last_bias():
    head = Head(5, (4, 3), num_tasks=2, bias=False).double()
    p = dict(head.named_parameters())
    assert [name for name in p if name.endswith("bias")] == ["logits.bias"]
    x = torch.randn(6, 5, dtype=torch.float64)
    expected = torch.stack([linear(relu_layers(row, p, "mlp", 2), p, "logits") for row in x])
    torch.testing.assert_close(head(x), expected, rtol=0, atol=1e-12)

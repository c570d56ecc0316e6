"""Wukong against the paper's equations, written out example by example and embedding by embedding."""

import torch

from exfm.models.config import WukongConfig
from exfm.models.interface import InputSpec
from exfm.models.wukong import OptimizedFM, PlainFM, Wukong


def linear(x, p, name):
    y = torch.einsum("i,oi->o", x, p[f"{name}.weight"])
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def mlp(x, p, name, num_hidden, has_output):
    for i in range(num_hidden):
        x = torch.clamp(linear(x, p, f"{name}.linears.{i}"), min=0)
    return linear(x, p, f"{name}.linears.{num_hidden}") if has_output else x


def layer_norm(x, p, name):
    centred = x - x.mean()
    y = centred / torch.sqrt((centred * centred).mean() + 1e-5) * p[f"{name}.weight"]
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def mixtures(weight, rows):
    return [sum(weight[m, n] * rows[n] for n in range(len(rows))) for m in range(len(weight))]


def in_rows(flat, width):
    return list(flat.split(width))


def embed(config: WukongConfig, inputs: InputSpec, p, dense, pooled):
    """The embeddings of one example, in order: dense, features outside groups, groups."""
    pieces = dict(
        zip([name for name, _ in inputs.features], pooled.split([w for _, w in inputs.features]), strict=True)
    )
    rows = []
    if inputs.num_dense:
        rows += in_rows(mlp(dense, p, "embedding.dense_mlp", len(config.dense_mlp), True), config.width)
    grouped = [name for group in config.groups for name in group.features]
    for name, piece in pieces.items():
        if name not in grouped:
            rows += in_rows(piece, config.width)
    for g, group in enumerate(config.groups):
        together = torch.cat([pieces[name] for name in group.features])
        rows += in_rows(mlp(together, p, f"embedding.group_mlps.{g}", len(group.hidden), True), config.width)
    return rows


def factorization_machine(config: WukongConfig, p, name, rows):
    x = torch.stack(rows)
    gram = torch.einsum("nd,md->nm", x, x)  # X X^T: (X X^T) Y and X (X^T Y) are the same
    if config.interaction == "plain":
        return gram
    if config.interaction == "optimized":
        return gram @ p[f"{name}.y"]
    compressed = torch.cat(mixtures(p[f"{name}.compress.weight"], rows))
    y = mlp(compressed, p, f"{name}.mlp", len(config.attention.hidden), True).reshape(len(rows), config.rank)
    return gram @ y


def wukong(config: WukongConfig, inputs: InputSpec, p, dense, pooled):
    """One example: [D], [pooled_width] -> [out_width]."""
    rows = embed(config, inputs, p, dense, pooled)
    for i in range(config.layers):
        name = f"layers.{i}"
        flat = factorization_machine(config, p, f"{name}.fmb.fm", rows).flatten()
        normed = layer_norm(flat, p, f"{name}.fmb.norm")
        fmb = in_rows(mlp(normed, p, f"{name}.fmb.mlp", len(config.fmb_mlp), True), config.width)
        lcb = mixtures(p[f"{name}.lcb.weight"], rows)
        residual = rows
        if len(rows) != config.num_fmb + config.num_lcb:
            residual = mixtures(p[f"{name}.residual.weight"], rows)
        rows = [layer_norm(a + b, p, f"{name}.norm") for a, b in zip(fmb + lcb, residual, strict=True)]
    return mlp(torch.cat(rows), p, "final_mlp", len(config.final_mlp), False)


def test_output_and_all_gradients_equal_the_equations(wukong_case, agree):
    config, inputs = wukong_case

    def reference(p, dense, pooled):
        return torch.stack([wukong(config, inputs, p, dense[b], pooled[b]) for b in range(len(pooled))])

    agree(Wukong(config, inputs), inputs, reference)


def test_optimized_machine_is_the_plain_one_times_y_and_never_makes_n_by_n_products():
    num, width, rank = 50, 4, 3
    fm, x_bnd = OptimizedFM(num, width, rank).double(), torch.randn(2, num, width, dtype=torch.float64)
    torch.testing.assert_close(fm(x_bnd), PlainFM(num, width)(x_bnd) @ fm.y, rtol=0, atol=1e-12)
    with torch.autograd.graph.saved_tensors_hooks(record := Recorder(), lambda kept: kept):
        fm(x_bnd)
    assert record.largest_numel <= x_bnd.numel() < 2 * num * num


class Recorder:
    """Remembers the largest tensor that autograd kept for backward."""

    largest_numel = 0

    def __call__(self, tensor):
        self.largest_numel = max(self.largest_numel, tensor.numel())
        return tensor

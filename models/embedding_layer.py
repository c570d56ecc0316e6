"""From dense features and pooled embeddings to the n embeddings of one width that interact (Wukong section 3.2)."""

# b examples, n embeddings, d width, p width of all pooled features together

import torch
from torch import Tensor, nn

from exfm.data.errors import UserError
from exfm.models.config import EmbeddingGroup
from exfm.models.interface import InputSpec, ModelSize
from exfm.models.layers import MLP


class EmbeddingLayer(nn.Module):
    """dense [b, D], pooled [b, p] -> [b, n, d]: dense embeddings, then ungrouped features, then groups.

    dense_mlp: maps the dense features to a multiple of d columns; None where there are no dense features.
    Raises UserError for a feature that fits neither the width nor a group, or a group of unknown or repeated features.
    """

    def __init__(
        self,
        inputs: InputSpec,
        width: int,
        dense_mlp: MLP | None,
        groups: tuple[EmbeddingGroup, ...] = (),
        bias: bool = True,
    ) -> None:
        super().__init__()
        _check_groups(groups, inputs)
        columns = inputs.columns()
        self.width = width
        self.num_dense_embeddings = 0 if dense_mlp is None else dense_mlp.out_width // width
        self.spans = _ungrouped_spans(inputs, width, groups)
        self.group_spans = [[columns[name] for name in group.features] for group in groups]
        self.dense_mlp = dense_mlp
        group_mlps = [
            MLP(sum(stop - start for start, stop in spans), group.hidden, group.outputs * width, bias)
            for group, spans in zip(groups, self.group_spans, strict=True)
        ]
        self.group_mlps = nn.ModuleList(group_mlps)
        self.num_embeddings = (
            self.num_dense_embeddings
            + sum(stop - start for start, stop in self.spans) // width
            + sum(group.outputs for group in groups)
        )
        if self.num_embeddings == 0:
            raise UserError("the model has no inputs: it has 0 dense and 0 sparse features; give it at least one")
        self._size = sum((mlp.size() for mlp in group_mlps), ModelSize() if dense_mlp is None else dense_mlp.size())

    def forward(self, dense: Tensor, pooled_bp: Tensor) -> Tensor:
        parts = [] if self.dense_mlp is None else [self.dense_mlp(dense)]
        parts += [pooled_bp[:, start:stop] for start, stop in self.spans]
        for mlp, spans in zip(self.group_mlps, self.group_spans, strict=True):
            parts.append(mlp(torch.cat([pooled_bp[:, start:stop] for start, stop in spans], dim=1)))
        together = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        # The count is given because a view of 0 examples cannot infer it.
        return together.unflatten(1, (self.num_embeddings, self.width))

    def size(self) -> ModelSize:
        return self._size


def _check_groups(groups: tuple[EmbeddingGroup, ...], inputs: InputSpec) -> None:
    known = [name for name, _ in inputs.features]
    grouped: set[str] = set()
    for i, group in enumerate(groups):
        for name in group.features:
            if name not in known:
                raise UserError(f"groups[{i}] names feature '{name}'; the model's features are: {', '.join(known)}")
            if name in grouped:
                raise UserError(f"feature '{name}' is named again in groups[{i}]; leave it in one group")
            grouped.add(name)


def _ungrouped_spans(inputs: InputSpec, width: int, groups: tuple[EmbeddingGroup, ...]) -> list[tuple[int, int]]:
    """Columns of the features outside groups; neighbours are merged, so that without groups it is one view."""
    grouped = {name for group in groups for name in group.features}
    spans: list[tuple[int, int]] = []
    for name, (start, stop) in inputs.columns().items():
        if name in grouped:
            continue
        if (stop - start) % width:
            raise UserError(
                f"feature '{name}' has a pooled width of {stop - start}, which is no multiple of the model's width "
                f"{width}; set the width of its table to {width} (or a multiple: several embeddings), or, in a Wukong "
                "model, put the feature in one of `groups`"
            )
        if spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], stop)
        else:
            spans.append((start, stop))
    return spans

"""Configuration of the backbones: one frozen pydantic model per `kind`; every default stands here once."""

from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

Widths = tuple[PositiveInt, ...]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EmbeddingGroup(_Frozen):
    """Small embeddings of any width that are concatenated and mapped by an MLP to `outputs` d-wide embeddings."""

    features: Annotated[tuple[str, ...], Field(min_length=1)]
    outputs: PositiveInt = 1
    hidden: Widths = ()


class AttentionConfig(_Frozen):
    """How the attentive FM makes Y: `compressed` mixtures of its input, then an MLP with these hidden widths."""

    compressed: PositiveInt = 16
    hidden: Widths = (64,)


class WukongConfig(_Frozen):
    """Wukong (arXiv 2403.02545, section 3). Widths of MLPs are hidden ones; output widths follow from the rest.

    width: d, of every embedding in the stack. A feature whose pooled width is m*d gives m embeddings; one of another
        width must be in a group.
    layers, num_fmb, num_lcb, rank: l, n_F, n_L, k. The plain FM has no rank.
    attention: read only where interaction is "attentive".
    bias: shifts in every linear layer of an MLP and in every LayerNorm; compressions never have one.
    dense_mlp, dense_embeddings: the MLP that maps the dense features to that many d-wide embeddings.
    final_mlp: ReLU after each; empty leaves the flattened last embeddings as the output.
    A validated mapping may hold `preset`, a key of WUKONG_PRESETS: its fields are the defaults of the others.
    """

    kind: Literal["wukong"] = "wukong"
    width: PositiveInt
    layers: PositiveInt = 2
    num_fmb: PositiveInt = 16
    num_lcb: PositiveInt = 16
    rank: PositiveInt = 24
    fmb_mlp: Widths = (512,)
    interaction: Literal["optimized", "plain", "attentive"] = "optimized"
    attention: AttentionConfig = AttentionConfig()
    bias: bool = True
    dense_mlp: Widths = (512, 256)
    dense_embeddings: PositiveInt = 1
    groups: tuple[EmbeddingGroup, ...] = ()
    final_mlp: Widths = (512, 256)

    @model_validator(mode="before")
    @classmethod
    def _merge_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "preset" not in given:
            return given
        fields = dict(given)
        name = str(fields.pop("preset"))
        if name not in _PRESET_FIELDS:
            near = get_close_matches(name, _PRESET_FIELDS, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ValueError(f"preset is {name!r}, which is none of {', '.join(_PRESET_FIELDS)}{hint}")
        return {**_PRESET_FIELDS[name], **fields}


class DlrmConfig(_Frozen):
    """DLRM (arXiv 1906.00091): `width` d of every embedding, hidden widths of the bottom MLP (d follows) and the top.

    A feature whose pooled width is m*d gives m embeddings. An empty top MLP leaves the interactions as the output.
    """

    kind: Literal["dlrm"] = "dlrm"
    width: PositiveInt
    bottom_mlp: Widths = (512, 256)
    top_mlp: Widths = (512, 256)
    bias: bool = True


class DcnV2Config(_Frozen):
    """DCN-V2 (arXiv 2008.13535) with cross layers of low rank; features may have any width.

    structure: "stacked" puts the MLP on the cross layers' output, "parallel" beside them on the input, outputs
        concatenated.
    """

    kind: Literal["dcnv2"] = "dcnv2"
    cross_layers: PositiveInt = 3
    rank: PositiveInt = 64
    deep_mlp: Widths = (512, 256)
    structure: Literal["parallel", "stacked"] = "parallel"
    bias: bool = True


ModelConfig = Annotated[WukongConfig | DlrmConfig | DcnV2Config, Field(discriminator="kind")]


def _table_5(layers: int, num: int, rank: int, mlp_width: int) -> dict[str, Any]:
    """A row of the paper's Table 5 (n_F = n_L = num); final-MLP sizes are not published, so there is none."""
    return dict(width=160, layers=layers, num_fmb=num, num_lcb=num, rank=rank, fmb_mlp=(mlp_width,) * 3, final_mlp=())


_PRESET_FIELDS: dict[str, dict[str, Any]] = {
    "wukong-0.53g": _table_5(2, 8, 24, 2048),
    "wukong-1.25g": _table_5(4, 32, 24, 2048),
    "wukong-2.12g": _table_5(8, 32, 24, 2048),
    "wukong-5.6g": _table_5(8, 48, 48, 4096),
    "wukong-22g": _table_5(8, 96, 96, 8192),
    "wukong-61g": _table_5(8, 96, 96, 16384),
    "wukong-108g": _table_5(8, 192, 192, 16384),
}
WUKONG_PRESETS: dict[str, WukongConfig] = {
    name: WukongConfig.model_validate(fields) for name, fields in _PRESET_FIELDS.items()
}

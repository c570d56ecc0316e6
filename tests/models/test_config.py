"""What a config accepts, and what the errors for the rest say."""

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from exfm.data.errors import UserError
from exfm.models.build import BACKBONES, build_backbone
from exfm.models.config import WUKONG_PRESETS, DlrmConfig, ModelConfig, WukongConfig
from exfm.models.interface import InputSpec

parse = TypeAdapter(ModelConfig).validate_python
SPARSE = InputSpec(0, (("user", 4), ("item", 4)))


def test_a_saved_config_reads_back_equal(case):
    config, _ = case
    assert parse(config.model_dump(mode="json")) == config


def test_a_preset_gives_the_fields_that_are_not_given():
    config = parse({"kind": "wukong", "preset": "wukong-5.6g", "layers": 2, "final_mlp": [64]})
    assert config == WUKONG_PRESETS["wukong-5.6g"].model_copy(update={"layers": 2, "final_mlp": (64,)})
    assert parse({"kind": "wukong", "preset": "wukong-61g"}) == WUKONG_PRESETS["wukong-61g"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "wukong", "preset": "wukong-5.8g"}, "did you mean 'wukong-5.6g'"),
        ({"kind": "wukong", "preset": ["x"]}, "which is none of wukong-0.53g"),
        ({"kind": "wukong"}, "width\n  Field required"),
        ({"kind": "wukong", "width": 0}, "greater than 0"),
        ({"kind": "wukong", "width": 4, "num_fbm": 3}, "num_fbm\n  Extra inputs are not permitted"),
        ({"kind": "wukong", "width": 4, "interaction": "fast"}, "'optimized', 'plain' or 'attentive'"),
        ({"kind": "wukong", "width": 4, "groups": [{"features": []}]}, "groups.0.features"),
        ({"kind": "dlrm", "width": 4, "top_mlp": [8, 0]}, "top_mlp.1"),
        ({"kind": "dcnv2", "structure": "both"}, "'parallel' or 'stacked'"),
        ({"kind": "dcn"}, "'wukong', 'dlrm', 'dcnv2'"),
    ],
)
def test_a_wrong_config_is_refused_with_the_key_and_what_is_allowed(given, message):
    with pytest.raises(ValidationError) as error:
        parse(given)
    assert message in str(error.value)


def test_a_config_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        WukongConfig(width=4).width = 8


GROUPED_TWICE = [{"features": ["user"]}, {"features": ["user"]}]


@pytest.mark.parametrize(
    ("fields", "inputs", "message"),
    [
        ({"width": 3}, SPARSE, "feature 'user' has a pooled width of 4, .*width 3; set the width of its table"),
        ({"width": 8}, SPARSE, "no multiple of the model's width 8"),
        ({"width": 4, "groups": [{"features": ["usr"]}]}, SPARSE, r"groups\[0\] names feature 'usr'; .*: user, item"),
        ({"width": 4, "groups": GROUPED_TWICE}, SPARSE, r"'user' is named again in groups\[1\]"),
        ({"width": 4, "groups": [{"features": ["user", "user"]}]}, SPARSE, r"named again in groups\[0\]"),
        ({"width": 4}, InputSpec(0, ()), "no inputs"),
        ({"kind": "dlrm", "width": 3}, SPARSE, "feature 'user'"),
        ({"kind": "dlrm", "width": 4}, InputSpec(0, (("user", 4),)), "two embeddings to interact, the model has 1"),
        ({"kind": "dcnv2"}, InputSpec(0, ()), "no inputs"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_with_the_feature_and_the_remedy(fields, inputs, message):
    with pytest.raises(UserError, match=message):
        build_backbone(parse({"kind": "wukong", **fields}), inputs)


@pytest.mark.parametrize(
    ("num_dense", "features", "message"),
    [
        (-1, (), "num_dense is -1"),
        (0, (("user", 0),), "'user' has a pooled width of 0"),
        (0, (("user", 4), ("user", 4)), "'user' is given twice"),
    ],
)
def test_impossible_inputs_are_refused(num_dense, features, message):
    with pytest.raises(UserError, match=message):
        InputSpec(num_dense, features)


def test_every_kind_has_a_backbone():
    assert set(BACKBONES) == set(TypeAdapter(ModelConfig).json_schema()["discriminator"]["mapping"])


def test_a_feature_of_m_widths_is_the_same_model_as_m_features():
    config = DlrmConfig(width=4)
    torch.manual_seed(1)
    several = build_backbone(config, InputSpec(0, (("user", 8), ("item", 4))))
    torch.manual_seed(1)
    single = build_backbone(config, InputSpec(0, (("user_a", 4), ("user_b", 4), ("item", 4))))
    dense, pooled = torch.empty(5, 0), torch.randn(5, 12)
    torch.testing.assert_close(several(dense, pooled), single(dense, pooled), rtol=0, atol=0)

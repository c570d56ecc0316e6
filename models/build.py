"""From a model's config and inputs to the model."""

from collections.abc import Callable
from typing import Any

from exfm.models.config import DcnV2Config, DlrmConfig, WukongConfig
from exfm.models.dcnv2 import DcnV2
from exfm.models.dlrm import Dlrm
from exfm.models.interface import Backbone, InputSpec
from exfm.models.wukong import Wukong

# Keyed by the configs' `kind`, which also says the type of the config that the function takes.
BACKBONES: dict[str, type[Backbone]] = {"wukong": Wukong, "dlrm": Dlrm, "dcnv2": DcnV2}


def build_backbone(config: WukongConfig | DlrmConfig | DcnV2Config, inputs: InputSpec) -> Backbone:
    """The model that `config` describes; raises UserError where the inputs do not fit it.

    Under `torch.device("meta")` nothing is allocated: `size()` still answers, and after `to_empty` every module with
    parameters has a `reset_parameters`.
    """
    make: Callable[[Any, InputSpec], Backbone] = BACKBONES[config.kind]
    return make(config, inputs)

"""docs/models.md says what the code does: its examples run and its table is the printed one."""

import re
from pathlib import Path

import yaml
from pydantic import TypeAdapter

from exfm.models.config import WUKONG_PRESETS, ModelConfig
from exfm.models.presets import markdown_table

DOCS = (Path(__file__).parents[2] / "docs" / "models.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", DOCS, flags=re.DOTALL)


def test_the_preset_table_is_the_one_that_the_command_prints():
    assert markdown_table() in DOCS


def test_the_python_example_runs(capsys):
    (example,) = blocks("python")
    exec(compile(example, "docs/models.md", "exec"), {})
    assert capsys.readouterr().out.startswith("ModelSize(num_parameters=")


def test_the_yaml_example_is_a_valid_config():
    (example,) = blocks("yaml")
    config = TypeAdapter(ModelConfig).validate_python(yaml.safe_load(example)["model"])
    assert config.layers == 4
    assert config.fmb_mlp == WUKONG_PRESETS["wukong-5.6g"].fmb_mlp

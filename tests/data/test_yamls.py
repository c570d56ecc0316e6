"""YAML is parsed as yaml.safe_load parses it, and no tag makes an object."""

from pathlib import Path

import pytest
import yaml

from exfm.data.yamls import parse_yaml

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.stat().st_size < 100_000], ids=lambda p: p.stem)
def test_every_config_means_what_safe_load_says(path):
    assert parse_yaml(path.read_bytes()) == yaml.safe_load(path.read_text())


@pytest.mark.parametrize("text", ["!!python/object/apply:os.getcwd []", "!!python/name:os.getcwd", "a: [1", "a: b: c"])
def test_what_safe_load_refuses_is_refused(text):
    with pytest.raises(yaml.YAMLError):
        yaml.safe_load(text)
    with pytest.raises(yaml.YAMLError):
        parse_yaml(text)

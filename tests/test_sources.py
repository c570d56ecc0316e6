"""Nothing in the package's sources can run what it reads."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def unsafe(tree: ast.AST) -> list[str]:
    """Calls and imports that can run what they read."""
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
        if bad := {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"} & {n.split(".")[0] for n in names}:  # fmt: skip
            found.append(f"{node.lineno} imports {bad}")
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name in ("torch.load", "yaml.load", "yaml.unsafe_load", "eval", "exec", "compile"):
            found.append(f"{node.lineno} calls {name}")
        # numpy refuses pickles unless it is told otherwise
        if keywords.get("allow_pickle", "False") != "False":
            found.append(f"{node.lineno} allows pickles")
    return found


def test_no_source_of_the_package_imports_pickle_or_loads_what_can_run():
    folders = ["data", "embeddings", "models", "distillation", "sharding", "checkpoints", "trainer", "launch"]
    paths = [p for folder in folders for p in (ROOT / folder).rglob("*.py")]
    assert len(paths) > 80
    assert {str(p): found for p in paths if (found := unsafe(ast.parse(p.read_text())))} == {}


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from pickle import loads", "import torch\ntorch.load('x')", "yaml.load(x)", "np.load(x, allow_pickle=True)"],
)  # fmt: skip
def test_the_look_at_sources_finds_what_is_planted(source):
    assert unsafe(ast.parse(source))

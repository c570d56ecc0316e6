"""Imports go down the list of folders only, and the environment is read in two files."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAYERS = ["launch", "trainer", "checkpoints", "sharding", "distillation", "models", "embeddings", "data"]
READS_ENVIRONMENT = {"trainer/env.py", "launch/cli.py"}


def imported_modules(tree: ast.AST, folder_parts: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import, wherever in the file; `from exfm import data` gives exfm.data."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = ("exfm", *folder_parts)[: 2 + len(folder_parts) - node.level] if node.level else ()
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            argument = node.args[0]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield node.lineno, argument.value


def reads_environment(tree: ast.AST) -> Iterator[int]:
    """Lines that name os.environ or os.getenv, or import them by name."""
    for node in ast.walk(tree):
        by_attribute = isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "getenvb")
        if by_attribute and isinstance(node.value, ast.Name) and node.value.id == "os":
            yield node.lineno
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (
                node.lineno for alias in node.names if alias.name in ("environ", "environb", "getenv", "getenvb")
            )


def violations(root: Path) -> list[str]:
    """One line per import that goes up, per library imported by its bare name and per stray look at the environment."""
    found = []
    for layer in LAYERS:
        allowed = LAYERS[LAYERS.index(layer) :]
        for path in sorted((root / layer).rglob("*.py")):
            name = path.relative_to(root).as_posix()
            tree = ast.parse(path.read_text(), name)
            for line, module in imported_modules(tree, path.relative_to(root).parent.parts):
                top, _, rest = module.partition(".")
                target = rest.split(".")[0]
                if top == "exfm" and target not in allowed:
                    found.append(f"{name}:{line} imports {module}: {layer} may import only {', '.join(allowed)}")
                elif top in LAYERS:
                    found.append(f"{name}:{line} imports {module}: say exfm.{module}")
            if name not in READS_ENVIRONMENT:
                found += [f"{name}:{line} reads the environment" for line in reads_environment(tree)]
    return found


def test_every_folder_imports_only_itself_and_folders_below_it():
    assert all((ROOT / layer / "__init__.py").exists() for layer in LAYERS)
    assert violations(ROOT) == []


def plant(root: Path, name: str, source: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)


def test_a_planted_violation_is_found_in_every_form_that_python_offers(tmp_path):
    plant(tmp_path, "data/up.py", "import exfm.models.wukong\n")
    plant(tmp_path, "data/late.py", "def f():\n    from exfm.trainer.loop import Loop\n")
    plant(tmp_path, "data/whole.py", "from exfm import launch\n")
    plant(tmp_path, "data/sub/dots.py", "from ...sharding import planner\n")
    plant(tmp_path, "data/dynamic.py", "import importlib\nimportlib.import_module('exfm.checkpoints.save')\n")
    plant(tmp_path, "models/bare.py", "from data import schema\n")
    plant(tmp_path, "benchmarks/free.py", "import exfm.launch.cli\n")
    plant(tmp_path, "models/env.py", "import os\nrank = os.environ['RANK']\n")
    plant(tmp_path, "models/getenv.py", "from os import getenv\n")
    lines = {"data": ["dynamic.py:2", "late.py:2", "sub/dots.py:1", "up.py:1", "whole.py:1"]}
    lines["models"] = ["bare.py:1", "env.py:2", "getenv.py:1"]
    expected = [f"{layer}/{line}" for layer in lines for line in lines[layer]]
    assert sorted(line.split(" ")[0] for line in violations(tmp_path)) == expected


def test_downward_sideways_and_foreign_imports_and_the_two_readers_are_allowed(tmp_path):
    plant(tmp_path, "launch/cli.py", "import os\nfrom exfm.trainer import loop\nhome = os.environ['EXFM_DATA_DIR']\n")
    plant(tmp_path, "models/a.py", "import torch\nfrom exfm.models import b\nfrom . import b\nfrom .b import c\n")
    plant(tmp_path, "models/sub/a.py", "from .. import b\nfrom ...data import schema\nfrom exfm.data.schema import S\n")
    plant(tmp_path, "trainer/env.py", "import os\nrank = int(os.environ['RANK'])\n")
    assert violations(tmp_path) == []

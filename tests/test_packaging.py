"""What is installed is the package exfm and nothing beside it, although the repository's root is that package."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARIES = ["data", "embeddings", "models", "distillation", "sharding", "checkpoints", "trainer", "launch"]
BESIDE = ["tests", "benchmarks", "configs", "docs", "typings", "requirements"]


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory) -> list[str]:
    """Names of the files in a wheel, built from a copy so that building leaves nothing in the checkout."""
    copy = tmp_path_factory.mktemp("source") / "exfm"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in [*LIBRARIES, *BESIDE]:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    # Were these packages, a careless setup.py would take them along.
    (copy / "tests" / "__init__.py").touch()
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "-w", str(copy.parent), str(copy)], check=True, capture_output=True)
    (wheel,) = copy.parent.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_the_wheel_holds_every_module_of_the_eight_libraries_under_exfm(wheel_names):
    modules = {
        f"exfm/{path.relative_to(ROOT).as_posix()}" for name in LIBRARIES for path in (ROOT / name).rglob("*.py")
    }
    assert {name for name in wheel_names if name.endswith(".py")} == modules


def test_nothing_but_exfm_appears_in_the_import_space(wheel_names):
    assert {name.split("/")[0] for name in wheel_names if ".dist-info/" not in name} == {"exfm"}
    assert not any(name.startswith(f"exfm/{folder}/") for name in wheel_names for folder in BESIDE)


def test_the_wheel_brings_the_command_and_its_licence(wheel_names):
    endings = ("dist-info/entry_points.txt", "LICENSE")
    assert [sum(name.endswith(ending) for name in wheel_names) for ending in endings] == [1, 1]

"""Packaging: the repository's root is the import package `exfm` (a namespace package).

torchrec, fbgemm-gpu and torch must match each other exactly and differ between CPU and GPU machines, so they are
not listed here: `make setup` installs the pinned set of requirements/cpu.txt or requirements/gpu.txt first.
"""

from setuptools import find_packages, setup

LIBRARIES = ["data", "embeddings", "models", "distillation", "sharding", "checkpoints", "trainer", "launch"]
found = [p for p in find_packages() if p.split(".")[0] in LIBRARIES]

setup(
    name="exfm",
    version="0.1.0",
    description="Train trillion-parameter sparse recommendation teachers and distil them into small students",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"exfm": "."},
    packages=[f"exfm.{p}" for p in found],
    install_requires=[
        "fsspec",
        "numpy",
        "plotly",
        "pyarrow",
        "pydantic>=2",
        "PyYAML",
        "rich",
        "safetensors",
        "tensorboard",
        "typer",
        "xxhash",
    ],
    extras_require={"deepspeed": ["deepspeed==0.19.8"], "s3": ["s3fs"], "peers": ["fuxictr==2.3.10", "packaging"]},
    entry_points={"console_scripts": ["exfm = exfm.launch.cli:main"]},
)

"""Changing a committed checkpoint as somebody would who means harm and can compute checksums."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from exfm.checkpoints.layout import manifest_bytes, sums_of
from exfm.data.errors import UserError

HUGE = 2**60


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def bomb(marker: Path, kind: str) -> bytes:
    """A pickle, as it is or inside torch.save's archive, that leaves a marker where it is loaded."""
    if kind == "pickle":
        return pickle.dumps(Bomb(marker))
    path = marker.with_suffix(".pt")
    torch.save(Bomb(marker), path)
    return path.read_bytes()


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest and give it the right checksum."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    manifest.pop("sum", None)
    (folder / "manifest.json").write_bytes(manifest_bytes(manifest))


def replace_file(folder: Path, name: str, payload: bytes) -> None:
    """Put other bytes in a data file's place, sizes and checksums made right."""
    (folder / name).write_bytes(payload)
    record = sums_of([memoryview(payload)], name).as_dict()

    def change(manifest: dict[str, Any]) -> None:
        manifest["files"] = [record if f["path"] == name else f for f in manifest["files"]]

    rewrite(folder, change)


def change_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the tensors of an index, checksums made right."""
    tensors = json.loads((folder / "index.json").read_text())["tensors"]
    change(tensors)
    replace_file(folder, "index.json", json.dumps({"tensors": tensors}).encode())


def refused(act: Callable[[], Any]) -> str:
    """The message of a refusal; "" where it was read as if nothing were wrong."""
    try:
        act()
    except UserError as error:
        return str(error)
    return ""

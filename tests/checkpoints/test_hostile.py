"""Checkpoints made to do harm, their checksums right: nothing of them runs, leads outside, hangs or takes memory."""

import io
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exfm.checkpoints.commits import Committed, chain, committed, listing
from exfm.checkpoints.snapshots import load_snapshot
from exfm.checkpoints.storage import Storage
from exfm.data.errors import UserError
from exfm.launch.checkpoint_diff import diff
from exfm.launch.checkpoint_export import export
from exfm.launch.checkpoints import list_all, merge, place, prune, show, verify
from tests.checkpoints.hostile import HUGE, bomb, change_index, refused, replace_file, rewrite
from tests.trainer.jobs import Raw, make_stream, replaced, run, teacher

DATA, INDEX, MANIFEST = "rank-00000.safetensors", "index.json", "manifest.json"
Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Raw:
    """A job that stopped early: a full commit with a delta on it, a full snapshot with a delta on it."""
    root = tmp_path_factory.mktemp("hostile")
    stream = make_stream(root / "stream").root
    checkpoint = {"every_slices": 1, "keep": 100, "full_every": 100, "snapshots": {"full_every": 2, "keep": 9}}
    raw = teacher(root / "run", stream, checkpoint=checkpoint)
    assert run(raw, 9)[0] == 75
    assert [c.kind for c in committed(root / "run/checkpoints")] == ["full", "delta"]
    return raw


@pytest.fixture
def raw(made: Raw, tmp_path: Path) -> Raw:
    shutil.copytree(made["run"]["folder"], tmp_path / "run")
    return replaced(made, run__folder=str(tmp_path / "run"))


def commits(raw: Raw) -> list[Path]:
    return sorted((Path(raw["run"]["folder"]) / "checkpoints").glob("step=*"))


def snapshots(raw: Raw) -> list[Path]:
    return sorted((Path(raw["run"]["folder"]) / "snapshots").glob("slice=*"))


def attempts(raw: Raw, tmp_path: Path) -> dict[str, Callable[[], Any]]:
    """Everything here that reads a checkpoint or a snapshot."""
    run_folder = raw["run"]["folder"]
    warm = replaced(raw, run__folder=str(tmp_path / "warm"))
    warm["checkpoint"] = {"warm_start": {"path": f"{run_folder}/checkpoints"}}
    state = {"tables.user.weight": torch.zeros(20, 8)}
    silent = lambda *_: None  # noqa: E731
    tools = {
        "list": lambda where: list_all(where),
        "show": lambda where: show(where),
        "verify": lambda where: verify(where, True, silent),
        "diff": lambda where: diff(where, where, silent),
        "export": lambda where: export(where, str(tmp_path / f"out{len(list(tmp_path.iterdir()))}"), "parquet", 99, True, silent),
        "prune": lambda where: prune(where, 9, 0, False, silent),
    }  # fmt: skip
    found: dict[str, Callable[[], Any]] = {
        f"{name} {kind}": lambda act=act, kind=kind: act(place(f"{run_folder}/{kind}"))
        for name, act in tools.items()
        for kind in ("checkpoints", "snapshots")
    }
    found["compact"] = lambda: merge(place(run_folder))
    last = snapshots(raw)[-1].name
    found["load_snapshot"] = lambda: load_snapshot(Storage(f"{run_folder}/snapshots"), last, state)
    found["warm start"] = lambda: run(warm, 1)
    found["resume"] = lambda: run(raw, 1)  # last: it sets damaged ones aside
    return found


@pytest.mark.timeout(200)
@pytest.mark.parametrize("kind", ["pickle", "torch.save"])
@pytest.mark.parametrize("file", [DATA, INDEX, MANIFEST, "ledger.parquet"])
@pytest.mark.parametrize("checksums", ["as committed", "made right"])
def test_a_pickle_in_any_file_is_never_run_by_anything_that_reads_checkpoints(checksums, file, kind, raw, tmp_path):
    marker = tmp_path / "marker"
    payload = bomb(marker, kind)
    for folder in [*commits(raw), *snapshots(raw)]:
        if file == "ledger.parquet":
            (Path(raw["run"]["folder"]) / file).write_bytes(payload)
        elif checksums == "as committed" or file == MANIFEST:
            (folder / file).write_bytes(payload)
        else:
            replace_file(folder, file, payload)
    for act in attempts(raw, tmp_path).values():
        refused(act)
    assert not marker.exists()
    load = pickle.loads if kind == "pickle" else lambda read: torch.load(io.BytesIO(read), weights_only=False)
    load(payload)
    assert marker.exists()  # it does act where it is unpickled


def files(change: Callable[[dict[str, Any]], Any], which: int = 0) -> Change:
    return lambda manifest: change(manifest["files"][which]) and None


MANIFESTS: dict[str, Change] = {
    "a path with ..": files(lambda f: f.update(path="../../x")),
    "an absolute path": files(lambda f: f.update(path="/etc/passwd")),
    "a path with a folder": files(lambda f: f.update(path="a/b")),
    "a path with a null byte": files(lambda f: f.update(path="rank\0")),
    "a path that is no text": files(lambda f: f.update(path=["x"])),
    "a size of 2^60": files(lambda f: f.update(bytes=HUGE)),
    "a negative size": files(lambda f: f.update(bytes=-1)),
    "a fraction of bytes": files(lambda f: f.update(bytes=1.5)),
    "true bytes": files(lambda f: f.update(bytes=True)),
    "an index of 2^50 bytes": files(lambda f: f.update(bytes=2**50, sums="0" * 16 * 2**20), -1),
    "no checksums": files(lambda f: f.update(sums="")),
    "no files": lambda m: m.update(files=[]),
    "files that are a number": lambda m: m.update(files=7),
    "a file that is no record": lambda m: m.update(files=[7]),
    "a file listed twice": lambda m: m.update(files=[m["files"][0], *m["files"]]),
    "no index": lambda m: m["files"].pop(),
    "2^60 ranks": lambda m: m.update(world_size=HUGE),
    "true ranks": lambda m: m.update(world_size=True),
    "seven ranks": lambda m: m.update(world_size=7),
    "a negative slice": lambda m: m["position"].update(slice=-1),
    "2^60 examples consumed": lambda m: m["position"].update(consumed=HUGE),
    "a fraction of a slice": lambda m: m["position"].update(slice=0.5),
    "no position": lambda m: m.pop("position"),
    "a position that is a list": lambda m: m.update(position=[1, 2]),
    "a base that is a number": lambda m: m.update(base=7),
    "a base without a name": lambda m: m.update(base={"sum": "x"}),
    "a base outside": lambda m: m.update(base={"name": "../../x", "sum": "x"}),
    "an identity that is a list": lambda m: m.update(identity=[]),
    "no identity": lambda m: m.pop("identity"),
    "no loss guard": lambda m: m.pop("loss_guard"),
    "seconds that are text": lambda m: m.update(seconds="x"),
    "a format that is a list": lambda m: m.update(format=[2]),
    "another format": lambda m: m.update(format=3),
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_a_manifest_that_no_save_writes_is_refused_by_name(what, raw, tmp_path):
    newest = commits(raw)[-1]
    rewrite(newest, MANIFESTS[what])
    for folder in commits(raw)[:-1]:  # nothing to fall back to
        (folder / MANIFEST).write_text("{}")
    message = refused(lambda: run(raw, 1))
    assert f"{newest.parent}" in message and "step=" in message, message


def test_the_commit_before_a_hostile_one_is_resumed_from(raw, capfd):
    newest = commits(raw)[-1]
    rewrite(newest, MANIFESTS["2^60 ranks"])
    assert run(raw, 1)[0] == 75
    said = "".join(capfd.readouterr())
    assert f"{newest}/{MANIFEST} is damaged: {HUGE} is no count" in said and f"resumed from {commits(raw)[0]}" in said


@pytest.mark.parametrize("nesting", ["[", '{"a":'])
@pytest.mark.parametrize("depth", [200, 100_000])
@pytest.mark.parametrize("file", [MANIFEST, INDEX])
def test_deep_nesting_is_refused_by_name(file, depth, nesting, raw):
    newest = commits(raw)[-1]
    closing = {"[": "]", '{"a":': "}"}[nesting]
    text = nesting * depth + ("" if nesting == "[" else "0") + closing * depth
    if file == INDEX:
        replace_file(newest, INDEX, f'{{"tensors": {{"x": {text}}}}}'.encode())
        assert f"{newest}/{INDEX}" in refused(lambda: show(place(str(newest))))
        return
    if depth < 1000:
        rewrite(newest, lambda m: m.update(extra=json.loads(text)))
    else:
        (newest / MANIFEST).write_text(text)
    assert f"{newest}/{MANIFEST} is damaged" in refused(lambda: show(place(str(newest))))


def rows_of(folder: Path, change: Callable[[np.ndarray], None]) -> None:
    """Change the row numbers of the user table's patch, checksums made right."""
    content = bytearray((folder / DATA).read_bytes())
    found = json.loads((folder / INDEX).read_text())["tensors"]["delta.user@0,0,0.rows"]
    start, count = found["chunks"][0][3], found["shape"][0]
    change(np.frombuffer(content, np.int64, count, start))
    replace_file(folder, DATA, bytes(content))


DELTAS: dict[str, Callable[[np.ndarray], None]] = {
    "negative": lambda rows: rows.__setitem__(0, -1),
    "out of range": lambda rows: rows.__setitem__(-1, 20),
    "far out of range": lambda rows: rows.__setitem__(-1, HUGE),
    "unsorted": lambda rows: rows.__setitem__(slice(None), rows[::-1].copy()),
    "repeated": lambda rows: rows.__setitem__(1, rows[0]),
}


@pytest.mark.parametrize("what", DELTAS)
def test_a_delta_of_rows_that_its_table_does_not_have_is_refused_by_name(what, raw, capfd):
    newest, last = commits(raw)[-1], snapshots(raw)[-1]
    for folder in (newest, last):
        rows_of(folder, DELTAS[what])
    problem = verify(place(str(newest)), False, lambda *_: None)["commits"][0]["problem"]
    assert f"{newest}: delta.user@0,0,0" in problem
    state = {"tables.user.weight": torch.zeros(20, 8)}
    assert f"{last}: delta.user@0,0,0" in refused(lambda: load_snapshot(Storage(last.parent), last.name, state))
    assert run(raw, 1)[0] == 75
    assert f"resumed from {commits(raw)[0]}" in "".join(capfd.readouterr())


NAMES = {
    "of no table": "delta.nobody@0,0,0",
    "of columns outside": "delta.user@0,1,0",
    "of a segment outside": "delta.user@0,0,1",
    "of a column of 2^60": f"delta.user@0,{HUGE},0",
    "of a column of 900 digits": f"delta.user@0,{'9' * 900},0",
}


@pytest.mark.parametrize("what", NAMES)
def test_a_delta_that_does_not_fit_its_table_is_refused_by_name(what, raw):
    newest = commits(raw)[-1]

    def rename(tensors: dict[str, Any]) -> None:
        for kind in ("rows", "weight", "adagrad_sum"):
            tensors[f"{NAMES[what]}.{kind}"] = tensors.pop(f"delta.user@0,0,0.{kind}")

    change_index(newest, rename)
    problem = verify(place(str(newest)), False, lambda *_: None)["commits"][0]["problem"]
    assert str(newest) in problem and "is no delta" in problem
    assert "is no delta" in refused(lambda: merge(place(str(newest))))


def test_a_chain_that_is_a_circle_is_refused():
    storage = Storage("/nowhere")
    names = ["step=00000001", "step=00000002", "step=00000003"]
    circle = [
        Committed(storage, name, {"kind": "delta", "sum": name, "base": {"name": names[i - 1], "sum": names[i - 1]}})
        for i, name in enumerate(names)
    ]
    itself = Committed(storage, names[0], {"sum": "x", "base": {"name": names[0], "sum": "x"}})
    for found, everything in ((circle[2], circle), (itself, [itself])):
        with pytest.raises(UserError, match="/nowhere/step="):
            chain(found, everything)


@pytest.mark.parametrize("file", [DATA, INDEX, MANIFEST])
@pytest.mark.parametrize("target", ["outside", "/etc/passwd", "/dev/zero"])
def test_a_symbolic_link_in_a_files_place_is_refused_by_name(target, file, raw, tmp_path):
    newest = commits(raw)[-1]
    if target == "outside":  # even to a file that is right in every byte
        shutil.copy(newest / file, tmp_path / "outside")
        target = str(tmp_path / "outside")
    (newest / file).unlink()
    (newest / file).symlink_to(target)
    assert f"{newest}/{file}" in refused(lambda: run(raw, 1))
    assert f"{file}" in refused(lambda: export(place(str(newest)), str(tmp_path / "o"), "parquet", 9, False, print))


def test_a_link_in_a_commits_place_is_refused_by_name(raw, tmp_path):
    newest = commits(raw)[-1]
    shutil.move(newest, tmp_path / "elsewhere")
    newest.symlink_to(tmp_path / "elsewhere")
    assert str(newest) in refused(lambda: run(raw, 1))


def test_an_export_of_a_table_named_to_lead_outside_stays_inside(raw, tmp_path):
    full = commits(raw)[0]

    def rename(tensors: dict[str, Any]) -> None:
        for kind in ("weight", "adagrad_sum"):
            tensors[f"tables.../../../x.{kind}"] = tensors.pop(f"tables.user.{kind}")

    change_index(full, rename)
    out = tmp_path / "deep" / "er" / "out"
    before = {p for p in tmp_path.rglob("*") if out not in p.parents}
    export(place(str(full)), str(out), "safetensors", 100, True, lambda *_: None)
    assert {p for p in tmp_path.rglob("*") if out not in p.parents} - before == {out, out.parent, out.parent.parent}
    assert len(list((out / "tables").iterdir())) == 4


ARRAYS: dict[str, tuple[str, Change]] = {
    "another shape": ("rank.00000.metrics/slice", lambda t: t.update(shape=[10, 1, 1], chunks=[[[0, 0, 0], [10, 1, 1], *t["chunks"][0][2:]]])),
    "another type": ("rank.00000.random/cpu", lambda t: t.update(dtype="I8")),
    "another type of a dense weight": ("dense.served.head.logits.bias", lambda t: t.update(dtype="I32")),
}  # fmt: skip


@pytest.mark.parametrize("what", ARRAYS)
def test_arrays_of_another_kind_than_the_job_saves_are_refused_by_name(what, raw):
    newest = commits(raw)[-1]
    name, change = ARRAYS[what]
    change_index(newest, lambda tensors: change(tensors[name]))
    for folder in commits(raw)[:-1]:
        (folder / MANIFEST).unlink()  # nothing to fall back to; the newest is a delta of it
    message = refused(lambda: run(raw, 1))
    assert newest.name in message


LIMITED = """
import resource, sys
import fbgemm_gpu, torch
from exfm.data.errors import UserError
from exfm.launch.checkpoints import place, show, verify
from exfm.checkpoints.commits import listing
from exfm.checkpoints.store import set_aside
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + 1400 * 2**20,) * 2)
try:
    show(place(sys.argv[1]))
except UserError as error:
    print("refused:", error)
"""


@pytest.mark.timeout(200)
@pytest.mark.parametrize("what", ["manifest of 2^40 bytes", "manifest of 200 MiB of nothing", "index of 2^40 bytes"])
def test_a_file_of_any_size_is_refused_in_bounded_memory(what, raw, warm):
    newest = commits(raw)[-1]
    if what == "index of 2^40 bytes":
        rewrite(newest, lambda m: m["files"][-1].update(bytes=2**40, sums="0" * 16 * 2**16))
        with open(newest / INDEX, "r+b") as f:
            f.truncate(2**40)
        named = MANIFEST  # it is the one that says so
    else:
        with open(newest / MANIFEST, "r+b") as f:
            f.truncate(2**40 if "2^40" in what else 200 * 2**20)
        named = MANIFEST
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(newest)], capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0 and done.stdout.startswith("refused:") and f"{newest}/{named}" in done.stdout, done


def test_a_listing_passes_over_what_is_removed_meanwhile(raw, monkeypatch):
    from exfm.checkpoints import commits as module

    read, (first, last) = module.read_manifest, commits(raw)

    def racing(storage: Storage, name: str) -> dict[str, Any]:
        if name == first.name:
            shutil.rmtree(first)
        return read(storage, name)

    monkeypatch.setattr(module, "read_manifest", racing)
    assert [c.name for c in listing(Storage(first.parent))] == [last.name]

"""`exfm checkpoint`: what it prints and writes, against the files read with the safetensors library and pyarrow alone."""

import json
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import typer
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from exfm.checkpoints import store, view
from exfm.checkpoints.commits import chain, committed, listing
from exfm.checkpoints.holding import reading, removing
from exfm.checkpoints.keeping import clean
from exfm.checkpoints.sources import Buffers, Memory
from exfm.checkpoints.storage import Storage
from exfm.checkpoints.writer import Item, Progress, commit_folder, write_file
from exfm.launch import cli
from exfm.trainer.env import RankEnv, process_group
from tests.trainer.jobs import make_stream, read_checkpoint, run, same, teacher

State = dict[str, Tensor]
Exfm = Callable[..., tuple[int, Any, str]]
CHECKPOINT = {
    "every_slices": 1, "every_examples": 64, "keep": 100, "full_every": 4,
    "snapshots": {"full_every": 2, "rows": "int8", "keep": 100},
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with chains of commits and of int8 snapshots; one table has fp16 rows."""
    root = tmp_path_factory.mktemp("cli")
    stream = make_stream(root / "stream").root
    raw = teacher(root / "run", stream, checkpoint=CHECKPOINT, tables__viewed__dtype="fp16")
    assert run(raw)[0] == 0
    return root / "run"


@pytest.fixture
def job(made: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.fixture
def exfm(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Exfm]:
    """Run `exfm checkpoint ARGS --json`; (exit code, value, stderr)."""

    def call(*args: object) -> tuple[int, Any, str]:
        monkeypatch.setattr(sys, "argv", ["exfm", "checkpoint", *map(str, args), "--json"])
        monkeypatch.setattr(cli, "console", Console(stderr=True, width=10_000))
        capfd.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capfd.readouterr()
        return code, json.loads(out) if out.strip() else None, err

    yield call


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def names(job: Path, inside: str = "checkpoints") -> list[str]:
    return sorted(p.parent.name for p in (job / inside).glob("*/manifest.json"))


def resolved(folder: Path) -> State:
    """A commit's state: its chain put together with the safetensors library and JSON."""
    base = manifest(folder)["base"]
    if base is None:
        return read_checkpoint(folder)
    before, own = resolved(folder.parent / base["name"]), read_checkpoint(folder)
    state = {n: t for n, t in before.items() if n.startswith("tables.")}
    state |= {n: t for n, t in own.items() if not n.startswith("delta.")}
    for name in (n for n in own if n.endswith(".rows")):
        table, at = name.removeprefix("delta.").removesuffix(".rows").rsplit("@", 1)
        _, column, segment = map(int, at.split(","))
        for kind, first in (("weight", column), ("adagrad_sum", segment)):
            values = own[name.removesuffix("rows") + kind]
            state[f"tables.{table}.{kind}"][own[name], first : first + values.shape[1]] = values
    return state


def newest(job: Path) -> Path:
    return job / "checkpoints" / names(job)[-1]


def test_list_says_of_every_commit_what_its_manifest_says(exfm: Exfm, made: Path) -> None:
    code, rows, _ = exfm("list", made)
    assert code == 0 and [r["name"] for r in rows] == names(made)
    for row in rows:
        m = manifest(made / "checkpoints" / row["name"])
        size = sum(
            p.stat().st_size for p in (made / "checkpoints" / row["name"]).iterdir() if p.name != "manifest.json"
        )
        found = (m["kind"], m["base"] and m["base"]["name"], m["position"]["slice"], m["position"]["consumed"])
        assert (row["kind"], row["base"], row["slice"], row["consumed"]) == found
        assert (row["bytes"], row["examples"], row["ranks"]) == (size, m["examples"], 1)
        assert (row["pinned"], row["problem"]) == (False, "")
    assert {r["kind"] for r in rows} == {"full", "delta"}
    assert exfm("list", made / "checkpoints")[1] == rows
    assert [r["name"] for r in exfm("list", made / "snapshots")[1]] == names(made, "snapshots")


def test_show_lists_the_tensors_that_the_safetensors_library_finds(exfm: Exfm, made: Path) -> None:
    folder = made / "checkpoints" / names(made)[0]
    code, found, _ = exfm("show", made / folder.name)
    assert code == 0
    opened = safe_open(str(folder / "rank-00000.safetensors"), "pt")
    expected = {}
    for key in opened.keys():  # noqa: SIM118
        part = opened.get_slice(key)
        expected[key.rsplit("@", 1)[0]] = (part.get_dtype(), part.get_shape())
    assert {n: (t["dtype"], t["shape"]) for n, t in found["tensors"].items()} == expected
    assert found["config"]["optim"]["dense"]["lr"] == 0.01 and "lr" not in found["config"]["optim"]["tables"]
    assert found["written_by"]["torch"] == torch.__version__


@pytest.mark.parametrize("file", ["rank-00000.safetensors", "index.json", "manifest.json"])
def test_verify_names_a_file_with_a_flipped_bit_and_every_commit_that_rests_on_it(exfm, job, file):
    assert exfm("verify", job, "--all")[0] == 0
    links = [c.name for c in chain(committed(job / "checkpoints")[-1], listing(Storage(job / "checkpoints")))]
    assert len(links) > 2
    path = job / "checkpoints" / links[0] / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    code, result, _ = exfm("verify", job, "--all")
    bad = {c["name"]: c["problem"] for c in result["commits"] if c["problem"]}
    assert code == 1 and set(bad) == set(links)
    assert f"{links[0]}/{file}" in bad[links[0]]
    code, result, _ = exfm("verify", job / links[-1])
    assert code == 1 and links[0] in result["commits"][0]["problem"]


def test_verify_reads_every_byte_of_a_commit_and_its_chain(exfm: Exfm, made: Path) -> None:
    links = chain(committed(made / "checkpoints")[-1], committed(made / "checkpoints"))
    sizes = sum((made / "checkpoints" / c.name / "rank-00000.safetensors").stat().st_size for c in links)
    code, result, _ = exfm("verify", made)
    assert code == 0 and result["bytes"] == sizes and result["gb_per_s"] > 0


def test_diff_finds_what_numpy_finds_in_two_chains(exfm: Exfm, made: Path) -> None:
    all_names = names(made)
    a, b = (made / "checkpoints" / n for n in (all_names[2], all_names[-1]))
    x, y = resolved(a), resolved(b)
    code, result, _ = exfm("diff", a, b)
    found = {t["name"]: t for t in result["tensors"]}
    assert code == 0 and not result["equal"]
    assert {n for n, t in found.items() if "shape" not in t} == {n for n in same(x, y) if x[n].shape == y[n].shape}
    assert any(n.startswith("tables.") for n in found)
    for name, t in found.items():
        if "shape" in t:
            assert t["shape"] == [list(x[name].shape), list(y[name].shape)]
            continue
        left, right = (np.atleast_1d(s[name].double().numpy()) for s in (x, y))
        gap = (left - right).reshape(len(left), -1)
        assert t["rows_differ"] == int((gap != 0).any(axis=1).sum())
        assert t["max_abs"] == pytest.approx(np.abs(gap).max(), rel=1e-12)
        assert t["l2"] == pytest.approx(np.linalg.norm(gap), rel=1e-12)
    assert {"position.slice", "step", "version"} <= {d["key"] for d in result["fields"]}


def write(folder: Path, state: State, cuts: dict[str, list[tuple[slice, slice]]]) -> None:
    """A full commit of 2-D tensors, cut into boxes of which every second is in another file."""
    storage = Storage(folder.parent)
    storage.make(folder.name)
    items: list[list[Item]] = [[], []]
    for name, boxes in cuts.items():
        for number, (rows, columns) in enumerate(boxes):
            box = state[name][rows, columns].contiguous()
            items[number % 2].append(Item(name, tuple(state[name].shape), (rows.start, columns.start), Memory(box)))
    files = [
        write_file(storage, folder.name, f"rank-{n:05d}.safetensors", part, Buffers(2**20), Progress())
        for n, part in enumerate(items)
    ]
    commit_folder(storage, folder.name, files, {"format": 2, "kind": "full", "base": None, "step": 1})


def test_diff_of_other_boxes_in_other_files_finds_exactly_the_rows_that_were_changed(exfm, tmp_path, monkeypatch):
    monkeypatch.setattr(view.View.parts, "__defaults__", (1000,))
    weight = torch.randn(503, 12)
    changed = weight.clone()
    changed[[7, 400]] += 0.5
    by_rows = [(slice(0, 100), slice(0, 12)), (slice(100, 503), slice(0, 12))]
    by_columns = [(slice(0, 503), slice(0, 4)), (slice(0, 503), slice(4, 8)), (slice(0, 503), slice(8, 12))]
    grid = [(r, c) for r in (slice(0, 333), slice(333, 503)) for c in (slice(0, 5), slice(5, 12))]
    for name, state, cut in (("1", weight, by_rows), ("2", weight, by_columns), ("3", changed, grid)):
        write(tmp_path / f"step=0000000{name}", {"tables.t.weight": state}, {"tables.t.weight": cut})
    code, result, _ = exfm("diff", tmp_path / "step=00000001", tmp_path / "step=00000002")
    assert code == 0 and result["equal"] and result["compared"] == 1
    _, result, _ = exfm("diff", tmp_path / "step=00000002", tmp_path / "step=00000003")
    (found,) = result["tensors"]
    assert (found["rows"], found["rows_differ"]) == (503, 2)
    assert found["l2"] == pytest.approx(np.sqrt(24) * 0.5, rel=1e-5)


def test_prune_keeps_the_newest_the_pinned_and_what_they_rest_on(exfm: Exfm, job: Path) -> None:
    every = names(job)
    inner = every[5]
    assert exfm("pin", job / inner)[0] == 0
    (job / "checkpoints/step=00000999").mkdir()  # a save in flight
    kept = {every[-1], inner}
    for name in (every[-1], inner):
        while (base := manifest(job / "checkpoints" / name)["base"]) is not None:
            name = base["name"]
            kept.add(name)
    before = resolved(newest(job))
    code, plan, _ = exfm("prune", job, "--keep", 1, "--dry-run")
    assert code == 0 and set(plan["kept"]) == kept and names(job) == every
    code, result, _ = exfm("prune", job, "--keep", 1)
    assert code == 0 and set(names(job)) == kept and set(result["removed"]) == set(every) - kept
    assert same(before, resolved(newest(job))) == []
    assert (job / "checkpoints/step=00000999").exists()
    assert exfm("unpin", job / inner)[1] == {"name": inner, "pinned": False}
    exfm("prune", job, "--keep", 1)
    assert set(names(job)) < kept and inner not in names(job)


def test_prune_leaves_a_commit_that_is_being_read_and_what_it_rests_on(exfm: Exfm, job: Path) -> None:
    storage = Storage(job / "checkpoints")
    everything = listing(storage)
    deltas = [c for c in everything[:-4] if c.kind == "delta"]
    links = [c.name for c in chain(deltas[-1], everything)]
    with reading(storage, links[-1]):
        code, result, err = exfm("prune", job, "--keep", 1)
        assert code == 0 and set(links) <= set(names(job)) and result["removed"]
        assert f"{links[-1]} is being read" in err
        assert resolved(job / "checkpoints" / links[-1])
    exfm("prune", job, "--keep", 1)
    assert links[-1] not in names(job)


def test_a_job_that_loads_a_commit_keeps_it_from_being_removed(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(made / "checkpoints")
    everything = listing(storage)
    free = []

    def look(*_: object) -> bool:
        with removing(storage, everything[-1].name) as alone:
            free.append(alone)
        return True

    monkeypatch.setattr(store, "load_from", look)
    with process_group(RankEnv(), torch.device("cpu"), 60.0):
        store.load(chain(everything[-1], everything), {})
    look()
    assert free == [False, True]


def test_a_damaged_newest_commit_does_not_count_as_one_that_is_kept(exfm: Exfm, job: Path) -> None:
    every = names(job)
    (job / "checkpoints" / every[-1] / "manifest.json").write_text("{}")
    exfm("prune", job, "--keep", 1)
    assert every[-2] in names(job)
    assert exfm("verify", job)[1]["commits"][0] | {"rests_on": 0} == {
        "name": every[-2], "kind": "delta", "rests_on": 0, "problem": ""
    }  # fmt: skip


def test_several_cleaners_at_once_leave_the_newest_whole(job: Path) -> None:
    before = resolved(newest(job))
    errors: list[BaseException] = []

    def one() -> None:
        try:
            clean(Storage(job / "checkpoints"), 1, 0, uncommitted=False)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    clean(Storage(job / "checkpoints"), 1, 0)
    assert len(names(job)) == len(chain(committed(job / "checkpoints")[-1], committed(job / "checkpoints")))
    assert same(before, resolved(newest(job))) == []


def test_compact_writes_the_chain_as_one_full_commit_and_waits_for_no_job(exfm: Exfm, job: Path) -> None:
    before = resolved(newest(job))
    with Storage(job).lock("a job"):
        code, _, err = exfm("compact", job)
        assert code == 2 and "another job (a job) is running" in err
    code, result, _ = exfm("compact", job)
    assert code == 0 and manifest(newest(job))["kind"] == "full" and newest(job).name == result["name"]
    assert same(before, read_checkpoint(newest(job))) == []
    code, _, err = exfm("compact", job)
    assert code == 2 and "is full already" in err


def exported(out: Path, table: str, form: str) -> tuple[np.ndarray, np.ndarray]:
    """(weights, Adagrad sums) of a table, from export.json and the files alone."""
    weights, sums, next_row = [], [], 0
    for file in json.loads((out / "export.json").read_text())["tables"][table]["files"]:
        assert file["rows"][0] == next_row and (out / file["path"]).stat().st_size == file["bytes"]
        next_row = file["rows"][1]
        if form == "safetensors":
            tensors = load_file(out / file["path"])
            weights.append(tensors["weight"].float().numpy()), sums.append(tensors["adagrad_sum"].numpy())
            continue
        read = pq.read_table(out / file["path"])
        assert read["row"].to_pylist() == list(range(*file["rows"]))
        weights.append(np.array(read["values"].to_pylist(), np.float32))
        sums.append(np.array(read["adagrad_sum"].to_pylist(), np.float32))
    return np.concatenate(weights), np.concatenate(sums)


@pytest.mark.parametrize("form", ["safetensors", "parquet"])
def test_an_export_of_a_chain_holds_its_tables_and_dense_part_bit_by_bit(exfm, made, tmp_path, form):
    state = resolved(newest(made))
    out = tmp_path / "out"
    code, _, err = exfm("export", made, out, "--tables", form, "--rows-per-file", 7, "--adagrad-sums")
    assert code == 0, err
    for table in ("user", "item", "viewed", "tags"):
        weights, sums = exported(out, table, form)
        assert np.array_equal(weights, state[f"tables.{table}.weight"].float().numpy())
        assert np.array_equal(sums, state[f"tables.{table}.adagrad_sum"].numpy())
    assert same(load_file(out / "dense.safetensors"), {n: t for n, t in state.items() if n.startswith("dense.")}) == []
    code, _, err = exfm("export", made, out)
    assert code == 2 and "is not empty" in err


def test_an_export_of_int8_snapshots_holds_code_times_scale_plus_bias(exfm: Exfm, made: Path, tmp_path: Path) -> None:
    last = made / "snapshots" / names(made, "snapshots")[-1]
    assert manifest(last)["base"] is not None
    code, _, err = exfm("export", made / last.name, tmp_path / "out", "--tables", "parquet")
    assert code == 0, err
    full = read_checkpoint(last.parent / manifest(last)["base"]["name"])["tables.user.int8"]
    delta = read_checkpoint(last)
    full[delta["delta.user@0,0,0.rows"]] = delta["delta.user@0,0,0.int8"]
    codes, scale, bias = (
        full[:, :8].numpy(),
        full[:, 8:12].clone().view(torch.float32),
        full[:, 12:].clone().view(torch.float32),
    )
    files = json.loads((tmp_path / "out/export.json").read_text())["tables"]["user"]["files"]
    found = np.array(pq.read_table(tmp_path / "out" / files[0]["path"])["values"].to_pylist(), np.float32)
    assert np.allclose(found, codes * scale.numpy() + bias.numpy(), rtol=1e-6, atol=1e-7)


def test_checkpoints_at_a_url_are_listed_checked_compared_and_pruned(exfm: Exfm, made: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(made / "checkpoints"), "/bucket/run/checkpoints", recursive=True)
    try:
        url = "memory://bucket/run"
        assert [r["name"] for r in exfm("list", url)[1]] == names(made)
        assert exfm("verify", url, "--all")[0] == 0
        assert exfm("diff", f"{url}/{names(made)[3]}", made / names(made)[3])[1]["equal"]
        assert exfm("prune", url, "--keep", 1)[1]["kept"] == [r["name"] for r in exfm("list", url)[1]]
        assert exfm("verify", url)[0] == 0
    finally:
        memory.rm("/bucket", recursive=True)


def test_wrong_places_and_options_are_the_users_to_mend(exfm: Exfm, made: Path, tmp_path: Path) -> None:
    for args, message in (
        (("list", tmp_path), f"{tmp_path} holds no commits"),
        (("show", made / "step=00099999"), "has no commit step=00099999"),
        (("prune", made / names(made)[0]), "prune works on a whole folder"),
        (("compact", made / names(made, "snapshots")[-1]), "only checkpoints are compacted"),
        (("export", made, tmp_path / "o", "--tables", "csv"), "--tables is 'csv'"),
        (("export", made, tmp_path / "o", "--rows-per-file", 0), "--rows-per-file is 0"),
    ):
        code, _, err = exfm(*args)
        assert code == 2 and message in err, (args, err)


def test_the_reader_in_the_documentation_reads_a_full_commit(made: Path) -> None:
    text = (Path(cli.__file__).resolve().parents[1] / "docs/checkpoints.md").read_text()
    scope: dict[str, Any] = {}
    exec(text.split("```python\n")[1].split("```")[0], scope)
    folder = made / "checkpoints" / names(made)[0]
    assert manifest(folder)["kind"] == "full"
    found, expected = scope["read"](folder), read_checkpoint(folder)
    assert len(found) > 50 and same(found, expected) == []


def test_commands_in_the_documentation_exist_with_their_options() -> None:
    text = (Path(cli.__file__).resolve().parents[1] / "docs/checkpoints.md").read_text()
    app = typer.main.get_command(cli.checkpoint_app)
    assert isinstance(app, typer.core.TyperGroup)
    lines = re.findall(r"^exfm checkpoint (.*)", text, re.M)
    told = {word for line in lines for word in line.split("PATH")[0].split(" A ")[0].replace("|", " ").split()}
    assert told == set(app.commands)
    for line in lines:
        options = {o for p in app.commands[line.split()[0]].params for o in p.opts}
        assert set(re.findall(r"--[a-z-]+", line)) <= options

"""`exfm export` against what the training loop predicts, and against tables and equations read from the checkpoint."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from exfm.data.cut import Cut, write_stream
from exfm.data.errors import UserError
from exfm.embeddings.ids import IdMap
from exfm.launch import cli, exporting
from exfm.launch.exporting import ExportFailed, export_model
from exfm.trainer.build import build_dense
from exfm.trainer.export import Lists, ServingModel
from tests.trainer.jobs import ROWS, SCHEMA, job, last_state, parsed, replaced, run, student, tables_of, teacher

ROOT = Path(__file__).parents[2]
LAST = 3  # the exported commit has trained slices 0..2; the loop's next predictions are of slice 3
RATE = 0.25
MODELS = {
    "dcnv2": {"kind": "dcnv2", "cross_layers": 2, "rank": 3, "deep_mlp": [8]},
    "dlrm": {"kind": "dlrm", "width": 4, "bottom_mlp": [8], "top_mlp": [8]},
    "wukong": {"kind": "wukong", "width": 4, "num_fmb": 2, "num_lcb": 2, "rank": 2, "fmb_mlp": [8], "final_mlp": [8]},
}
# the newest commit rests on deltas
DELTAS = {"every_examples": 64, "full_every": 100, "keep": 100, "when_busy": "wait"}
HALF = {"domains": [{"name": "odd", "column": "user", "modulo": 2, "values": [1]}], "domain": "odd"}


@dataclass
class Made:
    """A trained job, its export with fp32 rows and what the loop then predicted of the next batch, by example id."""

    raw: dict[str, Any]
    out: Path
    spec: dict[str, Any]
    predicted: dict[int, list[float]]


def quiet(*_: Any) -> None:
    pass


def made(raw: dict[str, Any], out: Path) -> Made:
    """Train to LAST, export, and train on."""
    raw = replaced(raw, stream__last=LAST, checkpoint=DELTAS)
    assert run(raw)[0] == 0
    spec = export_model(raw["run"]["folder"], out, "fp32", quiet)
    assert json.loads((Path(spec["of"]["folder"]) / "manifest.json").read_text())["kind"] == "delta"
    frozen = Path(shutil.copytree(raw["run"]["folder"], out.with_suffix(".run")))
    code, record = run(replaced(raw, stream__last=LAST + 1))
    assert code == 0
    first = list(record.logits.items())[:32]
    return Made(replaced(raw, run__folder=str(frozen)), out, spec, dict(first))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a stream whose negatives were sampled, and a teacher's log of it."""
    root = tmp_path_factory.mktemp("export")
    schema = SCHEMA.model_copy(update={"negative_rates": {"click": RATE}})
    edges = np.cumsum([0, *ROWS]).tolist()
    cuts = [Cut(edges[i], edges[i + 1], 1_000 + 100_000 * i, 1_000 + 100_000 * (i + 1)) for i in range(len(ROWS))]
    stream = write_stream(str(root / "stream"), schema, pa.concat_tables(tables_of()), cuts)
    assert run(teacher(root / "teacher", stream.root))[0] == 0
    return root


@pytest.fixture(scope="module", params=[*MODELS])
def served(root: Path, request: pytest.FixtureRequest) -> Made:
    """A student of every kind, with distillation heads and adapter."""
    kind = request.param
    over = {f"stream__{k}": v for k, v in HALF.items()} if kind == "dlrm" else {}
    raw = student(root / kind, root / "stream", root / "teacher/supervision/fm", "student_adapter", **over)
    return made(replaced(raw, model=MODELS[kind]), root / f"{kind}-out")


@pytest.fixture(scope="module")
def rich(root: Path) -> Made:
    """A job that uses everything tables know: shared, mean, weighted, fp16, lists, hashes."""
    return made(job(root / "rich", root / "stream", tables__viewed__dtype="fp16"), root / "rich-out")


@pytest.fixture
def exfm(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Any]]:
    """Run `exfm export ARGS`; (exit code, stdout, stderr)."""

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["exfm", "export", *map(str, args)])
        monkeypatch.setattr(cli, "console", Console(stderr=True, width=10_000))
        capfd.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capfd.readouterr()

    yield call


def assert_as_trained(m: Made) -> None:
    rows = tables_of()[LAST]
    rows = rows.filter(pa.array(np.isin(rows.column("example_id").to_numpy(), list(m.predicted))))
    assert rows.num_rows == 32 and rows.column("example_id").to_pylist() == list(m.predicted)
    logits = ServingModel(m.out).logits_of(rows)
    assert torch.equal(logits, torch.tensor(list(m.predicted.values())))
    assert m.spec["check"]["bitwise_equal"] and m.spec["check"]["largest_difference"] == 0


def reference(raw: dict[str, Any], rows: pa.Table, change: Callable[[Tensor], Tensor] = lambda t: t) -> Tensor:
    """Logits [b, t] from the newest checkpoint's tensors, example by example. change: of a table's rows."""
    config = parsed(raw)
    state = last_full_state(raw)
    model = build_dense(config, torch.device("cpu"))[0]
    model.load_state_dict(
        {k.removeprefix("dense.served."): v for k, v in state.items() if k.startswith("dense.served.")}
    )
    pooled = []
    for f in config.features.sparse:
        table = change(state[f"tables.{f.table}.weight"].float())
        of_feature, mean = IdMap(f, config.tables[f.table]), config.tables[f.table].pooling == "mean"
        for ids, weights in zip(rows.column(f.source).to_pylist(), rows.column("tag_weights").to_pylist(), strict=True):
            raw_ids = np.array(ids if isinstance(ids, list) else [] if ids is None else [ids], np.int64)
            found = table[of_feature(raw_ids, np.array([len(raw_ids)]), np.zeros(1, np.int64))]
            found = found * torch.tensor(weights)[:, None] if f.weighted else found
            pooled.append(found.sum(0) / max(len(raw_ids), 1) if mean else found.sum(0))
    b = rows.num_rows
    by_feature = [torch.stack(pooled[i * b : (i + 1) * b]) for i in range(len(config.features.sparse))]
    dense = [torch.from_numpy(np.nan_to_num(rows.column(d.name).to_numpy())) for d in config.features.dense]
    dense = [x.sign() * x.abs().log1p() if d.log1p else x for d, x in zip(config.features.dense, dense, strict=True)]
    with torch.no_grad():
        return model(torch.stack(dense, 1), torch.cat(by_feature, 1))[0]


def last_full_state(raw: dict[str, Any]) -> dict[str, Tensor]:
    """The newest commit's tensors, compacted into a full one first by the chain's own tool."""
    from exfm.launch.checkpoints import merge, place

    newest = sorted((Path(raw["run"]["folder"]) / "checkpoints").iterdir())[-1]
    if json.loads((newest / "manifest.json").read_text())["kind"] != "full":
        merge(place(raw["run"]["folder"]))
    return last_state(raw)


def dequantised(table: Tensor) -> Tensor:
    return torch.ops.fbgemm.Fused8BitRowwiseQuantizedToFloat(torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(table))


CHANGES = {"fp32": lambda t: t, "fp16": lambda t: t.half().float(), "int8": dequantised}


def test_an_exported_student_gives_the_logits_that_its_training_loop_gives_next_to_the_last_bit(served):
    assert_as_trained(served)


def test_shared_mean_weighted_and_fp16_tables_give_the_training_loops_logits_to_the_last_bit(rich):
    assert_as_trained(rich)


def test_no_distillation_head_adapter_or_optimiser_state_is_in_the_export(served):
    state = last_full_state(served.raw)
    files = {p.name: p.read_bytes() for p in served.out.rglob("*") if p.is_file()}
    everything = b"".join(files.values())
    exported = torch.export.load(served.out / "dense.pt2").state_dict
    assert {f"dense.served.{k}" for k in exported} == {k for k in state if k.startswith("dense.served.")}
    assert any(k.startswith("dense.heads") for k in state) and any(k.startswith("dense.adapter") for k in state)
    for name, tensor in state.items():
        content = tensor.numpy().tobytes()
        if len(content) < 12:  # may be anywhere by chance
            continue
        wanted = name.startswith("dense.served.") or (name.endswith(".weight") and name.startswith("tables."))
        assert (content in everything) == wanted, name
    for word in (b"adapter", b"by_teacher", b"adagrad", b"supervision", str(ROOT).encode()):
        assert word not in everything, word


@pytest.mark.parametrize("rows", ["fp32", "fp16", "int8"])
def test_rows_of_every_type_give_the_logits_of_such_rows_of_the_checkpoint(rich, rows, tmp_path):
    spec = export_model(rich.raw["run"]["folder"], tmp_path / "out", rows, quiet)
    batch = tables_of()[LAST]
    model = ServingModel(tmp_path / "out")
    expected = reference(rich.raw, batch, CHANGES[rows])
    torch.testing.assert_close(model.logits_of(batch), expected, rtol=0, atol=2e-6)
    # the loss of the type is there, stated and within what is stated
    plain = reference(rich.raw, tables_of()[LAST - 1])
    loss = (reference(rich.raw, tables_of()[LAST - 1], CHANGES[rows]) - plain).abs().max()
    check = spec["check"]
    assert check["largest_difference"] == pytest.approx(float(loss), abs=4e-6)
    assert check["largest_difference"] <= check["tolerance"] and check["bitwise_equal"] == (rows == "fp32")
    assert check["slice"] == LAST - 1 and check["examples"] == ROWS[LAST - 1]
    width = {"fp32": 4 * 8, "fp16": 2 * 8, "int8": 8 + 8}[rows]
    weight = load_file(tmp_path / "out/tables/user.safetensors")["weight"]
    assert weight.shape[1] * weight.element_size() == width
    assert load_file(tmp_path / "out/tables/viewed.safetensors")["weight"].shape[1] == 4 + 8 * (rows == "int8")


def test_the_checks_ne_is_that_of_the_sampled_world_and_served_logits_are_of_the_true_one(rich):
    rows = tables_of()[LAST - 1]
    label, weight = rows.column("click").to_numpy(), rows.column("importance").to_numpy().astype(np.float64)
    logit = reference(rich.raw, rows)[:, 0].double().numpy() - math.log(RATE)
    rate = (label * weight).sum() / weight.sum()
    loss = ((np.logaddexp(0, logit) - label * logit) * weight).sum() / weight.sum()
    ne = loss / -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
    assert rich.spec["check"]["ne"]["click"]["exported"] == pytest.approx(ne, rel=1e-5)
    assert rich.spec["calibration"] == {
        "logits": "true",
        "negative_rates": {"click": RATE, "buy": 1.0},
        "offsets_in_training": {"click": -math.log(RATE), "buy": 0.0},
    }


def test_the_program_takes_any_number_of_examples_and_examples_without_any_id(rich):
    model, rows = ServingModel(rich.out), tables_of()[LAST]
    bare = rows.slice(0, 1).to_pydict() | {c: [None] for c in ("item", "recent", "viewed", "tags", "tag_weights")}
    bare = pa.table(bare, schema=rows.schema)
    empty = (
        rows.slice(0, 1).to_pydict() | {"item": [None]} | {c: [[]] for c in ("recent", "viewed", "tags", "tag_weights")}
    )
    expected = reference(rich.raw, pa.table(empty, schema=rows.schema))
    torch.testing.assert_close(model.logits_of(bare), expected, rtol=0, atol=2e-6)
    assert model.logits_of(rows.slice(0, 0)).shape == (0, 2)
    big = pa.concat_tables([rows] * 30)
    torch.testing.assert_close(model.logits_of(big)[:150], model.logits_of(rows), rtol=0, atol=2e-6)


def test_lists_given_by_hand_and_arrow_rows_mean_the_same(rich):
    model = ServingModel(rich.out)
    rows = tables_of()[LAST].slice(3, 2)
    ids = {}
    for f in model.spec.features:
        values = rows.column(f.column).to_pylist()
        lists = [v if isinstance(v, list) else [] if v is None else [v] for v in values]
        weights = np.array([w for ws in rows.column("tag_weights").to_pylist() for w in ws], np.float32)
        flat = np.array([v for vs in lists for v in vs], np.int64)
        ids[f.name] = Lists(flat, np.array([len(v) for v in lists]), weights if f.weights else None)
    dense = np.array([rows.column(c).to_numpy() for c in ("price", "age_s")]).T
    assert torch.equal(model.logits(dense, ids), model.logits_of(rows))
    with pytest.raises(UserError, match=r"feature 'user': id 20 is outside the identity table 'user' of 20 rows"):
        model.logits(dense, ids | {"user": Lists(np.array([3, 20]), np.array([1, 1]))})
    with pytest.raises(UserError, match="lack column\\(s\\) item, tags"):
        model.logits_of(rows.drop_columns(["item", "tags"]))


def test_it_serves_without_torchrec_and_fbgemm(rich, tmp_path):
    rows = tables_of()[LAST].slice(0, 32)
    with pa.OSFile(str(tmp_path / "rows"), "wb") as f, pa.ipc.new_file(f, rows.schema) as writer:
        writer.write_table(rows)
    program = (
        "import sys; sys.modules['torchrec'] = sys.modules['fbgemm_gpu'] = None\n"
        "import pyarrow as pa; from exfm.trainer.export import ServingModel\n"
        f"rows = pa.ipc.open_file({str(tmp_path / 'rows')!r}).read_all()\n"
        f"print(ServingModel({str(rich.out)!r}).logits_of(rows).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout) == list(rich.predicted.values())


@pytest.mark.parametrize("path", ["tables/item.safetensors", "dense.pt2"])
def test_a_changed_or_missing_file_is_noticed_before_it_is_used(rich, path, tmp_path):
    folder = Path(shutil.copytree(rich.out, tmp_path / "out"))
    content = bytearray((folder / path).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / path).write_bytes(content)
    with pytest.raises(UserError, match=f"{path} differs from its checksum"):
        ServingModel(folder)
    (folder / path).unlink()
    with pytest.raises(UserError, match=f"{path} cannot be read"):
        ServingModel(folder)
    (folder / "serving.json").unlink()
    with pytest.raises(UserError, match=r"has no serving\.json"):
        ServingModel(folder)


def test_an_export_that_differs_from_the_trained_model_fails_and_leaves_no_serving_json(
    rich, exfm, tmp_path, monkeypatch
):
    monkeypatch.setattr(exporting, "_converted", lambda part, stored, name: part.float() + 0.001 * (name == "tags"))
    code, out, err = exfm(rich.raw["run"]["folder"], "--out", tmp_path / "out")
    assert code == 1 and out == "" and "logits differ by up to 0.00" in err
    assert (tmp_path / "out/dense.pt2").exists() and not (tmp_path / "out/serving.json").exists()


def test_values_that_a_row_type_cannot_hold_are_refused_by_table():
    fine = torch.tensor([[1e30, 1.0]])
    assert torch.equal(exporting._converted(fine, "fp32", "item"), fine)
    with pytest.raises(ExportFailed, match="table 'item' has values that are not finite as fp16"):
        exporting._converted(fine, "fp16", "item")
    with pytest.raises(ExportFailed, match="table 'item' has values that are not finite as int8"):
        exporting._converted(torch.tensor([[float("nan"), 1.0]]), "int8", "item")


def test_a_config_means_its_run_and_says_where_its_stream_is_now(rich, exfm, root, tmp_path):
    moved = Path(shutil.copytree(root / "stream", tmp_path / "elsewhere"))
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(replaced(rich.raw, stream__path=str(moved))))
    code, out, err = exfm(tmp_path / "job.yaml", "--out", tmp_path / "out")
    assert code == 0 and "bitwise equal to the trained model's" in out, err
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(replaced(rich.raw, heads__hidden=[7])))
    code, _, err = exfm(tmp_path / "job.yaml", "--out", tmp_path / "other")
    assert code == 2 and "heads.hidden" in err


def test_wrong_input_is_named_with_exit_code_2(rich, exfm, tmp_path):
    run_folder = rich.raw["run"]["folder"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    cases = [
        ((tmp_path / "empty", "--out", tmp_path / "a"), "holds no commits"),
        ((run_folder, "--out", tmp_path / "b", "--rows", "int4"), "--rows is 'int4'; use fp32, fp16, int8"),
        ((run_folder, "--out", tmp_path / "full"), "is not an empty folder"),
        ((f"{run_folder}/step=99999999", "--out", tmp_path / "c"), "has no commit step=99999999"),
    ]
    for args, word in cases:
        code, _, err = exfm(*args)
        assert code == 2 and word in err, (args, err)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "full"]


def test_json_says_what_is_in_serving_json(rich, exfm, tmp_path):
    code, out, _ = exfm(rich.raw["run"]["folder"], "--out", tmp_path / "out", "--rows", "int8", "--json")
    assert code == 0 and json.loads(out) == json.loads((tmp_path / "out/serving.json").read_text())

"""The streams of `exfm bench distill`: MovieLens-1M, RentTheRunway and Open Bandit, each with a teacher and a student."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from benchmarks._distill_runs import Raw, Study, say
from exfm.data.errors import UserError
from exfm.data.manifest import open_stream
from exfm.data.parquet import prepare_parquet
from exfm.data.schema import Schema, SparseColumn
from exfm.launch.demo import CONFIGS, find_source, make_stream

MOVIELENS_DOMAINS = {f"d{k}": {"column": "user_id", "modulo": 10, "values": [k]} for k in (1, 3, 5, 7, 9)}
# what its reviewers rented for, by the position in the publisher's sorted values
OCCASIONS = {"everyday": 2, "formal-affair": 3, "party": 5, "wedding": 8, "work": 9}
CAMPAIGNS = {"everyone": 0, "men": 1, "women": 2}
RENT_SPARSE = ("user_idx", "item_idx", "category", "size", "rented_for", "body_type", "bust_size")
BANDIT_SPARSE = ("item_id", "campaign", "position", "user_feature_0", "user_feature_1", "user_feature_2", "user_feature_3", "item_feature_1", "item_feature_2", "item_feature_3")  # fmt: skip
RENT = Schema(
    name="renttherunway",
    user="user_idx",
    labels=("label",),
    dense=("age", "height_in", "weight_lbs"),
    sparse=tuple(SparseColumn(name=n) for n in RENT_SPARSE),
)
BANDIT = Schema(
    name="obd",
    labels=("label",),
    dense=("item_feature_0", "affinity_this_item"),
    sparse=(*(SparseColumn(name=n) for n in BANDIT_SPARSE), SparseColumn(name="affinity_items", list=True)),
)


def movielens(out: Path, data_dir: str | None) -> Study:
    """MovieLens-1M, 50 slices; domains: tenths of the users."""
    stream = out / "movielens" / "stream"
    source = find_source("ml1m" if not data_dir else None, data_dir, out, say, _told)
    make_stream(source, stream, _told)
    return Study(
        "movielens", "MovieLens-1M", stream, _config("movielens_teacher"), _config("movielens_student"),
        MOVIELENS_DOMAINS, {d: f"user_id % 10 == {d[1:]}" for d in MOVIELENS_DOMAINS}, "d7", ("d1", "d3", "d5", "d9"),
    )  # fmt: skip


def renttherunway(out: Path, data_dir: str | None) -> Study:
    """RentTheRunway, 30 slices; domains: what a garment was rented for."""
    stream = out / "renttherunway" / "stream"
    _prepare(data_dir, "renttherunway", RENT, stream, 30)
    domains: dict[str, Raw] = {n: {"column": "rented_for", "values": [v]} for n, v in OCCASIONS.items()}
    return Study(
        "renttherunway", "RentTheRunway", stream, _config("renttherunway_teacher"), _config("renttherunway_student"),
        domains, {d: f"rented for: {d.replace('-', ' ')}" for d in domains}, "everyday",
        ("wedding", "formal-affair", "party", "work"),
    )  # fmt: skip


def open_bandit(out: Path, data_dir: str | None) -> Study:
    """Open Bandit, 10 slices; domains: campaigns. 287 clicks: it shows that the loop runs, and nothing else."""
    stream = out / "open_bandit" / "stream"
    _prepare(data_dir, "obd_small", BANDIT, stream, 10)
    domains: dict[str, Raw] = {n: {"column": "campaign", "values": [v]} for n, v in CAMPAIGNS.items()}
    teacher = _smoke_config((*BANDIT_SPARSE, "affinity_items"), list(BANDIT.dense), 16, 1024)
    teacher["distillation"] = {"publish": {"teacher": "teacher"}}
    student = _smoke_config(("item_id", "position", "user_feature_0", "user_feature_1"), [], 4, 256)
    named = {d: f"campaign {d}" for d in domains}
    return Study("open_bandit", "Open Bandit", stream, teacher, student, domains, named, "everyone", ("men", "women"))


def _smoke_config(sparse: tuple[str, ...], dense: list[str], width: int, batch: int) -> Raw:
    return {
        "run": {"name": "smoke", "folder": ""},
        "stream": {"path": "", "global_batch": batch},
        "features": {"dense": dense, "sparse": [{"name": n, "table": n, "ids": "hash"} for n in sparse]},
        "tables": {n: {"rows": 500, "width": width} for n in sparse},
        "model": {"kind": "dlrm", "width": width, "bottom_mlp": [16], "top_mlp": [32]},
        "heads": {"tasks": ["label"]},
        "optim": {"dense": {"lr": 0.001}, "tables": {"lr": 0.05}},
        "sharding": {"allowed": ["data_parallel"]},
    }


def _config(name: str) -> Raw:
    raw: Raw = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    return raw


def _prepare(data_dir: str | None, name: str, schema: Schema, stream: Path, num_slices: int) -> None:
    """Convert <data_dir>/<name>/events.parquet, in order of time, unless it is done. UserError where it is not there."""
    if (stream / "stream.json").exists() and open_stream(str(stream)).info.num_slices:
        return
    source = Path(data_dir or "") / name / "events.parquet"
    if not data_dir or not source.exists():
        raise UserError(f"{source} does not exist; set EXFM_DATA_DIR to a folder with {name}, or leave its part out")
    if any(stream.glob("slice=*")):  # an interrupted preparation, of use to nobody
        shutil.rmtree(stream)
    prepare_parquet(source, schema, str(stream), num_slices=num_slices, drop_extra=True, progress=_told)


def _told(message: str, done: int, total: int) -> None:
    if done >= total:
        say(message)


STREAMS: dict[str, Callable[[Path, str | None], Any]] = {
    "movielens": movielens, "renttherunway": renttherunway, "open_bandit": open_bandit,
}  # fmt: skip

"""A label that only a teacher which has already learned the example could know reaches no student.

Every example has a coin as its label and a receipt, an id of its own, which the teacher looks up: whoever has trained on the
example knows the coin, nobody else can. Examples come in pairs with one coin. Of the first of a pair the student has no label,
only the teacher's word; of the second it has, and is measured on it. Pair numbers are the student's only feature.
"""

from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from exfm.data.cut import Cut, write_stream
from exfm.data.errors import UserError
from exfm.data.manifest import Stream, open_stream
from exfm.data.schema import Schema, SparseColumn
from exfm.distillation.supervision import SupervisionLog, identity_of
from exfm.distillation.version import Origin, Versions
from exfm.trainer import commits
from exfm.trainer.config import parse_config
from exfm.trainer.run import run_scorer
from exfm.trainer.score_config import ScoreConfig
from tests.trainer.jobs import Raw, here, job, run

SLICES, PAIRS = 4, 400  # pairs of a slice
ROWS = SLICES * 2 * PAIRS
SCHEMA = Schema(
    name="coins",
    user="pair",
    labels=("coin", "late_coin"),
    dense=(),
    sparse=(SparseColumn(name="receipt"), SparseColumn(name="pair")),
)
METHODS = ["single_head", "auxiliary_head", "student_adapter"]
SURE = 3.29  # standard errors of a two-sided 99.9% interval


class Coins(NamedTuple):
    """The stream; every example's coin; which examples are the second of their pair."""

    stream: Stream
    coin: np.ndarray
    second: np.ndarray


@pytest.fixture(scope="module")
def coins(tmp_path_factory) -> Coins:
    """In a slice come the first examples of all its pairs, then the second ones."""
    rows = np.arange(ROWS)
    pair, second = rows // (2 * PAIRS) * PAIRS + rows % PAIRS, rows % (2 * PAIRS) >= PAIRS
    coin = np.random.default_rng(0).integers(0, 2, SLICES * PAIRS).astype(np.float32)[pair]
    columns = {
        "example_id": rows, "timestamp": 1_000 + rows, "receipt": rows, "pair": pair, "coin": coin,
        "late_coin": pa.array(coin, mask=~second),
    }  # fmt: skip
    types = SCHEMA.feature_types() | SCHEMA.label_types()
    table = pa.table({name: pa.array(columns[name], type=kind) for name, kind in types.items()})
    edges = range(0, ROWS + 1, 2 * PAIRS)
    cuts = [Cut(a, a + 2 * PAIRS, 1_000 + a, 1_000 + a + 2 * PAIRS) for a in edges[:-1]]
    return Coins(write_stream(str(tmp_path_factory.mktemp("coins") / "stream"), SCHEMA, table, cuts), coin, second)


def coin_job(folder: Path, stream: Stream, feature: str, task: str, rows: int, **over: object) -> Raw:
    """A job that looks up one id of every example in a table with a row for each."""
    sections: Raw = {
        "features": {"sparse": [{"name": feature, "table": feature, "ids": "identity"}]},
        "tables": {feature: {"rows": rows, "width": 8, "init": 0.001}},
        "model": {"kind": "dcnv2", "cross_layers": 1, "rank": 2, "deep_mlp": [8]},
        "heads": {"tasks": [task], "hidden": []},
        "optim": {"dense": {"lr": 0.02}, "tables": {"lr": 1.0}},
    }
    return job(folder, stream.root, stream__global_batch=50, evaluation__bootstrap=0, **(sections | over))


def run_teacher(folder: Path, stream: Stream, **checkpoint: object) -> Raw:
    over = {"run__name": "teacher", "distillation": {"publish": {"teacher": "fm"}}}
    raw = coin_job(folder, stream, "receipt", "coin", ROWS, checkpoint=checkpoint, **over)
    run(raw)
    return raw


@pytest.fixture(scope="module")
def honest(coins, tmp_path_factory) -> Raw:
    """A teacher that published its forward pass, and snapshots."""
    folder = tmp_path_factory.mktemp("coins") / "honest"
    return run_teacher(folder, coins.stream, every_slices=1, keep=9, snapshots={"keep": 9})


@pytest.fixture(scope="module")
def logs(coins, honest, tmp_path_factory) -> dict[str, Path]:
    """By name the logs of an honest teacher in both modes, and of a cheat: the same teacher, going over the stream again,
    that does not say where its weights come from."""
    folder = tmp_path_factory.mktemp("coins")
    own = {"name": "scorer", "folder": str(folder / "scorer"), "device": "cpu", "log_every_s": 1000.0}
    score = {"run": own, "score": {"teacher": honest["run"]["folder"], "global_batch": 400, "prefetch": 0}}
    run_scorer(parse_config(score, "test", ScoreConfig), here())
    start = {"path": str(Path(honest["run"]["folder"]) / "checkpoints")}
    with patch.multiple(commits, check_beginning=lambda *_: None, origin_of=lambda _: Origin()):
        run_teacher(folder / "cheat", coins.stream, every_slices=100, warm_start=start)
    return {
        "forward": Path(honest["run"]["folder"]) / "supervision/fm",
        "snapshot": folder / "scorer/supervision/teacher",
        "cheat": folder / "cheat/supervision/fm",
    }


def logits_of(log: Path) -> np.ndarray:
    """Logits of all examples; NaN where a slice was not scored."""
    found = np.full(ROWS, np.nan)
    for folder in log.glob("slice=*"):
        rows = pq.read_table(next(folder.glob("part-*.parquet"))).column(0).to_numpy()
        found[int(folder.name[6:]) * 2 * PAIRS :][: len(rows)] = rows
    return found


def auc(logits: np.ndarray, coin: np.ndarray) -> tuple[float, float]:
    """Area under the ROC curve, and the standard error that it would have without any information."""
    below = np.sort(logits[coin == 0])
    positives = logits[coin == 1]
    ranks = np.searchsorted(below, positives, "left") + np.searchsorted(below, positives, "right")
    error = np.sqrt((len(logits) + 1) / (12 * len(below) * len(positives)))
    return float(ranks.mean() / 2 / len(below)), float(error)


def losses(coins: Coins, folder: Path, learn: Raw | None) -> np.ndarray:
    """Log loss of a student on every second example, before it learned it."""
    distillation = {} if learn is None else {"learn": learn}
    raw = coin_job(folder, coins.stream, "pair", "late_coin", SLICES * PAIRS, distillation=distillation)
    seen = run(raw)[1].logits
    logits = np.array([seen[i][0] for i in range(ROWS)])[coins.second]
    return np.logaddexp(0, logits) - coins.coin[coins.second] * logits


@pytest.fixture(scope="module")
def undistilled(coins, tmp_path_factory) -> np.ndarray:
    return losses(coins, tmp_path_factory.mktemp("coins") / "twin", None)


def gain(coins: Coins, undistilled: np.ndarray, folder: Path, log: Path, method: str) -> tuple[float, float]:
    """What a student's mean loss is below its undistilled twin's, and the standard error of that."""
    teacher = {"name": "fm", "logs": [{"path": str(log)}], "tasks": {"late_coin": "coin"}}
    learn = {"teachers": [teacher], "method": method, "on_missing": "label_only", "loss_weight": 3.0, "wait_s": 0.0}
    difference = undistilled - losses(coins, folder, learn)
    return float(difference.mean()), float(difference.std() / len(difference) ** 0.5)


@pytest.mark.parametrize("mode", ["forward", "snapshot"])
def test_what_a_teacher_logs_says_nothing_of_labels_it_has_not_learned(mode, coins, logs):
    logits = logits_of(logs[mode])
    scored = np.isfinite(logits)
    assert scored.sum() == ROWS - (2 * PAIRS if mode == "snapshot" else 0)
    found, error = auc(logits[scored], coins.coin[scored])
    assert abs(found - 0.5) < SURE * error < 0.05


def test_a_teacher_that_has_learned_them_would_give_them_away(coins, logs):
    """The control: the same teacher after it has trained on the examples. Without it the test above could not fail."""
    assert auc(logits_of(logs["cheat"]), coins.coin)[0] > 0.95


@pytest.mark.parametrize("mode", ["forward", "snapshot"])
@pytest.mark.parametrize("method", METHODS)
def test_a_student_gains_nothing(method, mode, coins, undistilled, logs, tmp_path):
    found, error = gain(coins, undistilled, tmp_path, logs[mode], method)
    assert found < SURE * error < 0.05


@pytest.mark.parametrize("method", METHODS)
def test_with_a_cheat_for_a_teacher_it_would_gain(method, coins, undistilled, logs, tmp_path):
    found, error = gain(coins, undistilled, tmp_path, logs["cheat"], method)
    assert found > 0.1 > SURE * error


def test_a_cheat_that_says_what_it_had_learned_is_refused(coins, logs, tmp_path):
    """Its log as it would be if it told the truth: watermark and version of a teacher that has seen the whole stream."""
    log, stream = SupervisionLog(str(logs["cheat"])), open_stream(coins.stream.root)
    manifest = log.manifest(1)
    assert manifest is not None
    version = Versions(stream, identity_of(manifest)).after(SLICES - 1)
    for extra, message in (
        ({"watermark": SLICES - 1, "scored_by": version}, "had already trained on slice 3"),
        ({"scored_by": version}, "does not follow from slices 0 to 0"),
    ):
        told = manifest.model_copy(update={"extra": manifest.extra | extra})
        with pytest.raises(UserError, match=message):
            log.check(stream, told)

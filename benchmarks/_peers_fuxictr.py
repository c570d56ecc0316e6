"""FuxiCTR's WuKong on the same examples, trained by FuxiCTR's own `fit` from its own loader.

Its package holds the training loop and the layers; the model itself is in model_zoo of its repository, of which a checkout is needed.
n_F x d and n_L x d become fmb_dim and compression_dim. Its compressions are linear layers over all n x d columns, and its layer's output
is mapped back to the n x d columns of the input: more multiplications than the paper's.
"""

import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from benchmarks._peers_data import BATCH, EPOCHS, MODELS, Held
from exfm.data.errors import UserError

MODEL_FILE = Path("model_zoo/WuKong/src/WuKong.py")


def check(checkout: Path | None) -> Path:
    """The file of the model. UserError where the package or the checkout is missing."""
    if importlib.util.find_spec("fuxictr") is None:
        raise UserError(
            "peer 'fuxictr' is not installed; pip install -e '.[peers]' (or: pip install fuxictr), or leave it out of --peers"
        )
    if checkout is None or not (checkout / MODEL_FILE).is_file():
        raise UserError(
            f"peer 'fuxictr' needs --fuxictr FOLDER with {MODEL_FILE}, which its package lacks (here: {checkout}); git clone "
            "https://github.com/reczoo/FuxiCTR, or leave it out of --peers"
        )
    return checkout / MODEL_FILE


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuxictr_wukong", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def write_npz(path: Path, names: list[str], batches: list[Held]) -> None:
    """Ids from 1 on, as FuxiCTR counts them."""
    rows = np.concatenate([b.rows.numpy() for b in batches]) + 1
    labels = np.concatenate([b.labels.numpy() for b in batches])
    np.savez(path, label=labels, **{name: rows[:, i] for i, name in enumerate(names)})


def run(
    checkout: Path,
    folder: Path,
    names: list[str],
    sizes: list[int],
    train: list[Held],
    test: list[Held],
    lr: float,
    seed: int,
) -> dict[str, Any]:
    """Marks (wall s, CPU s, examples) around every step, evaluation taken out; AUC of `test` after the last epoch."""
    module = _load(check(checkout))
    from fuxictr.features import FeatureMap
    from fuxictr.pytorch.dataloaders.npz_dataloader import NpzDataLoader
    from fuxictr.pytorch.torch_utils import seed_everything

    folder.mkdir(parents=True, exist_ok=True)
    write_npz(folder / "train.npz", names, train)
    write_npz(folder / "test.npz", names, test or train[:1])
    features = FeatureMap("peers", str(folder))
    for name, size in zip(names, sizes, strict=True):
        features.features[name] = {"source": "", "type": "categorical", "vocab_size": size + 1}
    features.labels, features.default_emb_dim = ["label"], MODELS["small"]["width"]
    features.num_fields, features.total_features = len(names), sum(sizes) + len(names)
    features.set_column_index()
    seed_everything(2024 + seed)
    columns = MODELS["small"]["num_fmb"] * MODELS["small"]["width"]
    model = module.WuKong(
        features, gpu=-1, learning_rate=lr, embedding_dim=MODELS["small"]["width"], num_layers=MODELS["small"]["layers"], compression_dim=columns,
        mlp_hidden_units=list(MODELS["small"]["final_mlp"]), fmb_units=list(MODELS["small"]["fmb_mlp"]), fmb_dim=columns, project_dim=MODELS["small"]["rank"],
        dropout_rate=0.0, optimizer="adam", loss="binary_crossentropy", task="binary_classification", metrics=["AUC"],
        model_root=str(folder), verbose=0, monitor="AUC", early_stop_patience=EPOCHS + 1, save_best_only=False,
        reduce_lr_on_plateau=False,
    )  # fmt: skip
    (folder / "peers").mkdir(exist_ok=True)
    marks, away, step = [], [0.0, 0.0], model.train_step

    def timed(batch: Any) -> Any:
        loss = step(batch)
        done = (marks[-1][2] if marks else 0) + len(batch["label"])
        marks.append((time.perf_counter() - away[0], time.process_time() - away[1], done))
        return loss

    def evaluated() -> None:
        begun = time.perf_counter(), time.process_time()
        type(model).eval_step(model)
        away[0] += time.perf_counter() - begun[0]
        away[1] += time.process_time() - begun[1]

    model.train_step, model.eval_step = timed, evaluated
    loader = NpzDataLoader(features, str(folder / "train.npz"), batch_size=BATCH, shuffle=True)
    scored = NpzDataLoader(features, str(folder / "test.npz"), batch_size=BATCH)
    model.fit(loader, epochs=EPOCHS if test else 1, validation_data=scored)
    found = {"marks": marks, "parameters": sum(p.numel() for p in model.parameters())}
    return found | ({"auc": float(model.evaluate(scored, metrics=["AUC"])["AUC"])} if test else {})

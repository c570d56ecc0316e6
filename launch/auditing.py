"""`exfm data audit RUN`: compare a run's ledger with the data."""

from pathlib import Path
from typing import Any

from exfm.checkpoints.commits import committed
from exfm.data.commit import open_folder
from exfm.data.errors import UserError
from exfm.data.manifest import open_stream
from exfm.data.reader import SliceReader, open_slice, slices_of
from exfm.trainer.columns import batch_columns
from exfm.trainer.config import JobConfig, load_config
from exfm.trainer.ledger import audit, read_ledger


def audit_run(run: Path) -> dict[str, Any]:
    """Audit what the run's newest commit has learned. UserError names the first example skipped, repeated or exchanged."""
    if not (run / "config.yaml").exists():
        raise UserError(f"{run} has no config.yaml; give the folder of a run")
    config = load_config(run / "config.yaml", [], JobConfig)
    found = committed(config.checkpoint.folder or run / "checkpoints")
    if not found:
        raise UserError(f"{run} has no committed checkpoint yet; nothing to audit")
    stream = open_stream(config.stream.path, config.stream.labels)
    columns = batch_columns(config, stream)
    fs, root = open_folder(run)
    entries = read_ledger(fs, f"{root}/ledger.parquet")[: found[-1].manifest["ledger_entries"]]

    def open_reader(index: int) -> SliceReader:
        return open_slice(stream, config.stream, columns, index, config.run.seed)

    return audit(entries, slices_of(stream, config.stream), open_reader)

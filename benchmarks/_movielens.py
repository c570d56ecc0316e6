"""The MovieLens stream that benchmarks run on where no other is given."""

from pathlib import Path

from exfm.data.errors import UserError
from exfm.data.movielens import prepare


def movielens(out: Path, data_dir: str | None, name: str, instead: str = "") -> Path:
    """The stream under `out`, prepared where it is not there yet. name: the benchmark's; instead: what it would take in its place.

    UserError where it would have to be prepared and there is no data_dir.
    """
    if data_dir is None:
        raise UserError(f"exfm bench {name} needs {instead}MovieLens-1M: set EXFM_DATA_DIR to a folder that has ml1m")
    if not (out / "ml1m/stream.json").exists():
        prepare(Path(data_dir) / "ml1m/events.parquet", str(out / "ml1m"))
    return out / "ml1m"

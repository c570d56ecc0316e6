"""Supervision logs made by hand, with known logits and a watermark of one's choice."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from exfm.data.manifest import Stream, slice_folder
from exfm.distillation.supervision import SupervisionLog, write_supervision_part
from exfm.distillation.version import Identity, Versions


def hand_log(
    folder: Path,
    stream: Stream,
    logits: Callable[[pa.Table], np.ndarray],
    slices: Iterable[int],
    tasks: tuple[str, ...] = ("click", "buy"),
    staleness: int = 0,
    at: float = 0.0,
) -> str:
    """A snapshot scorer's log that is so many slices stale. logits: features of a part -> [rows] or [rows, tasks]."""
    log = SupervisionLog(str(folder))
    who = Identity(folder.name, "by hand", tasks, 0)
    versions = Versions(stream, who)
    for index in slices:
        features = stream.manifest(index, "features")
        assert features is not None
        parts = []
        for part in features.parts:
            values = logits(pq.read_table(f"{slice_folder(stream.root, index)}/features/{part.path}"))
            values = np.broadcast_to(values.reshape(part.rows, -1), (part.rows, len(tasks))).astype(np.float32)
            parts.append(write_supervision_part(log.fs, log.folder(index), part, tasks, values))
        watermark = index - 1 - staleness
        log.commit(features, tuple(parts), who, "snapshot", versions.after(watermark), watermark, at)
    return str(folder)

"""Where the data sets are, for the tests of exfm.data."""

import os
from pathlib import Path

import pytest


@pytest.fixture
def ml1m_source() -> Path:
    """events.parquet of MovieLens-1M; without it the test is skipped, or fails where the data sets are required."""
    root = os.environ.get("EXFM_DATA_DIR")
    path = Path(root or "") / "ml1m" / "events.parquet"
    if root is None or not path.exists():
        message = f"EXFM_DATA_DIR is {root}; it must name a folder with ml1m/events.parquet"
        if os.environ.get("EXFM_REQUIRE_DATA"):
            pytest.fail(message)
        pytest.skip(message)
    return path

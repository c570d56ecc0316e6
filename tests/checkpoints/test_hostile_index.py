"""An index made to do harm: boxes and bytes that no save writes are refused before anything is allocated."""

import json
from typing import Any

import numpy as np
import pytest

from exfm.checkpoints.layout import FileRecord, parse_index
from exfm.data.errors import UserError
from tests.checkpoints.hostile import HUGE, refused


def entry(**over: Any) -> dict[str, Any]:
    """An index of one tensor [10, 4] f32 in two chunks of one file of 200 bytes."""
    chunks = [[[0, 0], [5, 4], 0, 0], [[5, 0], [5, 4], 0, 80]]
    return {"dtype": "F32", "shape": [10, 4], "chunks": chunks} | over


INDICES: dict[str, dict[str, Any]] = {
    "a shape of 2^60": entry(shape=[HUGE, 4]),
    "a shape whose product is 2^64": entry(shape=[2**32, 2**32], chunks=[]),
    "a negative shape": entry(shape=[-10, -4]),
    "a fractional shape": entry(shape=[10.0, 4]),
    "a true shape": entry(shape=[True, 4]),
    "a shape of NaN": entry(shape=[float("nan"), 4]),
    "nine dimensions": entry(shape=[1] * 9),
    "a thousand dimensions": entry(shape=[1] * 1000),
    "a start of 2^60": entry(chunks=[[[0, 0], [10, 4], 0, HUGE]]),
    "a negative start": entry(chunks=[[[0, 0], [10, 4], 0, -1]]),
    "a start beyond the file": entry(chunks=[[[0, 0], [10, 4], 0, 41]]),
    "a file that is not listed": entry(chunks=[[[0, 0], [10, 4], 1, 0]]),
    "a negative file": entry(chunks=[[[0, 0], [10, 4], -1, 0]]),
    "a duplicated chunk": entry(chunks=[entry()["chunks"][0], entry()["chunks"][0]]),
    "overlapping chunks with a hole elsewhere": entry(chunks=[[[0, 0], [5, 4], 0, 0], [[4, 0], [5, 4], 0, 80]]),
    "overlapping columns with a hole elsewhere": entry(chunks=[[[0, 0], [10, 2], 0, 0], [[0, 1], [10, 2], 0, 80]]),
    "chunks that share bytes": entry(chunks=[[[0, 0], [5, 4], 0, 0], [[5, 0], [5, 4], 0, 40]]),
    "a hole": entry(chunks=entry()["chunks"][:1]),
    "a chunk outside": entry(chunks=[[[1, 0], [10, 4], 0, 0]]),
    "a chunk of other dimensions": entry(chunks=[[[0], [40], 0, 0]]),
    "a chunk of three things": entry(chunks=[[[0, 0], [10, 4], 0]]),
    "chunks that are a number": entry(chunks=7),
    "an unknown type": entry(dtype="F31"),
    "a type that is a list": entry(dtype=["F32"]),
    "no chunks": entry(chunks=None),
    "a number": 7,  # type: ignore[dict-item]
}
FILE = FileRecord("rank-00000.safetensors", 200, "0" * 16)


def test_the_index_that_the_hostile_ones_are_made_from_is_read():
    assert parse_index(json.dumps({"tensors": {"t": entry()}}).encode(), [FILE], "x")["t"].shape == (10, 4)


@pytest.mark.parametrize("what", INDICES)
def test_an_index_that_no_save_writes_is_refused_by_name(what):
    text = json.dumps({"tensors": {"t": INDICES[what]}}).encode()
    with pytest.raises(UserError, match="x/index.json is damaged or hostile"):
        parse_index(text, [FILE], "x/index.json")


def test_tensors_that_share_bytes_are_refused_so_that_a_small_file_cannot_become_a_large_state():
    tensors = {f"t{n}": entry() for n in range(1000)}
    with pytest.raises(UserError, match="share byte"):
        parse_index(json.dumps({"tensors": tensors}).encode(), [FILE], "x")


def test_a_tensor_name_that_commands_a_terminal_is_refused():
    text = json.dumps({"tensors": {"t\x1b[2J": entry()}}).encode()
    with pytest.raises(UserError, match=r"'t\?\[2J' is no name"):
        parse_index(text, [FILE], "x")


@pytest.mark.parametrize("seed", range(5))
def test_boxes_are_taken_exactly_where_a_painted_grid_says_that_they_cover_it_once(seed):
    """Random sets of boxes, most of them wrong, against painting them."""
    rng, seen = np.random.default_rng(seed), set()
    for _ in range(400):
        rows, columns = np.sort(rng.integers(0, 7, 2)), np.sort(rng.integers(0, 5, 2))
        boxes = []
        for r in ((0, rows[0]), (rows[0], rows[1]), (rows[1], 6)):
            for c in ((0, columns[0]), (columns[0], columns[1]), (columns[1], 4)):
                moved = rng.integers(0, 2, 2) * (rng.random() < 0.05)
                boxes.append([[int(r[0] + moved[0]), int(c[0] + moved[1])], [int(r[1] - r[0]), int(c[1] - c[0])]])
        painted = np.zeros((6, 4), int)
        inside, chunks, start = True, [], 0
        for (r, c), (h, w) in boxes:
            inside &= r + h <= 6 and c + w <= 4
            painted[r : r + h, c : c + w] += 1
            chunks.append([[r, c], [h, w], 0, start])
            start += 4 * h * w
        text = json.dumps({"tensors": {"t": {"dtype": "F32", "shape": [6, 4], "chunks": chunks}}}).encode()
        good = bool(inside and (painted == 1).all())
        seen.add(good)
        assert (refused(lambda text=text: parse_index(text, [FILE], "x")) == "") == good
    assert seen == {True, False}

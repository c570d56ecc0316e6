"""A log per rank: what its Python prints, its log records and the stack of a fatal signal, without taking them from the common log."""

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

from exfm.trainer.env import RankEnv
from exfm.trainer.ranklog import Tee, keep_log, rank_log

RANK = """
import faulthandler, logging, os, sys, warnings
from pathlib import Path
log = logging.getLogger("a library's")
log.propagate = False
log.addHandler(logging.StreamHandler(sys.stderr))
from exfm.trainer.env import RankEnv
from exfm.trainer.ranklog import keep_log
keep_log(Path(sys.argv[1]), RankEnv(3, 8, attempt=2, run_id="abc"))
print("said")
print("complained", file=sys.stderr)
log.warning("warned")
os.write(2, b"from native code\\n")
if sys.argv[2] == "crash":
    faulthandler._sigsegv()
from exfm.trainer.__main__ import leave
leave(5)
"""


def rank(folder: Path, how: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", RANK, str(folder), how]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def test_a_ranks_own_log_has_what_it_printed_and_the_common_log_too(warm: None, tmp_path: Path) -> None:
    first, second = rank(tmp_path, "leave"), rank(tmp_path, "leave")
    assert first.returncode == second.returncode == 5
    assert first.stdout == "said\n" and first.stderr == "complained\nwarned\nfrom native code\n"
    text = (tmp_path / "logs" / "rank-00003.log").read_text()
    starts = re.findall(r"^---- \S+ rank 3 of 8, host \S+, pid \d+, attempt 2, run abc$", text, re.M)
    assert len(starts) == 2  # one file for all attempts
    assert text.replace(starts[0], "").replace(starts[1], "") == 2 * "\nsaid\ncomplained\nwarned\n"


def test_the_stack_of_a_segmentation_fault_is_in_the_ranks_own_log(warm: None, tmp_path: Path) -> None:
    assert rank(tmp_path, "crash").returncode == -11
    text = rank_log(tmp_path, 3).read_text()
    assert "Fatal Python error: Segmentation fault" in text and 'File "<string>", line 15' in text


def test_a_folder_that_cannot_be_written_costs_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").write_text("a file where the folder should be")
    before = sys.stdout, sys.stderr
    assert keep_log(tmp_path, RankEnv(0, 2)) is None
    assert (sys.stdout, sys.stderr) == before
    said = capsys.readouterr().err
    assert said.startswith("exfm: no log of rank 0's own: cannot write ") and said.count("\n") == 1


def test_a_log_on_a_full_disk_takes_nothing_from_the_stream() -> None:
    stream = io.StringIO()
    full = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    tee = Tee(stream, full)
    print("one", file=tee, flush=True)
    tee.writelines(["two\n", "three\n"])
    assert stream.getvalue() == "one\ntwo\nthree\n" and tee.getvalue() == stream.getvalue()
    with pytest.raises(OSError, match="No space left"):
        full.close()

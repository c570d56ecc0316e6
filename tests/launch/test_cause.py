"""The first cause on top: what torchrun itself saw of ranks that died without a word, told in a few lines."""

import subprocess
import sys
from pathlib import Path

import pytest

from exfm.launch.cause import guessed

# ranks 0 and 1 wait until torchrun ends them; rank 2 goes wrong
RANK = """
import os, signal, sys, time, faulthandler
if os.environ["RANK"] != "2":
    time.sleep(60)
{}
"""
CASES = {
    "out of memory": ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL (out of memory? see dmesg"),
    "segmentation fault": ("faulthandler._sigsegv()", "segmentation fault (SIGSEGV)"),
    "an error at once": (
        "raise KeyError('no such thing')",
        "ended with exit code 1\n  the first error: KeyError: 'no such",
    ),
}


@pytest.mark.parametrize(("does", "expected"), CASES.values(), ids=CASES)
def test_the_rank_that_torchrun_saw_die_first_is_named_with_the_likely_reason(
    does: str, expected: str, warm: None, tmp_path: Path
) -> None:
    (tmp_path / "rank.py").write_text(RANK.format(does))
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-00002.log").touch()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    with open(tmp_path / "logs" / "torchrun.log", "w+") as log:
        process = subprocess.Popen([*command, str(tmp_path / "rank.py")], stdout=log, stderr=log)
        assert process.wait(60) == 1
        log.seek(0)
        text = guessed(tmp_path, log.read(), 1, 0.0)
    assert text.startswith("rank 2 (pid ") and expected in text
    assert text.splitlines()[-1] == f"  read: {tmp_path}/logs/rank-00002.log, {tmp_path}/logs/torchrun.log"
    assert len(text.splitlines()) <= 3


def test_where_torchrun_says_nothing_the_end_of_its_log_is_shown(tmp_path: Path) -> None:
    log = "\n".join(f"line {i}" for i in range(100))
    text = guessed(tmp_path, log, 7, 0.0)
    assert text.startswith("torchrun ended with 7; end of ") and text.endswith("line 98\n  line 99")
    assert len(text.splitlines()) == 7

"""`exfm data replay` and `exfm data join`, as a user calls them, killed for real."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from exfm.data.inspect import inspect
from exfm.data.manifest import open_stream
from exfm.data.synth import START, synth

EXFM = [sys.executable, "-m", "exfm.launch.cli", "data"]
SLICES = 4


def exfm(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([*EXFM, *arguments], capture_output=True, text=True, timeout=120)


@pytest.mark.timeout(240)
def test_a_killed_joiner_makes_the_stream_that_was_replayed(tmp_path):
    written = synth(str(tmp_path / "stream"), num_slices=SLICES, rows_per_slice=500)
    inbox, out, config = tmp_path / "inbox", tmp_path / "out", tmp_path / "join.yaml"
    assert exfm("replay", written.root, "--inbox", str(inbox), "--delay", "click=300").returncode == 0
    example = yaml.safe_load((Path(__file__).parents[2] / "configs/join.yaml").read_text())
    paths = {"inbox": str(inbox), "out": str(out), "schema_file": str(inbox / "schema.yaml")}
    clock = {"clock": {"simulated": {"start": START, "speed": 4_000}}, "poll_s": 0.05}
    config.write_text(yaml.safe_dump(example | paths | clock | {"slices": SLICES}))
    process = subprocess.Popen([*EXFM, "join", str(config), "--follow"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not (out / "slice=000000/labels/manifest.json").exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = exfm("join", str(config), "--follow", "--json")
    assert done.returncode == 0, done.stderr
    counted = json.loads(done.stdout)
    assert (counted["slices"], counted["finished"], counted["late"]) == (SLICES, True, {"click": 0})
    joined = open_stream(str(out))
    for index in range(SLICES):
        assert joined.wait(index, "features", 0).row_groups == written.wait(index, "features", 0).row_groups
        for own, theirs in (("features", "features"), ("labels", "labels"), ("labels.amended", "labels")):
            a, b = joined.wait(index, own, 0), written.wait(index, theirs, 0)
            assert [p.sha256 for p in a.parts] == [p.sha256 for p in b.parts]
    assert [s["labels"] for s in inspect(str(out))["slices"]] == [s["labels"] for s in inspect(written.root)["slices"]]

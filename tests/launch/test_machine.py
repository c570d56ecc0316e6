"""What the doctor says of memory, disk and network, and what a preflight has warned of reaches the user's terminal."""

import io
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from exfm.launch.local import LocalJob
from exfm.launch.machine import GIB, Interface, Machine, diagnose_machine, interfaces, look
from exfm.launch.progress import JobView
from tests.trainer.jobs import job

ETHERNET, INFINIBAND = Interface("eth0", "10.0.0.7"), Interface("ib0", "10.1.0.7")
GOOD = Machine("n7", 64 * GIB, 500 * GIB, "/work", (ETHERNET,), ("10.0.0.7",))


def said(machine: Machine) -> list[tuple[str, str, str]]:
    return [(f.level, f.what, f.fix) for f in diagnose_machine(machine)]


def test_a_good_machine_has_nothing_to_fix_and_its_interface_is_named():
    assert [(level, fix) for level, _, fix in said(GOOD)] == [("ok", "")] * 3
    assert "host name n7 is interface eth0 (10.0.0.7); NCCL would use eth0" in said(GOOD)[2][1]
    assert "NCCL would use ib0" in said(replace(GOOD, interfaces=(ETHERNET, INFINIBAND)))[2][1]


@pytest.mark.parametrize(
    ("over", "says", "fix"),
    [
        ({"memory_bytes": GIB}, "1.0 GiB of memory free: little", ""),
        ({"disk_bytes": GIB}, "1.0 GiB free on the disk of /work; runs and checkpoints", ""),
        (
            {"addresses": ("127.0.1.1",)},
            "n7 resolves to 127.0.1.1, none of eth0 (10.0.0.7): ranks on other hosts could not reach",
            "export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0",
        ),
        (
            {"addresses": (), "interfaces": (ETHERNET, INFINIBAND)},
            "n7 does not resolve, none of eth0 (10.0.0.7), ib0 (10.1.0.7)",
            "export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0",
        ),
        ({"interfaces": (Interface("docker0", "172.17.0.1"),)}, "no network interface but loopback", ""),
        ({"interfaces": (Interface("eth0", ""),)}, "no network interface but loopback", ""),
    ],
    ids=["memory", "disk", "loopback", "unknown", "containers", "no address"],
)
def test_what_keeps_others_away_is_a_warning_with_what_to_type(over, says, fix):
    (found,) = [f for f in diagnose_machine(replace(GOOD, **over)) if f.level != "ok"]
    assert found.level == "warn" and says in found.what and found.fix == fix


def test_only_interfaces_that_are_up_and_no_loopback_count(tmp_path):
    for name, flags in {"lo": "0x9", "down": "0x1002", "up": "0x1003"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "flags").write_text(flags + "\n")
    (tmp_path / "bonding_masters").write_text("")  # a file beside the interfaces
    assert interfaces(tmp_path) == (Interface("up", ""),)
    assert interfaces(tmp_path / "absent") == ()


def test_this_machine_is_seen_as_ip_sees_it():
    if not shutil.which("ip"):
        pytest.skip("there is no ip here")
    shown = subprocess.run(["ip", "-4", "-o", "addr", "show", "up"], capture_output=True, text=True, check=True).stdout
    expected = {(w[1], w[3].split("/")[0]) for w in map(str.split, shown.splitlines()) if w[1] != "lo"}
    assert {(i.name, i.address) for i in look().interfaces if i.address} <= expected
    assert {name for name, _ in expected} == {i.name for i in look().interfaces if i.address}


def test_what_a_preflight_warns_of_is_said_once_when_the_job_begins(tmp_path: Path):
    config = tmp_path / "job.yaml"
    config.write_text(yaml.safe_dump(job(tmp_path / "run", tmp_path / "stream")))
    findings = [{"level": level, "what": f"{level} [x]", "fix": "mend it"} for level in ("warn", "ok")]
    (tmp_path / "run/logs").mkdir(parents=True)
    (tmp_path / "run/logs/preflight.json").write_text(json.dumps({"findings": findings}))
    out = io.StringIO()
    view = JobView(Console(file=out, width=200))
    for _ in range(2):
        view.update(LocalJob(config), {})
    assert out.getvalue().splitlines() == ["job: preflight warns: warn [x]; mend it"]
    quiet = LocalJob(config, sets=("run.preflight=off",))
    JobView(console := Console(file=io.StringIO())).update(quiet, {})
    assert console.file.getvalue() == ""

"""Machines on a true KVM: `kvik run` from nothing, the life cycle, and what is said where /dev/kvm is withheld."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.harness import Lab
from lab.managed import row

READY = 120.0  # seconds; 7 is usual for a machine in the lab
NOBODY = {"XDG_RUNTIME_DIR": "/tmp/nobody/run", "HOME": "/tmp/nobody"}


@pytest.fixture
def lab(managed: Lab) -> Lab:
    return managed


@contextlib.contextmanager
def withheld(lab: Lab, how: str, back: str) -> Iterator[None]:
    lab.sh(how)
    try:
        yield
    finally:
        lab.sh(back)


@pytest.mark.lab(deadline=240)
def test_one_command_runs_a_command_in_a_machine_on_kvm(lab: Lab) -> None:
    done = lab.kvik("run", "--rm", "--", "uname", "-a", timeout=READY).check()
    assert done.stdout.startswith("Linux tiny-1 ") and "cloud-amd64" in done.stdout
    assert lab.sh("uname -r").strip() not in done.stdout
    assert "Acceleration: KVM" in done.stderr and "SVM with NPT" in done.stderr
    assert json.loads(lab.kvik("list", "--all", "--json").check().stdout) == []
    assert lab.run(["pgrep", "-x", "qemu-system-x86"]).code == 1


@pytest.mark.lab(deadline=300)
def test_the_life_cycle_of_a_machine_on_kvm(lab: Lab) -> None:
    lab.kvik("run", "--detach", "--name", "one", timeout=READY).check()
    found = row(lab, "one")
    assert found["state"] == "running" and found["ready"] and found["acceleration"] == "kvm"
    assert found["address"] == "10.0.2.15"
    assert "<domain type='kvm'" in lab.kvik("dumpxml", "one").check().stdout
    info = lab.kvik("dominfo", "one").check().stdout
    assert "Acceleration:" in info and "kvm" in info
    assert "-accel\0kvm" in lab.sh("cat /proc/$(pgrep -x qemu-system-x86)/cmdline")

    # the guest knows that it runs on KVM
    clock = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
    assert lab.kvik("exec", "one", "--", "cat", clock, timeout=READY).check().stdout == "kvm-clock\n"

    lab.kvik("suspend", "one").check()
    assert row(lab, "one")["state"] == "paused"
    lab.kvik("resume", "one").check()
    assert row(lab, "one")["state"] == "running"

    # the daemon is killed, the machine goes on, and the next command finds it again
    pid = lab.sh("pgrep -x qemu-system-x86").strip()
    lab.sh("pkill -KILL -f [k]vik.daemon")
    again = row(lab, "one")
    assert again["state"] == "running" and again["acceleration"] == "kvm"
    assert lab.sh("pgrep -x qemu-system-x86").strip() == pid

    lab.kvik("destroy", "one").check()
    assert row(lab, "one")["state"] == "shut off"
    lab.kvik("start", "one", timeout=READY).check()
    assert row(lab, "one")["acceleration"] == "kvm"
    lab.kvik("destroy", "one").check()
    lab.kvik("undefine", "one").check()
    assert lab.run(["pgrep", "-x", "qemu-system-x86"]).code == 1


MACHINE = """<domain type='kvm'><name>wants-kvm</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type></os></domain>"""


def test_a_forbidden_kvm_is_said_with_its_owner_and_its_fix(lab: Lab) -> None:
    done = lab.kvik("doctor", "--json", user="nobody", **NOBODY)
    finding = next(f for f in json.loads(done.stdout)["findings"] if f["name"] == "kvm")
    assert finding["status"] == "warn"
    assert "root:kvm with mode 0660" in finding["why"] and "usermod" in finding["fix"]


@pytest.mark.lab(deadline=240)
@pytest.mark.parametrize(
    ("how", "back", "words"),
    [
        ("mv /dev/kvm /dev/kvm-away", "mv /dev/kvm-away /dev/kvm", "does not exist"),
        ("mv /dev/kvm /dev/kvm-away; touch /dev/kvm", "mv -f /dev/kvm-away /dev/kvm", "not a device node"),
    ],
    ids=["absent", "no device"],
)
def test_a_kvm_document_where_kvm_is_withheld_is_a_clear_error(lab: Lab, how: str, back: str, words: str) -> None:
    path = Path("/run/lab/wants-kvm.xml")
    (lab.share / path.name).write_text(MACHINE)
    with withheld(lab, how, back):
        report = json.loads(lab.kvik("doctor", "--json").stdout)
        assert report["accelerator"] == "tcg"
        done = lab.kvik("create", str(path))
        assert done.code != 0
        assert words in done.stderr, done.stderr
        assert "hint:" in done.stderr
        assert lab.run(["pgrep", "-x", "qemu-system-x86"]).code == 1

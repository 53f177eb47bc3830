"""Machines on kvik-vmm, on a true KVM, under our daemon: `kvik run`, the life cycle, devices, and virsh."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvik.errors import HostError, NotFound
from kvik.guest.tiny import TinyImage, kernel_arguments, tiny
from kvik.paths import Paths
from lab.harness import Lab
from lab.kernel import cache_directory

READY = 150.0  # seconds; 10 is usual in the lab
STATE = "/etc/kvik /var/lib/kvik /var/cache/kvik /var/log/kvik /run/kvik"
EMULATOR = "kvik-vmm"  # the daemon's own
PIDS = "pgrep -x kvik-vmm"


@pytest.fixture(scope="session")
def image() -> tuple[Paths, TinyImage]:
    paths = Paths.system(cache_directory() / "root")
    try:
        return paths, tiny(paths)
    except (HostError, NotFound) as error:
        pytest.skip(f"no tiny image: {error}")


@pytest.fixture
def lab(lab: Lab, image: tuple[Paths, TinyImage]) -> Iterator[Lab]:
    """The lab with the image in place; afterwards no daemon, no machine and no state is left."""
    paths, _ = image
    lab.sh(
        f"""
        mkdir -p /var/lib/kvik/images /var/cache/kvik
        cp -a /run/lower{paths.images}/tiny /var/lib/kvik/images/
        cp -a /run/lower{paths.cache}/kernels /var/cache/kvik/
        """
    )
    yield lab
    lab.sh(
        f"""
        kill -KILL $({PIDS}) || true
        pkill -KILL -f [k]vik.daemon || true
        find {STATE} -mindepth 1 -delete || true
        """
    )


def row(lab: Lab, name: str) -> dict[str, Any]:
    rows = json.loads(lab.kvik("list", "--all", "--json").check().stdout)
    return next(row for row in rows if row["name"] == name)


def run(lab: Lab, name: str) -> None:
    lab.kvik("run", "--vmm", "kvik", "--network", "none", "--detach", "--name", name, timeout=READY).check()


def wait_for_agent(lab: Lab) -> None:
    for _ in range(30):
        lab.sh("sleep 1")
        if lab.kvik("exec", "one", "--", "true", timeout=READY).code == 0:
            return
    raise AssertionError("the guest's agent does not answer")


@pytest.mark.lab(deadline=300)
def test_one_command_runs_a_command_in_a_machine_on_kvik_vmm(lab: Lab) -> None:
    done = lab.kvik("run", "--vmm", "kvik", "--network", "none", "--rm", "--", "uname", "-a", timeout=READY).check()
    assert done.stdout.startswith("Linux tiny-1 ") and "cloud-amd64" in done.stdout
    assert lab.sh("uname -r").strip() not in done.stdout
    assert json.loads(lab.kvik("list", "--all", "--json").check().stdout) == []
    assert lab.run(["sh", "-c", PIDS]).code == 1


@pytest.mark.lab(deadline=400)
def test_the_life_cycle_of_a_machine_on_kvik_vmm(lab: Lab) -> None:
    run(lab, "one")
    found = row(lab, "one")
    assert found["state"] == "running" and found["ready"] and found["acceleration"] == "kvm"
    xml = lab.kvik("dumpxml", "one").check().stdout
    assert f"<emulator>{EMULATOR}</emulator>" in xml and "machine='kvik-1'" in xml
    clock = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
    assert lab.kvik("exec", "one", "--", "cat", clock, timeout=READY).check().stdout == "kvm-clock\n"

    lab.kvik("suspend", "one").check()
    assert row(lab, "one")["state"] == "paused"
    lab.kvik("resume", "one").check()
    assert row(lab, "one")["state"] == "running"

    # the daemon is killed, the machine goes on, and the next command finds it again
    pid = lab.sh(PIDS).strip()
    lab.sh("pkill -KILL -f [k]vik.daemon")
    assert row(lab, "one")["state"] == "running"
    assert lab.sh(PIDS).strip() == pid
    assert lab.kvik("exec", "one", "--", "echo", "still here", timeout=READY).check().stdout == "still here\n"

    status = lab.kvik("qemu-monitor-command", "one", '{"execute": "query-status"}').check().stdout
    assert json.loads(status)["return"]["status"] == "running"
    figures = lab.kvik("domstats", "one").check().stdout
    assert "cpu.time=" in figures and "vcpu.current=1" in figures

    lab.kvik("destroy", "one").check()
    assert row(lab, "one")["state"] == "shut off"
    lab.kvik("undefine", "one").check()
    assert lab.run(["sh", "-c", PIDS]).code == 1


@pytest.mark.lab(deadline=400)
def test_the_guest_powers_off_and_reboots(lab: Lab) -> None:
    run(lab, "one")
    pid = lab.sh(PIDS).strip()
    lab.kvik("reboot", "one", "--mode", "agent").check()
    wait_for_agent(lab)  # it goes with the old system and comes with the new one
    assert lab.sh(PIDS).strip() == pid
    lab.kvik("shutdown", "one", "--mode", "acpi").check()
    for _ in range(60):
        if row(lab, "one")["state"] == "shut off":
            break
        lab.sh("sleep 0.5")
    assert row(lab, "one")["state"] == "shut off"
    assert lab.run(["sh", "-c", PIDS]).code == 1


DISK = "<disk type='file'><driver name='qemu' type='{0}'/><source file='/tmp/{1}'/><target dev='{2}'/></disk>"


def inside(lab: Lab, command: str) -> str:
    return lab.kvik("exec", "one", "--", "sh", "-c", command, timeout=READY).check().stdout


@pytest.mark.lab(deadline=400)
def test_disks_of_any_format_come_and_go_while_the_guest_runs(lab: Lab, image: tuple[Paths, TinyImage]) -> None:
    """One qcow2 disk from the start, which makes the memory one that a storage daemon can map; a raw and a qcow2 one
    that are plugged in; and the first one's daemon killed."""
    lab.sh("truncate -s 16M /tmp/b.raw; for n in a c; do qemu-img create -q -f qcow2 /tmp/$n.qcow2 8M; done")
    paths, files = image
    kernel, initrd = (f"/var/lib/kvik/images/{path.relative_to(paths.images)}" for path in (files.kernel, files.initrd))
    words = ["--kernel", kernel, "--initrd", initrd, "--append", kernel_arguments("kvm", hostname="one")]
    disk = ["--disk", "/tmp/a.qcow2", "--network", "none", "--detach", "--name", "one"]
    lab.kvik("run", "--vmm", "kvik", *words, *disk, timeout=READY).check()
    wait_for_agent(lab)
    assert inside(lab, "cat /sys/block/vda/size") == "16384\n"
    inside(lab, "seq 60000 >/p; dd if=/p of=/dev/vda bs=4k count=64 oflag=direct 2>/dev/null; sync")
    for format_, name, dev, size in (("raw", "b.raw", "vdb", "32768"), ("qcow2", "c.qcow2", "vdc", "16384")):
        (lab.share / "disk.xml").write_text(DISK.format(format_, name, dev))
        before = inside(lab, "ls /sys/block")
        lab.kvik("attach-device", "one", "/run/lab/disk.xml", "--live").check()
        # The guest calls it by the first free name.
        found = inside(lab, "for n in $(seq 50); do cat /sys/block/vdb/size && exit; sleep 0.2; done").split()
        assert found == [size]
        inside(lab, "dd if=/p of=/dev/vdb bs=4k count=64 oflag=direct 2>/dev/null; sync")
        if format_ == "raw":
            counted = lab.kvik("domblkstat", "one", dev).check().stdout
            assert int(counted.split("wr_bytes")[1].split()[0]) >= 64 * 4096
        lab.kvik("detach-disk", "one", dev, "--live").check()
        assert inside(lab, "ls /sys/block") == before
    lab.sh("kill -KILL $(pgrep -f 'qemu-storage-[d]aemon.*virtio-disk0')")
    for _ in range(50):
        if "vda" in lab.kvik("domblkerror", "one").stdout:
            break
        lab.sh("sleep 0.1")
    else:
        raise AssertionError(lab.kvik("domblkerror", "one").stdout)
    assert inside(lab, "echo still here") == "still here\n"
    lab.kvik("destroy", "one").check()
    for name in ("a", "c"):
        lab.sh(
            f"""
            qemu-img check -q -f qcow2 /tmp/{name}.qcow2
            qemu-img convert -f qcow2 -O raw /tmp/{name}.qcow2 /tmp/{name}.raw
            seq 60000 | cmp -n 262144 - /tmp/{name}.raw
            """
        )


@pytest.mark.lab(deadline=400)
def test_debians_virsh_runs_one(lab: Lab) -> None:
    if lab.run(["sh", "-c", "command -v virsh"]).code:
        pytest.skip("virsh is not installed: apt install libvirt-clients")
    run(lab, "one")
    socket = Paths.system().socket
    virsh = f"virsh -c 'qemu+unix:///system?socket={socket}'"
    assert lab.sh(f"{virsh} list --name").split() == ["one"]
    assert EMULATOR in lab.sh(f"{virsh} dumpxml one")
    lab.sh(f"{virsh} suspend one; {virsh} resume one")
    assert "running" in lab.sh(f"{virsh} domstate one")
    assert "kvik-1" in lab.sh(f"{virsh} domcapabilities --emulatorbin {EMULATOR}")
    lab.sh(f"{virsh} destroy one")
    assert row(lab, "one")["state"] == "shut off"


def test_capabilities_name_both_vmms(lab: Lab) -> None:
    text = Path("/run/lab/kvik-vmm")  # found by path as well
    caps = lab.kvik("capabilities").check().stdout
    assert f"<emulator>{EMULATOR}</emulator>" in caps and "qemu-system-x86_64" in caps
    assert "canonical='kvik-1'" in caps
    told = lab.kvik("domcapabilities", "--emulatorbin", str(text)).check().stdout
    assert f"<path>{text}</path>" in told and "<domain>kvm</domain>" in told

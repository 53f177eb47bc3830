"""vCPUs, memory and devices of a running tiny machine, changed in it and in its definition, as virsh does it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from kvik.errors import KvikError

from .conftest import AGENT, CONSOLE, NIC, until
from .processes import qemu_of

LIVE, CONFIG, INACTIVE = 1, 2, 2
BOTH = LIVE | CONFIG
CDROM = (
    "<disk type='file' device='cdrom'><driver name='qemu' type='raw'/>{source}"
    "<target dev='sda' bus='sata'/><readonly/></disk>"
)


def image(path: Path, size: int = 4 << 20) -> Path:
    path.write_bytes(b"")
    with path.open("r+b") as file:
        file.truncate(size)
    return path


def shell(domain: Any, script: str) -> str:
    return domain.exec(["/bin/sh", "-c", script]).stdout.decode()


def sees(domain: Any, script: str, wanted: str) -> None:
    until(lambda: wanted in shell(domain, script))


def misses(domain: Any, script: str, unwanted: str) -> None:
    until(lambda: unwanted not in shell(domain, script))


def test_vcpus_come_and_go(make: Any) -> None:
    domain = make.ready("cpus", vcpus="<vcpu current='1'>3</vcpu>")
    domain.set_vcpus(3, LIVE)
    sees(domain, "ls -d /sys/devices/system/cpu/cpu[0-9]*", "cpu2")
    assert ">3</vcpu>" in domain.xml() and "current=" not in domain.xml()
    assert "current='1'" in domain.xml(INACTIVE)
    domain.set_vcpus(2, CONFIG)
    assert "current='2'" in domain.xml(INACTIVE)
    with pytest.raises(KvikError):
        domain.set_vcpus(4, LIVE)
    domain.set_vcpus(2, BOTH)
    until(lambda: "current='2'" in domain.xml())
    assert domain.vcpus(LIVE) == 2


def test_memory_by_the_balloon(make: Any) -> None:
    domain = make.ready("balloon")
    sees(domain, "lsmod", "virtio_balloon")
    domain.set_memory(128 << 10, LIVE)
    until(lambda: domain.info().memory == 128 << 10)
    assert "<memory unit='KiB'>196608</memory>" in domain.xml()
    until(lambda: "<currentMemory unit='KiB'>131072</currentMemory>" in domain.xml())
    assert "<currentMemory unit='KiB'>196608</currentMemory>" in domain.xml(INACTIVE)
    domain.set_memory(160 << 10, BOTH)
    until(lambda: domain.info().memory == 160 << 10)
    assert "<currentMemory unit='KiB'>163840</currentMemory>" in domain.xml(INACTIVE)
    with pytest.raises(KvikError):
        domain.set_memory(1 << 20, LIVE)


def test_period_of_memory_statistics(make: Any, kvikd: Any) -> None:
    domain = make.ready("period")
    sees(domain, "lsmod", "virtio_balloon")
    done = kvikd.virsh("dommemstat", "period", "--period", "1", "--live", "--config")
    assert done.returncode == 0, done.stderr
    assert "<stats period='1'/>" in domain.xml() and "<stats period='1'/>" in domain.xml(INACTIVE)
    until(lambda: {"unused", "available", "usable"} <= set(domain.memory_stats()))
    stats = kvikd.virsh("domstats", "--balloon", "period").stdout
    assert "balloon.unused=" in stats and "balloon.last-update=" in stats


def test_a_disk_as_virsh_attaches_and_detaches_it(make: Any, kvikd: Any, tmp_path: Path) -> None:
    domain = make.ready("disks")
    one, two = image(tmp_path / "one.img"), image(tmp_path / "two.img", 8 << 20)
    done = kvikd.virsh("attach-disk", "disks", str(one), "vda", "--persistent", "--targetbus", "virtio")
    assert done.returncode == 0, done.stderr
    shell(domain, "modprobe virtio_blk")  # the tiny image loads drivers for what is there when it boots
    sees(domain, "cat /proc/partitions", "4096 vda")
    assert str(one) in domain.xml() and str(one) in domain.xml(INACTIVE)
    assert kvikd.virsh("attach-disk", "disks", str(two), "vda", "--live").returncode == 1
    done = kvikd.virsh("attach-disk", "disks", str(two), "vdb", "--live")
    assert done.returncode == 0, done.stderr
    sees(domain, "cat /proc/partitions", "8192 vdb")
    assert str(two) not in domain.xml(INACTIVE)
    assert "vdb" in kvikd.virsh("domblklist", "disks").stdout
    done = kvikd.virsh("detach-disk", "disks", "vda", "--persistent")
    assert done.returncode == 0, done.stderr
    misses(domain, "cat /proc/partitions", "vda")
    assert str(one) not in domain.xml() and str(one) not in domain.xml(INACTIVE)
    assert kvikd.kvik("detach-disk", "disks", "vdb").returncode == 0
    assert str(two) not in domain.xml()
    assert kvikd.virsh("detach-disk", "disks", "vdb").returncode == 1
    assert not open_in(domain, one) and not open_in(domain, two)
    # Nothing of them is left: the same names can be used again.
    assert kvikd.virsh("attach-disk", "disks", str(one), "vda").returncode == 0


def open_in(domain: Any, path: Path) -> bool:
    """Whether the machine's QEMU still has the file open."""
    return any(fd.readlink() == path for fd in Path(f"/proc/{qemu_of(domain)}/fd").iterdir())


def test_an_interface_comes_changes_and_goes(make: Any, kvikd: Any) -> None:
    domain = make.ready("nics")
    domain.attach_device(NIC, BOTH)
    sees(domain, "ip link", "52:54:00:00:00:01")
    assert "52:54:00:00:00:01" in domain.xml(INACTIVE)
    done = kvikd.virsh("domif-setlink", "nics", "52:54:00:00:00:01", "down")
    assert done.returncode == 0, done.stderr
    shell(domain, "ip link set eth0 up")
    sees(domain, "cat /sys/class/net/eth0/carrier", "0")
    done = kvikd.virsh("domif-setlink", "nics", "52:54:00:00:00:01", "up")
    assert done.returncode == 0, done.stderr
    sees(domain, "cat /sys/class/net/eth0/carrier", "1")
    done = kvikd.virsh("detach-interface", "nics", "user", "--mac", "52:54:00:00:00:01", "--live", "--config")
    assert done.returncode == 0, done.stderr
    misses(domain, "ip link", "52:54:00:00:00:01")
    assert "<interface" not in domain.xml() and "<interface" not in domain.xml(INACTIVE)


def test_a_medium_goes_in_and_out(make: Any, kvikd: Any, tmp_path: Path) -> None:
    disc = image(tmp_path / "disc.iso", 3 << 20)
    domain = make.ready("media", CONSOLE + AGENT + CDROM.format(source=""))
    done = kvikd.virsh("change-media", "media", "sda", str(disc), "--insert", "--live", "--config")
    assert done.returncode == 0, done.stderr
    assert str(disc) in domain.xml() and str(disc) in domain.xml(INACTIVE)
    assert open_in(domain, disc)
    done = kvikd.virsh("change-media", "media", "sda", "--eject", "--live")
    assert done.returncode == 0, done.stderr
    assert str(disc) not in domain.xml() and str(disc) in domain.xml(INACTIVE)
    assert not open_in(domain, disc)


RNG = "<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>"
CHANNEL = "<channel type='unix'><target type='virtio' name='org.example.0'/></channel>"


@pytest.mark.parametrize(
    ("device", "look", "sign"),
    [
        (RNG, "cat /sys/bus/virtio/devices/*/device", "0x0004"),
        (CHANNEL, "cat /sys/class/virtio-ports/*/name", "org.example.0"),
    ],
    ids=["rng", "channel"],
)
def test_small_devices(make: Any, device: str, look: str, sign: str) -> None:
    domain = make.ready("small")
    before = domain.xml(INACTIVE)
    domain.attach_device(device, BOTH)
    sees(domain, look, sign)
    assert domain.xml(INACTIVE) != before
    domain.detach_device(device, BOTH)
    misses(domain, look, sign)
    for flags in (0, INACTIVE):
        assert "org.example.0" not in domain.xml(flags) and "<rng" not in domain.xml(flags)


def test_a_display_is_handed_over(make: Any, kvikd: Any) -> None:
    vnc = "<graphics type='vnc' port='-1' autoport='yes'/><video><model type='vga'/></video>"
    make.ready("shown", CONSOLE + AGENT + vnc)
    script = (
        "import libvirt, os, sys\n"
        "domain = libvirt.open(sys.argv[1]).lookupByName('shown')\n"
        "fd = domain.openGraphicsFD(0, 0)\n"
        "print(os.read(fd, 12))\n"
        "try:\n    domain.openGraphicsFD(1, 0)\n"
        "except libvirt.libvirtError as error:\n    print(error)\n"
    )
    done = subprocess.run(["/usr/bin/python3", "-c", script, kvikd.uri], capture_output=True, text=True, check=False)
    if "No module named 'libvirt'" in done.stderr:
        pytest.skip("needs python3-libvirt")
    assert "RFB 003.008" in done.stdout, done
    assert "no display number 1" in done.stdout


def test_no_disk_has_an_error(make: Any, kvikd: Any, tmp_path: Path) -> None:
    disk = image(tmp_path / "d.img")
    device = (
        f"<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{disk}'/>"
        "<target dev='vda' bus='virtio'/></disk>"
    )
    make.ready("healthy", CONSOLE + AGENT + device)
    assert kvikd.virsh("domblkerror", "healthy").stdout.strip() == "No errors found"


def test_a_monitors_events_reach_virsh(make: Any, kvikd: Any) -> None:
    domain = make.ready("told")
    with subprocess.Popen(
        ["virsh", "-c", kvikd.uri, "qemu-monitor-event", "--domain", "told", "--event", "STOP", "--timeout", "30"],
        stdout=subprocess.PIPE,
        text=True,
    ) as watcher:
        until(lambda: domain.suspend() or domain.resume() or watcher.poll() is not None)
        assert watcher.stdout is not None
        assert "event STOP" in watcher.stdout.read()


# What libvirt 9.0 tells of the same document, as measured.
KEYS = """
state.state state.reason cpu.time cpu.user cpu.system cpu.cache.monitor.count cpu.haltpoll.success.time
cpu.haltpoll.fail.time balloon.current balloon.maximum balloon.last-update balloon.rss vcpu.current vcpu.maximum
vcpu.0.state vcpu.0.time vcpu.0.wait vcpu.0.delay net.count block.count iothread.count iothread.1.poll-max-ns
iothread.1.poll-grow iothread.1.poll-shrink dirtyrate.calc_status dirtyrate.calc_start_time dirtyrate.calc_period
dirtyrate.calc_mode block.1.name
"""
DISK = "name path rd.reqs rd.bytes rd.times wr.reqs wr.bytes wr.times fl.reqs fl.times allocation capacity physical"
EMPTY = "name rd.reqs rd.bytes rd.times wr.reqs wr.bytes wr.times fl.reqs fl.times"


def test_the_figures_have_libvirts_names(make: Any, kvikd: Any, tmp_path: Path) -> None:
    disk = image(tmp_path / "d.img")
    devices = (
        f"<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{disk}'/>"
        "<target dev='vda' bus='virtio'/></disk>" + CDROM.format(source="") + NIC + "<serial type='pty'/>"
    )
    domain = make("figures", devices, vcpus="<vcpu current='1'>2</vcpu><iothreads>1</iothreads>")
    domain.start()
    assert kvikd.virsh("dommemstat", "figures", "--period", "1", "--live").returncode == 0
    lines = kvikd.virsh("domstats", "figures").stdout.split()[2:]
    found = {line.partition("=")[0] for line in lines}
    wanted = {*KEYS.split(), *(f"block.0.{key}" for key in DISK.split()), *(f"block.1.{key}" for key in EMPTY.split())}
    assert found == wanted

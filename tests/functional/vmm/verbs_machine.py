"""A daemon in a network namespace of its own, for machines on kvik-vmm, and the files that its commands name."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from acpi_guest import kernel
from guests import needs_kvm

from functional.daemon.conftest import Kvikd
from kvik.host.process import find_program
from kvik.image.create import create

MARKS = [
    pytest.mark.functional,
    pytest.mark.root,
    needs_kvm,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(
        find_program("ip") is None or not Path("/dev/net/tun").exists(), reason="needs iproute2 and tun"
    ),
]
ANY_KVM = Path(__file__).with_name("any_kvm.py")
# sysfs shows the network namespace that it was mounted in; passt wants a way to somewhere.
NAMESPACE = """mount -t sysfs sysfs /sys && ip link set lo up
for bridge in br0 br1 out0; do ip link add $bridge type bridge && ip link set $bridge up; done
ip addr add 192.0.2.1/24 dev out0 && ip route add default via 192.0.2.2 dev out0"""
DOMAIN = """<domain type='kvm'><name>{name}</name>
<maxMemory slots='4' unit='MiB'>2048</maxMemory><memory unit='MiB'>64</memory>
<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>
<vcpu current='1'>3</vcpu>
<cpu mode='host-passthrough'><numa><cell id='0' cpus='0-2' memory='65536' memAccess='shared'/></numa></cpu>
<os><type machine='kvik'>hvm</type><kernel>{root}/kernel</kernel></os>
<devices><emulator>kvik-vmm</emulator>{devices}
<serial type='pty'/><channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
<memballoon model='virtio'/></devices></domain>"""
OWN = """<disk type='file'><driver name='qemu' type='raw'/><source file='{root}/a.raw'/><target dev='vda'/></disk>
<interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='br0'/></interface>"""
DEVICES = {
    "rng": "<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>",
    "rng-config": "<rng model='virtio'><rate bytes='1024' period='1000'/><backend model='random'/></rng>",
    "ethernet": "<interface type='ethernet'><mac address='52:54:00:00:00:02'/></interface>",
    "user": "<interface type='user'><mac address='52:54:00:00:00:03'/></interface>",
    "filesystem": "<filesystem type='mount'><driver type='virtiofs'/><source dir='{root}/share'/><target dir='tag'/>"
    "</filesystem>",
    "memory": "<memory model='virtio-mem'><target><size unit='MiB'>256</size><node>0</node><block unit='MiB'>2</block>"
    "<requested unit='MiB'>64</requested></target></memory>",
    "memory-more": "<memory model='virtio-mem'><target><size unit='MiB'>256</size><node>0</node>"
    "<block unit='MiB'>2</block><requested unit='MiB'>128</requested></target></memory>",
    "memory-none": "<memory model='virtio-mem'><target><size unit='MiB'>256</size><node>0</node>"
    "<block unit='MiB'>2</block><requested unit='MiB'>0</requested></target></memory>",
    "disk": "<disk type='file'><driver name='qemu' type='raw'/><source file='{root}/a.raw'/><target dev='vda'/>"
    "<iotune><total_iops_sec>100</total_iops_sec></iotune></disk>",
    "disk-other": "<disk type='file'><driver name='qemu' type='raw'/><source file='{root}/b.raw'/><target dev='vda'/>"
    "</disk>",
    "bridge-other": "<interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='br1'/>"
    "<model type='virtio'/></interface>",
    "bridge-none": "<interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='br9'/></interface>",
    "direct": "<interface type='direct'><mac address='52:54:00:00:00:0a'/><source dev='br1' mode='bridge'/>"
    "</interface>",
    "balloon": "<memballoon model='virtio'><stats period='3'/></memballoon>",
    "channel": "<channel type='unix'><target type='virtio' name='org.x'/></channel>",
    "panic": "<panic model='isa'/>",
    "serial": "<serial type='pty'/>",
    "console": "<console type='pty'><target type='virtio'/></console>",
    "watchdog": "<watchdog model='i6300esb' action='reset'/>",
    "dimm": "<memory model='dimm'><target><size unit='MiB'>128</size><node>0</node></target></memory>",
    "cdrom": "<disk type='file' device='cdrom'><driver name='qemu' type='raw'/><source file='{root}/b.raw'/>"
    "<target dev='sda' bus='sata'/></disk>",
    "vsock": "<vsock model='virtio'><cid auto='yes'/></vsock>",
    "disk-qcow2": "<disk type='file'><driver name='qemu' type='qcow2'/><source file='{root}/c.qcow2'/>"
    "<target dev='vdc'/></disk>",
    "checkpoint": "<domaincheckpoint><name>c2</name><disks><disk name='vdc'/></disks></domaincheckpoint>",
    "pull": "<domainbackup mode='pull'><server transport='unix' socket='{root}/nbd'/><disks>"
    "<disk name='vdc' type='file'><scratch file='{root}/scratch.qcow2'/></disk></disks></domainbackup>",
    "backup": "<domainbackup><incremental>c1</incremental><disks><disk name='vdc' type='file'>"
    "<target file='{root}/backup.qcow2'/></disk></disks></domainbackup>",
}


class Machine:
    """The daemon, and the files that the steps name."""

    def __init__(self) -> None:
        become = f'{NAMESPACE}\nshift 3; exec {sys.executable} {ANY_KVM} daemon "$@"'  # for: python -m kvik.daemon
        self.daemon = Kvikd("unshare", "--mount", "--net", "sh", "-c", become, "sh")
        self.root = self.daemon.root
        (self.root / "share").mkdir()
        (self.root / "kernel").write_bytes(kernel())
        (self.root / "editor").write_text(
            "#!/bin/sh\nsed -i 's|</name>|</name><description>edited</description>|' $1\n"
        )
        (self.root / "editor").chmod(0o755)
        for name in ("a.raw", "b.raw"):
            with (self.root / name).open("wb") as image:
                image.truncate(4 << 20)
        create(str(self.root / "lowest.qcow2"), "qcow2", 4 << 20)
        for name, below in (
            ("middle.qcow2", "lowest.qcow2"),
            ("below.qcow2", "middle.qcow2"),
            ("c.qcow2", "below.qcow2"),
        ):
            backing = str(self.root / below)
            create(str(self.root / name), "qcow2", 4 << 20, backing_file=backing, backing_format="qcow2")
        self.write("m", DOMAIN.format(name="m", root=self.root, devices=OWN.format(root=self.root)))
        self.write("c", DOMAIN.format(name="c", root=self.root, devices=""))
        for name, text in DEVICES.items():
            self.write(name, text.format(root=self.root))

    def write(self, name: str, text: str) -> None:
        (self.root / f"{name}.xml").write_text(text)

    def words(self, line: str) -> list[str]:
        def place(word: str) -> str:
            name = word.removeprefix("@")
            return word if name == word else str(self.root / (name if "." in name else f"{name}.xml"))

        return [place(word) for word in shlex.split(line)]

    def command(self, line: str) -> list[str]:
        words = self.words(line)
        start = [str(ANY_KVM), "cli"] if words[0] == "run" else ["-m", "kvik.cli.main"]
        return [sys.executable, *start, "-c", self.daemon.uri, *words]

    @property
    def environ(self) -> dict[str, str]:
        return {**self.daemon.environ, "NO_COLOR": "1", "EDITOR": str(self.root / "editor"), "LANG": "C.UTF-8"}

    def __call__(self, line: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(line), env=self.environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
            check=False,
        )  # fmt: skip

    def out(self, line: str) -> str:
        done = self(line)
        assert done.returncode == 0, (line, done.stderr)
        return done.stdout

    def until(self, line: str, wanted: str) -> None:
        end = time.monotonic() + 30
        while wanted not in (said := self.out(line)):
            assert time.monotonic() < end, (line, wanted, said)

    def close(self) -> None:
        try:
            for domain in self.daemon.connection.domains(1):
                domain.destroy()
            assert "failed unexpectedly" not in self.daemon.messages(), self.daemon.messages()
        finally:
            assert self.daemon.end() == 0
            shutil.rmtree(self.root, ignore_errors=True)

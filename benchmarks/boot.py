"""From `start` to the first program of the guest: kvik's document beside the one virt-install writes, interleaved.

Same kernel, same initramfs, software emulation for both. The initramfs holds one program, a few instructions of machine
code that print a mark on the console: what is measured is the machine and the kernel, not a distribution.
"""

from __future__ import annotations

import argparse
import os
import select
import struct
import tempfile
import time
from pathlib import Path

import peer
from report import Report

from kvik.cli import run_document
from kvik.guest.debs import Apt, deb_members
from kvik.guest.tiny import kernel_arguments
from kvik.image.cpio import CpioWriter
from kvik.paths import Paths

MARK = b"userspace reached"

# What `virt-install --import --boot kernel=...,initrd=... --graphics none --virt-type qemu` (4.1) writes.
VIRT_INSTALL = """<domain type="qemu">
  <name>boot</name>
  <memory>524288</memory>
  <currentMemory>524288</currentMemory>
  <vcpu>1</vcpu>
  <os>
    <type arch="x86_64" machine="q35">hvm</type>
    <kernel>{kernel}</kernel>
    <initrd>{initrd}</initrd>
    <cmdline>console=ttyS0</cmdline>
  </os>
  <features><acpi/><apic/></features>
  <clock offset="utc">
    <timer name="rtc" tickpolicy="catchup"/>
    <timer name="pit" tickpolicy="delay"/>
    <timer name="hpet" present="no"/>
  </clock>
  <pm><suspend-to-mem enabled="no"/><suspend-to-disk enabled="no"/></pm>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <controller type="usb" model="qemu-xhci" ports="15"/>
    <controller type="pci" model="pcie-root"/>
    {root_ports}
    <interface type="user"><model type="virtio"/></interface>
    <console type="pty"/>
    <channel type="unix"><source mode="bind"/><target type="virtio" name="org.qemu.guest_agent.0"/></channel>
    <memballoon model="virtio"/>
    <rng model="virtio"><backend model="random">/dev/urandom</backend></rng>
  </devices>
</domain>"""
ROOT_PORTS = 14


def init_program() -> bytes:
    """A static x86-64 ELF executable: write(1, MARK), then pause() for ever (System V ABI, generic and AMD64)."""
    text = MARK + b"\r\n"
    code = bytes.fromhex("b801000000 bf01000000 488d3515000000 ba".replace(" ", "")) + struct.pack("<I", len(text))
    code += bytes.fromhex("0f05 b822000000 0f05 ebf7 9090909090".replace(" ", ""))
    load, offset = 0x400000, 120
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01" + bytes(9), 2, 62, 1, load + offset, 64, 0, 0, 64, 56, 1, 0, 0, 0,
    )  # fmt: skip
    size = offset + len(code) + len(text)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, load, load, size, size, 4096)
    return header + segment + code + text


def write_initrd(path: Path) -> None:
    with path.open("wb") as stream, CpioWriter(stream) as archive:
        archive.device("dev/console", 0o020000, 5, 1)
        archive.file("init", init_program(), 0o755)


def fetch_kernel(metapackage: str, directory: Path) -> Path:
    """The bzImage of the kernel that a Debian metapackage depends on."""
    apt = Apt(Paths.default().cache / "apt")
    name = next(name for name in apt.show([metapackage])[metapackage].depends if name.startswith("linux-image-"))
    deb = apt.download(apt.show([name]).values())[0]
    member = next(iter(deb_members(deb.read_bytes(), lambda path: path.startswith("boot/vmlinuz-"))))
    kernel = directory / f"vmlinuz-{metapackage}"
    kernel.write_bytes(member.data)
    return kernel


def boot(daemon: peer.Daemon, deadline: float = 60.0) -> float:
    """Seconds from the start command to the mark on the serial console."""
    begun = time.perf_counter()
    daemon.run("start", "boot")
    terminal = os.open(daemon.run("ttyconsole", "boot").strip(), os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
    seen = b""
    try:
        while MARK not in seen:
            if time.perf_counter() - begun > deadline:
                raise RuntimeError(f"{daemon.name}: no userspace after {deadline} s: {seen[-500:]!r}")
            if select.select([terminal], [], [], 1.0)[0]:
                seen = (seen + os.read(terminal, 65536))[-65536:]
        return time.perf_counter() - begun
    finally:
        os.close(terminal)
        daemon.run("destroy", "boot")


def measure(rounds: int) -> Report:
    report = Report(f"boot to userspace, software emulation, {rounds} interleaved rounds, medians")
    with tempfile.TemporaryDirectory(dir="/tmp") as name, peer.libvirtd() as libvirtd, peer.kvikd() as kvikd:
        directory = Path(name)
        directory.chmod(0o755)
        initrd = directory / "initrd"
        write_initrd(initrd)
        for metapackage, what, times in (
            ("linux-image-cloud-amd64", "Debian's cloud kernel", 1.5),
            ("linux-image-amd64", "Debian's generic kernel", 3.0),
        ):
            kernel = fetch_kernel(metapackage, directory)
            ours = run_document.Machine("boot", accelerated=False)
            ours.kernel, ours.initrd = str(kernel), str(initrd)
            ours.append = kernel_arguments("tcg")
            ours.network = run_document.network_xml("user")
            documents = {
                kvikd.name: run_document.domain_xml(ours),
                libvirtd.name: VIRT_INSTALL.format(
                    kernel=kernel,
                    initrd=initrd,
                    root_ports='<controller type="pci" model="pcie-root-port"/>' * ROOT_PORTS,
                ),
            }
            for daemon in (kvikd, libvirtd):
                file = directory / f"{daemon.name}.xml"
                file.write_text(documents[daemon.name])
                daemon.run("define", str(file))
                boot(daemon)  # once unmeasured: caches of QEMU's capabilities and of the kernel fill
            samples: dict[str, list[float]] = {kvikd.name: [], libvirtd.name: []}
            for _ in range(rounds):
                for daemon in (kvikd, libvirtd):
                    samples[daemon.name].append(boot(daemon))
            for daemon in (kvikd, libvirtd):
                daemon.run("undefine", "boot")
            report.faster(what, samples[kvikd.name], samples[libvirtd.name], "s", times)
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    measure(parser.parse_args().rounds).show()

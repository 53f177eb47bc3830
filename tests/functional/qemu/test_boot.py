"""Machines that boot from a disk, a CD or UEFI firmware, each told by what it writes to its serial line."""

from __future__ import annotations

import asyncio
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvik.errors import HostError
from kvik.host.tsc import tsc_khz
from kvik.hypervisor.firmware import installed_firmware

sys.path.insert(0, str(Path(__file__).parent))
from test_goldens import no_kernel

needs_xorriso = pytest.mark.skipif(shutil.which("xorriso") is None, reason="needs xorriso (apt install xorriso)")
needs_ovmf = pytest.mark.skipif(
    not any(item.fits("x86_64", "pc-q35-7.2", False) for item in installed_firmware()),
    reason="needs UEFI firmware (apt install ovmf)",
)

DOMAIN = """<domain type='qemu'>
  <name>boot</name>
  <memory unit='MiB'>{memory}</memory>
  <os{firmware}><type arch='x86_64' machine='{machine}'>hvm</type>{boot}</os>
  <devices>
    {devices}
    <serial type='file'><source path='{serial}'/></serial>
    <memballoon model='none'/>
  </devices>
</domain>"""


def boot_code(text: str) -> bytes:
    """Real-mode code for 0000:7c00 that writes `text` to COM1 and halts; a boot sector of 512 bytes."""
    code = bytes.fromhex(
        "31c0 8ed8"  # xor ax, ax; mov ds, ax
        "be167c baf803"  # mov si, 0x7c16 (behind the code); mov dx, 0x3f8
        "ac 84c0 7403"  # lodsb; test al, al; jz +3
        "ee ebf8"  # out dx, al; jmp -8
        "fa f4 ebfd"  # cli; hlt; jmp -3
    )
    assert len(code) == 0x16
    return (code + text.encode() + b"\0").ljust(510, b"\0") + b"\x55\xaa"


@pytest.fixture
def disk(place: Path) -> Path:
    path = place / "disk.raw"
    path.write_bytes(boot_code("BOOTED FROM DISK").ljust(1 << 20, b"\0"))
    return path


@pytest.fixture
def cdrom(place: Path) -> Path:
    tree, path = place / "tree", place / "cd.iso"
    tree.mkdir()
    (tree / "boot.bin").write_bytes(boot_code("BOOTED FROM CD").ljust(2048, b"\0"))
    options = ["-o", str(path), "-b", "boot.bin", "-c", "boot.cat", "-no-emul-boot", "-boot-load-size", "4", str(tree)]
    subprocess.run(["xorriso", "-as", "mkisofs", *options], check=True, capture_output=True)
    return path


def disk_xml(path: Path, bus: str = "virtio", order: int = 0) -> str:
    name = {"virtio": "vda", "sata": "sda", "ide": "hda", "scsi": "sda", "usb": "sda"}[bus]
    boot = f"<boot order='{order}'/>" if order else ""
    return (
        f"<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{path}'/>"
        f"<target dev='{name}' bus='{bus}'/>{boot}</disk>"
    )


def cdrom_xml(path: Path, bus: str = "sata", order: int = 0) -> str:
    boot = f"<boot order='{order}'/>" if order else ""
    name = "hdc" if bus == "ide" else "sdc"
    return (
        f"<disk type='file' device='cdrom'><driver name='qemu' type='raw'/><source file='{path}'/>"
        f"<target dev='{name}' bus='{bus}'/><readonly/>{boot}</disk>"
    )


class Boot:
    def __init__(self, lab: Any, place: Path) -> None:
        self.lab = lab
        self.serial = place / "serial"

    async def start(self, devices: str, boot: str = "", machine: str = "q35", firmware: str = "") -> Any:
        self.serial.unlink(missing_ok=True)
        memory = 256 if firmware else 32
        xml = DOMAIN.format(
            devices=devices, boot=boot, machine=machine, firmware=firmware, serial=self.serial, memory=memory
        )
        return await self.lab.start(xml)

    async def says(self, *words: str, seconds: float = 60.0) -> str:
        """The first of `words` on the serial line."""
        end = asyncio.get_running_loop().time() + seconds
        text = ""
        while asyncio.get_running_loop().time() < end:
            text = self.serial.read_text("latin-1")
            # SeaBIOS' own last dots come late now and then, amid what the disk says.
            found = [word for word in words if word in text or word in text.replace(".", "").replace("\n", "")]
            if found:
                return found[0]
            await asyncio.sleep(0.05)
        raise AssertionError(f"none of {words} in {text!r}")


@pytest.fixture
def boot(lab: Any, place: Path) -> Boot:
    return Boot(lab, place)


@pytest.mark.parametrize(
    ("machine", "bus"), [("q35", "virtio"), ("q35", "sata"), ("q35", "scsi"), ("q35", "usb"), ("pc", "ide")]
)
async def test_seabios_boots_a_disk(boot: Boot, disk: Path, machine: str, bus: str) -> None:
    started = await boot.start(disk_xml(disk, bus), machine=machine)
    await boot.says("BOOTED FROM DISK")
    await started.quit()


@needs_xorriso
@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("<boot dev='cdrom'/><boot dev='hd'/>", "BOOTED FROM CD"),
        ("<boot dev='hd'/><boot dev='cdrom'/>", "BOOTED FROM DISK"),
        ("", "BOOTED FROM DISK"),
    ],
)
async def test_the_boot_order_of_the_machine(boot: Boot, disk: Path, cdrom: Path, order: str, expected: str) -> None:
    started = await boot.start(disk_xml(disk) + cdrom_xml(cdrom), order)
    assert await boot.says("BOOTED FROM CD", "BOOTED FROM DISK") == expected
    await started.quit()


@needs_xorriso
@pytest.mark.parametrize(("machine", "bus"), [("q35", "sata"), ("pc", "ide")])
@pytest.mark.parametrize("first", ["disk", "cd"])
async def test_the_boot_order_of_devices(
    boot: Boot, disk: Path, cdrom: Path, *, machine: str, bus: str, first: str
) -> None:
    orders = (1, 2) if first == "disk" else (2, 1)
    started = await boot.start(disk_xml(disk, "virtio", orders[0]) + cdrom_xml(cdrom, bus, orders[1]), machine=machine)
    assert await boot.says("BOOTED FROM CD", "BOOTED FROM DISK") == f"BOOTED FROM {first.upper()}"
    await started.quit()


@needs_xorriso
async def test_a_disk_that_cannot_boot_gives_way_to_the_cd(boot: Boot, cdrom: Path, place: Path) -> None:
    """To a CD, not to a second disk: SeaBIOS tries the first hard disk only."""
    blank = place / "blank.raw"
    blank.write_bytes(bytes(1 << 20))
    started = await boot.start(disk_xml(blank, "virtio", 1) + cdrom_xml(cdrom, "sata", 2))
    await boot.says("BOOTED FROM CD")
    await started.quit()


@needs_ovmf
async def test_uefi_firmware_runs_and_keeps_its_variables(boot: Boot, disk: Path, place: Path) -> None:
    variables = place / "root/var/lib/kvik/qemu/nvram/boot_VARS.fd"
    started = await boot.start(disk_xml(disk), firmware=" firmware='efi'")
    assert stat.S_IMODE(variables.stat().st_mode) == 0o600
    template = Path(started.domain.os.nvram.template).read_bytes()
    await boot.says("BdsDxe", "UEFI Interactive Shell")
    await started.quit()
    written = variables.read_bytes()
    assert len(written) == len(template) and written != template  # the firmware has noted its boot entries
    inode = variables.stat().st_ino
    started = await boot.start(disk_xml(disk), firmware=" firmware='efi'")
    assert variables.stat().st_ino == inode and variables.read_bytes()[:4096] == written[:4096]
    await started.quit()


@needs_ovmf
async def test_firmware_that_is_not_there_is_the_error(boot: Boot) -> None:
    loader = "<loader readonly='yes' type='pflash'>/nowhere/CODE.fd</loader><nvram template='/nowhere/VARS.fd'/>"
    with pytest.raises(HostError, match=r"/nowhere/CODE\.fd"):
        await boot.start("", boot=loader)


async def test_a_microvm_under_emulation_is_told_the_rate_of_the_tsc(lab: Any, place: Path) -> None:
    """Linux cannot always calibrate it there, and then hangs."""
    kernel = place / "vmlinuz"
    kernel.write_bytes(no_kernel())
    boot = f"<kernel>{kernel}</kernel>{{}}"
    for given, told in (("", True), ("<cmdline>quiet</cmdline>", True), ("<cmdline>tsc_early_khz=1</cmdline>", False)):
        xml = DOMAIN.format(
            devices="", boot=boot.format(given), machine="microvm", firmware="", serial=place / "s", memory=64
        )
        machine = await lab.start(xml, paused=True)
        words = (machine.domain.os.cmdline or "").split()
        assert (f"tsc_early_khz={tsc_khz()}" in words) is told
        assert sum(word.startswith("tsc_early_khz=") for word in words) == 1
        await machine.quit()
    machine = await lab.start(xml.replace("machine='microvm'", "machine='q35'"), paused=True)
    assert machine.domain.os.cmdline == "tsc_early_khz=1"
    await machine.quit()

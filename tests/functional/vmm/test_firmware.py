"""A firmware of a few instructions on the host's own /dev/kvm, from the reset vector to power off. What it does is
what OVMF does first, in its order: protected mode, the host bridge, fw_cfg, the tick, the flash; it reboots once."""

from __future__ import annotations

import asyncio
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from functional.vmm.guests import needs_kvm
from kvik.errors import ImageError, InvalidArgument
from kvik.hypervisor.driver import HostVerdict
from kvik.hypervisor.kvik.driver import KvikDriver
from kvik.hypervisor.test.driver import TestDriver
from kvik.manager.manager import Manager
from kvik.paths import Paths
from kvik.vmm.build import build
from kvik.vmm.config import CharConfig, DiskConfig, MachineConfig
from kvik.vmm.layout import MIB
from kvik.vmm.machine import Machine

pytestmark = needs_kvm

SOURCE = """
    .code16
    .globl _start
_start:
    cli
    lgdtl %cs:(pointer - _start)
    movl %cr0, %eax
    orl $1, %eax
    movl %eax, %cr0
    ljmpl $8, $protected
    .code32
protected:
    movw $16, %ax
    movw %ax, %ds
    movw %ax, %es
    movl $0x80000000, %eax      # the host bridge's identity: '4' if it is the 440FX
    movw $0xcf8, %dx
    outl %eax, %dx
    movw $0xcfc, %dx
    inl %dx, %eax
    cmpl $0x12378086, %eax
    jne stop
    movb $'4', %al
    movw $0x402, %dx
    outb %al, %dx
    movw $0x510, %dx            # fw_cfg's signature, passed on
    xorl %eax, %eax
    outw %ax, %dx
    movl $4, %ecx
1:  movw $0x511, %dx
    inb %dx, %al
    movw $0x402, %dx
    outb %al, %dx
    loop 1b
    movl $0x8000, %esp          # three ticks, by the first 8259, whose vectors begin at 0x20
    movb $0, 0x500
    movl $tick, %eax
    andl $0xffff, %eax
    orl $0x80000, %eax
    movl %eax, 0x1100
    movl $0xffff8e00, 0x1104
    lidtl vectors
    movl $initialization, %esi
    movl $9, %ecx
2:  lodsb
    movzbl %al, %edx
    lodsb
    outb %al, %dx
    loop 2b
    sti
3:  hlt
    cmpb $3, 0x500
    jb 3b
    cli
    movb $'T', %al
    movw $0x402, %dx
    outb %al, %dx
    movl $0xfffee000, %ebx      # the flash: how often we were here; one more
    movb (%ebx), %cl
    movb $0x10, (%ebx)
    movb %cl, %al
    incb %al
    movb %al, (%ebx)
    movb $0xff, (%ebx)
    cmpb %al, (%ebx)
    jne stop
    cmpb $1, %al
    ja off
    movw $0xcf9, %dx
    movb $6, %al
    outb %al, %dx
off:
    movw $0xb004, %dx
    movw $0x2000, %ax
    outw %ax, %dx
stop:
    hlt
    jmp stop
tick:
    incb 0x500
    movb $0x20, %al
    outb %al, $0x20
    popl %ecx                   # for iret, which KVM emulates in real mode only where it has to emulate
    addl $8, %esp
    sti
    jmp *%ecx
initialization:                 # port, value
    .byte 0x20, 0x11, 0x21, 0x20, 0x21, 4, 0x21, 1, 0x21, 0xfe, 0xa1, 0xff
    .byte 0x43, 0x34, 0x40, 0xa9, 0x40, 4
vectors:
    .word 0x7ff
    .long 0x1000
    .balign 8
table:
    .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
pointer:
    .word 23
    .long table
    .org 0xfff0
    .code16
    jmp _start
    .org 0x10000
"""
SIZE, FLASH_SIZE = 0x10000, 0x2000
DOCUMENT = """<domain type='kvm'><name>m</name><memory unit='MiB'>32</memory><os><type machine='kvik'>hvm</type>
<loader type='pflash' readonly='yes'>{code}</loader><nvram template='{template}'/></os>
<devices><emulator>kvik-vmm</emulator><memballoon model='none'/></devices></domain>"""


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("as") is None or shutil.which("ld") is None:
        pytest.skip("needs binutils (apt install binutils)")
    place = tmp_path_factory.mktemp("firmware")
    (place / "source.s").write_text(SOURCE)
    subprocess.run(["as", "--32", "-o", "object", "source.s"], cwd=place, check=True)
    link = ["ld", "-m", "elf_i386", "-Ttext=0xffff0000", "--oformat", "binary", "-o", "code", "object"]
    subprocess.run(link, cwd=place, check=True)
    assert (place / "code").stat().st_size == SIZE
    return place / "code"


def config_of(code: Path, place: Path) -> MachineConfig:
    config = MachineConfig(name="firmware", debugcon=[CharConfig(backend=f"file:{place / 'log'}")])
    config.serials = [CharConfig(backend="null")]
    config.boot.firmware, config.boot.nvram = str(code), str(place / "vars")
    config.memory.size = 32 * MIB
    if not (place / "vars").exists():
        (place / "vars").write_bytes(bytes(FLASH_SIZE))
    return config


def run(machine: Machine) -> str:
    machine.loop.call_later(60, lambda: machine.quit("too slow"))
    return machine.run()


def test_it_runs_from_the_reset_vector_reboots_with_its_flash_kept_and_powers_off(code: Path, tmp_path: Path) -> None:
    machine = build(config_of(code, tmp_path))
    events: list[str] = []
    machine.listeners.append(lambda name, data: events.append(name))
    assert run(machine) == "guest-shutdown"
    assert events.count("RESET") == 1 and (tmp_path / "log").read_bytes() == b"4QEMUT" * 2
    assert (tmp_path / "vars").read_bytes() == b"\x02" + bytes(FLASH_SIZE - 1)


def test_a_restored_machine_has_its_own_flash_and_goes_on(code: Path, tmp_path: Path) -> None:
    machine = build(config_of(code, tmp_path))
    for value in (0x10, 0x77, 0xFF):  # program a byte, read again
        machine.find("nvram").write(1, 1, value)
    machine.save(str(tmp_path / "saved"))
    machine.close()
    (tmp_path / "vars").write_bytes(bytes(FLASH_SIZE))
    again = Machine.restore(str(tmp_path / "saved"))
    assert run(again) == "guest-shutdown"
    assert (tmp_path / "vars").read_bytes()[:2] == b"\x02\x77"


def test_what_cannot_be_started_is_said_and_leaves_nothing_open(code: Path, tmp_path: Path) -> None:
    config = config_of(code, tmp_path)
    config.boot.kernel = str(code)
    with pytest.raises(InvalidArgument, match="with firmware or with a kernel"):
        build(config)
    config = config_of(code, tmp_path)
    (tmp_path / "vars").write_bytes(bytes(100))
    with pytest.raises(ImageError, match="no flash image"):
        build(config)


def test_the_command_runs_it_inside_the_sandbox(code: Path, tmp_path: Path) -> None:
    (tmp_path / "vars").write_bytes(bytes(FLASH_SIZE))
    words = ["--firmware", str(code), "--nvram", str(tmp_path / "vars"), "--debugcon", f"file:{tmp_path / 'log'}"]
    done = subprocess.run(
        [sys.executable, "-m", "kvik.vmm.main", *words, "--serial", "null", "--memory", "32M"],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "log").read_bytes() == b"4QEMUT" * 2 and (tmp_path / "vars").read_bytes()[0] == 2


def test_the_firmware_is_told_of_memory_processors_disks_and_tables(code: Path, tmp_path: Path) -> None:
    config = config_of(code, tmp_path)
    config.cpus.count = 2
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(bytes(MIB))
        config.disks.append(DiskConfig(path=str(tmp_path / name), iothread=False))
    config.disks[0].slot = 9
    with build(config) as machine:
        items = machine.find("fw_cfg").items
        entries = items[0x19]
        names = [entries[at + 8 : at + 64].rstrip(b"\0").decode() for at in range(4, len(entries), 64)]
        files = {name: items[0x20 + number] for number, name in enumerate(names)}
        assert files["bootorder"] == b"/pci@i0cf8/scsi@9/disk@0,0\n/pci@i0cf8/scsi@2/disk@0,0\0"
        assert files["etc/e820"] == struct.pack("<QQI", 0, 32 * MIB, 1)
        assert items[5] == b"\2\0" and files["etc/smbios/smbios-anchor"][:5] == b"_SM3_"
        assert {"etc/table-loader", "etc/acpi/tables", "etc/acpi/rsdp"} <= set(files)
        cmos = machine.devices["rtc"].cmos
        assert struct.unpack_from("<H", cmos, 0x34) == (16 * MIB >> 16,) and bytes(cmos[0x5B:0x5E]) == bytes(3)


async def test_a_document_with_firmware_runs_under_the_manager(code: Path, tmp_path: Path) -> None:
    """Its variables are made from the template at the first start, and kept."""
    (tmp_path / "template").write_bytes(bytes(FLASH_SIZE))
    paths = Paths.system(tmp_path / "state")
    ours = KvikDriver(paths, lambda: HostVerdict(True, "told so"))
    manager = Manager(paths, {"qemu": TestDriver(), "kvik-vmm": ours})
    await manager.open()
    try:
        domain = await manager.define(DOCUMENT.format(code=code, template=tmp_path / "template"))
        for runs in (1, 2):
            await domain.start()
            async with asyncio.timeout(60):
                while domain.is_active:
                    await asyncio.sleep(0.01)
            variables = paths.nvram / "m_VARS.fd"
            assert variables.read_bytes() == bytes([1 + runs]) + bytes(FLASH_SIZE - 1)
    finally:
        await manager.close()

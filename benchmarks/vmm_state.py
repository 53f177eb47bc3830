"""The state of a kvik-vmm machine: resets a second, save and restore, a migration's total time and downtime.

    python benchmarks/vmm_state.py [--memory MIB] [--dirty MIB]

The guest is 45 bytes of 32-bit code that writes one word in each page of an area, over and over, so this runs on any
KVM. Restoring a stock kernel beside QEMU's incoming migration: `vmm_boot.py --what restores`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from kvik.kvm.structs import Segment
from kvik.vmm.build import add_vcpus
from kvik.vmm.config import MachineConfig, MemoryConfig
from kvik.vmm.machine import Machine
from kvik.vmm.state.migration import await_incoming, migration_of
from kvik.vmm.state.snapshot import fill_and_apply, read

MIB = 1 << 20
CODE, COUNTER, AREA = 0x1000, 0x8000, 0x20_0000


def program(pages: int) -> bytes:
    """1: mov esi, AREA; mov ecx, pages; 2: inc dword [esi]; add esi, 4096; dec ecx; jnz 2b; inc dword [COUNTER];
    jmp 1b"""
    code = b"\xbe" + AREA.to_bytes(4, "little") + b"\xb9" + pages.to_bytes(4, "little")
    code += bytes.fromhex("ff06 81c600100000 49 75f5 ff05") + COUNTER.to_bytes(4, "little")
    return code + b"\xeb" + (256 - len(code) - 2).to_bytes(1, "little")


def make(memory: int, dirty: int) -> Machine:
    machine = Machine(MachineConfig(memory=MemoryConfig(size=memory)))
    add_vcpus(machine)
    machine.memory.write(CODE, program(dirty // 4096))
    vcpu = machine.vcpus[0].vcpu
    sregs = vcpu.sregs()
    sregs.cs = Segment(0, 0xFFFFFFFF, 8, type=11, present=1, s=1, db=1, g=1)
    data = Segment(0, 0xFFFFFFFF, 16, type=3, present=1, s=1, db=1, g=1)
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data
    sregs.cr0 = 0x11
    vcpu.set_sregs(sregs)
    registers = vcpu.regs()
    registers.rip, registers.rflags = CODE, 2
    vcpu.set_regs(registers)
    return machine


def until(condition: Callable[[], object], *machines: Machine) -> None:
    while not condition():
        for machine in machines:
            machine.loop.run_once(0.001)


def resets(memory: int, dirty: int, count: int = 200) -> tuple[float, float]:
    """Resets a second, each after at least one round of writes; and milliseconds in `rewind` alone."""
    with make(memory, dirty) as machine:
        machine.start()
        until(lambda: machine.memory.u32(COUNTER) > 1, machine)
        machine.pause()
        machine.checkpoint()
        start, inside, pages = machine.memory.u32(COUNTER), 0.0, 0
        began = time.perf_counter()
        for _ in range(count):
            machine.resume()
            while machine.memory.u32(COUNTER) < start + 2:
                time.sleep(0)
            machine.pause()
            mark = time.perf_counter()
            pages = machine.rewind()
            inside += time.perf_counter() - mark
        seconds = time.perf_counter() - began
        assert pages * 4096 >= dirty, pages
        return count / seconds, inside / count * 1e3


def save_and_restore(memory: int, dirty: int, compression: str) -> tuple[float, float]:
    """Seconds to save, and from the files to a running vCPU that has written."""
    with tempfile.TemporaryDirectory() as directory:
        place = f"{directory}/saved"
        with make(memory, dirty) as machine:
            machine.start()
            until(lambda: machine.memory.u32(COUNTER) > 1, machine)
            began = time.perf_counter()
            machine.save(place, compression)
            saved = time.perf_counter() - began
        with make(memory, dirty) as machine:
            began = time.perf_counter()
            fill_and_apply(machine, read(place), fresh=True)
            before = machine.memory.u32(COUNTER)
            machine.start()
            until(lambda: machine.memory.u32(COUNTER) > before, machine)
            return saved, time.perf_counter() - began


def migrate(memory: int, dirty: int, channels: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory, make(memory, dirty) as here, make(memory, dirty) as there:
        for at in range(AREA + dirty, memory // 2, MIB):
            here.memory.write(at, bytes(range(256)) * 4096)  # half of RAM in use
        await_incoming(there, f"unix:{directory}/socket")
        here.start()
        until(lambda: here.memory.u32(COUNTER) > 1, here)
        migration = migration_of(here)
        migration.set_parameters({"multifd-channels": channels})
        migration.set_capability("multifd", channels > 1)
        migration.start(f"unix:{directory}/socket")
        until(lambda: migration.report()["status"] in ("completed", "failed"), here, there)
        return migration.report()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=int, default=128, help="MiB of RAM")
    parser.add_argument("--dirty", type=int, default=1, help="MiB that the guest writes")
    options = parser.parse_args()
    sys.setswitchinterval(1e-4)  # as kvik-vmm does
    memory, dirty = options.memory * MIB, options.dirty * MIB
    rate, inside = resets(memory, dirty)
    print(f"resets {rate:17.0f} a second, {inside:.2f} ms each ({options.dirty} MiB of {options.memory} dirty)")
    for compression in ("none", "zlib"):
        saved, restored = save_and_restore(memory, dirty, compression)
        print(f"snapshot {compression:6} save {saved * 1e3:7.1f} ms, restore to running {restored * 1e3:7.1f} ms")
    for channels in (1, 2):
        report = migrate(memory, dirty, channels)
        ram = report["ram"]
        times = f"{report['total-time']} ms, downtime {report.get('downtime')} ms"
        rounds = f"{ram['mbps'] / 8:.0f} MB/s in the last of {ram['dirty-sync-count']} rounds"
        print(f"migration x{channels}    {times}, {ram['transferred'] >> 20} MiB, {rounds}")


if __name__ == "__main__":
    main()

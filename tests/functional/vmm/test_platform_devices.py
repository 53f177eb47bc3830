"""The platform's small devices as a guest meets them: 16-bit code on this host's KVM, in a machine with little else."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import restored

from kvik.kvm.structs import Regs
from kvik.vmm.backends.char import Chardev
from kvik.vmm.config import MachineConfig
from kvik.vmm.device import Device
from kvik.vmm.devices.debugcon import Debugcon
from kvik.vmm.devices.pvpanic import Pvpanic
from kvik.vmm.devices.rtc import Rtc
from kvik.vmm.machine import Machine

pytestmark = [
    pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm may not be opened here"),
    restored.either_way,
]

CODE, HANDLER, VECTOR = 0x1000, 0x1100, 0x40
POWER_OFF = "ba 05 05 b0 04 ee f4"  # mov $0x505,%dx; mov $4,%al; out %al,(%dx); hlt: pvpanic's shutdown
LIMIT = 30.0  # seconds, for a guest that does not end
Events = list[tuple[str, dict[str, Any]]]


def run(
    code: str,
    *devices: Callable[[], Device],
    handler: str = "",
    on_panic: str = "pause",
    prepare: Callable[[Machine], None] | None = None,
) -> tuple[Machine, Events]:
    """Until the guest ends it; what the machine told. On a restored machine the devices were saved with it."""

    def make() -> Machine:
        config = MachineConfig(name="platform")
        config.memory.size, config.on_panic = 1 << 20, on_panic
        machine = Machine(config)
        for device in (Pvpanic, *devices):
            machine.add(device())
        vcpu = machine.add_vcpu(0).vcpu
        sregs = vcpu.sregs()
        for segment in (sregs.cs, sregs.ds, sregs.es, sregs.ss):
            segment.base = segment.selector = 0
        vcpu.set_sregs(sregs)
        vcpu.set_regs(Regs(rip=CODE, rsp=0x8000, rflags=2))
        machine.memory.write(CODE, bytes.fromhex(code))
        machine.memory.write(HANDLER, bytes.fromhex(handler))
        machine.memory.write(VECTOR * 4, HANDLER.to_bytes(4, "little"))
        if prepare is not None:
            prepare(machine)
        return machine

    machine = restored.either(make, "real")
    events: Events = []
    machine.listeners.insert(0, lambda name, data: events.append((name, data)))
    timer = machine.loop.call_later(LIMIT, lambda: machine.quit("too slow"))
    machine.run()
    timer.cancel()
    return machine, events


def names(events: Events) -> list[str]:
    return [name for name, _ in events]


def test_a_guest_powers_off_through_pvpanic() -> None:
    machine, events = run(POWER_OFF)
    assert machine.outcome == "guest-shutdown" and machine.status == "shutdown"
    assert names(events) == ["RESUME", "GUEST_PVSHUTDOWN", "SHUTDOWN"]


def test_a_panic_ends_the_machine_if_it_shall() -> None:
    machine, events = run("ba 05 05 ec 24 01 ee f4", on_panic="exit-failure")  # in (%dx),%al; and $1,%al; out
    assert (machine.outcome, machine.exit_code) == ("guest-panic", 1)
    assert ("GUEST_PANICKED", {"action": "poweroff"}) in events


def test_a_panic_stops_the_guest() -> None:
    def end_when_stopped(machine: Machine) -> None:
        machine.listeners.append(lambda name, data: machine.quit(machine.status) if name == "STOP" else None)

    # After the panic a byte to port 0x10 of nobody, then the shutdown: neither may come.
    machine, events = run("ba 05 05 b0 01 ee " + POWER_OFF, prepare=end_when_stopped)
    assert machine.outcome == "guest-panicked"
    assert names(events)[:3] == ["RESUME", "GUEST_PANICKED", "STOP"] and "GUEST_PVSHUTDOWN" not in names(events)


def test_the_debug_console_writes_a_file(tmp_path: Path) -> None:
    code = "b0 6f e6 e9 b0 6b e6 e9" + POWER_OFF  # 'o', 'k'
    run(code, lambda: Debugcon("debug", Chardev(f"file:{tmp_path / 'log'}")))
    assert (tmp_path / "log").read_bytes() == b"ok"


def test_a_guest_reads_the_clock(tmp_path: Path) -> None:
    # century, year, month, day, hour to the debug console: mov $r,%al; out %al,$0x70; in $0x71,%al; out %al,$0xe9
    code = "".join(f"b0 {register:02x} e6 70 e4 71 e6 e9" for register in (0x32, 9, 8, 7, 4)) + POWER_OFF
    before = time.gmtime()
    run(code, Rtc, lambda: Debugcon("debug", Chardev(f"file:{tmp_path / 'log'}")))
    after = time.gmtime()
    said = (tmp_path / "log").read_bytes().hex()
    assert said in {time.strftime("%Y%m%d%H", at) for at in (before, after)}


def test_the_clocks_update_interrupts_a_waiting_guest() -> None:
    def enable(machine: Machine) -> None:
        vcpu = machine.vcpus[0].vcpu
        lapic = bytearray(vcpu.lapic())
        lapic[0xF0:0xF4] = (0x1FF).to_bytes(4, "little")
        lapic[0x350:0x354] = (0x10000).to_bytes(4, "little")
        vcpu.set_lapic(bytes(lapic))
        chip = bytearray(machine.vm.irqchip(2))
        chip[24 + 8 * 8 : 24 + 8 * 9] = VECTOR.to_bytes(8, "little")  # IOAPIC pin 8
        machine.vm.set_irqchip(2, bytes(chip))

    # B := 24 hours, update interrupt; sti; 1: hlt; jmp 1b
    code = "b0 0b e6 70 b0 12 e6 71 fb f4 eb fd"
    machine, _ = run(code, Rtc, handler=POWER_OFF, prepare=enable)
    assert machine.outcome == "guest-shutdown"

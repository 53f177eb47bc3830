"""The machine with tiny guests on this host's KVM: the loop, its buses, stopping and starting, resets, ends."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
from restored import booted_only, either_way

from functional.vmm.guests import machine_with, needs_kvm
from kvik.errors import AlreadyExists, OperationInvalid
from kvik.vmm.config import MachineConfig
from kvik.vmm.device import MmioDevice, PortDevice
from kvik.vmm.machine import Machine

pytestmark = [needs_kvm, either_way]

PORT = 0x5F0


class Probe(PortDevice):
    """Records what the guest writes; a value in `ends` powers the machine off."""

    kind, base, size = "probe", PORT, 8

    def __init__(self, ends: int = 0xFF) -> None:
        self.seen: list[tuple[int, int, int]] = []
        self.ends = ends
        self.answer = 0
        super().__init__("probe")

    def attach(self, machine: Machine) -> None:
        super().attach(machine)
        self.machine = machine

    def read(self, offset: int, size: int) -> int:
        return self.answer

    def write(self, offset: int, size: int, value: int) -> None:
        self.seen.append((offset, size, value))
        if value == self.ends:
            self.machine.hold_caller()
            self.machine.request_shutdown()


def out(value: int) -> bytes:
    """mov $value, %al; mov $PORT, %dx; out %al, %dx"""
    return bytes((0xB0, value, 0xBA)) + PORT.to_bytes(2, "little") + b"\xee"


HALT = b"\xf4\xeb\xfd"  # 1: hlt; jmp 1b
LOOP = b"\xeb\xfe"
END = out(0xFF) + HALT


def run(code: bytes, probe: Probe, **options: Any) -> Machine:
    machine = machine_with(code, **options)
    machine.add(probe)
    machine.loop.call_later(20, lambda: machine.quit("took too long"))
    assert machine.run() == "guest-shutdown"
    return machine


def test_a_guest_s_port_writes_reach_the_device() -> None:
    probe = Probe()
    machine = run(out(7) + out(8) + END, probe)
    assert probe.seen == [(0, 1, 7), (0, 1, 8), (0, 1, 0xFF)]
    assert machine.outcome == "guest-shutdown" and machine.status == "shutdown"


def test_what_it_reads_comes_back_with_the_right_width() -> None:
    probe = Probe()
    probe.answer = 0x11223344
    # mov $PORT,%dx; in (%dx),%ax; mov %ax,0x2000; in (%dx),%eax; mov %eax,0x2004
    code = b"\xba" + PORT.to_bytes(2, "little") + bytes.fromhex("ed a30020 66ed 66a30420") + END
    seen: list[bytes] = []
    machine = machine_with(code)
    machine.add(probe)
    machine.listeners.append(
        lambda name, data: seen.append(machine.memory.read(0x2000, 8)) if name == "SHUTDOWN" else None
    )
    machine.run()
    assert seen[0] == bytes.fromhex("4433 0000 44332211")


def test_string_output_arrives_byte_by_byte() -> None:
    probe = Probe()
    # mov $0x1000,%si; mov $5,%cx; mov $PORT,%dx; cld; rep outsb
    code = bytes.fromhex("be0010 b90500 ba") + PORT.to_bytes(2, "little") + bytes.fromhex("fc f36e") + END
    run(code, probe)
    assert bytes(value for _, _, value in probe.seen[:5]) == code[:5]


def test_memory_that_is_no_ram_reaches_the_mmio_bus() -> None:
    class Register(MmioDevice):
        kind, base, size = "register", 0xFEB0_0000, 0x1000

        def __init__(self) -> None:
            self.seen: list[tuple[int, int, int]] = []
            super().__init__("register")

        def read(self, offset: int, size: int) -> int:
            return 0x5A

        def write(self, offset: int, size: int, value: int) -> None:
            self.seen.append((offset, size, value))

    # Unreal mode is not needed: with RAM of 64 KiB what lies behind it is memory-mapped I/O.
    register, probe = Register(), Probe()
    register.base = 0x10_0000 - 0x1000
    # mov $0xFF00,%ax; mov %ax,%ds; mov 0x10,%al (DS:0x10 = 0xFF010); mov $PORT,%dx; out %al,%dx; movb $3,0x20
    code = bytes.fromhex("b800ff 8ed8 a01000 ba") + PORT.to_bytes(2, "little") + bytes.fromhex("ee c606200003") + END
    machine = machine_with(code, memory=0x10000)
    machine.add(register)
    machine.add(probe)
    machine.loop.call_later(20, lambda: machine.quit("took too long"))
    assert machine.run() == "guest-shutdown"
    assert probe.seen[0] == (0, 1, 0x5A) and register.seen == [(0x20, 1, 3)]


def test_pause_stops_the_guest_and_resume_goes_on() -> None:
    probe = Probe()
    # 1: incw 0x2000; jmp 1b
    machine = machine_with(bytes.fromhex("ff060020 ebfa"))
    events: list[str] = []
    machine.listeners.append(lambda name, data: events.append(name))
    counts: list[int] = []

    def look() -> None:
        machine.pause()
        counts.append(machine.memory.u16(0x2000))
        time.sleep(0.02)
        counts.append(machine.memory.u16(0x2000))
        machine.resume()
        time.sleep(0.05)
        with machine.paused():
            counts.append(machine.memory.u16(0x2000))
            assert machine.still and machine.status == "running"
        assert not machine.still
        machine.quit()

    machine.add(probe)
    machine.loop.call_later(0.05, look)
    machine.run()
    assert counts[0] == counts[1] != counts[2]
    assert events == ["RESUME", "STOP", "RESUME", "SHUTDOWN"]


def test_a_machine_that_starts_paused_waits() -> None:
    probe = Probe()
    machine = machine_with(out(1) + END)
    machine.add(probe)
    states: list[tuple[str, int]] = []

    def look() -> None:
        states.append((machine.status, len(probe.seen)))
        machine.resume()

    machine.loop.call_later(0.05, look)
    assert machine.run(paused=True) == "guest-shutdown"
    assert states == [("prelaunch", 0)] and len(probe.seen) == 2


def test_pausing_again_and_again_loses_nothing() -> None:
    probe = Probe(ends=-1)
    # a counter in memory, written to the port each time: every value must arrive once, in order
    code = b"\xba" + PORT.to_bytes(2, "little") + bytes.fromhex("31c0 ef 40 3d0008 75f9") + END  # until ax = 0x800
    probe.ends = 0xFF
    machine = machine_with(code)
    machine.add(probe)

    def again() -> None:
        with machine.paused():
            pass
        machine.loop.call_later(0.0005, again)

    machine.loop.call_later(0.001, again)
    machine.loop.call_later(30, lambda: machine.quit("took too long"))
    probe.ends = 0x10000  # no value of the counter
    original = probe.write

    def write(offset: int, size: int, value: int) -> None:
        original(offset, size, value)
        if size == 1 and value == 0xFF:
            machine.hold_caller()
            machine.request_shutdown()

    probe.write = write
    assert machine.run() == "guest-shutdown"
    assert [value for _, size, value in probe.seen if size == 2] == list(range(0x800))


def test_a_triple_fault_resets_and_the_program_starts_again() -> None:
    probe = Probe()
    # mov $1,%al; mov $PORT,%dx; out %al,%dx; ud2
    machine = machine_with(bytes.fromhex("b001 66ba f005 ee 0f0b"), mode="protected")
    machine.add(probe)
    events: list[tuple[str, dict[str, Any]]] = []
    machine.listeners.append(lambda name, data: events.append((name, data)))
    machine.listeners.append(lambda name, data: machine.quit() if len(probe.seen) >= 3 else None)
    machine.loop.call_later(20, lambda: machine.quit("took too long"))
    machine.run()
    resets = [data for name, data in events if name == "RESET"]
    assert len(resets) >= 2 and resets[0] == {"guest": True, "reason": "guest-reset"}
    assert machine.outcome == "host-qmp-quit"


@pytest.mark.parametrize(("policy", "status"), [("shutdown", "shutdown"), ("none", "paused")])
def test_a_guest_s_reboot_may_end_or_stop_the_machine(policy: str, status: str) -> None:
    machine = machine_with(b"\x0f\x0b", mode="protected", change=lambda config: setattr(config, "on_reboot", policy))
    seen: list[str] = []
    machine.listeners.append(lambda name, data: seen.append(machine.status))
    machine.loop.call_later(0.5, lambda: machine.quit("enough"))
    machine.run()
    assert status in seen


def test_a_reset_from_outside_starts_over() -> None:
    probe = Probe(ends=-1)
    machine = machine_with(out(1) + LOOP)
    machine.add(probe)

    def reset() -> None:
        machine.reset()
        machine.loop.call_later(0.1, machine.quit)

    machine.loop.call_later(0.1, reset)
    machine.run()
    assert probe.seen == [(0, 1, 1), (0, 1, 1)]


def test_a_device_that_raises_stops_the_machine_and_not_the_process(capfd: pytest.CaptureFixture[str]) -> None:
    class Broken(Probe):
        def write(self, offset: int, size: int, value: int) -> None:
            raise ValueError("a bug of a device")

    machine = machine_with(out(1) + END)
    machine.add(Broken())
    states: list[str] = []

    def look() -> None:
        states.append(machine.status)
        machine.quit()

    machine.loop.call_later(0.3, look)
    machine.run()
    assert states == ["internal-error"]
    assert "vCPU 0 cannot go on: ValueError: a bug of a device" in capfd.readouterr().err


def test_a_stopped_machine_of_internal_error_does_not_go_on_before_a_reset() -> None:
    machine = machine_with(HALT)
    machine.start()
    machine.pause("internal-error")
    with pytest.raises(OperationInvalid, match="reset it first"):
        machine.resume()
    machine.reset()
    assert machine.status == "paused"
    machine.resume()
    machine.close()


def test_names_are_unique_and_nothing_is_left_of_what_failed() -> None:
    with machine_with(HALT) as machine:
        machine.add(Probe())
        with pytest.raises(AlreadyExists, match="probe"):
            machine.add(Probe())
        other = Probe()
        other.name = "other"
        with pytest.raises(Exception, match="overlaps probe"):
            machine.add(other)
        assert "other" not in machine.devices
        machine.remove("probe")
        machine.add(Probe())


def test_closing_gives_everything_back() -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    def mapped() -> int:
        with open("/proc/self/maps") as stream:
            return sum(1 for line in stream if "kvm-v" in line)

    run(END, Probe())
    before = descriptors(), mapped()
    for _ in range(5):
        run(END, Probe(), cpus=3)
    assert (descriptors(), mapped()) == before


def test_64_vcpus_start_stop_and_end() -> None:
    machine = machine_with(HALT, cpus=64)
    machine.loop.call_later(0.1, lambda: machine.pause() or machine.resume() or machine.quit())
    assert machine.run() == "host-qmp-quit"


def test_the_trace_counts_what_the_guest_did(capsys: pytest.CaptureFixture[str]) -> None:
    from kvik.vmm.trace import Trace

    machine = machine_with(out(1) + out(2) + END)
    machine.trace = Trace()
    machine.add(Probe())
    machine.run()
    text = machine.trace.summary()
    assert "vCPU 0:" in text and "IO" in text and hex(PORT) in text


@booted_only
def test_without_kvm_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvik.errors import HostError

    def refused(path: str, *arguments: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("kvik.kvm.system.os.open", refused)
    with pytest.raises(HostError, match=r"cannot open /dev/kvm: Permission denied.*kvik doctor"):
        Machine(MachineConfig())

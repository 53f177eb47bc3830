"""The debug console: bytes from port 0xE9 into a file, and what the host does not take."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from kvik.vmm.backends.char import Chardev
from kvik.vmm.devices.debugcon import Debugcon
from unit.vmm.devices.machine import FakeMachine


def test_bytes_arrive_and_a_read_says_that_it_is_there(tmp_path: Path) -> None:
    machine, log = FakeMachine(), tmp_path / "log"
    device = Debugcon("debug", Chardev(f"file:{log}"))
    device.attach(machine)
    for byte in b"firmware":
        machine.ports.write(0xE9, 1, byte)
    machine.turn()
    assert machine.ports.read(0xE9, 1) == 0xE9
    device.close()
    device.close()
    assert log.read_bytes() == b"firmware"
    assert device.stats() == {"bytes_sent": 8, "bytes_dropped": 0}
    assert machine.ports.read(0xE9, 1) == 0xFF


def test_what_nobody_takes_is_dropped_and_counted() -> None:
    full = SimpleNamespace(write=lambda data: 0, open=lambda loop, on_input: None, close=lambda: None)
    machine, device = FakeMachine(), Debugcon("debug", full)
    device.attach(machine)
    machine.ports.write(0xE9, 1, 1)
    assert device.stats() == {"bytes_sent": 0, "bytes_dropped": 1}

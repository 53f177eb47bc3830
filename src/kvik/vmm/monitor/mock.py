"""What the monitor asks of a machine, without KVM: for tests and fuzzers of the control plane.

`MonitoredMock` goes before a class that has memory, buses, devices and a loop (`virtio.mock_machine.MockMachine`, or
attributes of the test's own), and has the same rules about its status as `runstate.RunState`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvik.errors import NoDevice, OperationInvalid
from kvik.kvm.structs import Regs, Sregs
from kvik.vmm.config import MachineConfig

__all__ = ["MonitoredMock", "VcpuMock", "VcpuThreadMock"]

MIB = 1 << 20


class VcpuMock:
    """Remembers NMIs; its registers are zero and its page tables map the first `size` bytes to themselves."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.nmis = 0

    def nmi(self) -> None:
        self.nmis += 1

    def regs(self) -> Regs:
        return Regs()

    def sregs(self) -> Sregs:
        return Sregs()

    def translate(self, address: int) -> Any:
        class Translation:
            valid, physical_address = address < self.size, address

        return Translation


class VcpuThreadMock:
    def __init__(self, index: int, size: int) -> None:
        self.name = ""
        self.index, self.thread_id, self.exits, self.vcpu = index, 1000 + index, [0] * 64, VcpuMock(size)


class MonitoredMock:
    """`calls` are the commands that a machine would have carried out, `holds` how often it is held right now."""

    config: MachineConfig
    devices: dict[str, Any]

    def prepare(self, name: str, size: int = 16 * MIB) -> None:
        self.config = MachineConfig(name=name, uuid="c7a5fdbd-edaf-9455-926a-d65c16db1809")
        self.config.memory.size = size
        self.config.cpus.count, self.config.cpus.maximum = 2, 4
        self.status = "running"
        self.vcpus = [VcpuThreadMock(0, size), VcpuThreadMock(1, size)]
        self.listeners: list[Callable[[str, dict[str, Any]], None]] = []
        self.calls: list[str] = []
        self.holds = 0
        self.on_close: list[Callable[[], None]] = []
        self.migration: Any = None
        self.background: Any = None

    def find(self, name: str) -> Any:
        if name not in self.devices:
            raise NoDevice(f"the machine has no device {name!r}")
        return self.devices[name]

    def emit(self, name: str, data: dict[str, Any] | None = None) -> None:
        for listener in self.listeners:
            listener(name, data or {})

    def pause(self, status: str = "paused") -> None:
        if self.status == "running":
            self.status = status
            self.emit("STOP")

    def resume(self) -> None:
        if self.status in ("shutdown", "guest-panicked"):
            raise OperationInvalid("the machine cannot go on")
        self.status = "running"
        self.emit("RESUME")

    def reset(self, reason: str = "host-qmp-system-reset") -> None:
        self.calls.append("reset")
        self.emit("RESET", {"guest": False, "reason": reason})

    def powerdown(self) -> None:
        self.calls.append("powerdown")
        self.emit("POWERDOWN")

    def quit(self, reason: str = "host-qmp-quit") -> None:
        self.calls.append("quit")
        self.emit("SHUTDOWN", {"guest": False, "reason": reason})

    def checkpoint(self) -> None:
        self.calls.append("checkpoint")

    def forget_checkpoint(self) -> None:
        self.calls.append("forget checkpoint")

    def rewind(self) -> int:
        raise OperationInvalid("there is no checkpoint")

    def paused(self) -> Any:
        machine = self

        class Paused:
            def __enter__(self) -> None:
                machine.holds += 1

            def __exit__(self, *_: object) -> None:
                machine.holds -= 1

        return Paused()

"""The debug console: a port whose bytes go to a character backend at once, for firmware and kernels' first steps.

Bochs's and QEMU's port 0xE9: a read answers 0xE9, by which a program finds out that it is there.
"""

from __future__ import annotations

from kvik.vmm.device import PortDevice
from kvik.vmm.layout import DEBUGCON_PORT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.backends.char import Chardev
    from kvik.vmm.machine import Machine

__all__ = ["Debugcon"]


class Debugcon(PortDevice):
    """Output only: it never waits, and what the backend does not take is dropped and counted."""

    kind, base, size = "isa-debugcon", DEBUGCON_PORT, 1

    def __init__(self, name: str, chardev: Chardev, base: int | None = None) -> None:
        self.chardev = chardev
        self.sent = self.dropped = 0
        super().__init__(name, base)

    def attach(self, machine: Machine) -> None:
        super().attach(machine)
        self.chardev.open(machine.loop, lambda data: None)

    def read(self, offset: int, size: int) -> int:
        return DEBUGCON_PORT

    def write(self, offset: int, size: int, value: int) -> None:
        data = value.to_bytes(size, "little")
        taken = self.chardev.write(data)
        self.sent += taken
        self.dropped += len(data) - taken

    def close(self) -> None:
        super().close()
        self.chardev.close()

    def stats(self) -> dict[str, int]:
        return {"bytes_sent": self.sent, "bytes_dropped": self.dropped}

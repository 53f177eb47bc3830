"""A PCI device with a BAR and MSI-X: it adds what is written to it, and interrupts by vector 0 when the sum overflows.

BAR 0, offset 0  write: a summand (32 bits)   4  the sum   8  overflows so far
"""

from typing import Any

from kvik.vmm.pci.device import Bar, PciDevice


class Adder(PciDevice):
    kind = "adder"
    vendor, device_id = 0x1B36, 0x00AD
    class_code = 0x0B4000  # a co-processor
    bars = (Bar(0, 4096),)
    msix_vectors = 1

    def reset(self) -> None:
        super().reset()
        self.sum = self.overflows = 0

    def read_bar(self, bar: int, offset: int, size: int) -> int:
        return {4: self.sum, 8: self.overflows}.get(offset, 0)

    def write_bar(self, bar: int, offset: int, size: int, value: int) -> None:
        if offset != 0 or size != 4:
            return
        self.sum += value
        if self.sum > 0xFFFFFFFF:
            self.sum &= 0xFFFFFFFF
            self.overflows += 1
            self.msix.signal(0)

    def state(self) -> dict[str, Any]:
        return {**super().state(), "sum": self.sum, "overflows": self.overflows}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.sum, self.overflows = int(state["sum"]), int(state["overflows"])

"""A PCI device: configuration space, BARs, interrupts. Subclasses say what lies behind the BARs.

    class Doorbell(PciDevice):
        kind, vendor, device_id, class_code = "doorbell", 0x1B36, 0x0011, 0xFF0000
        bars = (Bar(0, 4096),)
        msix_vectors = 2

        def read_bar(self, bar: int, offset: int, size: int) -> int:
            return 0

        def write_bar(self, bar: int, offset: int, size: int, value: int) -> None:
            self.msix.signal(value)

`PciBus.add` puts it into a slot. Source: PCI Local Bus Specification 3.0, 6.
"""

from __future__ import annotations

from kvik.errors import InvalidArgument
from kvik.vmm.device import Device
from kvik.vmm.layout import PAGE, pci_gsi
from kvik.vmm.pci import config as c
from kvik.vmm.pci.config import ConfigSpace
from kvik.vmm.pci.msix import ENTRY, MAX_VECTORS, Msix
from kvik.vmm.slots import Pages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.device import State
    from kvik.vmm.interrupts import Line
    from kvik.vmm.machine import Machine
    from kvik.vmm.pci.bus import PciBus

__all__ = ["Bar", "PciDevice"]


class Bar:
    """One base address register: `size` bytes, a power of 2. `kind`: mem32, mem64 (takes `index` + 1 too) or io."""

    __slots__ = ("index", "kind", "prefetch", "size")

    def __init__(self, index: int, size: int, kind: str = "mem32", *, prefetch: bool = False) -> None:
        smallest = 4 if kind == "io" else 16  # 6.2.5.1
        largest = {"io": 256, "mem32": 1 << 28, "mem64": 1 << 36}.get(kind, 0)
        if size & (size - 1) or not smallest <= size <= largest or not 0 <= index <= (4 if kind == "mem64" else 5):
            raise InvalidArgument(f"a BAR {index} of kind {kind} with {size} bytes cannot be")
        self.index, self.size, self.kind, self.prefetch = index, size, kind, prefetch

    @property
    def flags(self) -> int:
        """The read-only low bits of the register."""
        return 1 if self.kind == "io" else (4 if self.kind == "mem64" else 0) | (8 if self.prefetch else 0)


class Doorbell:
    """A register behind a BAR whose writes only add to an eventfd."""

    __slots__ = ("bar", "fd", "offset", "size")

    def __init__(self, bar: int, offset: int, size: int, fd: int) -> None:
        self.bar, self.offset, self.size, self.fd = bar, offset, size, fd


class _Window:
    """What answers on the bus at a BAR's address."""

    __slots__ = ("bar", "device", "lock", "mapped", "start")

    def __init__(self, device: PciDevice, bar: Bar) -> None:
        self.device, self.bar, self.lock = device, bar, device.lock
        self.start = -1  # where the guest wants it, -1: nowhere
        self.mapped = False  # whether it is there

    def read(self, offset: int, size: int) -> int:
        return self.device.bar_read(self.bar.index, offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self.device.bar_write(self.bar.index, offset, size, value)


class PciDevice(Device):
    """Base of all PCI devices (type 0 header)."""

    kind = "pci"
    vendor = 0x1B36
    device_id = 0xFFFF
    class_code = 0xFF0000  # base class, subclass, programming interface
    revision = 0
    subsystem_vendor = 0
    subsystem = 0
    bars: tuple[Bar, ...] = ()
    msix_vectors = 0  # more than 0: an MSI-X capability
    msix_bar = 4  # where its table is, and the pending bits. A BAR that is not in `bars` is made for it.
    msix_table, msix_pba = 0, PAGE  # offsets behind that BAR, multiples of the page size
    intx = False  # has an interrupt pin
    express = False  # has a PCI Express capability, and with it the space from 0x100 on
    hotpluggable = True

    def __init__(self, name: str) -> None:
        self.slot = self.function = -1  # set by the bus
        self.bus: PciBus | None = None
        self.config = ConfigSpace()
        self.pages: list[tuple[int, int, Pages]] = []  # (BAR, offset, pages): registers that are read without exits
        self.doorbells: list[Doorbell] = []
        self._msix_capability = 0
        self._line: Line | None = None
        self._interrupt = False
        bars = list(self.bars)
        if self.msix_vectors:
            if all(bar.index != self.msix_bar for bar in bars):
                bars.append(Bar(self.msix_bar, 2 * PAGE))
            self.msix = Msix(self.msix_vectors, self.msix_page())
        self._all_bars = {bar.index: bar for bar in bars}
        self._build()
        super().__init__(name)
        self.windows = [_Window(self, bar) for bar in bars]

    def _build(self) -> None:
        config = self.config
        for register, size, value in (
            (c.VENDOR_ID, 2, self.vendor),
            (c.DEVICE_ID, 2, self.device_id),
            (c.REVISION, 1, self.revision),
            (c.CLASS_CODE, 3, self.class_code),
            (c.SUBSYSTEM_VENDOR, 2, self.subsystem_vendor),
            (c.SUBSYSTEM, 2, self.subsystem),
            (c.INTERRUPT_PIN, 1, 1 if self.intx else 0),  # INTA
        ):
            config.set(register, size, value)
        command = c.COMMAND_MASTER | c.COMMAND_PARITY | c.COMMAND_SERR | c.COMMAND_NO_INTX
        for bar in self._all_bars.values():
            command |= c.COMMAND_IO if bar.kind == "io" else c.COMMAND_MEMORY
            wide = bar.kind == "mem64"
            width = 8 if wide else 4
            mask = -bar.size & ((1 << 8 * width) - 1)  # the size is told by which bits can be set (6.2.5.1)
            if bar.kind == "io":
                mask &= 0xFFFF
            config.set(c.BAR0 + 4 * bar.index, width, bar.flags, mask & ~0xF if bar.kind != "io" else mask & ~3)
        config.set(c.COMMAND, 2, 0, command)
        config.set(c.CACHE_LINE, 1, 0, 0xFF)
        config.set(c.INTERRUPT_LINE, 1, 0, 0xFF)
        if self.msix_vectors:
            where = self._all_bars[self.msix_bar].index
            body = (self.msix_vectors - 1).to_bytes(2, "little")
            body += (self.msix_table | where).to_bytes(4, "little") + (self.msix_pba | where).to_bytes(4, "little")
            self._msix_capability = config.add_capability(c.CAP_MSIX, body, b"\x00\xc0")
        if self.express:
            # Version 2, root complex integrated endpoint (PCIe 3.0, 7.8): no link to train, extended space is there.
            config.add_capability(c.CAP_EXPRESS, (0x92).to_bytes(2, "little") + bytes(0x38))
        self.add_capabilities()
        config.freeze()

    def add_capabilities(self) -> None:
        """For subclasses with capabilities of their own: `self.config.add_capability`."""

    def msix_page(self) -> memoryview:
        """The page of the MSI-X table. A subclass may give one that lies among other pages of its own."""
        table = Pages(PAGE)
        self.pages.append((self.msix_bar, self.msix_table, table))
        return table.view

    # --- for subclasses: to write

    def read_bar(self, bar: int, offset: int, size: int) -> int:
        """The guest reads behind a BAR; `lock` is held."""
        return (1 << 8 * size) - 1

    def write_bar(self, bar: int, offset: int, size: int, value: int) -> None:
        """The guest writes behind a BAR; `lock` is held."""

    def config_written(self, offset: int, size: int) -> None:
        """The guest wrote to the configuration space, and what was writable has changed; `lock` is held."""

    # --- for subclasses: to use

    def raise_intx(self) -> None:
        """Assert the interrupt pin: a level, until `lower_intx`."""
        with self.lock:
            self._interrupt = True
            self._drive_intx()

    def lower_intx(self) -> None:
        """Deassert the interrupt pin."""
        with self.lock:
            self._interrupt = False
            self._drive_intx()

    def _drive_intx(self) -> None:
        status = self.config.view[c.STATUS]
        wanted = status | c.STATUS_INTERRUPT if self._interrupt else status & ~c.STATUS_INTERRUPT
        if wanted != status:
            self.config.view[c.STATUS] = wanted  # 6.2.3: whatever Interrupt Disable says
        if self._line is not None:
            disabled = self.config.get(c.COMMAND, 2) & c.COMMAND_NO_INTX
            self._line.set(self._interrupt and not disabled)

    # --- called by the bus

    def attach(self, machine: Machine) -> None:
        """Called by `PciBus.add`, when `slot`, `function` and `bus` are set."""
        if self.intx:
            self._line = machine.interrupts.line(pci_gsi(self.slot))
        if self.msix_vectors:
            self.msix.attach(machine.interrupts)

    def config_read(self, offset: int, size: int) -> int:
        """The guest reads the configuration space and it exits for that."""
        return self.config.read(offset, size)

    def config_write(self, offset: int, size: int, value: int) -> None:
        """The guest writes to the configuration space; the bus's lock and `lock` are held."""
        if not self.config.write(offset, size, value):
            return
        end = offset + size
        if offset < c.STATUS and end > c.COMMAND:
            self._drive_intx()
        if offset < c.BAR0 + 24 and end > c.COMMAND:
            self.place()
        if self._msix_capability and offset < self._msix_capability + 4 and end > self._msix_capability + 2:
            self.msix.set_control(self.config.get(self._msix_capability + 2, 2))
        self.config_written(offset, size)

    def bar_address(self, index: int) -> int:
        """Where the guest has put a BAR; 0 before it did. Decoding may be off."""
        bar = self._all_bars[index]
        value = self.config.get(c.BAR0 + 4 * index, 8 if bar.kind == "mem64" else 4)
        return value & (~3 if bar.kind == "io" else ~0xF)

    def fix_bar_address(self, index: int, address: int) -> None:
        """What firmware would do: give a BAR its address, from now on also after a reset."""
        bar = self._all_bars[index]
        self.config.fix(c.BAR0 + 4 * index, 8 if bar.kind == "mem64" else 4, address | bar.flags)

    def place(self) -> None:
        """Answer where the registers now say, and nowhere else. The bus's lock is held."""
        if self.bus is None:
            return
        command = self.config.get(c.COMMAND, 2)
        moves = []
        for window in self.windows:
            enabled = command & (c.COMMAND_IO if window.bar.kind == "io" else c.COMMAND_MEMORY)
            wanted = self.bar_address(window.bar.index) if enabled else -1
            if wanted != window.start:
                self.bus.unmap(window)
                moves.append((window, wanted))
        for window, wanted in moves:
            if wanted >= 0:
                self.bus.map(window, wanted)

    def unplace(self) -> None:
        """Answer nowhere. The bus's lock is held."""
        if self.bus is not None:
            for window in self.windows:
                self.bus.unmap(window)

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        if self.msix_vectors and bar == self.msix_bar:
            if self.msix_table <= offset < self.msix_table + PAGE:
                return self.msix.read(offset - self.msix_table, size)
            if self.msix_pba <= offset < self.msix_pba + PAGE:
                return self.msix.read_pending(offset - self.msix_pba, size)
        return self.read_bar(bar, offset, size)

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        if self.msix_vectors and bar == self.msix_bar:
            if self.msix_table <= offset < self.msix_table + PAGE:
                if offset - self.msix_table < MAX_VECTORS * ENTRY:
                    self.msix.write(offset - self.msix_table, size, value)
                return
            if self.msix_pba <= offset < self.msix_pba + PAGE:
                return  # undefined for software to write (6.8.2.10)
        self.write_bar(bar, offset, size, value)

    # --- life

    def reset(self) -> None:
        """Power-on. The bus calls `place` afterwards. A subclass that overrides it calls this."""
        self._interrupt = False
        self.config.reset()
        self._drive_intx()
        if self.msix_vectors:
            self.msix.reset()

    def state(self) -> State:
        state: State = {"config": self.config.state(), "interrupt": self._interrupt}
        if self.msix_vectors:
            state["msix"] = self.msix.state()
        return state

    def restore(self, state: State) -> None:
        self.config.restore(state["config"])
        if self.msix_vectors:
            self.msix.restore(state["msix"], self.config.get(self._msix_capability + 2, 2))
        self._interrupt = bool(state["interrupt"])
        self._drive_intx()
        if self.bus is not None:
            with self.bus.lock:
                self.place()

    def close(self) -> None:
        if self.bus is not None:
            self.bus.forget(self)
        self._interrupt = False
        self._drive_intx()
        if self.msix_vectors:
            self.msix.close()

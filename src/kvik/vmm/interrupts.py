"""Interrupts and doorbells: how a device reaches a vCPU, and how a vCPU reaches a device, without user mode between.

A *line* is a pin of the IOAPIC, with a level. A *message* (MSI) is an address and a value, written by the device; KVM
delivers it either at once by an ioctl, or, once somebody asked for a descriptor, by an eventfd that anyone can write
to: another process, or the kernel's vhost ("irqfd"). A *doorbell* is an address at which a guest's write only adds to
an eventfd ("ioeventfd").
"""

from __future__ import annotations

import _thread
import os

from kvik.errors import OperationFailed
from kvik.kvm import routing
from kvik.kvm.constants import Irqchip
from kvik.vmm.layout import MSI_GSI

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.kvm.vm import Vm

__all__ = ["Doorbells", "Interrupts", "Line", "MsiRoute", "mask_pics"]

OFTEN = 256
MAX_ROUTES = 4096  # KVM_MAX_IRQ_ROUTES on x86
PIC_IMR = 2  # offset of the interrupt mask register in struct kvm_pic_state


class Line:
    """One IOAPIC pin. Several devices may share it: each has a `Line` of its own, the pin is up while any is."""

    __slots__ = ("_interrupts", "_level", "gsi")

    def __init__(self, interrupts: Interrupts, gsi: int) -> None:
        self._interrupts, self.gsi, self._level = interrupts, gsi, False

    @property
    def level(self) -> bool:
        return self._level

    def set(self, level: bool) -> None:
        if level != self._level:
            self._level = level
            self._interrupts.drive(self.gsi, 1 if level else -1)

    def pulse(self) -> None:
        """An edge."""
        self.set(True)
        self.set(False)


class MsiRoute:
    """One message. `update` when the guest programs it, `signal` to send it."""

    __slots__ = ("_bound", "_fd", "_interrupts", "_sent", "address", "data", "gsi", "masked", "pending")

    def __init__(self, interrupts: Interrupts) -> None:
        self._interrupts = interrupts
        self.address = self.data = 0
        self.gsi = -1
        self.masked = False
        self.pending = False  # signalled while masked
        self._fd = -1
        self._bound = False
        self._sent = 0  # by ioctl

    def update(self, address: int, data: int) -> None:
        if (address, data) != (self.address, self.data):
            self.address, self.data = address, data
            if self.gsi >= 0:
                self._interrupts.reroute()

    def signal(self) -> None:
        """Send it now; if masked, when it is unmasked."""
        if self.masked:
            self.pending = True
        elif self._fd >= 0:
            os.eventfd_write(self._fd, 1)
        else:
            self._interrupts.send(self.address, self.data)
            self._sent += 1
            if self._sent == OFTEN:
                self._interrupts.hasten(self)

    def fd(self) -> int:
        """An eventfd: each write to it sends the message, in the kernel. Stays this route's; do not close it."""
        with self._interrupts.making:
            if self._fd < 0:
                self._interrupts.allocate(self)
                fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                if not self.masked:
                    self._bind(fd)
                self._fd = fd
            return self._fd

    def _bind(self, fd: int) -> None:
        if self._interrupts.vm is not None:
            self._interrupts.vm.irqfd(fd, self.gsi)
        self._bound = True

    def mask(self) -> None:
        """Signals stay pending. What others write to the descriptor stays in it and is delivered by `unmask`."""
        if not self.masked:
            self.masked = True
            self._unbind()

    def unmask(self) -> None:
        if self.masked:
            self.masked = False
            if self._fd >= 0:
                self._bind(self._fd)  # KVM delivers at once what is in the eventfd
            if self.pending:
                self.pending = False
                self.signal()

    def _unbind(self) -> None:
        if self._bound and self._interrupts.vm is not None:
            self._interrupts.vm.irqfd(self._fd, self.gsi, deassign=True)
        self._bound = False

    def close(self) -> None:
        if self._fd >= 0:
            self._unbind()
            os.close(self._fd)
            self._fd = -1
        if self.gsi >= 0:
            self._interrupts.free(self)


class Interrupts:
    """All lines and messages of a machine. Without `vm` nothing is delivered, but counted: unit tests."""

    def __init__(self, vm: Vm | None) -> None:
        self.vm = vm
        self.sent: list[tuple[int, int]] = []  # messages, where there is no machine to take them
        self._lock = _thread.allocate_lock()
        self.making = _thread.allocate_lock()  # over the making of a route's eventfd
        self._raised: dict[int, int] = {}
        self._routes: dict[int, MsiRoute] = {}

    def line(self, gsi: int) -> Line:
        return Line(self, gsi)

    def drive(self, gsi: int, change: int) -> None:
        """One more, or one fewer, holds the pin up."""
        with self._lock:
            before = self._raised.get(gsi, 0)
            after = self._raised[gsi] = before + change
            if self.vm is not None and (before > 0) != (after > 0):
                self.vm.irq_line(gsi, after > 0)

    def level(self, gsi: int) -> bool:
        return self._raised.get(gsi, 0) > 0

    def redrive(self) -> None:
        """Tell KVM all levels again, after its chips were reset or restored."""
        with self._lock:
            for gsi, count in self._raised.items():
                if self.vm is not None:
                    self.vm.irq_line(gsi, count > 0)

    def msi(self) -> MsiRoute:
        return MsiRoute(self)

    def send(self, address: int, data: int) -> None:
        if self.vm is not None:
            self.vm.signal_msi(address, data)
        else:
            self.sent.append((address, data))

    def hasten(self, route: MsiRoute) -> None:
        """This message is sent often: by an eventfd, which costs less than the ioctl. Making one takes the kernel
        milliseconds (it waits for all vCPUs to have left the old routing table), so the boot's few get none."""
        if self.vm is not None and len(self._routes) < MAX_ROUTES // 2:
            route.fd()

    def allocate(self, route: MsiRoute) -> None:
        with self._lock:
            gsi = MSI_GSI
            while gsi in self._routes:
                gsi += 1
            if gsi >= MAX_ROUTES:
                raise OperationFailed(f"more than {MAX_ROUTES} interrupt routes", remedy="give devices fewer queues")
            self._routes[gsi] = route
            route.gsi = gsi
        self.reroute()

    def free(self, route: MsiRoute) -> None:
        with self._lock:
            self._routes.pop(route.gsi, None)
            route.gsi = -1
        self.reroute()

    def reroute(self) -> None:
        """KVM_SET_GSI_ROUTING replaces the whole table: the chips' pins always belong to it."""
        if self.vm is None:
            return
        with self._lock:
            table = routing.default_routes()
            table += [routing.MsiRoute(gsi, route.address, route.data) for gsi, route in sorted(self._routes.items())]
            self.vm.set_gsi_routing(table)


def mask_pics(vm: Vm) -> None:
    """Mask every pin of KVM's two 8259s, which nobody can tell from their absence then. KVM makes them unmasked, their
    vectors where exceptions are, and each line that rises would reach the boot processor twice (i8259.c; the second
    way is LINT0). The guest is told of no 8259, so it does not mask them itself."""
    for chip in (Irqchip.PIC_MASTER, Irqchip.PIC_SLAVE):
        state = bytearray(vm.irqchip(chip))
        state[PIC_IMR] = 0xFF
        vm.set_irqchip(chip, bytes(state))


class Doorbells:
    """The ioeventfds of a machine."""

    def __init__(self, vm: Vm | None) -> None:
        self.vm = vm
        self.rung: dict[tuple[int, int, int | None, bool], int] = {}

    def add(self, address: int, size: int, fd: int, *, datamatch: int | None = None, pio: bool = False) -> None:
        """A guest's write of `size` bytes (0: of any size) at `address` adds 1 to the eventfd `fd`."""
        if self.vm is not None:
            try:
                self.vm.ioeventfd(fd, address, size, datamatch=datamatch, pio=pio)
            except OSError:
                return  # KVM has a bound (1000): the write arrives as an exit then, and the device rings by itself
        self.rung[address, size, datamatch, pio] = fd

    def remove(self, address: int, size: int, *, datamatch: int | None = None, pio: bool = False) -> None:
        """No harm if there is none."""
        fd = self.rung.pop((address, size, datamatch, pio), None)
        if fd is not None and self.vm is not None:
            self.vm.ioeventfd(fd, address, size, datamatch=datamatch, pio=pio, deassign=True)

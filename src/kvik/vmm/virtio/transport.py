"""Virtio over PCI, modern only (virtio 1.2, 4.1). One BAR:

0x0000  common configuration   ) three pages that the guest reads without an exit; writes arrive as MMIO
0x1000  device configuration   )
0x2000  MSI-X table            )
0x3000  MSI-X pending bits
0x4000  ISR: reading clears it, so it is never shown
0x5000  notification, 4 bytes a queue: each is an ioeventfd
"""

from __future__ import annotations

import os
import struct

from kvik.vmm.faults import GuestFault
from kvik.vmm.layout import PAGE
from kvik.vmm.pci import config as c
from kvik.vmm.pci.device import Bar, Doorbell, PciDevice
from kvik.vmm.pci.msix import MAX_VECTORS
from kvik.vmm.slots import Pages
from kvik.vmm.virtio.queue import RING_RESET, VERSION_1, Queue

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvik.vmm.device import State
    from kvik.vmm.machine import Machine
    from kvik.vmm.virtio.device import VirtioDevice

__all__ = ["VirtioPci"]

BAR = 0
COMMON, DEVICE, MSIX_TABLE, MSIX_PBA, ISR, NOTIFY = 0x0000, 0x1000, 0x2000, 0x3000, 0x4000, 0x5000
BAR_SIZE = 0x8000
NOTIFY_MULTIPLIER = 4

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 64, 128
NO_VECTOR = 0xFFFF

# struct virtio_pci_common_cfg (4.1.4.3)
_COMMON = struct.Struct("<IIIIHHBBHHHHHQQQHH")
DEVICE_FEATURE_SELECT, DEVICE_FEATURE, DRIVER_FEATURE_SELECT = 0, 4, 8
DRIVER_FEATURE, CONFIG_VECTOR, NUM_QUEUES = 12, 16, 18
DEVICE_STATUS, CONFIG_GENERATION, QUEUE_SELECT = 20, 21, 22
QUEUE_SIZE, QUEUE_VECTOR, QUEUE_ENABLE = 24, 26, 28
QUEUE_NOTIFY_OFF, QUEUE_DESC, QUEUE_DRIVER = 30, 32, 40
QUEUE_DEVICE, QUEUE_NOTIFY_DATA, QUEUE_RESET = 48, 56, 58

# struct virtio_pci_cap (4.1.4): cfg_type
CAP_COMMON, CAP_NOTIFY, CAP_ISR, CAP_DEVICE, CAP_PCI = 1, 2, 3, 4, 5


class VirtioPci(PciDevice):
    """A virtio device on the PCI bus. Has the device's name and its lock."""

    vendor = 0x1AF4
    revision = 1
    subsystem_vendor = 0x1AF4
    subsystem = 0x1100
    bars = (Bar(BAR, BAR_SIZE),)
    msix_bar, msix_table, msix_pba = BAR, MSIX_TABLE, MSIX_PBA
    intx = True

    def __init__(self, device: VirtioDevice) -> None:
        self.device = device
        self.kind = device.kind
        self.device_id = 0x1040 + device.device_id
        self.class_code = device.pci_class
        queues = len(device.queue_sizes)
        self.msix_vectors = min(queues + 1, MAX_VECTORS)
        self._page = Pages(3 * PAGE)
        self._kick_fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(queues)]
        self._taken = [False] * queues  # kicks go to somebody else (vhost)
        self._offered = device.features | device.ring_features | VERSION_1
        self._status = self._generation = self._isr = 0
        self._device_select = self._driver_select = self._queue_select = 0
        self._driver_features = 0
        self._config_vector = NO_VECTOR
        super().__init__(device.name)
        self.lock = device.lock
        for window in self.windows:
            window.lock = device.lock
        self.pages.append((BAR, 0, self._page))
        # Of any size: what a bell is rung with does not matter, and VMX then need not decode the instruction.
        self.doorbells = [
            Doorbell(BAR, NOTIFY + NOTIFY_MULTIPLIER * index, 0, fd) for index, fd in enumerate(self._kick_fds)
        ]
        device.config.move(self._page.view[DEVICE : DEVICE + PAGE])

    def msix_page(self) -> memoryview:
        return self._page.view[MSIX_TABLE : MSIX_TABLE + PAGE]

    def add_capabilities(self) -> None:
        for kind, offset, length, more in (
            (CAP_COMMON, COMMON, _COMMON.size, b""),
            (CAP_ISR, ISR, 1, b""),
            (CAP_DEVICE, DEVICE, max(self.device.config.size, 4), b""),
            (CAP_NOTIFY, NOTIFY, NOTIFY_MULTIPLIER * len(self._kick_fds), struct.pack("<I", NOTIFY_MULTIPLIER)),
        ):
            if kind == CAP_DEVICE and not self.device.config.size:
                continue  # 4.1.4.6: only a device with such a space has the capability
            body = struct.pack("<BBBBHII", 16 + len(more), kind, BAR, 0, 0, offset, length)
            self.config.add_capability(c.CAP_VENDOR, body + more)
        # Bar, offset, length and the data are the driver's to write (4.1.4.9).
        body = struct.pack("<BBBBHIII", 20, CAP_PCI, 0, 0, 0, 0, 0, 0)
        self._window_capability = self.config.add_capability(c.CAP_VENDOR, body, b"\0\0\xff\0\0\0" + b"\xff" * 12)

    def attach(self, machine: Machine) -> None:
        super().attach(machine)
        device = self.device
        device.transport = self
        device.attach(machine)
        self.msix.on_enable = self._vectors_changed
        self._on_loop(self._listen)
        self._refresh()

    # --- notifications

    def _on_loop(self, call: Callable[[], None]) -> None:
        """Run on the device's loop; at once if that is here or does not run yet."""
        if self.device.loop.running and not self.device.loop.in_loop():
            self.device.loop.call_soon(call)
        else:
            call()

    def _listen(self) -> None:
        for index, fd in enumerate(self._kick_fds):
            if not self._taken[index]:
                self.device.loop.add_reader(fd, self._kicker(index), edge=True)

    def _kicker(self, index: int) -> Callable[[], None]:
        taken, kick = self._taken, self.device.kick

        def kicked() -> None:
            if not taken[index]:  # else somebody else's now; the reader is about to be removed
                kick(index)

        return kicked

    def notifier_fd(self, index: int) -> int:
        """The eventfd of a queue's kicks, for vhost; the loop stops reading it."""
        fd = self._kick_fds[index]
        if not self._taken[index]:
            self._taken[index] = True
            self._on_loop(lambda: self.device.loop.remove_reader(fd))
        return fd

    def release_notifier(self, index: int) -> None:
        """The loop reads the kicks of a queue again, and looks at once whether there is something."""
        if not self._taken[index]:
            return
        fd = self._kick_fds[index]
        self._taken[index] = False
        if fd < 0:
            return

        def listen() -> None:
            if not self._taken[index] and self._kick_fds[index] >= 0:
                self.device.loop.add_reader(fd, self._kicker(index), edge=True)
                self.device.kick(index)

        self._on_loop(listen)

    # --- interrupts

    def signal_queue(self, index: int) -> None:
        if self.msix.enabled:
            self.msix.signal(self.device.queues[index].vector)
        else:
            self._raise(1)

    def signal_config(self) -> None:
        if self.msix.enabled:
            self.msix.signal(self._config_vector)
        else:
            self._raise(2)

    def _raise(self, bit: int) -> None:
        with self.lock:
            self._isr |= bit
            self.raise_intx()

    def interrupt_fd(self, index: int) -> int | None:
        """The irqfd of a queue's vector; None without MSI-X or vector."""
        vector = self.device.queues[index].vector
        if not self.msix.enabled or vector >= self.msix.vectors:
            return None
        return self.msix.fd(vector)

    def _vectors_changed(self) -> None:
        if self.device.active:
            for index in range(len(self.device.queues)):
                self.device.interrupt_changed(index)

    def config_changed(self, change: Callable[[], None] | None = None) -> None:
        """4.1.4.3.1: the generation tells a driver that reads meanwhile. Reads exit during the change and wait for
        the lock, so that none sees half of it."""
        with self.lock:
            self._page.hide()
            try:
                if change is not None:
                    change()
                self._generation = (self._generation + 1) & 0xFF
                self._refresh()
            finally:
                self._page.show()
            if self._status & DRIVER_OK:
                self.signal_config()

    def needs_reset(self) -> None:
        self._status |= NEEDS_RESET
        self._refresh()
        if self._status & DRIVER_OK:
            self.signal_config()

    # --- the BAR

    def _queue(self) -> Queue | None:
        queues = self.device.queues
        return queues[self._queue_select] if self._queue_select < len(queues) else None

    def _refresh(self) -> None:
        """Write the registers' values into the page that the guest reads."""
        queue = self._queue()
        registers: tuple[int, ...] = (0, NO_VECTOR, 0, 0, 0, 0, 0, 0, 0)
        if queue is not None:
            size, enabled, index = queue.size, int(queue.ready), queue.index
            registers = (size, queue.vector, enabled, index, queue.desc, queue.avail, queue.used, index, 0)
        select, driver = self._device_select, self._driver_select
        _COMMON.pack_into(
            *(self._page.view, COMMON),
            *(select, self._offered >> 32 * select & 0xFFFFFFFF if select < 2 else 0),
            *(driver, self._driver_features >> 32 * driver & 0xFFFFFFFF if driver < 2 else 0),
            *(self._config_vector, len(self.device.queues), self._status, self._generation, self._queue_select),
            *registers,
        )

    def read_bar(self, bar: int, offset: int, size: int) -> int:
        if offset < COMMON + PAGE:
            return int.from_bytes(self._page.view[offset : min(offset + size, PAGE)], "little")
        if DEVICE <= offset < DEVICE + PAGE:
            return self.device.config.read(offset - DEVICE, size)
        if offset == ISR:
            isr, self._isr = self._isr, 0
            self.lower_intx()
            return isr
        return 0

    def write_bar(self, bar: int, offset: int, size: int, value: int) -> None:
        if offset >= NOTIFY:
            index, rest = divmod(offset - NOTIFY, NOTIFY_MULTIPLIER)
            if not rest and index < len(self._kick_fds):  # a write that is no ioeventfd's: of another size
                os.eventfd_write(self._kick_fds[index], 1)
        elif offset < _COMMON.size:
            self._write_common(offset, size, value)
            self._refresh()
        elif DEVICE <= offset < DEVICE + PAGE and self.device.config.write(offset - DEVICE, size, value):
            self.device.config_written(offset - DEVICE, size)

    def _write_common(self, offset: int, size: int, value: int) -> None:
        """4.1.3.1: the driver uses each field's own width, and halves of 64-bit fields. Others are ignored."""
        if size == 4:
            if offset == DEVICE_FEATURE_SELECT:
                self._device_select = value
            elif offset == DRIVER_FEATURE_SELECT:
                self._driver_select = value
            elif offset == DRIVER_FEATURE:
                if self._driver_select < 2 and not self._status & FEATURES_OK:  # 3.1.1: never after FEATURES_OK
                    shift = 32 * self._driver_select
                    self._driver_features = self._driver_features & ~(0xFFFFFFFF << shift) | value << shift
            else:
                self._write_address(offset, size, value)
        elif size == 2:
            if offset == QUEUE_SELECT:
                self._queue_select = value
            elif offset == CONFIG_VECTOR:
                self._config_vector = value if value < self.msix.vectors else NO_VECTOR
            else:
                self._write_queue(offset, value)
        elif size == 1 and offset == DEVICE_STATUS:
            self._write_status(value)
        elif size == 8:
            self._write_address(offset, size, value)

    def _write_address(self, offset: int, size: int, value: int) -> None:
        queue = self._queue()
        if queue is None or queue.ready or not QUEUE_DESC <= offset < QUEUE_NOTIFY_DATA or offset % size:
            return  # 4.1.4.3.2: not while it is enabled
        name = ("desc", "avail", "used")[(offset - QUEUE_DESC) // 8]
        shift, mask = 8 * (offset % 8), (1 << 8 * size) - 1
        old: int = getattr(queue, name)
        setattr(queue, name, old & ~(mask << shift) | value << shift)

    def _write_queue(self, offset: int, value: int) -> None:
        queue = self._queue()
        if queue is None:
            return
        device = self.device
        if offset == QUEUE_VECTOR:
            queue.vector = value if value < self.msix.vectors else NO_VECTOR
            if device.active:
                device.interrupt_changed(queue.index)
        elif offset == QUEUE_SIZE and not queue.ready:
            queue.size = value
        elif offset == QUEUE_ENABLE and value == 1 and not queue.ready and self._status & FEATURES_OK:
            if device.broken:
                return
            try:
                queue.start(self._driver_features)
                if device.active:
                    device.queue_enabled(queue.index)
            except GuestFault as fault:
                device.needs_reset(str(fault))
        elif offset == QUEUE_RESET and value == 1 and queue.ready and self._driver_features & RING_RESET:
            if device.active:
                device.queue_reset(queue.index)
            queue.reset()

    def _write_status(self, value: int) -> None:
        if not value:
            self._stop()
            return
        status = self._status
        added = value & ~status & (ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED)
        if added & FEATURES_OK:
            features = self._driver_features
            known = not features & ~self._offered
            if known and features & VERSION_1 and self.device.accepts(features):
                self.device.make_queues(features)
            else:
                added &= ~FEATURES_OK  # 2.2.2: refused; the driver reads the status again
        if added & DRIVER_OK and not (status | added) & FEATURES_OK:
            added &= ~DRIVER_OK  # 3.1.1: it skipped a step
        self._status = status | added  # 2.1.1: bits are never cleared
        if added & DRIVER_OK and not self.device.broken:
            self.device.start(self._driver_features)

    def _stop(self) -> None:
        """The driver's reset (2.4)."""
        self._status = self._isr = self._driver_features = 0
        self._device_select = self._driver_select = self._queue_select = 0
        self._config_vector = NO_VECTOR
        self.lower_intx()
        self.device.stop()

    # --- the capability that reaches the BAR through configuration space (4.1.4.9)

    def _bar_window(self) -> tuple[int, int] | None:
        at = self._window_capability
        bar, (offset, length) = self.config.view[at + 4], struct.unpack_from("<II", self.config.view, at + 8)
        if bar != BAR or length not in (1, 2, 4) or offset % length or offset + length > BAR_SIZE:
            return None
        return offset, length

    def config_read(self, offset: int, size: int) -> int:
        data = self._window_capability + 16
        if data <= offset < data + 4:
            window = self._bar_window()
            if window is not None:
                self.config.put(data, 4, self.bar_read(BAR, *window))
        return super().config_read(offset, size)

    def config_written(self, offset: int, size: int) -> None:
        start = self._window_capability + 4
        if offset + size <= start or offset >= start + 16:
            return
        # Reads of the data have side effects from now on: they must exit.
        self.config.pages.hide()
        if offset + size > start + 12:
            window = self._bar_window()
            if window is not None:
                value = self.config.get(start + 12, 4) & (1 << 8 * window[1]) - 1
                self.bar_write(BAR, *window, value)

    # --- life

    def reset(self) -> None:
        super().reset()
        if hasattr(self.device, "transport"):
            self._stop()
            self.device.reset()
            self._refresh()
            self.config.pages.show()

    def pause(self) -> None:
        self.device.pause()

    def resume(self) -> None:
        self.device.resume()

    def state(self) -> State:
        names = ("status", "generation", "isr", "device_select", "driver_select", "queue_select", "driver_features")
        own = {name: getattr(self, "_" + name) for name in (*names, "config_vector")}
        return {**super().state(), "virtio": own, "device": self.device.state()}

    def restore(self, state: State) -> None:
        """Ends with `activate` if the device was in use; `resume` then kicks all queues."""
        super().restore(state)
        for name, value in state["virtio"].items():
            if name not in self.state()["virtio"]:
                raise ValueError(f"{self.name}: the state has an unknown register {name}")
            setattr(self, "_" + name, int(value))
        try:
            if self.device.active:
                self.device.active = False
                self.device.deactivate()
            self.device.restore(state["device"])
            self._refresh()
            if self.device.active:
                self.device.activate()
        except GuestFault as fault:
            raise ValueError(f"{self.name}: {fault}") from fault

    def close(self) -> None:
        super().close()
        self.device.close()
        fds, self._kick_fds = self._kick_fds, []
        self.doorbells = []
        for index, fd in enumerate(fds):
            self._taken[index] = True
            self._on_loop(lambda fd=fd: self._end(fd))  # type: ignore[misc]  # mypy: default of a lambda

    def _end(self, fd: int) -> None:
        try:
            self.device.loop.remove_reader(fd)
        except ValueError:
            pass  # the loop was closed before
        os.close(fd)

    def stats(self) -> dict[str, int]:
        return self.device.stats()

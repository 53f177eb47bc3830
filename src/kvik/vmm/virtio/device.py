"""A virtio device: queues, feature bits, configuration space (virtio 1.2, 2). It never knows its transport.

    class Echo(VirtioDevice):
        kind, device_id, queue_sizes = "echo", 0x3F, (64,)

        def queue_kicked(self, index: int) -> None:
            queue = self.queues[index]
            for chain in queue:
                queue.push(chain, chain.write(chain.read_all(4096)))
            queue.flush()

What a guest does wrong raises `GuestFault` in the queue's code; the base class catches it, and the device stands still
with DEVICE_NEEDS_RESET until the driver resets it.

Threads: `activate`, `deactivate` and `config_written` come on a vCPU's thread, `queue_kicked` on the device's loop;
`lock` is held in all of them. A device that finishes requests on other threads pushes them on its loop
(`loop.call_soon`), under `lock`, and asks `active` first.
"""

from __future__ import annotations

from kvik.vmm.device import Device
from kvik.vmm.faults import GuestFault
from kvik.vmm.virtio.config import Config, Field
from kvik.vmm.virtio.queue import (
    EVENT_IDX,
    IN_ORDER,
    INDIRECT_DESC,
    RING_PACKED,
    RING_RESET,
    VERSION_1,
    Queue,
)
from kvik.vmm.virtio.split import SplitQueue

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    from kvik.vmm.device import State
    from kvik.vmm.loop import EventLoop
    from kvik.vmm.machine import Machine
    from kvik.vmm.memory import GuestMemory

    class Transport(Protocol):
        """What a device asks of what carries it."""

        def config_changed(self, change: Callable[[], None] | None = None) -> None:
            """Tell the driver that the configuration space changed. `change` makes the change, unseen half-done."""

        def signal_queue(self, index: int) -> None:
            """Send a queue's used buffer notification. `Queue.flush` does it when the driver wants it."""

        def signal_config(self) -> None:
            """Send a configuration change notification."""

        def notifier_fd(self, index: int) -> int:
            """The eventfd that a queue's kicks arrive on, for somebody else (vhost): the loop stops reading it."""

        def release_notifier(self, index: int) -> None:
            """The loop reads the queue's kicks again, and kicks once for what may have been missed."""

        def interrupt_fd(self, index: int) -> int | None:
            """An eventfd that interrupts the guest for a queue, in the kernel (irqfd). None where interrupts are not
            MSI-X or the queue has no vector: whoever completes requests must then call `signal_queue`."""

        def needs_reset(self) -> None:
            """Set DEVICE_NEEDS_RESET and tell the driver (2.1.2)."""


# What the rings and the transport offer for every device. IN_ORDER and RING_PACKED are offered by choice: `ring`.
RING_FEATURES = VERSION_1 | EVENT_IDX | INDIRECT_DESC | RING_RESET


class VirtioDevice(Device):
    """Base of all virtio devices. A subclass says what it is and works on its queues."""

    kind = "virtio"
    device_id = 0  # virtio's number (5), not PCI's
    pci_class = 0xFF0000  # 24 bits, for the PCI transport
    queue_sizes: tuple[int, ...] = ()  # what is offered, the maximum of each queue; powers of 2
    features = 0  # offered feature bits of the device type
    ring_features = RING_FEATURES  # offered feature bits of the rings; may add IN_ORDER and RING_PACKED
    config_fields: tuple[Field, ...] = ()
    split_queue: type[Queue] = SplitQueue

    memory: GuestMemory
    loop: EventLoop
    transport: Transport

    def __init__(self, name: str) -> None:
        self.config = Config(self.config_fields)
        self.queues: list[Queue] = []
        self.acked = 0  # negotiated features, valid while active
        self.active = False  # the driver set DRIVER_OK, and nothing went wrong since
        self.broken = ""  # why the device needs a reset
        self.paused = False
        self.kicks = 0
        self.faults = 0
        self.machine: Machine | None = None
        super().__init__(name)

    # --- for subclasses: to write

    def activate(self) -> None:
        """The driver is ready: features are negotiated, queues with `ready` run."""

    def deactivate(self) -> None:
        """The driver reset the device, or it broke: forget all requests in flight. Never push one of them later."""

    def queue_kicked(self, index: int) -> None:
        """On the loop: the driver says that there is something in queue `index`. Also called without reason."""

    def queue_enabled(self, index: int) -> None:
        """A queue was enabled again while the device runs (RING_RESET)."""

    def queue_reset(self, index: int) -> None:
        """The driver takes one queue back (RING_RESET, 2.6.1): forget its requests in flight."""

    def config_written(self, offset: int, size: int) -> None:
        """The driver wrote to writable fields of the configuration space."""

    def interrupt_changed(self, index: int) -> None:
        """While active: a queue's vector changed. Only of interest to those who use `transport.interrupt_fd`."""

    def accepts(self, features: int) -> bool:
        """Whether the device can work with this choice of the driver's; else FEATURES_OK is refused (2.2)."""
        return True

    # --- for subclasses: to use

    def has(self, feature: int) -> bool:
        """Whether a feature (a mask, not a bit number) is negotiated."""
        return self.acked & feature == feature

    def config_changed(self, change: Callable[[], None] | None = None) -> None:
        """Make a change to the configuration space and tell the driver (2.5)."""
        with self.lock:
            self.transport.config_changed(change)

    def needs_reset(self, reason: str) -> None:
        """Stop until the driver resets the device. Logged once."""
        with self.lock:
            if self.broken:
                return
            self.broken = reason
            self.faults += 1
            was_active, self.active = self.active, False
            if self.machine is not None:
                self.machine.log(f"{self.name}: needs a reset: {reason}")
            if was_active:
                self.deactivate()
            self.transport.needs_reset()

    # --- called by the transport, with `lock` held

    def attach(self, machine: Machine) -> None:
        """Called by the transport, which sets `transport` before. The loop is the machine's unless it was chosen."""
        self.machine = machine
        self.memory = machine.memory
        if not hasattr(self, "loop"):
            self.loop = machine.loop
        self.make_queues()
        self.memory.on_change.append(self._memory_changed)

    def _memory_changed(self) -> None:
        for queue in self.queues:
            queue.forget_memory()

    def make_queues(self, features: int = 0) -> None:
        """New queues of the kind that the features ask for, with registers as after a reset."""
        kind = self.split_queue
        if features & RING_PACKED:
            from kvik.vmm.virtio.packed import PackedQueue

            kind = PackedQueue
        signal = self.transport.signal_queue
        self.queues[:] = [kind(self.memory, index, size) for index, size in enumerate(self.queue_sizes)]
        for queue in self.queues:
            queue.notify = lambda index=queue.index: signal(index)  # type: ignore[misc]  # mypy: default of a lambda

    def kick(self, index: int) -> None:
        """On the loop: queue `index` was notified."""
        with self.lock:
            if not self.active or self.paused or not self.queues[index].ready:
                return  # `resume` kicks every queue
            self.kicks += 1
            try:
                self.queue_kicked(index)
            except GuestFault as fault:
                self.needs_reset(str(fault))

    def start(self, features: int) -> None:
        """DRIVER_OK."""
        self.acked = features
        self.active = True
        try:
            self.activate()
        except GuestFault as fault:
            self.needs_reset(str(fault))

    def stop(self) -> None:
        """The driver wrote 0 to the status: everything as at power-on, but for the configuration space."""
        was_active, self.active = self.active, False
        if was_active:
            self.deactivate()
        self.acked, self.broken = 0, ""
        self.make_queues()

    def reset(self) -> None:
        """Power-on. A subclass that overrides it calls this first."""
        self.active = False
        self.acked, self.broken = 0, ""

    def state(self) -> State:
        """Features, configuration space, queues. A subclass adds its own to the dictionary."""
        return {
            "acked": self.acked,
            "active": self.active,
            "broken": self.broken,
            "config": bytes(self.config),
            "queues": [queue.state() for queue in self.queues],
        }

    def restore(self, state: State) -> None:
        """The transport calls it, then `activate` if the device was active."""
        self.acked, self.broken = int(state["acked"]), str(state["broken"])
        self.config.restore(state["config"])
        queues: list[dict[str, Any]] = state["queues"]
        if len(queues) != len(self.queue_sizes):
            raise ValueError(f"{self.name}: the state has {len(queues)} queues, the device {len(self.queue_sizes)}")
        self.make_queues(self.acked)
        for queue, saved in zip(self.queues, queues, strict=True):
            queue.restore(saved, self.acked)
        self.active = bool(state["active"])

    def pause(self) -> None:
        """No kick comes through until `resume`. A subclass finishes or holds its requests first."""
        with self.lock:
            self.paused = True

    def resume(self) -> None:
        """Kicks every queue: notifications that came meanwhile are not kept."""
        with self.lock:
            self.paused = False
            for index in range(len(self.queues)):
                self.loop.call_soon(lambda index=index: self.kick(index))  # type: ignore[misc]  # mypy: default of a lambda

    def close(self) -> None:
        if self.machine is not None and self._memory_changed in self.memory.on_change:
            self.memory.on_change.remove(self._memory_changed)
        if self.active:
            self.active = False
            self.deactivate()

    def stats(self) -> dict[str, int]:
        return {"kicks": self.kicks, "faults": self.faults}


__all__ = ["IN_ORDER", "RING_FEATURES", "RING_PACKED", "Config", "Field", "GuestFault", "VirtioDevice"]

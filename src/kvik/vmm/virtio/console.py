"""virtio-console (virtio 1.2, 5.3): terminals (hvc0, ...) and named ports (/dev/virtio-ports/NAME) over character
backends.

Queues: 0 and 1 receive and transmit of port 0, 2 and 3 control messages, then a pair for each further port. Neither
side can make the other's memory grow: input that the guest has no buffers for stays with the backend, and output that
the backend does not take keeps the rest of the queue waiting.
"""

from __future__ import annotations

import struct

from kvik.errors import InvalidArgument
from kvik.vmm.virtio.config import Field
from kvik.vmm.virtio.device import VirtioDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections import deque

    from kvik.vmm.backends.char import Chardev
    from kvik.vmm.device import State
    from kvik.vmm.machine import Machine
    from kvik.vmm.virtio.queue import Queue
else:
    from _collections import deque  # what is behind `collections`, which takes longer

__all__ = ["Console", "Port"]

SIZE, MULTIPORT, EMERG_WRITE = 1 << 0, 1 << 1, 1 << 2  # VIRTIO_CONSOLE_F_*, 5.3.3
DEVICE_READY, DEVICE_ADD, DEVICE_REMOVE, PORT_READY, CONSOLE_PORT, RESIZE, PORT_OPEN, PORT_NAME = range(8)  # 5.3.6.2
_CONTROL = struct.Struct("<IHH")  # id, event, value
_SIZE = struct.Struct("<HH")  # cols, rows: the order of the kernel's and QEMU's messages

MAX_PORTS = 31
MAX_WRITE = 2 << 20  # bytes of one request of the driver; Linux sends 32 KiB, a splice a pipe's megabyte
MAX_CONTROL = 256  # control messages that wait for the driver's buffers
ROUND = 64
_RX_CONTROL, _TX_CONTROL = 2, 3


class Port:
    """One end: a terminal (`console`) or a named channel, such as `org.qemu.guest_agent.0`."""

    def __init__(self, chardev: Chardev, *, console: bool = False, name: str = "", alias: str = "") -> None:
        self.chardev = chardev
        self.console = console
        self.name = name
        self.alias = alias or name  # the id in VSERPORT_CHANGE
        self.guest_open = False
        self.host_open = False
        self.ready = False
        self.pending = b""  # input that the guest had no buffer for; the backend is paused meanwhile
        self.unsent = b""  # output that the backend did not take
        self.received = self.sent = 0


class Console(VirtioDevice):
    """`ports` in order of their numbers; port 0 should be the console."""

    kind = "virtio-console"
    device_id = 3
    pci_class = 0x078000
    config_fields = (
        Field("cols", 0, 2),
        Field("rows", 2, 2),
        Field("max_nr_ports", 4, 4),
        Field("emerg_wr", 8, 4, writable=True),
    )

    def __init__(self, name: str, ports: list[Port]) -> None:
        if not 1 <= len(ports) <= MAX_PORTS:
            raise InvalidArgument(f"{name}: {len(ports)} ports, where 1 to {MAX_PORTS} are possible")
        names = [port.name for port in ports if port.name]
        if len(set(names)) != len(names):
            raise InvalidArgument(f"{name}: two ports have the same name")
        self.ports = ports
        self.features = SIZE | MULTIPORT | EMERG_WRITE
        # Port 0, control, and the rest; the control queues are wide, as each port needs several messages at once.
        self.queue_sizes = (128, 128, 64, 64, *(128 for _ in range(2 * (len(ports) - 1))))
        self.paused = False
        self._control: deque[bytes] = deque()
        super().__init__(name)
        self.config["max_nr_ports"] = len(ports)
        self.config["cols"], self.config["rows"] = 80, 25

    def attach(self, machine: Machine) -> None:
        super().attach(machine)
        for number in range(len(self.ports)):
            self._open(number)

    def _open(self, number: int) -> None:
        port = self.ports[number]
        port.chardev.on_writable = lambda: self._writable(number)
        port.chardev.open(
            self.loop, lambda data: self._input(number, data), lambda connected: self._host_opened(number, connected)
        )

    def reset(self) -> None:
        super().reset()
        self.deactivate()
        for port in self.ports:
            port.pending = port.unsent = b""

    def deactivate(self) -> None:
        self._control.clear()
        for number, port in enumerate(self.ports):
            port.ready = False
            self._set_guest_open(number, False)

    def activate(self) -> None:
        if not self.has(MULTIPORT):
            self.ports[0].ready = True
            self._set_guest_open(0, True)

    def config_written(self, offset: int, size: int) -> None:
        if offset <= 8 < offset + size:  # 5.3.4: an early message, character by character, before any queue works
            self.ports[0].chardev.write(bytes([self.config["emerg_wr"] & 0xFF]))

    def queue_kicked(self, index: int) -> None:
        if self.paused:
            return
        if index == _TX_CONTROL:
            self._take_control()
        elif index == _RX_CONTROL:
            self._send_control()
        else:
            number = index >> 1 if index < 2 else (index >> 1) - 1
            if index & 1:
                self._transmit(number)
            else:
                self._receive(number)

    def _rearm(self, queue: Queue) -> None:
        """All is taken: let the driver kick again, and look once more if it put something meanwhile."""
        if queue.enable_notifications():
            self.loop.call_soon(lambda: self.kick(queue.index))

    @staticmethod
    def _queue_of(number: int) -> int:
        """The index of a port's receive queue; its transmit queue is the next."""
        return 0 if number == 0 else 2 + 2 * number

    # Guest to host -----------------------------------------------------------------------------------------------

    def _transmit(self, number: int) -> None:
        port, queue = self.ports[number], self.queues[self._queue_of(number) + 1]
        if not queue.ready:
            return
        for _ in range(ROUND):
            if port.unsent:
                break
            if (chain := queue.pop()) is None:
                self._rearm(queue)
                break
            data = chain.read_all(MAX_WRITE)
            queue.push(chain, 0)
            port.sent += len(data)
            taken = port.chardev.write(data)
            port.unsent = data[taken:]
        else:
            self.loop.call_soon(lambda: self.kick(self._queue_of(number) + 1))
        queue.flush()

    def _writable(self, number: int) -> None:
        """The backend takes output again."""
        with self.lock:
            port = self.ports[number]
            if port.unsent:
                port.unsent = port.unsent[port.chardev.write(port.unsent) :]
        if not port.unsent:
            self.kick(self._queue_of(number) + 1)

    # Host to guest -----------------------------------------------------------------------------------------------

    def _input(self, number: int, data: bytes) -> None:
        with self.lock:
            port = self.ports[number]
            port.pending += data
            self._receive_checked(number)
            if port.pending:
                port.chardev.pause_input()

    def _receive_checked(self, number: int) -> None:
        if self.active and not self.paused:
            self.kick(self._queue_of(number))

    def _receive(self, number: int) -> None:
        port, queue = self.ports[number], self.queues[self._queue_of(number)]
        if not port.pending:
            return
        while port.pending and port.guest_open and (chain := queue.pop()) is not None:
            given = chain.write(port.pending)
            port.pending = port.pending[given:]
            port.received += given
            queue.push(chain, given)
        queue.flush()
        if port.pending and port.guest_open:
            self._rearm(queue)
        if not port.pending:
            port.chardev.resume_input()

    # Control -----------------------------------------------------------------------------------------------------

    def _take_control(self) -> None:
        queue = self.queues[_TX_CONTROL]
        for _ in range(ROUND):
            chain = queue.pop()
            if chain is None:
                self._rearm(queue)
                break
            data = chain.read_all(4096)
            queue.push(chain, 0)
            if len(data) >= _CONTROL.size:
                self._heard(*_CONTROL.unpack_from(data))
        else:
            self.loop.call_soon(lambda: self.kick(_TX_CONTROL))
        queue.flush()
        self._send_control()

    def _heard(self, number: int, event: int, value: int) -> None:
        if event == DEVICE_READY:
            if value:
                for index in range(len(self.ports)):
                    self._say(index, DEVICE_ADD, 1)
            return
        if number >= len(self.ports):
            return  # nothing of ours; QEMU ignores it too
        port = self.ports[number]
        if event == PORT_READY and value:
            port.ready = True
            if port.console:
                self._say(number, CONSOLE_PORT, 1)
                self._say(number, RESIZE, 0, _SIZE.pack(self.config["cols"], self.config["rows"]))
            if port.name:
                self._say(number, PORT_NAME, 1, port.name.encode() + b"\0")
            if port.host_open or port.console:
                self._say(number, PORT_OPEN, 1)
        elif event == PORT_OPEN:
            self._set_guest_open(number, bool(value))

    def _say(self, number: int, event: int, value: int, more: bytes = b"") -> None:
        if len(self._control) < MAX_CONTROL:  # a driver that asks on and on, and takes no answer, gets no more
            self._control.append(_CONTROL.pack(number, event, value) + more)

    def _send_control(self) -> None:
        queue = self.queues[_RX_CONTROL]
        if not queue.ready:
            return
        while self._control and (chain := queue.pop()) is not None:
            queue.push(chain, chain.write(self._control.popleft()))
        queue.flush()
        if self._control:
            self._rearm(queue)

    def _set_guest_open(self, number: int, opened: bool) -> None:
        port = self.ports[number]
        if port.guest_open == opened:
            return
        port.guest_open = opened
        if self.machine is None:
            return
        if port.name:
            self.machine.emit("VSERPORT_CHANGE", {"id": port.alias, "open": opened})
        if opened and port.pending:
            self.loop.call_soon(lambda: self.kick(self._queue_of(number)))

    def _host_opened(self, number: int, opened: bool) -> None:
        """Somebody connected to the backend, or left."""
        with self.lock:
            port = self.ports[number]
            port.host_open = opened
            if not opened:
                port.unsent = b""
            if self.active and port.ready and self.has(MULTIPORT) and not port.console:
                self._say(number, PORT_OPEN, int(opened))
        if self.active:
            self.kick(_RX_CONTROL)
            self.kick(self._queue_of(number) + 1)

    def resize(self, columns: int, rows: int) -> None:
        """Tell the guest how large the terminal is."""
        if not (0 < columns <= 0xFFFF and 0 < rows <= 0xFFFF):
            raise InvalidArgument(f"a terminal of {columns} columns and {rows} rows")

        def change() -> None:
            self.config["cols"], self.config["rows"] = columns, rows

        self.config_changed(change)
        with self.lock:
            for number, port in enumerate(self.ports):
                if port.console and port.ready and self.active and self.has(MULTIPORT):
                    self._say(number, RESIZE, 0, _SIZE.pack(columns, rows))
        self.loop.call_soon(lambda: self.kick(_RX_CONTROL))

    # Life --------------------------------------------------------------------------------------------------------

    def pause(self) -> None:
        with self.lock:
            self.paused = True

    def resume(self) -> None:
        with self.lock:
            self.paused = False
        self.loop.call_soon(self._kick_all)

    def _kick_all(self) -> None:
        for index in range(len(self.queues)):
            self.kick(index)

    def state(self) -> State:
        ports = [
            {"guest_open": p.guest_open, "ready": p.ready, "pending": p.pending, "unsent": p.unsent} for p in self.ports
        ]
        return {**super().state(), "ports": ports, "control": list(self._control)}

    def restore(self, state: State) -> None:
        super().restore(state)
        if len(state["ports"]) != len(self.ports):
            raise ValueError(f"{self.name}: the state has {len(state['ports'])} ports, the device {len(self.ports)}")
        self._control = deque(bytes(message) for message in state["control"][:MAX_CONTROL])
        for number, (port, saved) in enumerate(zip(self.ports, state["ports"], strict=True)):
            port.ready = bool(saved["ready"])
            port.pending, port.unsent = bytes(saved["pending"]), bytes(saved["unsent"])
            self._set_guest_open(number, bool(saved["guest_open"]))
            if self.active and port.ready and not port.console and self.has(MULTIPORT):
                self._say(number, PORT_OPEN, int(port.host_open))

    def close(self) -> None:
        super().close()
        for port in self.ports:
            port.chardev.close()

    def stats(self) -> dict[str, int]:
        out = super().stats()
        for number, port in enumerate(self.ports):
            out[f"port{number}_received_bytes"] = port.received
            out[f"port{number}_sent_bytes"] = port.sent
        return out

"""A 16550A serial line.

Registers as in the PC16550D data sheet (National Semiconductor, 1995), 8. Bytes go out at once, whatever the baud rate
says: the transmitter is always empty, unless the host's side is full; then it is not, and the driver waits as it would
for a slow modem.
"""

from __future__ import annotations

from kvik.vmm.device import PortDevice
from kvik.vmm.layout import COM_GSIS, COM_PORTS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.backends.char import Chardev
    from kvik.vmm.device import State
    from kvik.vmm.interrupts import Line
    from kvik.vmm.machine import Machine

__all__ = ["Serial"]

DATA, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCR = range(8)
IER_RX, IER_TX, IER_LINE, IER_MODEM = 1, 2, 4, 8
IIR_NONE, IIR_TX, IIR_RX, IIR_LINE, IIR_TIMEOUT, IIR_MODEM, IIR_FIFO = 1, 2, 4, 6, 0xC, 0, 0xC0
LCR_DLAB, MCR_OUT2, MCR_LOOP = 0x80, 0x08, 0x10
LSR_DATA, LSR_OVERRUN, LSR_BREAK, LSR_THRE, LSR_EMPTY = 0x01, 0x02, 0x10, 0x20, 0x40
MSR_IDLE = 0xB0  # carrier, data set ready, clear to send
FIFO = 16
INPUT_ROOM = 64  # bytes taken from the host ahead of the guest


class Serial(PortDevice):
    """COM1 to COM4 (`index` 0 to 3) on a character backend."""

    kind, size = "isa-serial", 8

    def __init__(self, name: str, chardev: Chardev, index: int = 0) -> None:
        self.chardev, self.index = chardev, index
        self.line: Line | None = None
        self.sent = self.received = 0
        super().__init__(name, COM_PORTS[index])

    def attach(self, machine: Machine) -> None:
        super().attach(machine)
        self.line = machine.interrupts.line(COM_GSIS[self.index])
        self.chardev.on_writable = self._room
        self.chardev.open(machine.loop, self._input)

    def reset(self) -> None:
        self.ier = self.lcr = self.mcr = self.scr = self.fcr = 0
        self.divisor = 0x0C
        self.lsr_errors = 0
        self.tx_pending = False  # the "transmitter empty" interrupt is due
        self.full = False  # the host's side takes no more
        self.input = bytearray()
        self._update()

    def close(self) -> None:
        super().close()
        self.chardev.close()

    # The guest's side --------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        if offset <= IER and self.lcr & LCR_DLAB:
            return self.divisor >> 8 * offset & 0xFF
        if offset == DATA:
            return self._take()
        if offset == IER:
            return self.ier
        if offset == IIR_FCR:
            cause = self._cause()
            if cause == IIR_TX:
                self.tx_pending = False  # reading the register is the acknowledgement
                self._update()
            return cause | (IIR_FIFO if self.fcr & 1 else 0)
        if offset == LSR:
            value = (LSR_DATA if self.input else 0) | (0 if self.full else LSR_THRE | LSR_EMPTY) | self.lsr_errors
            self.lsr_errors = 0
            self._update()
            return value
        if offset == MSR:
            # In loopback the modem's outputs come back as its inputs.
            return (
                (self.mcr & 0xC) << 4 | (self.mcr & 2) << 3 | (self.mcr & 1) << 5 if self.mcr & MCR_LOOP else MSR_IDLE
            )
        return (self.lcr, self.mcr, self.scr)[{LCR: 0, MCR: 1, SCR: 2}[offset]]

    def write(self, offset: int, size: int, value: int) -> None:
        value &= 0xFF
        if offset <= IER and self.lcr & LCR_DLAB:
            self.divisor = self.divisor & 0xFF << 8 * (1 - offset) | value << 8 * offset
        elif offset == DATA:
            self._put(value)
        elif offset == IER:
            if value & IER_TX and not self.ier & IER_TX:
                self.tx_pending = not self.full
            self.ier = value & 0xF
        elif offset == IIR_FCR:
            self.fcr = value & 0xC9 if value & 1 else 0
            if value & 3 == 3:
                self.input.clear()
                self.chardev.resume_input()
        elif offset == LCR:
            self.lcr = value
        elif offset == MCR:
            self.mcr = value & 0x1F
        elif offset == SCR:
            self.scr = value
        self._update()

    def _put(self, value: int) -> None:
        if self.mcr & MCR_LOOP:
            if len(self.input) < FIFO:
                self.input.append(value)
            else:
                self.lsr_errors |= LSR_OVERRUN
            return
        self.full = self.chardev.write(bytes((value,))) == 0
        self.sent += not self.full
        self.tx_pending = not self.full

    def _take(self) -> int:
        if not self.input:
            return 0
        value = self.input.pop(0)
        self.received += 1
        if len(self.input) == INPUT_ROOM // 2:
            self.chardev.resume_input()
        self._update()
        return value

    def _cause(self) -> int:
        if self.ier & IER_LINE and self.lsr_errors:
            return IIR_LINE
        if self.ier & IER_RX and self.input:
            return IIR_RX
        if self.ier & IER_TX and self.tx_pending:
            return IIR_TX
        return IIR_NONE

    def _update(self) -> None:
        # OUT2 gates the interrupt on a PC, but in loopback its state is fed back and the gate is as good as closed.
        if self.line is not None:
            self.line.set(self._cause() != IIR_NONE)

    # The host's side ---------------------------------------------------------------------------------------------

    def _input(self, data: bytes) -> None:
        with self.lock:
            self.input += data
            if len(self.input) >= INPUT_ROOM:
                self.chardev.pause_input()
            self._update()

    def _room(self) -> None:
        with self.lock:
            if self.full:
                self.full, self.tx_pending = False, True
                self._update()

    # State -------------------------------------------------------------------------------------------------------

    _FIELDS = ("ier", "lcr", "mcr", "scr", "fcr", "divisor", "lsr_errors", "tx_pending")

    def state(self) -> State:
        # Where it is restored the host's side takes output: the driver that waits for that has its interrupt then.
        own = {name: getattr(self, name) for name in self._FIELDS} | {"tx_pending": self.tx_pending or self.full}
        return own | {"input": bytes(self.input)}

    def restore(self, state: State) -> None:
        for name in self._FIELDS:
            setattr(self, name, type(getattr(self, name))(state[name]))
        self.input = bytearray(state["input"])[: INPUT_ROOM + 4096]
        self.full = False
        self._update()

    def stats(self) -> dict[str, int]:
        return {"bytes_sent": self.sent, "bytes_received": self.received}

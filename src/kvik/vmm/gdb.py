"""What gdb is told and may do: each vCPU is a thread; all stop together. `gdb_server.py` waits for it.

Software breakpoints are int3 in the guest's memory, hardware breakpoints and watchpoints the debug registers; KVM turns
what they raise into exits (KVM_SET_GUEST_DEBUG, api.rst 4.87). An int3 of the guest's own goes back to the guest.
Memory is read and written by virtual address, through the page tables of the vCPU that gdb looks at, or by physical
address after `maintenance packet Qqemu.PhyMemMode:1`, as with QEMU.

The debugger is trusted with the machine, as whoever holds its monitor; packets are bounded all the same. Everything
runs on the main loop, except `_debug_exit`.

Reference: gdb's manual, "GDB Remote Serial Protocol".
"""

from __future__ import annotations

import contextlib
import socket

from kvik.errors import KvikError
from kvik.kvm.exits import DebugExit
from kvik.vmm import guestview
from kvik.vmm.faults import GuestFault
from kvik.vmm.gdb_breakpoints import HARDWARE, Breakpoints
from kvik.vmm.gdb_registers import DESCRIPTION, REGISTERS, RegisterFile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.machine import Machine
    from kvik.vmm.vcpu import VcpuThread

__all__ = ["GdbSession"]

PACKET = 0x4000  # bytes between $ and #
MAX_OUTPUT = 1 << 20
_SIGINT, _SIGTRAP = 2, 5


class GdbSession:
    """One debugger."""

    def __init__(self, machine: Machine, sock: socket.socket) -> None:
        self.machine = machine
        self.closed = False
        self._sock, self._fd = sock, sock.fileno()
        self._input = bytearray()
        self._output = bytearray()
        self._acks = True
        self._waiting = False  # gdb said continue and waits for a stop
        self._alone: VcpuThread | None = None  # it steps while all else stands still
        self._stepping: VcpuThread | None = None
        self._physical = False
        self._thread = self._first()
        self._last_stop = f"T{_SIGTRAP:02x}thread:01;"
        self.breakpoints = Breakpoints(machine)
        sock.setblocking(False)
        machine.loop.add_reader(self._fd, self._readable)
        machine.listeners.append(self._event)
        for thread in machine.vcpus:
            thread.on_debug = self._debug_exit
        machine.pause("debug")

    def _first(self) -> VcpuThread:
        return self.machine.vcpus[0]

    # Bytes -------------------------------------------------------------------------------------------------------

    def _readable(self) -> None:
        try:
            data = self._sock.recv(PACKET)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        self._input += data
        self._packets()

    def _packets(self) -> None:
        buffer = self._input
        while buffer and not self.closed:
            first = buffer[0]
            if first == 0x03:
                del buffer[:1]
                self._interrupt()
            elif first != ord("$"):
                del buffer[:1]  # acknowledgements, and noise
            else:
                end = buffer.find(b"#")
                if end < 0 or len(buffer) < end + 3:
                    if len(buffer) > PACKET + 4:
                        self.close()
                    return
                body, told = bytes(buffer[1:end]), bytes(buffer[end + 1 : end + 3])
                del buffer[: end + 3]
                if told.lower() != b"%02x" % (sum(body) & 0xFF):
                    self._write(b"-")
                    continue
                if self._acks:
                    self._write(b"+")
                self._handle(body)

    def _send(self, text: str | bytes) -> None:
        body = text.encode("latin-1") if isinstance(text, str) else text
        self._write(b"$" + body + b"#%02x" % (sum(body) & 0xFF))

    def _write(self, data: bytes) -> None:
        if self.closed:
            return
        self._output += data
        if len(self._output) > MAX_OUTPUT:
            self.close()
            return
        self._writable()

    def _writable(self) -> None:
        try:
            del self._output[: self._sock.send(self._output)]
        except BlockingIOError:
            pass
        except OSError:
            self.close()
            return
        if self._output:
            self.machine.loop.add_writer(self._fd, self._writable)
        else:
            self.machine.loop.remove_writer(self._fd)

    # Packets -----------------------------------------------------------------------------------------------------

    def _handle(self, body: bytes) -> None:
        try:
            answer = self._answer(body)
        except GuestFault:
            answer = "E14"  # EFAULT
        except (ValueError, IndexError, UnicodeDecodeError):
            answer = "E22"  # EINVAL
        except (KvikError, OSError) as error:
            self.machine.log(f"gdb: {error}")
            answer = "E01"
        if answer is not None:
            self._send(answer)

    def _answer(self, body: bytes) -> str | bytes | None:
        """What to send back; None: nothing now; empty: not known here."""
        if body.startswith(b"X"):
            place, _, binary = body[1:].partition(b":")
            return self._store(place.decode("ascii"), _unescaped(binary))
        text = body.decode("ascii")
        letter, rest = text[:1], text[1:]
        if letter == "q":
            return self._query(rest)
        if letter == "Q":
            return self._set(rest)
        if letter == "v":
            return self._verbose(rest)
        if self._running and letter not in "?D":
            return "E16"  # EBUSY: gdb asks only while all stands still
        if letter == "?":
            return self._last_stop
        if letter == "g":
            file = RegisterFile(self._thread.vcpu)
            return b"".join(file.read(number) for number in range(len(REGISTERS))).hex()
        if letter == "G":
            return self._write_all(bytes.fromhex(rest))
        if letter == "p":
            return RegisterFile(self._thread.vcpu).read(_hex(rest)).hex()
        if letter == "P":
            number, _, value = rest.partition("=")
            file = RegisterFile(self._thread.vcpu)
            file.write(_hex(number), bytes.fromhex(value))
            file.flush()
            return "OK"
        if letter == "m":
            return self._load(rest)
        if letter == "M":
            head, _, data = rest.partition(":")
            return self._store(head, bytes.fromhex(data))
        if letter in ("Z", "z"):
            return self._breakpoint(letter == "Z", rest)
        if letter == "H":
            return self._select(rest)
        if letter == "T":
            return "OK" if self._by_id(rest) is not None else "E03"
        if letter in ("c", "s", "C", "S"):
            # An address to go on at is an old form that gdb no longer sends.
            return self._go(self._thread if letter in "sS" else None, alone=letter in "sS")
        if letter == "D":
            self._send("OK")
            self.close()
            return None
        if letter == "k":
            self.close(resume=False)
            self.machine.quit("host-signal")
            return None
        return ""

    @property
    def _running(self) -> bool:
        return not self.machine.still or self._alone is not None

    def _query(self, rest: str) -> str | bytes | None:
        name, _, value = rest.partition(":")
        if name == "Supported":
            return (
                f"PacketSize={PACKET:x};QStartNoAckMode+;qXfer:features:read+;vContSupported+;swbreak+;hwbreak+;"
                "qqemu.PhyMemMode+"
            )
        if name == "Xfer" and value.startswith("features:read:target.xml:"):
            offset, length = (_hex(part) for part in value.rsplit(":", 1)[1].split(","))
            piece = DESCRIPTION[offset : offset + min(length, PACKET - 8)]
            return ("m" if offset + len(piece) < len(DESCRIPTION) else "l") + piece
        if name == "Attached":
            return "1"
        if name == "C":
            return f"QC{self._thread.index + 1:02x}"
        if name == "fThreadInfo":
            return "m" + ",".join(f"{thread.index + 1:02x}" for thread in self.machine.vcpus)
        if name == "sThreadInfo":
            return "l"
        if name.startswith("ThreadExtraInfo,"):
            thread = self._by_id(name.split(",", 1)[1])
            return f"vCPU {thread.index}, thread {thread.thread_id}".encode().hex() if thread else "E03"
        if name == "qemu.PhyMemMode":
            return str(int(self._physical))
        if name.startswith("Rcmd,"):
            return self._command(bytes.fromhex(name.split(",", 1)[1]).decode("ascii", "replace"))
        if name == "Symbol":
            return "OK"
        return ""

    def _set(self, rest: str) -> str:
        if rest == "StartNoAckMode":
            self._acks = False
            return "OK"
        if rest in ("qemu.PhyMemMode:0", "qemu.PhyMemMode:1"):
            self._physical = rest.endswith("1")
            return "OK"
        return ""

    def _verbose(self, rest: str) -> str | bytes | None:
        if rest == "Cont?":
            return "vCont;c;C;s;S"
        if rest.startswith("Kill"):
            self._send("OK")
            self.close(resume=False)
            self.machine.quit("host-signal")
            return None
        if not rest.startswith("Cont;"):
            return ""
        if self._running:
            return "E16"
        stepping: VcpuThread | None = None
        others = False
        for action in rest.removeprefix("Cont;").split(";"):
            word, _, which = action.partition(":")
            if word[:1] in ("s", "S"):
                if stepping is None:
                    stepping = self._by_id(which) if which and which != "-1" else self._thread
            elif word[:1] in ("c", "C"):
                others = True
            else:
                return "E22"
        return self._go(stepping, alone=stepping is not None and not others)

    def _select(self, rest: str) -> str:
        if rest[1:] not in ("0", "-1"):
            thread = self._by_id(rest[1:])
            if thread is None:
                return "E03"
            if rest[:1] == "g":
                self._thread = thread
        return "OK"

    def _by_id(self, text: str) -> VcpuThread | None:
        number = _hex(text) - 1
        return next((thread for thread in self.machine.vcpus if thread.index == number), None)

    def _write_all(self, data: bytes) -> str:
        file = RegisterFile(self._thread.vcpu)
        for number, register in enumerate(REGISTERS):
            size = register.bits // 8
            if len(data) < size:
                break
            with contextlib.suppress(ValueError):  # a read-only one, unchanged or not: gdb sends all of them
                file.write(number, data[:size])
            data = data[size:]
        file.flush()
        return "OK"

    def _load(self, rest: str) -> str:
        address, size = (_hex(part) for part in rest.split(","))
        size = min(size, (PACKET - 8) // 2)
        if self._physical:
            return guestview.read_physical(self.machine, address, size).hex()
        data = guestview.read_virtual(self.machine, self._thread, address, size)
        return self.breakpoints.hidden(address, data).hex()

    def _store(self, head: str, data: bytes) -> str:
        address, size = (_hex(part) for part in head.split(","))
        if self._running:
            return "E16"
        if size != len(data):
            return "E22"
        if self._physical:
            guestview.write_physical(self.machine, address, data)
        else:
            guestview.write_virtual(self.machine, self._thread, address, data)
        return "OK"

    def _breakpoint(self, insert: bool, rest: str) -> str:
        kind, address, length = (_hex(part) for part in rest.split(";", maxsplit=1)[0].split(","))
        if kind != 0 and kind not in HARDWARE:
            return ""  # watchpoints on reads alone
        if insert:
            return "OK" if self.breakpoints.insert(self._thread, kind, address, length) else "E28"  # ENOSPC
        self.breakpoints.remove(kind, address, length)
        return "OK"

    def _command(self, line: str) -> str:
        """gdb's `monitor`: what the human monitor's `info` and a few others answer."""
        words = line.split()
        if words[:1] == ["reset"]:
            self.machine.reset()
            text = "reset\n"
        elif words == ["info", "exits"]:
            text = "".join(f"vCPU {thread.index}: {sum(thread.exits)} exits\n" for thread in self.machine.vcpus)
        elif words == ["info", "mtree"]:
            buses = (self.machine.mmio, self.machine.ports)
            text = "".join(f"{start:#x} {size:#x} {name}\n" for bus in buses for start, size, name in bus.ranges())
        else:
            text = "monitor reset | info exits | info mtree\n"
        return text[: PACKET // 2 - 8].encode("ascii", "replace").hex()

    # Running and stopping ----------------------------------------------------------------------------------------

    def _go(self, stepping: VcpuThread | None, *, alone: bool) -> str | None:
        """Let go: all, or only the one that steps. gdb hears when they stop."""
        self._stepping = stepping
        for thread in self.machine.vcpus:
            thread.vcpu.set_guest_debug(*self.breakpoints.control(thread is stepping))
        if stepping is not None and alone:
            self._alone = stepping
            stepping.unpark()
        else:
            self.machine.resume()
        self._waiting = True
        return None

    def _debug_exit(self, thread: VcpuThread) -> None:
        """On the vCPU's thread: a step, a breakpoint, or the guest's own."""
        exit_ = thread.vcpu.exit()
        if not isinstance(exit_, DebugExit):
            return
        ours = exit_.exception != 3 or exit_.pc in self.breakpoints.software
        if not ours:
            # The guest's own int3: KVM took it from the guest, so it is given back (api.rst 4.32, soft exceptions).
            events = thread.vcpu.vcpu_events()
            events.exception_injected, events.exception_nr, events.exception_has_error_code = 1, 3, 0
            thread.vcpu.set_vcpu_events(events)
            return
        thread.hold()
        self.machine.loop.call_soon(lambda: self._stopped(thread, exit_))

    def _stopped(self, thread: VcpuThread, exit_: DebugExit) -> None:
        if self.closed or not self._waiting:
            return
        if self._alone is not None:
            self._alone.wait_parked()
            self._alone = None
        reason = ""
        if exit_.exception == 3:
            reason = "swbreak:;"
        elif (hit := self.breakpoints.hit(exit_.dr6)) is not None:
            kind, address = hit
            reason = {1: "hwbreak:;", 2: f"watch:{address:x};", 4: f"awatch:{address:x};"}[kind]
        self._report(_SIGTRAP, thread, reason)

    def _report(self, signal: int, thread: VcpuThread, reason: str = "") -> None:
        """Everything stands still; gdb hears which one caused it."""
        self._waiting = False
        self.machine.pause("debug")
        if self._stepping is not None:
            self._stepping.vcpu.set_guest_debug(*self.breakpoints.control(False))
            self._stepping = None
        self._thread = thread
        self._last_stop = f"T{signal:02x}thread:{thread.index + 1:02x};{reason}"
        self._send(self._last_stop)

    def _interrupt(self) -> None:
        """Control-C."""
        if self._alone is not None:
            self._alone.ask_to_park()
            self._alone.wait_parked()
            self._alone = None
        if self._waiting:
            self._report(_SIGINT, self._thread)

    def _event(self, name: str, data: dict[str, object]) -> None:
        if self.closed or not self._waiting:
            return
        if name == "SHUTDOWN":
            self._waiting = False
            self._send("W00")
        elif name == "STOP" and self.machine.status != "debug":  # the monitor's, or a panic
            self._report(_SIGINT, self._thread)

    def close(self, *, resume: bool = True) -> None:
        """Take out every breakpoint; the machine goes on if it was we who stopped it."""
        if self.closed:
            return
        if self._alone is not None:
            self._alone.ask_to_park()
            self._alone.wait_parked()
            self._alone = None
        self.closed = True
        if self._event in self.machine.listeners:
            self.machine.listeners.remove(self._event)
        if self.machine.vcpus:
            with self.machine.paused():
                self.breakpoints.clear()
                for thread in self.machine.vcpus:
                    thread.on_debug = None
                    with contextlib.suppress(OSError):
                        thread.vcpu.set_guest_debug(0)
        self.machine.loop.remove_reader(self._fd)
        self.machine.loop.remove_writer(self._fd)
        if self._output:
            with contextlib.suppress(OSError):
                self._sock.send(self._output)
        self._sock.close()
        if resume and self.machine.status == "debug":
            self.machine.resume()


def _hex(text: str) -> int:
    """Raises ValueError also for signs, underscores and more than 64 bits."""
    if not text or len(text) > 16 or not all(letter in "0123456789abcdefABCDEF" for letter in text):
        raise ValueError(text)
    return int(text, 16)


def _unescaped(data: bytes) -> bytes:
    """Binary data: } and the next byte xor 0x20."""
    first, *rest = data.split(b"}")
    return first + b"".join(bytes([piece[0] ^ 0x20]) + piece[1:] for piece in rest if piece)

"""A guest of a few hundred bytes with a virtio-net driver: what comes by its serial line it sends, what it receives it
says there. Each frame behind its length (two bytes, little-endian), both ways. 32-bit code, polling.

So whoever holds the other end of the serial line is the guest's network stack (`SerialGuest`).
"""

from __future__ import annotations

import socket
import struct

from blk_guest import ECAM, NOTIFY, WINDOW, fill, poke
from tiny_kernel import COM1

from unit.network.switch.guest import Guest

NOTIFY_MULTIPLIER = 4  # `virtio.transport`
HEADER = 12  # struct virtio_net_hdr_v1
STACK, SEEN = 0x17F_0000, 0x17F_8000
MEMORY = 0x180_0000  # of the receiving queue; the sending one's follows
BUFFER = 2048
WRITE = 2


class _Ring:
    def __init__(self, index: int, bar: int) -> None:
        self.index = index
        memory = MEMORY + index * 0x1_0000
        self.desc, self.avail, self.used, self.buffer = (memory + at for at in (0, 0x1000, 0x2000, 0x3000))
        self.doorbell = bar + NOTIFY + NOTIFY_MULTIPLIER * index

    def offer(self) -> bytes:
        """incw avail.idx; then the doorbell. All entries of the ring say descriptor 0."""
        return b"\x66\xff\x05" + struct.pack("<I", self.avail + 2) + poke(self.doorbell, self.index, 2)


def relay(slot: int) -> bytes:
    """The program, for the card in PCI slot `slot`."""
    bar = WINDOW + slot * 0x1_0000
    receiving, sending = _Ring(0, bar), _Ring(1, bar)
    return b"\xfc\xbc" + struct.pack("<I", STACK) + _start(slot, bar, receiving, sending) + _loop(receiving, sending)


def _start(slot: int, bar: int, receiving: _Ring, sending: _Ring) -> bytes:
    """virtio 1.2, 3.1.1: acknowledge, driver, VERSION_1 and no other feature, two queues of eight."""
    config = ECAM + (slot << 15)
    code = poke(config + 0x10, bar) + poke(config + 0x14, 0) + poke(config + 0x04, 6) + poke(SEEN, 0)
    for status in (0, 1, 3):
        code += poke(bar + 20, status, 1)
    code += poke(bar + 8, 0) + poke(bar + 12, 0) + poke(bar + 8, 1) + poke(bar + 12, 1) + poke(bar + 20, 11, 1)
    for index, ring in enumerate((receiving, sending)):
        code += poke(ring.avail, 0) + poke(ring.used, 0) + fill(ring.buffer, bytes(HEADER))
        flags = 0 if index else WRITE
        code += fill(ring.desc, struct.pack("<QIHH", ring.buffer, BUFFER, flags, 0))
        code += poke(bar + 22, index, 2) + poke(bar + 24, 8, 2)
        for offset, place in ((32, ring.desc), (40, ring.avail), (48, ring.used)):
            code += poke(bar + offset, place) + poke(bar + offset + 4, 0)
        code += poke(bar + 28, 1, 2)
    return code + poke(bar + 20, 15, 1) + receiving.offer()


def _loop(receiving: _Ring, sending: _Ring) -> bytes:
    def word(value: int) -> bytes:
        return struct.pack("<I", value)

    line, data = b"\x66\xba" + struct.pack("<H", COM1 + 5), b"\x66\xba" + struct.pack("<H", COM1)
    # getc: mov $COM1+5,%dx; 1: in (%dx),%al; test $1,%al; jz 1b; mov $COM1,%dx; in (%dx),%al; ret
    getc = line + b"\xec\xa8\x01\x74\xfb" + data + b"\xec\xc3"
    code = b"\xe9" + word(len(getc)) + getc
    main = len(code)

    def call() -> bytes:
        return b"\xe8" + struct.pack("<i", 5 - (len(code) + 5))

    # main: in %dx,%al of the line's state; test $1,%al; jz receive
    code += line + b"\xec\xa8\x01\x0f\x84"
    jump = len(code)
    code += bytes(4)
    code += call()
    code += b"\x0f\xb6\xc8"  # movzbl %al,%ecx
    code += call()
    code += b"\x88\xc5\x89\xce\xbf" + word(sending.buffer + HEADER)  # mov %al,%ch; mov %ecx,%esi; mov $frame,%edi
    code += call()  # 1: call getc; stosb; dec %ecx; jnz 1b
    code += b"\xaa\x49\x75\xf7"
    code += b"\x83\xc6\x0c\x89\x35" + word(sending.desc + 8)  # add $HEADER,%esi; mov %esi,length
    code += sending.offer()
    # 1: pause; mov used.idx,%ax; cmp avail.idx,%ax; jne 1b
    code += b"\xf3\x90\x66\xa1" + word(sending.used + 2) + b"\x66\x3b\x05" + word(sending.avail + 2) + b"\x75\xef"
    code = code[:jump] + struct.pack("<i", len(code) - (jump + 4)) + code[jump + 4 :]
    # receive: mov used.idx,%ax; cmp SEEN,%ax; je main
    code += b"\x66\xa1" + word(receiving.used + 2) + b"\x66\x3b\x05" + word(SEEN)
    code += b"\x0f\x84" + struct.pack("<i", main - (len(code) + 6))
    # movzwl SEEN,%ebx; and $7,%ebx; mov used.ring[%ebx].len,%ecx; incw SEEN; sub $HEADER,%ecx
    code += b"\x0f\xb7\x1d" + word(SEEN) + b"\x83\xe3\x07\x8b\x0c\xdd" + word(receiving.used + 8)
    code += b"\x66\xff\x05" + word(SEEN) + b"\x83\xe9\x0c"
    # mov %cl,%al; out; mov %ch,%al; out; mov $frame,%esi; 1: lodsb; out %al,(%dx); dec %ecx; jnz 1b
    code += data + b"\x88\xc8\xee\x88\xe8\xee\xbe" + word(receiving.buffer + HEADER) + b"\xac\xee\x49\x75\xfb"
    code += receiving.offer()
    return code + b"\xe9" + struct.pack("<i", main - (len(code) + 5))


class SerialGuest(Guest):
    """The network stack of a guest that runs `relay`; `line` is the other end of its serial line."""

    def __init__(self, line: socket.socket, mac: str) -> None:
        super().__init__(line, mac)

    def send(self, frame: bytes) -> None:
        self.sock.sendall(struct.pack("<H", len(frame)) + frame)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self.sock.recv(size - len(data))
            if not more:
                raise ConnectionError("the guest is gone")
            data += more
        return data

    def frame(self) -> bytes:
        return self._exactly(struct.unpack("<H", self._exactly(2))[0])

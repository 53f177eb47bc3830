"""Firmware's memory just below 4 GiB: a ROM with its code, and NOR flash with its variables.

Both are pages that the guest reads, and runs, without an exit. The flash speaks Intel's command set (CFI 0001; Intel
StrataFlash data sheet, 290667, "Command Definitions") as QEMU's pflash does, whose two departures firmware relies
on: to clear the status register makes all of it 0, and to program a byte stores it, whatever was there before.

    array     reads give the contents, without an exit      <- 0xFF, 0x00, 0x50, or what is no command
    status    reads give the status register                <- 0x70, and after program and erase
    program   the next write is data                        <- 0x10, 0x40
    erase     the next write confirms (0xD0): 4 KiB of 0xFF <- 0x20

A change is written to the file before the guest's next instruction.
"""

from __future__ import annotations

import os

from kvik.errors import HostError, ImageError
from kvik.vmm.device import Device, MmioDevice
from kvik.vmm.layout import FLASH, PAGE, RAM_HIGH
from kvik.vmm.slots import Pages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.boot.source import Source
    from kvik.vmm.device import State
    from kvik.vmm.machine import Machine

__all__ = ["Flash", "Rom"]

READ_ARRAY, PROGRAM, PROGRAM_ALSO, ERASE, CLEAR, STATUS, CONFIRM = 0xFF, 0x40, 0x10, 0x20, 0x50, 0x70, 0xD0
MODES = ("array", "status", "program", "erase")
READY, ERASE_FAILED, PROGRAM_FAILED = 1 << 7, 1 << 5, 1 << 4
BLOCK = 4096


class Rom(Device):
    """What `source` holds, at the end of the first 4 GiB or, with `below`, just below that address."""

    kind = "rom"

    def __init__(self, name: str, source: Source, below: int = RAM_HIGH) -> None:
        self.pages = contents(source)
        self.base = below - self.pages.size
        if self.base < FLASH:
            raise ImageError(
                f"the {source.what} {source.name} is too large: {self.pages.size} bytes",
                remedy=f"firmware and its variables have {RAM_HIGH - FLASH >> 20} MiB together",
            )
        super().__init__(name)

    def attach(self, machine: Machine) -> None:
        self.pages.place(machine.slots, self.base)
        if not self.pages.shown:
            raise HostError(
                "this host's KVM has no read-only memory, which firmware runs from",
                remedy="boot a kernel, with --kernel",
            )

    def close(self) -> None:
        self.pages.place(None, -1)


class Flash(MmioDevice):
    """Variables. `fd`, writable, is the file that they are kept in, as large as `source`; -1: changes are lost."""

    kind = "cfi01-flash"

    def __init__(self, name: str, source: Source, below: int, fd: int) -> None:
        self.pages = contents(source)
        self.size, self.fd = self.pages.size, fd
        if below - self.size < FLASH:
            raise ImageError(
                f"the {source.what} {source.name} is too large: {self.size} bytes",
                remedy="give the variables file that came with the firmware",
            )
        self.machine: Machine | None = None
        super().__init__(name, below - self.size)

    def attach(self, machine: Machine) -> None:
        super().attach(machine)
        self.machine = machine
        self.pages.place(machine.slots, self.base)

    def close(self) -> None:
        super().close()
        self.pages.place(None, -1)

    def reset(self) -> None:
        self.status = READY
        self.mode = "array"
        self.pages.show()

    def _enter(self, mode: str) -> None:
        self.mode = mode
        if mode == "array":
            self.pages.show()
        else:
            self.pages.hide()

    # The guest's side --------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """Where it exits: in all modes but one, and in that on a host that cannot show pages."""
        if self.mode == "array":
            return int.from_bytes(self.pages.view[offset : offset + size], "little")
        return self.status

    def write(self, offset: int, size: int, value: int) -> None:
        if self.mode == "program":
            self._store(offset, value.to_bytes(size, "little"), PROGRAM_FAILED)
            return
        command = value & 0xFF
        if self.mode == "erase":
            if command == CONFIRM:
                self._store(offset & -BLOCK, b"\xff" * BLOCK, ERASE_FAILED)
            else:  # a wrong sequence sets both (290667, "Status Register Definitions")
                self.status |= READY | ERASE_FAILED | PROGRAM_FAILED
                self._enter("status")
        elif command in (PROGRAM, PROGRAM_ALSO):
            self._enter("program")
        elif command == ERASE:
            self._enter("erase")
        elif command == STATUS:
            self._enter("status")
        else:
            if command == CLEAR:
                self.status = 0
            self._enter("array")

    def _store(self, offset: int, data: bytes, failed: int) -> None:
        self.pages.view[offset : offset + len(data)] = data
        self.status |= READY
        try:
            self._keep(offset, data)
        except OSError as error:
            self.status |= failed
            assert self.machine is not None
            self.machine.log(f"{self.name}: the firmware's variables cannot be written: {error.strerror}")
        self._enter("status")

    def _keep(self, offset: int, data: bytes | memoryview) -> None:
        if self.fd < 0:
            return
        os.lseek(self.fd, offset, os.SEEK_SET)  # pwrite is none of the calls that a vCPU's thread may make
        while data:
            data = data[os.write(self.fd, data) :]

    # State ---------------------------------------------------------------------------------------------------------

    def state(self) -> State:
        """With the contents: the file is the machine's own, and may not be there, or be older, where it goes on."""
        import zlib

        return {"mode": self.mode, "status": self.status, "contents": zlib.compress(self.pages.view, 1)}

    def restore(self, state: State) -> None:
        import zlib

        if state["mode"] not in MODES:
            raise ValueError(f"a flash in mode {state['mode']!r}")
        unpacker = zlib.decompressobj()
        try:
            data = unpacker.decompress(state["contents"], self.size + 1)
        except zlib.error as error:
            raise ValueError(f"the flash's contents: {error}") from None
        if len(data) != self.size:
            raise ValueError(f"the state is of a flash of another size than {self.size} bytes")
        self.pages.view[:] = data
        self._keep(0, data)
        self.status = int(state["status"]) & 0xFF
        self._enter(state["mode"])


def contents(source: Source) -> Pages:
    """All of a file, in pages that can be shown to the guest."""
    if source.size % PAGE or source.size > RAM_HIGH - FLASH:
        raise ImageError(
            f"the {source.what} {source.name} is no flash image: {source.size} bytes",
            remedy=f"it is a multiple of {PAGE} bytes and at most {RAM_HIGH - FLASH >> 20} MiB",
        )
    pages = Pages(source.size)
    done = 0
    while done < source.size:
        got = os.preadv(source.fd, [pages.view[done:]], done)
        if not got:
            raise ImageError(f"the {source.what} {source.name} was cut off while it was read", remedy="try again")
        done += got
    return pages

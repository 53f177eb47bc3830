"""fw_cfg: named files from the machine to its firmware, through three ports. QEMU's docs/specs/fw_cfg.rst.

    0x510   selector, 16 bits: which item; reading begins at its first byte
    0x511   data: its next byte, 0 behind its end
    0x514   DMA address, two halves of 32 bits, both big-endian; the lower one starts what it points at

A request in guest memory: control, length (32 bits each), address (64), all big-endian. Firmware uses it wherever the
ID item says that there is DMA, for a byte takes an exit else. Nothing can be written here: all items are ours.
"""

from __future__ import annotations

import struct

from kvik.vmm.device import PortDevice
from kvik.vmm.faults import GuestFault
from kvik.vmm.layout import FW_CFG_PORT, MIB

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.vmm.device import State
    from kvik.vmm.machine import Machine
    from kvik.vmm.memory import GuestMemory

__all__ = ["FwCfg"]

# Items without a name
SIGNATURE, ID, CPU_COUNT, MAX_CPUS, DIRECTORY, FIRST_FILE = 0x00, 0x01, 0x05, 0x0F, 0x19, 0x20
HAS_PORTS, HAS_DMA = 1, 2  # bits of ID
WRITE_MODE = 1 << 14  # of the selector: of no effect any more
MAX_FILES = 64
NAME = 56  # bytes of a name, with the zero behind

DMA_SIGNATURE = b"QEMU CFG"  # what the DMA address reads as
ERROR, READ, SKIP, SELECT, WRITE = (1 << bit for bit in range(5))
REQUEST = struct.Struct(">IIQ")
BEHIND = 16 * MIB  # zeroes that one request gets behind an item's end; longer ones are refused

_SELECTOR, _DATA, _DMA_HIGH, _DMA_LOW = 0, 1, 4, 8


class FwCfg(PortDevice):
    """`items`: by selector value, the directory of files among them; `publish` says what there is."""

    kind, base, size = "fw_cfg", FW_CFG_PORT, 12

    def __init__(self, name: str = "fw_cfg") -> None:
        self.memory: GuestMemory | None = None
        self.items: dict[int, bytes] = {}
        super().__init__(name)

    def attach(self, machine: Machine) -> None:
        super().attach(machine)
        self.memory = machine.memory

    def reset(self) -> None:
        self.selected = self.offset = self.dma_high = 0

    def publish(self, files: dict[str, bytes], items: dict[int, bytes]) -> None:
        """From now on the guest finds these files, and these items besides what the interface itself has."""
        if len(files) > MAX_FILES:
            raise ValueError(f"{len(files)} files for the firmware, at most {MAX_FILES}")
        found = {SIGNATURE: b"QEMU", ID: struct.pack("<I", HAS_PORTS | HAS_DMA), **items}
        entries = [struct.pack(">I", len(files))]
        for key, (name, data) in enumerate(sorted(files.items()), FIRST_FILE):
            text = name.encode("ascii")
            if len(text) >= NAME:
                raise ValueError(f"the name {name} is longer than {NAME - 1} bytes")
            entries.append(struct.pack(f">IHH{NAME}s", len(data), key, 0, text))
            found[key] = data
        found[DIRECTORY] = b"".join(entries)
        with self.lock:
            self.items = found

    # The guest's side --------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        if offset == _DATA and size == 1:
            return self._take(1)[0]
        if offset >= _DMA_HIGH:
            at = offset - _DMA_HIGH
            return int.from_bytes(DMA_SIGNATURE[at : at + size], "little")
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == _SELECTOR and size == 2:
            self._select(value)
        elif offset == _DMA_HIGH and size == 4:
            self.dma_high = _swapped(value)
        elif offset == _DMA_LOW and size == 4:
            address, self.dma_high = self.dma_high << 32 | _swapped(value), 0
            self._request(address)

    def _select(self, key: int) -> None:
        self.selected, self.offset = key & ~WRITE_MODE & 0xFFFF, 0

    def _take(self, count: int) -> bytes:
        """The next bytes of the item; zeroes behind its end."""
        data = self.items.get(self.selected, b"")[self.offset : self.offset + count]
        self.offset = min(self.offset + count, 1 << 32)
        return data + bytes(count - len(data))

    def _request(self, address: int) -> None:
        """Do what a request in guest memory says. One that is not in RAM gets no answer: there is no place for it."""
        assert self.memory is not None
        try:
            control, length, target = REQUEST.unpack(self.memory.read(address, REQUEST.size))
            self.memory.put_u32(address, _swapped(self._perform(control, length, target)))
        except GuestFault:
            return

    def _perform(self, control: int, length: int, target: int) -> int:
        """What becomes of `control`: 0, or ERROR."""
        assert self.memory is not None
        if control & SELECT:
            self._select(control >> 16)
        if control & READ:
            left = max(len(self.items.get(self.selected, b"")) - self.offset, 0)
            if length > left + BEHIND:
                return ERROR
            try:
                self.memory.view(target, length)  # all of it is RAM, before anything is taken
                self.memory.write(target, self._take(length))
            except GuestFault:
                return ERROR
        elif control & WRITE:
            return ERROR
        elif control & SKIP:
            self.offset = min(self.offset + length, 1 << 32)
        return 0

    # State: the items follow from the configuration ---------------------------------------------------------------

    def state(self) -> State:
        return {"selected": self.selected, "offset": self.offset, "dma_high": self.dma_high}

    def restore(self, state: State) -> None:
        self.selected = int(state["selected"]) & 0xFFFF
        self.offset = min(max(int(state["offset"]), 0), 1 << 32)
        self.dma_high = int(state["dma_high"]) & 0xFFFF_FFFF


def _swapped(value: int) -> int:
    """A big-endian register of 32 bits as ports, which are little-endian, carry it."""
    return int.from_bytes((value & 0xFFFF_FFFF).to_bytes(4, "little"), "big")

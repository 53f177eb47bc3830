"""The machine's RAM in another process: mapped from the memfds that its VMM sends (vhost-user, SET_MEM_TABLE)."""

from __future__ import annotations

import mmap
import os

from kvik.errors import HostError, InvalidArgument
from kvik.vmm.faults import GuestFault
from kvik.vmm.layout import PAGE, Layout
from kvik.vmm.memory import MAP_NORESERVE, GuestMemory, Region, map_memory, unmap_memory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    # guest-physical address, size, address in the VMM, offset in the file
    Entry = tuple[int, int, int, int]

__all__ = ["DirtyPages", "SharedMemory"]

MAX_ADDRESS = 1 << 52


class SharedMemory(GuestMemory):
    """What a table of the VMM's describes. It can take its memory away under us (a memfd that is cut short is SIGBUS):
    then this process ends, and its disk with it."""

    def __init__(self) -> None:
        super().__init__(Layout(PAGE))
        self._known: dict[tuple[int, ...], Region] = {}
        self._theirs: list[tuple[int, int, int]] = []  # address in the VMM, size, guest-physical address

    def set_table(self, entries: Sequence[Entry], fds: Sequence[int]) -> None:
        """All of RAM, from now on; the descriptors are taken in any case. Regions that stay are not mapped anew, so
        rings in them go on. Raises `InvalidArgument`, `HostError`; then nothing has changed."""
        made: dict[tuple[int, ...], Region] = {}
        table: dict[tuple[int, ...], Region] = {}
        left = list(fds)
        try:
            for start, size, _, offset in entries:
                fd = left.pop(0)
                status = os.fstat(fd)
                key = (start, size, offset, status.st_dev, status.st_ino)
                if key in table:
                    os.close(fd)
                    raise InvalidArgument(f"memory at {start:#x} is told twice")
                if key in self._known:
                    table[key] = self._known[key]
                    os.close(fd)
                    continue
                table[key] = made[key] = self._map(start, size, offset, fd, status.st_size)
            ordered = sorted(table.values(), key=lambda region: region.start)
            end = 0
            for region in ordered:
                if region.start < end:
                    raise InvalidArgument(f"memory at {region.start:#x} overlaps other memory")
                end = region.end
        except BaseException as error:
            for region in made.values():
                region.view.release()
                unmap_memory(region.address, region.size)
                os.close(region.fd)
            for fd in left:
                os.close(fd)
            if isinstance(error, OSError):
                raise HostError(f"the VMM's memory cannot be mapped: {error.strerror}") from error
            raise
        for gone in self._known.keys() - table.keys():
            self.remove(self._known[gone])
        for region in made.values():
            self.add(region)
        self._known = table
        self._theirs = [(user, size, start) for start, size, user, _ in entries]

    @staticmethod
    def _map(start: int, size: int, offset: int, fd: int, end: int) -> Region:
        try:
            if not size or start + size > MAX_ADDRESS or offset + size > end:
                raise InvalidArgument(f"{size} bytes of memory at {start:#x} are not in a file of {end} bytes")
            address = map_memory(size, mmap.MAP_SHARED | MAP_NORESERVE, fd, offset)
        except BaseException:
            os.close(fd)
            raise
        return Region(start, size, address, fd=fd, fd_offset=offset)

    def guest_address(self, theirs: int, size: int) -> int:
        """The guest-physical address of what the VMM has at `theirs`. Raises `GuestFault`."""
        for user, length, start in self._theirs:
            if user <= theirs and theirs + size <= user + length:
                return start + theirs - user
        raise GuestFault(f"{size} bytes at the VMM's {theirs:#x} are not all RAM")

    def close(self) -> None:
        super().close()
        self._known.clear()
        self._theirs.clear()


class DirtyPages:
    """The bitmap that the VMM reads to know which pages were written: one bit for each 4 KiB (VHOST_LOG_PAGE)."""

    def __init__(self, fd: int, size: int, offset: int) -> None:
        """Takes the descriptor. Raises `HostError`, `InvalidArgument`."""
        try:
            if not 0 < size <= 1 << 37 or offset + size > os.fstat(fd).st_size:
                raise InvalidArgument(f"a log of {size} bytes is not in the VMM's file")
            self._map = mmap.mmap(fd, size + offset % PAGE, offset=offset - offset % PAGE)
        except (OSError, ValueError, OverflowError) as error:
            raise HostError(f"the VMM's log cannot be mapped: {error}") from error
        finally:
            os.close(fd)
        self._start, self._bits = offset % PAGE, 8 * size

    def mark(self, address: int, size: int) -> None:
        """Nobody else writes to this bitmap while we do: the VMM gives another before it reads this one."""
        bits, start = self._map, self._start
        for page in range(address // PAGE, min((address + size - 1) // PAGE + 1, self._bits)):
            bits[start + (page >> 3)] |= 1 << (page & 7)

    def close(self) -> None:
        self._map.close()

"""A bus: which device answers at which address. One for ports, one for memory-mapped I/O."""

from __future__ import annotations

from bisect import bisect_right

from kvik.errors import InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    class BusDevice(Protocol):
        """What a bus needs of a device. `size` is 1, 2, 4 or 8 bytes; values are little-endian integers.

        A `lock` attribute (a lock or RLock), if the device has one, is held around each call: calls come from the
        threads of all vCPUs.
        """

        def read(self, offset: int, size: int) -> int: ...
        def write(self, offset: int, size: int, value: int) -> None: ...


__all__ = ["Bus"]


class _NoLock:
    def __enter__(self) -> None: ...
    def __exit__(self, *exc: object) -> None: ...


_NO_LOCK = _NoLock()


class Bus:
    """Address ranges and their devices. Nobody home: reads give all ones, writes are dropped, as on a real PC."""

    def __init__(self, name: str, limit: int) -> None:
        self.name, self.limit = name, limit
        self.unclaimed = 0  # accesses that nobody answered
        # Replaced as a whole when something changes, so that vCPUs may look without a lock.
        self._map: tuple[list[int], list[tuple[int, int, BusDevice, object, str]]] = ([], [])

    def attach(self, start: int, size: int, device: BusDevice, name: str = "") -> None:
        """From now on `device` answers at [start, start + size)."""
        if size <= 0 or start < 0 or start + size > self.limit:
            raise InvalidArgument(f"{name or device}: {size} bytes at {start:#x} are no part of the {self.name} bus")
        for begin, end, _, _, other in self._map[1]:
            if start < end and begin < start + size:
                raise InvalidArgument(
                    f"{name or type(device).__name__} at {start:#x} ({size} bytes) overlaps {other} at {begin:#x} "
                    f"on the {self.name} bus",
                    remedy="choose another address for one of them",
                )
        entry = (start, start + size, device, getattr(device, "lock", _NO_LOCK), name or type(device).__name__)
        self._replace([*self._map[1], entry])

    def detach(self, start: int) -> None:
        """Nobody answers any more at the range that begins at `start`; no harm if nobody did."""
        self._replace([entry for entry in self._map[1] if entry[0] != start])

    def _replace(self, entries: list[tuple[int, int, BusDevice, object, str]]) -> None:
        entries.sort(key=lambda entry: entry[0])
        self._map = ([entry[0] for entry in entries], entries)

    def ranges(self) -> list[tuple[int, int, str]]:
        """(start, size, name) of everything that is attached, in order."""
        return [(begin, end - begin, name) for begin, end, _, _, name in self._map[1]]

    def read(self, address: int, size: int) -> int:
        """The value at an address; only the low `size` bytes of what the device says count."""
        starts, entries = self._map
        index = bisect_right(starts, address) - 1
        if index >= 0:
            begin, end, device, lock, _ = entries[index]
            if address + size <= end:
                with lock:  # type: ignore[attr-defined]  # a lock of any kind
                    return device.read(address - begin, size) & (1 << 8 * size) - 1
        self.unclaimed += 1
        return (1 << 8 * size) - 1

    def write(self, address: int, size: int, value: int) -> None:
        starts, entries = self._map
        index = bisect_right(starts, address) - 1
        if index >= 0:
            begin, end, device, lock, _ = entries[index]
            if address + size <= end:
                with lock:  # type: ignore[attr-defined]  # a lock of any kind
                    device.write(address - begin, size, value)
                return
        self.unclaimed += 1

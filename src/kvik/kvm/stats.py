"""KVM's own counters of a machine or a vCPU (api.rst 4.133, KVM_GET_STATS_FD): self-describing, read with pread."""

from __future__ import annotations

import os
import struct

_HEADER = struct.Struct("<6I")  # flags, name_size, num_desc, id_offset, desc_offset, data_offset
_DESCRIPTOR = struct.Struct("<IhHII")  # flags, exponent, size, offset, bucket_size; then the name
_UNITS = ("none", "bytes", "seconds", "cycles", "boolean")
_MAX_NAME, _MAX_COUNTERS, _MAX_VALUES = 4096, 4096, 4096


class Stats:
    """Owns the descriptor of `Vm.stats_fd` or `Vcpu.stats_fd`. `units` tells each counter's unit; seconds are powers of
    ten by `exponents` (-9: nanoseconds)."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.units: dict[str, str] = {}
        self.exponents: dict[str, int] = {}
        self._places: list[tuple[str, int, int]] = []
        self._end = 0
        _, name_size, count, id_offset, offset, self._data = _HEADER.unpack(os.pread(fd, _HEADER.size, 0))
        if name_size > _MAX_NAME or count > _MAX_COUNTERS:
            raise ValueError(f"KVM's statistics announce {count} counters with names of {name_size} bytes")
        self.id = os.pread(fd, name_size, id_offset).split(b"\0")[0].decode()
        each = _DESCRIPTOR.size + name_size
        table = os.pread(fd, each * count, offset)
        for start in range(0, len(table) - each + 1, each):
            flags, exponent, size, place, _ = _DESCRIPTOR.unpack_from(table, start)
            name = table[start + _DESCRIPTOR.size : start + each].split(b"\0")[0].decode()
            unit = flags >> 4 & 0xF
            self.units[name] = _UNITS[unit] if unit < len(_UNITS) else str(unit)
            self.exponents[name] = exponent
            size = min(size, _MAX_VALUES)
            self._places.append((name, place, size))
            self._end = max(self._end, place + 8 * size)

    def read(self) -> dict[str, tuple[int, ...]]:
        """Each counter by name: one value, or a histogram's buckets."""
        data = os.pread(self._fd, self._end, self._data)
        return {name: struct.unpack_from(f"<{size}Q", data, place) for name, place, size in self._places}

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Stats:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

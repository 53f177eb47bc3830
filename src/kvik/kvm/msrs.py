"""Model-specific registers in bulk (api.rst 4.18, 4.19).

KVM_GET_MSRS and KVM_SET_MSRS stop at the first register that the kernel refuses and return how many came before it;
both functions here go on behind it and say at the end what was refused.
"""

from __future__ import annotations

import struct

from kvik.kvm.descriptor import Descriptor

_HEADER = struct.Struct("<II")
_ENTRY = struct.Struct("<IIQ")
_BATCH = 256  # MAX_IO_MSRS in the kernel


def _table(pairs: list[tuple[int, int]]) -> bytearray:
    """struct kvm_msrs."""
    table = bytearray(_HEADER.size + _ENTRY.size * len(pairs))
    _HEADER.pack_into(table, 0, len(pairs), 0)
    for number, (index, value) in enumerate(pairs):
        _ENTRY.pack_into(table, _HEADER.size + _ENTRY.size * number, index, 0, value)
    return table


def read_msrs(owner: Descriptor, indices: list[int]) -> tuple[list[tuple[int, int]], list[int]]:
    """(index, value) pairs in the order asked for, and the indices that the kernel refused."""
    found: list[tuple[int, int]] = []
    refused: list[int] = []
    position = 0
    while position < len(indices):
        table = _table([(index, 0) for index in indices[position : position + _BATCH]])
        done = owner._struct("GET_MSRS", table)
        for number in range(done):
            index, _, value = _ENTRY.unpack_from(table, _HEADER.size + _ENTRY.size * number)
            found.append((index, value))
        position += done
        if done < (len(table) - _HEADER.size) // _ENTRY.size:
            refused.append(indices[position])
            position += 1
    return found, refused


def write_msrs(owner: Descriptor, pairs: list[tuple[int, int]]) -> list[int]:
    """Write in the order given; the indices that the kernel refused."""
    refused: list[int] = []
    position = 0
    while position < len(pairs):
        batch = pairs[position : position + _BATCH]
        done = owner._struct("SET_MSRS", _table(batch))
        position += done
        if done < len(batch):
            refused.append(pairs[position][0])
            position += 1
    return refused

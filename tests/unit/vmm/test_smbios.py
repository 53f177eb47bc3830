"""SMBIOS tables, read back."""

from __future__ import annotations

import struct
import uuid

import pytest

from kvik.errors import InvalidArgument
from kvik.vmm.config import SmbiosConfig
from kvik.vmm.cpu.topology import Topology
from kvik.vmm.layout import GIB, HIGH_MEMORY, MIB, SMBIOS, TIB, Layout
from kvik.vmm.smbios import build

UUID = "6f8e2a4c-9d0b-4f57-8c9a-0d1f5e3b7a21"


def made(
    config: SmbiosConfig | None = None, memory: int = 512 * MIB, topology: Topology | None = None
) -> dict[int, list[tuple[bytes, list[str]]]]:
    """From structure type to (formatted part, strings), after checking how they hang together."""
    (entry_at, entry), (at, data) = build(
        config or SmbiosConfig(), uuid=UUID, memory=memory, topology=topology or Topology(), ram=Layout(memory).ram
    )
    assert entry_at == SMBIOS and entry[:5] == b"_SM3_" and len(entry) == entry[6] == 24 and sum(entry) % 256 == 0
    assert entry[7:9] == b"\3\0" and struct.unpack_from("<IQ", entry, 12) == (len(data), at)
    assert at + len(data) <= HIGH_MEMORY
    found: dict[int, list[tuple[bytes, list[str]]]] = {}
    handles = set()
    while data:
        kind, size, handle = struct.unpack_from("<BBH", data)
        end = data.index(b"\0\0", size)
        found.setdefault(kind, []).append(
            (data[:size], [text.decode() for text in data[size:end].split(b"\0") if text])
        )
        handles.add(handle)
        data = data[end + 2 :]
    assert len(handles) == sum(map(len, found.values()))
    return found


def test_the_structures_that_tools_expect_are_there() -> None:
    assert set(made()) == {0, 1, 2, 3, 4, 16, 17, 19, 32, 127}


def test_the_system_carries_serial_and_uuid() -> None:
    config = SmbiosConfig(serial="ds=nocloud;h=web", version="2", sku="s", family="f")
    part, strings = made(config)[1][0]
    assert strings == ["kvik", "kvik-vmm", "2", "ds=nocloud;h=web", "s", "f"]
    assert part[4:8] == bytes((1, 2, 3, 4)) and part[8:24] == uuid.UUID(UUID).bytes_le
    own = str(uuid.uuid4())
    assert made(SmbiosConfig(uuid=own))[1][0][0][8:24] == uuid.UUID(own).bytes_le


def test_what_is_not_given_has_no_string() -> None:
    part, strings = made()[1][0]
    assert strings == ["kvik", "kvik-vmm"] and part[4:8] == bytes((1, 2, 0, 0))


def test_oem_strings_are_kept_in_order() -> None:
    part, strings = made(SmbiosConfig(oem_strings=("a=1", "b=zwei")))[11][0]
    assert part[4] == 2 and strings == ["a=1", "b=zwei"]


def test_one_processor_structure_a_socket() -> None:
    found = made(topology=Topology(2, 2, 3, 2))[4]
    assert len(found) == 2 and all(len(part) == 48 for part, _ in found)
    assert struct.unpack_from("<HHH", found[0][0], 42) == (6, 6, 12)


@pytest.mark.parametrize("memory", [512 * MIB, 8 * GIB, 64 * GIB, 4 * TIB])
def test_the_size_of_the_memory(memory: int) -> None:
    found = made(memory=memory)
    device = found[17][0][0]
    (size,) = struct.unpack_from("<H", device, 12)
    assert (size if size != 0x7FFF else struct.unpack_from("<I", device, 28)[0]) == memory // MIB
    total = 0
    for part, _ in found[19]:
        start, end = struct.unpack_from("<II", part, 4)
        first, last = struct.unpack_from("<QQ", part, 15)
        total += (last - first + 1) if start == 0xFFFFFFFF else (end - start + 1) << 10
    assert total == memory


@pytest.mark.parametrize(
    "config",
    [
        *[SmbiosConfig(serial="a\0b"), SmbiosConfig(serial="x" * 5000), SmbiosConfig(uuid="12")],
        *[SmbiosConfig(uuid="zz" * 16), SmbiosConfig(oem_strings=("y" * 4000,) * 20)],
    ],
)
def test_what_smbios_cannot_hold_is_refused(config: SmbiosConfig) -> None:
    with pytest.raises(InvalidArgument) as caught:
        made(config)
    assert caught.value.remedy

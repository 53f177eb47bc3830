"""qcow2 headers as a hostile guest might write them."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvik.errors import ConfigUnsupported
from kvik.hypervisor.chain import Backing, qcow2_backing


def header(name: bytes = b"", image_format: bytes = b"raw", features: int = 0, version: int = 3) -> bytes:
    extension = struct.pack(">II", 0xE2792ACA, len(image_format)) + image_format.ljust(
        (len(image_format) + 7) & ~7, b"\0"
    )
    start = 104 if version == 3 else 72
    data = bytearray(4096)
    struct.pack_into(">IIQI", data, 0, 0x514649FB, version, 1024 if name else 0, len(name))
    if version == 3:
        struct.pack_into(">Q", data, 72, features)
        struct.pack_into(">I", data, 100, 104)
    if image_format:
        data[start : start + len(extension)] = extension
    data[1024 : 1024 + len(name)] = name
    return bytes(data)


def read(data: bytes, image: str = "/images/top.qcow2") -> Backing | None:
    fd = os.memfd_create("test")
    try:
        os.write(fd, data)
        return qcow2_backing(fd, image)
    finally:
        os.close(fd)


@pytest.mark.parametrize("version", [2, 3])
def test_a_backing_file_is_found_beside_its_image(version: int) -> None:
    assert read(header(b"base.raw", version=version)) == Backing("/images/base.raw", "raw")
    assert read(header(b"/other/base", b"qcow2", version=version)) == Backing("/other/base", "qcow2")


def test_an_image_may_stand_alone() -> None:
    assert read(header()) is None


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (header(b"base", b""), "does not say which format"),
        (header(b"json:{}"), "no plain file"),
        (header(b"nbd://evil/x"), "no plain file"),
        (header(b"nbd:unix:/x"), "no plain file"),
        (header(features=4), "another file"),
        (b"raw image", "not a qcow2"),
        (bytes(4096), "not a qcow2"),
        (header(b"x")[:8] + struct.pack(">QI", 1 << 40, 10) + header()[20:], "out of bounds"),
        (header(b"x")[:8] + struct.pack(">QI", 1024, 1 << 31) + header()[20:], "out of bounds"),
        (header()[:90], "cut off"),
    ],
)
def test_what_is_not_safe_is_refused(data: bytes, text: str) -> None:
    with pytest.raises(ConfigUnsupported, match=text):
        read(data)


@given(st.binary(max_size=300), st.integers(0, 120))
def test_no_header_makes_it_fail_otherwise(noise: bytes, place: int) -> None:
    data = bytearray(header(b"base.raw"))
    data[place : place + len(noise)] = noise
    check: Callable[[bytes], Backing | None] = read
    try:
        check(bytes(data))
    except ConfigUnsupported:
        pass

"""qcow2 headers as a hostile guest might write them."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvik.errors import ConfigUnsupported
from kvik.hypervisor.chain import Backing, check_meant, qcow2_backing


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


@pytest.mark.parametrize("path", ["/etc/shadow", "/proc/1/environ", "/dev/mem", "{}/link"])
def test_no_raw_file_of_the_hosts_own_is_read_by_a_headers_word(tmp_path: Path, path: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/link").symlink_to("/etc/shadow")
    named = path.format(tmp_path / "elsewhere")
    bases = [str(tmp_path / "elsewhere")]  # in which the link lies, and not what it leads to
    with pytest.raises(ConfigUnsupported, match="a file of the host's own") as refused:
        check_meant(Backing(named, "raw"), str(tmp_path / "top.qcow2"), bases, block=False)
    assert "<backingStore>" in refused.value.remedy
    check_meant(Backing(named, "qcow2"), str(tmp_path / "top.qcow2"), (), block=False)  # is none, which is found


@pytest.mark.parametrize("path", ["/srv/base.raw", "/home/me/.ssh/id_rsa", "/home/you/disk.raw", "/srvs/base.raw"])
def test_no_other_raw_file_is_unless_people_said_where_images_are(tmp_path: Path, path: str) -> None:
    with pytest.raises(ConfigUnsupported, match="in no storage pool and not beside it") as refused:
        check_meant(Backing(path, "raw"), str(tmp_path / "top.qcow2"), ["/srv/pool", "/srv/b"], block=False)
    assert str(Path(path).parent) in refused.value.remedy
    check_meant(Backing(path, "raw"), str(tmp_path / "top.qcow2"), [str(Path(path).parent)], block=False)
    check_meant(Backing(path, "raw"), str(tmp_path / "top.qcow2"), [path], block=False)
    check_meant(Backing(path, "raw"), str(Path(path).parent / "top.qcow2"), (), block=False)


def test_a_pool_that_is_named_by_a_link_is_that_pool(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "pool").symlink_to(tmp_path / "images")
    check_meant(Backing(str(tmp_path / "pool/base"), "raw"), "/images/top", [str(tmp_path / "pool")], block=False)


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("losetup") is None, reason="needs root and losetup")
def test_a_device_that_the_host_has_mounted_is_not_named(tmp_path: Path) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(4 << 20)
    subprocess.run(["mkfs.ext2", "-q", str(image)], check=True, env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"})
    loop = subprocess.run(["losetup", "-f", "--show", str(image)], check=True, capture_output=True, text=True)
    device = loop.stdout.strip()
    try:
        check_meant(Backing(device, "raw"), "/images/top.qcow2", [device], block=True)
        with pytest.raises(ConfigUnsupported, match="a device of no storage pool"):
            check_meant(Backing(device, "raw"), "/dev/top.qcow2", ["/dev/vg"], block=True)
        (tmp_path / "m").mkdir()
        subprocess.run(["mount", device, str(tmp_path / "m")], check=True)
        try:
            with pytest.raises(ConfigUnsupported, match="a device that the host uses"):
                check_meant(Backing(device, "raw"), "/images/top.qcow2", [device], block=True)
        finally:
            subprocess.run(["umount", str(tmp_path / "m")], check=True)
    finally:
        subprocess.run(["losetup", "-d", device], check=True)

"""The initramfs writer, read back by an independent small reader of the format's documentation."""

from __future__ import annotations

import io
import stat

import pytest

from kvik.errors import InvalidArgument
from kvik.image.cpio import CpioWriter


def read_newc(data: bytes) -> dict[str, tuple[int, bytes, tuple[int, int]]]:
    """name: (mode, contents, device numbers), and the checks that the kernel makes."""
    entries = {}
    at = 0
    while True:
        assert data[at : at + 6] == b"070701"
        assert at % 4 == 0
        fields = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        mode, size, major, minor, name_size = fields[1], fields[6], fields[9], fields[10], fields[11]
        name = data[at + 110 : at + 110 + name_size]
        assert name.endswith(b"\0")
        start = (at + 110 + name_size + 3) & ~3
        at = (start + size + 3) & ~3
        if name == b"TRAILER!!!\0":
            assert at == len(data)
            return entries
        entries[name[:-1].decode()] = (mode, data[start : start + size], (major, minor))


def written(fill) -> dict[str, tuple[int, bytes, tuple[int, int]]]:
    stream = io.BytesIO()
    with CpioWriter(stream) as archive:
        fill(archive)
    return read_newc(stream.getvalue())


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 4095])
def test_contents_of_every_length_survive_the_padding(size: int) -> None:
    body = bytes(range(256)) * 16
    entries = written(lambda archive: (archive.file("a", body[:size]), archive.file("bc", b"after")))
    assert entries["a"][1] == body[:size]
    assert entries["bc"][1] == b"after"


def test_directories_above_a_file_come_before_it() -> None:
    entries = written(lambda archive: archive.file("/etc/deep/file", b"x", 0o640))
    assert list(entries) == ["etc", "etc/deep", "etc/deep/file"]
    assert stat.S_ISDIR(entries["etc/deep"][0])
    assert entries["etc/deep/file"][0] == stat.S_IFREG | 0o640


def test_links_and_devices_keep_target_and_numbers() -> None:
    entries = written(
        lambda archive: (archive.symlink("bin/sh", "busybox"), archive.device("dev/null", stat.S_IFCHR, 1, 3, 0o666))
    )
    assert entries["bin/sh"][:2] == (stat.S_IFLNK | 0o777, b"busybox")
    assert entries["dev/null"] == (stat.S_IFCHR | 0o666, b"", (1, 3))


@pytest.mark.parametrize("path", ["../etc/passwd", "a/../../b", "a\0b", "", "/"])
def test_a_path_that_leaves_the_archive_is_refused(path: str) -> None:
    with pytest.raises(InvalidArgument):
        written(lambda archive: archive.file(path, b""))


def test_the_same_path_twice_is_refused_but_a_directory_may_be_repeated() -> None:
    def twice(archive: CpioWriter) -> None:
        archive.directory("etc")
        archive.directory("/etc/")
        archive.file("etc/a", b"")
        archive.file("etc/a", b"")

    with pytest.raises(InvalidArgument, match="already"):
        written(twice)


def test_an_archive_whose_writing_failed_has_no_trailer() -> None:
    stream = io.BytesIO()
    with pytest.raises(RuntimeError), CpioWriter(stream) as archive:
        archive.file("a", b"")
        raise RuntimeError
    assert b"TRAILER" not in stream.getvalue()


def test_the_same_calls_give_the_same_bytes() -> None:
    def once() -> bytes:
        stream = io.BytesIO()
        with CpioWriter(stream) as archive:
            archive.file("a/b", b"c")
        return stream.getvalue()

    assert once() == once()

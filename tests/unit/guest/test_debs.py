"""Debian packages taken apart, and apt driven with its state in a private directory."""

from __future__ import annotations

import io
import lzma
import tarfile
from pathlib import Path

import pytest

from kvik.errors import HostError, ImageError, NotFound
from kvik.guest.debs import Apt, Package, deb_members


def tar(entries: list[tuple[str, bytes | str | None]]) -> bytes:
    """name with bytes: a file; with a string: a symbolic link; with None: a directory."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, body in entries:
            info = tarfile.TarInfo(name)
            if body is None:
                info.type = tarfile.DIRTYPE
            elif isinstance(body, str):
                info.type, info.linkname = tarfile.SYMTYPE, body
            else:
                info.size = len(body)
            archive.addfile(info, io.BytesIO(body) if isinstance(body, bytes) else None)
    return stream.getvalue()


def ar(*members: tuple[str, bytes]) -> bytes:
    data = b"!<arch>\n"
    for name, body in members:
        data += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(body):<10}`\n".encode() + body + b"\n" * (len(body) % 2)
        )
    return data


def deb(entries: list[tuple[str, bytes | str | None]]) -> bytes:
    packed = lzma.compress(tar(entries))
    return ar(("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", packed))


def test_files_and_links_come_out_with_clean_paths() -> None:
    members = list(deb_members(deb([("./", None), ("./usr/bin/a", b"program"), ("./usr/lib/b.so", "b.so.1")])))
    assert [(member.path, member.data, member.link) for member in members] == [
        ("usr/bin/a", b"program", ""),
        ("usr/lib/b.so", b"", "b.so.1"),
    ]


def test_unwanted_files_are_skipped() -> None:
    package = deb([("./doc", b"text"), ("./program", b"x")])
    assert [member.path for member in deb_members(package, lambda path: path == "program")] == ["program"]


@pytest.mark.parametrize("path", ["/etc/passwd", "../../etc/passwd", "./a/../../b"])
def test_a_path_that_leaves_the_root_is_refused(path: str) -> None:
    with pytest.raises(ImageError, match="unsafe"):
        list(deb_members(deb([(path, b"x")])))


def test_devices_are_refused() -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        info = tarfile.TarInfo("dev/sda")
        info.type = tarfile.BLKTYPE
        archive.addfile(info)
    with pytest.raises(ImageError, match="neither"):
        list(deb_members(ar(("data.tar", stream.getvalue()))))


def test_truncation_anywhere_is_an_error() -> None:
    whole = deb([("./file", b"contents" * 50)])
    for length in range(0, len(whole) - 2, 3):
        with pytest.raises(ImageError):
            list(deb_members(whole[:length]))


def test_other_files_are_no_package() -> None:
    for data in (b"", b"PK\x03\x04", ar(("something", b"else")), b"!<arch>\n" + b"x" * 60):
        with pytest.raises(ImageError):
            list(deb_members(data))


SHOWN = """\
Package: busybox-static
Version: 1:1.35.0-4
Architecture: amd64
Depends: libc6 (>= 2.3) | libc6-udeb, other:any
Pre-Depends: first
Description: a
 Package: not-this-one
Size: 5
SHA256: 00
Filename: pool/b.deb

Package: half
Version: 1
"""


class FakeApt:
    """Stands for the apt programs: shows `SHOWN`, and downloads files with five bytes."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.size = 5

    def __call__(self, argv: list[str], directory: Path) -> str:
        self.calls.append(argv)
        if "show" in argv:
            return SHOWN
        if "download" in argv:
            for word in argv[argv.index("download") + 1 :]:
                name, _, version = word.partition("=")
                (directory / f"{name}_{version.replace(':', '%3a')}_amd64.deb").write_bytes(b"x" * self.size)
        if "update" in argv:
            (directory / "lists" / "archive_Packages").touch()
        return ""


@pytest.fixture
def fake() -> FakeApt:
    return FakeApt()


@pytest.fixture
def apt(tmp_path: Path, fake: FakeApt) -> Apt:
    return Apt(tmp_path / "apt", run=fake, lists=tmp_path / "none")


def test_a_package_is_read_from_what_apt_shows(apt: Apt) -> None:
    package = apt.show(["busybox-static"])["busybox-static"]
    assert package == Package(
        "busybox-static", "1:1.35.0-4", "busybox-static_1%3a1.35.0-4_amd64.deb", 5, "00", ("first", "libc6", "other")
    )


def test_packages_the_lists_do_not_have_are_named(apt: Apt) -> None:
    with pytest.raises(NotFound, match="half, none"):
        apt.show(["busybox-static", "half", "none"])


def test_apt_never_touches_the_systems_state(apt: Apt, fake: FakeApt, tmp_path: Path) -> None:
    apt.update()
    apt.show(["busybox-static"])
    for argv in fake.calls:
        settings = dict(word.split("=", 1) for word in argv if "=" in word)
        for key in ("Dir::State", "Dir::State::status", "Dir::State::lists", "Dir::Cache", "Dir::Log"):
            assert settings[key].startswith(str(tmp_path / "apt"))


def test_what_is_there_is_not_fetched_again(apt: Apt, fake: FakeApt) -> None:
    package = apt.show(["busybox-static"])["busybox-static"]
    seen: list[tuple[int, int]] = []
    (path,) = apt.download([package], lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == b"xxxxx"
    assert seen[-1] == (5, 5)
    apt.download([package])
    assert sum("download" in argv for argv in fake.calls) == 1


def test_a_short_download_is_an_error(apt: Apt, fake: FakeApt) -> None:
    fake.size = 4
    with pytest.raises(HostError, match="did not fetch busybox-static"):
        apt.download(list(apt.show(["busybox-static"]).values()))


def test_no_lists_after_an_update_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="could not fetch the package lists"):
        Apt(tmp_path / "apt", run=lambda argv, directory: "", lists=tmp_path).update()

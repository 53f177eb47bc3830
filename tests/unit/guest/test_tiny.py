"""The tiny image's making, with packages made here: what is chosen, what is refused, what stays on disk."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import struct
import tarfile
from pathlib import Path
from threading import Thread

import pytest

from kvik.errors import HostError, ImageError, NotFound
from kvik.guest import tiny as module
from kvik.guest.debs import Apt, Member
from kvik.guest.rootfs import FILES, INSTALLED, Rootfs
from kvik.guest.tiny import build_tiny, cached_tiny, kernel_arguments, tiny
from kvik.paths import Paths

LOADER = "/lib64/ld-linux-x86-64.so.2"
BUSYBOX = b"\x7fELF junk \0[\0[[\0ash\0init\0ip\0poweroff\0sh\0\0 junk"


def program(interpreter: str) -> bytes:
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    text = interpreter.encode() + b"\0"
    return header + struct.pack("<IIQQQQQQ", 3, 4, 120, 0, 0, len(text), len(text), 1) + text


def kernel_module(depends: str) -> bytes:
    """A module with a `.modinfo` section: header, names, modinfo, section table."""
    names = b"\0.modinfo\0.shstrtab\0"
    info = f"alias=virtio:d{len(depends)}\0depends={depends}\0license=GPL\0".encode()
    table = 64 + len(names) + len(info)
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, table, 0, 64, 0, 0, 64, 3, 2)

    def section(name: int, kind: int, offset: int, size: int) -> bytes:
        return struct.pack("<IIQQQQIIQQ", name, kind, 0, 0, offset, size, 0, 0, 1, 0)

    sections = bytes(64) + section(1, 1, 64 + len(names), len(info)) + section(10, 3, 64, len(names))
    return header + names + info + sections


def deb(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, body in files.items():
            info = tarfile.TarInfo("./" + name)
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    packed = lzma.compress(stream.getvalue())
    return b"!<arch>\n" + f"{'data.tar.xz':<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(packed):<10}`\n".encode() + packed


MODULES = "lib/modules/6.1-x/kernel"
CONTENTS = {
    "linux-image-6.1-x": {
        "boot/vmlinuz-6.1-x": b"kernel",
        f"{MODULES}/drivers/virtio/virtio_pci.ko": kernel_module("virtio,virtio_ring"),
        f"{MODULES}/drivers/virtio/virtio_ring.ko": kernel_module("virtio"),
        f"{MODULES}/drivers/virtio/virtio.ko": kernel_module(""),
        f"{MODULES}/sound/unwanted.ko": kernel_module(""),
    },
    "busybox-static": {"bin/busybox": BUSYBOX, "usr/share/doc/busybox": b"text"},
    "qemu-guest-agent": {"usr/sbin/qemu-ga": program(LOADER)},
    "libc6": {LOADER.lstrip("/"): program("")},
}
DEPENDS = {"linux-image-cloud-amd64": "linux-image-6.1-x (= 1)", "qemu-guest-agent": "libc6, adduser"}


class Archive:
    """Stands for apt and an archive behind it."""

    def __init__(self) -> None:
        self.debs = {name: deb(files) for name, files in CONTENTS.items()} | {"linux-image-cloud-amd64": deb({})}
        self.calls: list[str] = []
        self.stale = 0
        self.corrupt = ""

    def __call__(self, argv: list[str], directory: Path) -> str:
        verb = next(word for word in argv if word in ("show", "download", "update"))
        self.calls.append(verb)
        names = [word.partition("=")[0] for word in argv[argv.index(verb) + 1 :]]
        if verb == "update":
            (directory / "lists/x_Packages").touch()
        if verb == "download":
            if self.stale:
                self.stale -= 1
                raise HostError("404")
            for name in names:
                body = self.debs[name]
                (directory / f"{name}_1_amd64.deb").write_bytes(body[:-1] + b"?" if name == self.corrupt else body)
        return "\n\n".join(
            f"Package: {name}\nVersion: 1\nArchitecture: amd64\nSize: {len(self.debs[name])}\n"
            f"SHA256: {hashlib.sha256(self.debs[name]).hexdigest()}\nDepends: {DEPENDS.get(name, '')}\n"
            for name in names
            if name in self.debs
        )


@pytest.fixture
def archive() -> Archive:
    return Archive()


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths.system(tmp_path)


@pytest.fixture
def apt(paths: Paths, archive: Archive, tmp_path: Path) -> Apt:
    (tmp_path / "system-lists").mkdir()
    (tmp_path / "system-lists/x_Packages").touch()
    return Apt(paths.cache / "apt", run=archive, lists=tmp_path / "system-lists")


def names_in(initramfs: bytes) -> dict[str, bytes]:
    found, at = {}, 0
    while True:
        fields = [int(initramfs[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name = initramfs[at + 110 : at + 109 + fields[11]].decode()
        start = (at + 110 + fields[11] + 3) & ~3
        if name == "TRAILER!!!":
            return found
        found[name] = initramfs[start : start + fields[6]]
        at = (start + fields[6] + 3) & ~3


def test_the_image_has_what_it_needs_and_nothing_else(paths: Paths, apt: Apt) -> None:
    image = build_tiny(paths, apt=apt)
    assert image.kernel.read_bytes() == b"kernel"
    assert image.kernel_version == "6.1-x"
    files = names_in(image.initrd.read_bytes())
    assert set(INSTALLED.values()) <= files.keys()
    assert files["bin/ash"] == b"/bin/busybox"
    assert files["usr/sbin/qemu-ga"] == program(LOADER)
    assert LOADER.lstrip("/") in files
    assert not any("unwanted" in name or "doc" in name for name in files)
    assert files["sbin/reboot"] == b"poweroff"  # our own, not busybox's slow one
    assert b"mount -a" in files["init"]


def test_modprobe_finds_each_modules_dependencies_in_loading_order(paths: Paths, apt: Apt) -> None:
    files = names_in(build_tiny(paths, apt=apt).initrd.read_bytes())
    table = dict(line.split(":") for line in files["lib/modules/6.1-x/modules.dep"].decode().splitlines())
    directory = "kernel/drivers/virtio"
    # modprobe loads the list from its end
    assert table[f"{directory}/virtio_pci.ko"].split() == [f"{directory}/virtio_ring.ko", f"{directory}/virtio.ko"]
    assert b"alias virtio:d0 virtio" in files["lib/modules/6.1-x/modules.alias"]


def test_the_second_call_finds_the_first_ones_image(paths: Paths, apt: Apt, archive: Archive) -> None:
    assert cached_tiny(paths) is None
    image = build_tiny(paths, apt=apt)
    calls = len(archive.calls)
    assert tiny(paths) == cached_tiny(paths)
    assert tiny(paths).directory == image.directory
    build_tiny(paths, apt=apt)
    assert len(archive.calls) == calls


def test_another_recipe_makes_another_image_and_keeps_the_old(
    paths: Paths, apt: Apt, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_tiny(paths, apt=apt)
    monkeypatch.setattr(module, "FORMAT", 99)
    assert cached_tiny(paths) is None
    second = build_tiny(paths, apt=apt)
    assert second.directory != first.directory
    assert first.initrd.exists()
    assert cached_tiny(paths) == second


def test_stale_lists_are_renewed_in_our_own_directory(paths: Paths, apt: Apt, archive: Archive) -> None:
    archive.stale = 1
    stages: list[str] = []
    build_tiny(paths, lambda stage, done, total: stages.append(stage), apt=apt)
    assert archive.calls.count("update") == 1
    assert stages.index("lists") < stages.index("image")


def test_a_package_with_other_contents_than_the_list_says_is_refused(paths: Paths, apt: Apt, archive: Archive) -> None:
    archive.corrupt = "busybox-static"
    with pytest.raises(ImageError, match="busybox-static"):
        build_tiny(paths, apt=apt)
    assert cached_tiny(paths) is None
    archive.corrupt = ""
    build_tiny(paths, apt=apt)  # the bad file was not kept


@pytest.mark.parametrize(("package", "what"), [("busybox-static", "busybox"), ("libc6", "library")])
def test_what_the_packages_lack_is_named(paths: Paths, apt: Apt, archive: Archive, package: str, what: str) -> None:
    archive.debs[package] = deb({})
    with pytest.raises(ImageError, match=what):
        build_tiny(paths, apt=apt)
    assert [path.name for path in (paths.images / "tiny").iterdir()] == [".lock"]


def test_an_archive_without_the_kernel_is_an_error(paths: Paths, apt: Apt, archive: Archive) -> None:
    del archive.debs["linux-image-cloud-amd64"]
    with pytest.raises(NotFound, match="linux-image-cloud-amd64"):
        build_tiny(paths, apt=apt)


def test_two_builders_make_one_image(paths: Paths, apt: Apt, archive: Archive) -> None:
    workers = [Thread(target=build_tiny, args=(paths,), kwargs={"apt": apt}) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert archive.calls.count("download") == 1
    assert cached_tiny(paths) is not None


def test_packages_of_earlier_images_are_not_kept(paths: Paths, apt: Apt) -> None:
    old = paths.cache / "apt/debs/busybox-static_0_amd64.deb"
    old.touch()
    build_tiny(paths, apt=apt)
    assert sorted(path.name for path in old.parent.iterdir()) == [
        f"{name}_1_amd64.deb" for name in ("busybox-static", "libc6", "linux-image-6.1-x", "qemu-guest-agent")
    ]


def test_a_dead_builders_leftovers_are_removed(paths: Paths, apt: Apt) -> None:
    leftover = paths.images / "tiny" / ".new-dead"
    leftover.mkdir(parents=True)
    build_tiny(paths, apt=apt)
    assert not leftover.exists()


def test_a_damaged_manifest_means_no_image(paths: Paths, apt: Apt) -> None:
    image = build_tiny(paths, apt=apt)
    for text in ("", "[]", '{"recipe": 1}', gzip.compress(b"x").decode("latin-1")):
        (image.directory / "manifest.json").write_text(text)
        assert cached_tiny(paths) is None


def test_a_library_link_in_a_circle_is_an_error() -> None:
    rootfs = Rootfs()
    rootfs.offer(Member("usr/lib/x86_64-linux-gnu/a.so", 0o777, b"", "b.so"))
    rootfs.offer(Member("usr/lib/x86_64-linux-gnu/b.so", 0o777, b"", "a.so"))
    with pytest.raises(ImageError, match=r"a\.so"):
        rootfs._library("a.so")


def test_every_file_of_the_overlay_is_installed() -> None:
    assert {path.name for path in FILES.iterdir()} == set(INSTALLED)


def test_kernel_arguments_fit_the_accelerator() -> None:
    assert "no_timer_check" in kernel_arguments("tcg").split()
    assert "no_timer_check" not in kernel_arguments("kvm").split()
    assert "console=hvc0" in kernel_arguments("kvm", console="hvc0").split()
    assert "kvik.hostname=web-1" in kernel_arguments(hostname="web-1").split()

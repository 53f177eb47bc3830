"""What goes into the tiny image's initramfs: chosen from packages' files, checked for completeness, written as cpio."""

from __future__ import annotations

import hashlib
import re
import stat
from pathlib import Path
from typing import BinaryIO

from kvik.errors import ImageError
from kvik.guest.debs import Member
from kvik.image.cpio import CpioWriter
from kvik.image.elf import ElfFile

__all__ = ["Rootfs"]

FILES = Path(__file__).parent / "overlay"
INSTALLED = {  # name in overlay/: path in the guest
    "init": "init",
    "rc": "etc/rc",
    "rc.agent": "etc/rc.agent",
    "rc.network": "etc/rc.network",
    "udhcpc.script": "etc/udhcpc.script",
    "autologin": "etc/autologin",
    "profile": "etc/profile",
    "poweroff": "sbin/poweroff",
}
TEXTS = {
    "etc/hostname": "tiny\n",
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    "etc/group": "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n",
    "etc/shells": "/bin/sh\n",
    "etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "etc/resolv.conf": "",
    # One `mount -a` is one process where three mounts were three: 0.1 s under emulation.
    "etc/fstab": (
        "proc /proc proc nosuid,nodev,noexec 0 0\n"
        "sysfs /sys sysfs nosuid,nodev,noexec 0 0\n"
        "devtmpfs /dev devtmpfs nosuid,mode=0755 0 0\n"
    ),
    "etc/issue": "",
    # acpid's event for the power button, and what it starts
    "etc/acpid.conf": "PWRF power\n",
    "etc/os-release": 'NAME="kvik tiny"\nID=kvik-tiny\nID_LIKE=debian\nPRETTY_NAME="kvik tiny image"\n',
}
SCRIPTS = {"etc/acpi/power": "#!/bin/sh\nexec /sbin/poweroff\n"}

MODULES = [
    *("virtio_pci", "virtio_console", "virtio_net", "virtio_blk", "virtio_scsi", "virtio-rng", "virtio_balloon"),
    *("virtio_input", "virtiofs", "vmw_vsock_virtio_transport", "sd_mod", "sr_mod", "isofs", "nls_utf8", "overlay"),
    *("button", "evdev", "pvpanic-pci", "qemu_fw_cfg"),
]

# The applets scripts call by path; the rest are found by the shell, which is the same program.
SBIN = {"init", "getty", "poweroff", "reboot", "halt", "modprobe", "insmod", "acpid", "mdev"}
AGENT = "usr/sbin/qemu-ga"
BUSYBOX = re.compile(r"(usr/)?bin/busybox")
KERNEL_IMAGE = re.compile(r"boot/vmlinuz-(.+)")
MODULE = re.compile(r"(usr/)?lib/modules/[^/]+/kernel/(.+\.ko(\.xz|\.zst|\.gz)?)")
LIBRARY = re.compile(r"(usr/)?lib(64)?/(x86_64-linux-gnu/)?[^/]+\.so(\.[0-9.]+)?")


class Rootfs:
    """Collects package members, then writes the archive. `kernel` and `kernel_version` come along the way."""

    def __init__(self) -> None:
        self.kernel = b""
        self.kernel_version = ""
        self._busybox = b""
        self._agent = b""
        self._libraries: dict[str, Member] = {}  # by file name
        self._modules: dict[str, tuple[str, bytes]] = {}  # by module name: path below kernel/, contents

    @staticmethod
    def recipe(version: int) -> str:
        """A hash of all that decides the contents except the packages."""
        digest = hashlib.sha256(f"{version}{MODULES}{TEXTS}{SCRIPTS}".encode())
        for name in sorted(INSTALLED):
            digest.update((FILES / name).read_bytes())
        digest.update(Path(__file__).read_bytes())
        return digest.hexdigest()[:16]

    def wants(self, path: str) -> bool:
        """Whether a package's file may be needed; the rest is skipped unread."""
        if match := MODULE.fullmatch(path):
            return _module_name(match[2]) not in self._modules
        return path == AGENT or any(rule.fullmatch(path) for rule in (BUSYBOX, KERNEL_IMAGE, LIBRARY))

    def offer(self, member: Member) -> None:
        if match := MODULE.fullmatch(member.path):
            self._modules[_module_name(match[2])] = (match[2], member.data)
        elif match := KERNEL_IMAGE.fullmatch(member.path):
            self.kernel, self.kernel_version = member.data, match[1]
        elif BUSYBOX.fullmatch(member.path):
            self._busybox = member.data
        elif member.path == AGENT:
            self._agent = member.data
        else:
            self._libraries.setdefault(member.path.rpartition("/")[2], member)

    def write(self, stream: BinaryIO) -> None:
        """The whole initramfs. Raises `ImageError` naming what the packages lacked."""
        for what, data in (("kernel", self.kernel), ("busybox", self._busybox), ("guest agent", self._agent)):
            if not data:
                raise ImageError(f"the packages hold no {what}")
        with CpioWriter(stream) as archive:
            archive.directories(["dev", "proc", "sys", "run", "root", "var/run", "var/log", "mnt", "etc"])
            archive.directory("tmp", 0o1777)
            # Before devtmpfs is there, the first process needs somewhere to say what went wrong.
            archive.device("dev/console", stat.S_IFCHR, 5, 1)
            archive.device("dev/null", stat.S_IFCHR, 1, 3, 0o666)
            for name, path in INSTALLED.items():
                archive.file(path, (FILES / name).read_bytes(), 0o755)
            for path, text in TEXTS.items():
                archive.file(path, text.encode())
            for path, text in SCRIPTS.items():
                archive.file(path, text.encode(), 0o755)
            for name in ("reboot", "halt", "shutdown"):
                archive.symlink(f"sbin/{name}", "poweroff")
            self._write_busybox(archive)
            archive.file(AGENT, self._agent, 0o755)
            self._write_libraries(archive)
            self._write_modules(archive)

    def _write_busybox(self, archive: CpioWriter) -> None:
        archive.file("bin/busybox", self._busybox, 0o755)
        for applet in _applets(self._busybox):
            where = "sbin" if applet in SBIN else "bin"
            if f"{where}/{applet}" not in archive:
                archive.symlink(f"{where}/{applet}", "/bin/busybox")

    def _write_libraries(self, archive: CpioWriter) -> None:
        """The agent's loader, and its libraries and theirs, each under the name that the loader looks for."""
        program = ElfFile(self._agent)
        loader = program.interpreter().lstrip("/")
        archive.file(loader, self._library(loader.rpartition("/")[2]), 0o755)
        waiting = program.needed()
        done = {loader.rpartition("/")[2]}
        while waiting:
            name = waiting.pop()
            if name in done:
                continue
            done.add(name)
            data = self._library(name)
            archive.file(f"lib/x86_64-linux-gnu/{name}", data, 0o755)
            waiting += ElfFile(data).needed()

    def _library(self, name: str) -> bytes:
        wanted = name
        for _ in range(8):  # links may chain, never in a circle
            member = self._libraries.get(name)
            if member is None:
                break
            if not member.link:
                return member.data
            name = member.link.rpartition("/")[2]
        raise ImageError(f"the packages hold no library {wanted!r}, which the guest agent needs")

    def _write_modules(self, archive: CpioWriter) -> None:
        """The modules and what they depend on, with the tables that modprobe reads (depmod(8))."""
        directory = f"lib/modules/{self.kernel_version}"
        paths: dict[str, str] = {}
        depends: dict[str, list[str]] = {}
        aliases: list[str] = []
        waiting = [_module_name(name) for name in MODULES]
        while waiting:
            name = waiting.pop()
            if name in paths or name not in self._modules:  # not a module here: built into the kernel, or not there
                continue
            path, data = self._modules[name]
            paths[name] = f"kernel/{path}"
            archive.file(f"{directory}/kernel/{path}", data)
            info = ElfFile(data).modinfo()
            depends[name] = [_module_name(other) for other in ",".join(info.get("depends", [])).split(",") if other]
            aliases += (f"alias {alias} {name}\n" for alias in info.get("alias", []))
            waiting += depends[name]
        table = "".join(
            f"{paths[name]}: {' '.join(paths[other] for other in _closure(name, depends) if other in paths)}\n"
            for name in paths
        )
        archive.file(f"{directory}/modules.dep", table.encode())
        archive.file(f"{directory}/modules.alias", "".join(sorted(aliases)).encode())
        archive.file(f"{directory}/modules.symbols", b"")


def _closure(name: str, depends: dict[str, list[str]]) -> list[str]:
    """All that `name` needs, each before what it needs in turn: modprobe loads from the end."""
    order: list[str] = []

    def visit(module: str) -> None:
        for other in depends.get(module, []):
            if other in order:
                order.remove(other)
            order.append(other)
            visit(other)

    visit(name)
    return order


def _module_name(path: str) -> str:
    return re.sub(r"\.ko(\.\w+)?$", "", path.rpartition("/")[2]).replace("-", "_")


def _applets(busybox: bytes) -> list[str]:
    """The applet names: one NUL-separated table in the program, which begins with `[` and `[[` and is sorted."""
    start = busybox.find(b"\0[\0[[\0")
    if start < 0:
        raise ImageError("the busybox program has no table of applets")
    end = busybox.find(b"\0\0", start + 1)
    names = busybox[start + 1 : end].split(b"\0")
    return [name.decode() for name in names if re.fullmatch(rb"[a-z0-9_.\[-]+", name)]

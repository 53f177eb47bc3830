"""A root directory of its own for a program that Landlock cannot confine, because it mounts FUSE, and that needs the
network: qemu-storage-daemon as the client of a volume's server.

Its namespaces (user, mount, IPC, host name) begin with nothing but a small file system in memory: programs and
libraries read-only, what names of hosts are resolved by, /dev/fuse, and what it was given. There is no /proc, no home,
no other device. Root is root there only: it may mount, which is why it has namespaces, and on the host it has no
capability. Signals to others and the kernel's odd corners answer ENOSYS (seccomp).
user_namespaces(7), pivot_root(2), mount_setattr(2).
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct

from kvik.vmm.sandbox import privileges, seccomp
from kvik.vmm.sandbox.isolation import REFUSED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["DEVICES", "SETTINGS", "enter", "restrict"]

SETTINGS = (
    "/etc/hosts", "/etc/resolv.conf", "/etc/nsswitch.conf", "/etc/host.conf", "/etc/gai.conf", "/etc/services",
    "/etc/protocols", "/etc/ld.so.cache", "/etc/ssl/certs/ca-certificates.crt",
)  # fmt: skip
DEVICES = ("/dev/null", "/dev/urandom", "/dev/random", "/dev/fuse")
_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER = 0x00020000, 0x04000000, 0x08000000, 0x10000000  # linux/sched.h
_RDONLY, _NOSUID, _NODEV, _BIND, _REC, _PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18  # linux/mount.h
_DETACH = 2  # MNT_DETACH
_SYS_MOUNT_SETATTR, _AT_RECURSIVE, _ATTR_RDONLY = 442, 0x8000, 1
_SYS_ADMIN = 21  # linux/capability.h
# What it does itself (mounts, sockets, rings), or its libraries with files in memory.
_NEEDED = frozenset({
    "socket", "connect", "bind", "listen", "socketpair", "truncate", "rename", "mkdir", "unlink", "fchmod", "mount",
    "umount2", "io_uring_setup",
})  # fmt: skip
# It has the user's own number, and no other process to talk to (asm/unistd_64.h).
_SIGNALS = {"kill": 62, "rt_sigqueueinfo": 129, "tkill": 200, "tgkill": 234, "rt_tgsigqueueinfo": 297}
_libc = ctypes.CDLL(None, use_errno=True)


def enter(directory: str, places: Iterable[str], given: Mapping[str, bytes]) -> None:
    """Make `directory` this process's root. `places`: directories that stay as they are, read-only; `given`: files in
    memory and what is in them. Raises OSError."""
    user, group = os.geteuid(), os.getegid()
    settings = {path: data for path in SETTINGS if (data := _read(path)) is not None}
    _leave(_NEWIPC | _NEWUTS, user, group)
    _mount("", "/", "", _REC | _PRIVATE)
    _mount("kvik", directory, "tmpfs", _NOSUID | _NODEV, "mode=0700,size=16m")
    for place in places:
        _show(place, directory)
    for path in DEVICES:
        if os.path.exists(path):  # noqa: PTH110
            _write(f"{directory}{path}", b"")
            _mount(path, f"{directory}{path}", "", _BIND)
    for path, data in {**settings, **given}.items():
        _write(f"{directory}{path}", data)
    old = f"{directory}/old"
    os.mkdir(old)  # noqa: PTH102
    # Once more: only what comes from other namespaces is locked, and cannot be made writable or taken off again.
    _leave(0, 0, 0)
    _mount(directory, directory, "", _BIND | _REC)
    _call("pivot_root", os.fsencode(directory), os.fsencode(old))
    os.chdir("/")
    _call("umount2", b"/old", _DETACH)
    os.rmdir("/old")  # noqa: PTH106


def restrict() -> None:
    """For good, also in what is executed: no privilege but to mount in its own namespace. Raises OSError."""
    privileges.limit()
    privileges.no_new_privileges()
    privileges.bound_capabilities((_SYS_ADMIN,))
    if os.uname().machine == "x86_64":
        refused = [number for name, number in {**REFUSED, **_SIGNALS}.items() if name not in _NEEDED]
        seccomp.load(seccomp.pack(seccomp.assemble({}, seccomp.ALLOW, refused)))


def _leave(more: int, user: int, group: int) -> None:
    try:
        _call("unshare", _NEWUSER | _NEWNS | more)
    except OSError as error:
        raise OSError(
            error.errno, f"it needs a user namespace of its own: {error.strerror} (sysctl user.max_user_namespaces)"
        ) from error
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:  # noqa: PTH123 - this program imports next to nothing
            file.write(text)


def _show(place: str, directory: str) -> None:
    target = f"{directory}{place}"
    if os.path.islink(place):  # noqa: PTH114  # /lib -> usr/lib
        os.symlink(os.readlink(place), target)  # noqa: PTH115, PTH211
        return
    os.makedirs(target, exist_ok=True)  # noqa: PTH103
    _mount(place, target, "", _BIND | _REC)
    attributes = struct.pack("=QQQQ", _ATTR_RDONLY, 0, 0, 0)  # struct mount_attr
    if _libc.syscall(_SYS_MOUNT_SETATTR, -100, os.fsencode(target), _AT_RECURSIVE, attributes, len(attributes)) < 0:
        raise OSError(ctypes.get_errno(), f"cannot show {place} read-only: {os.strerror(ctypes.get_errno())}")


def _read(path: str) -> bytes | None:
    """Of a regular file, through links: some lead to where it cannot look later."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            return file.read(1 << 20) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else None
    except OSError:
        return None


def _write(path: str, data: bytes) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:  # noqa: PTH123
        file.write(data)


def _mount(source: str, target: str, type_: str, flags: int, options: str = "") -> None:
    encoded = [os.fsencode(text) for text in (source, target, type_)]
    _call("mount", *encoded, ctypes.c_ulong(flags), os.fsencode(options))


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")

"""What the kernel offers, asked of the kernel itself: each probe tries the thing and undoes it.

Presence of a file or module says little (a module may be loadable, a system call filtered by a container), so system
calls are called. Numbers are x86_64's.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from kvik.host.sysfs import read_text

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_SYS_USERFAULTFD, _SYS_IO_URING_SETUP, _SYS_LANDLOCK_CREATE_RULESET = 323, 425, 444
_LANDLOCK_CREATE_RULESET_VERSION = 1
_UFFD_USER_MODE_ONLY = 1
_PARAMS_FEATURES = 20  # where struct io_uring_params has them
_PR_GET_SECCOMP = 21
_ROOT = Path("/")


@dataclass(frozen=True, slots=True)
class Facility:
    """`value`: a version or count where there is one, else 1; 0 if absent, then `why` says so in words."""

    value: int
    why: str = ""

    def __bool__(self) -> bool:
        return self.value > 0


def _call(number: int, *arguments: int | ctypes.Array[ctypes.c_char] | None) -> tuple[int, str]:
    """Its result, and why it failed if that is negative."""
    converted = [ctypes.c_long(part) if isinstance(part, int) else part for part in arguments]
    result = int(_libc.syscall(ctypes.c_long(number), *converted))
    if result >= 0:
        return result, ""
    code = ctypes.get_errno()
    if code == errno.ENOSYS:
        return -code, "the kernel was built without it"
    if code == errno.EPERM:
        return -code, "it is switched off or filtered here (sysctl, seccomp of a container)"
    if code == errno.EOPNOTSUPP:
        return -code, "it is not among the boot's security modules (lsm=)"
    return -code, os.strerror(code)


def _descriptor(number: int, *arguments: int | ctypes.Array[ctypes.c_char] | None) -> Facility:
    """For a system call that returns a descriptor, which is closed."""
    fd, why = _call(number, *arguments)
    if fd < 0:
        return Facility(0, why)
    os.close(fd)
    return Facility(1)


def landlock() -> Facility:
    """`value` is the ABI version (landlock(7))."""
    version, why = _call(_SYS_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_CREATE_RULESET_VERSION)
    return Facility(max(version, 0), why)


def seccomp(root: Path = _ROOT) -> Facility:
    """Filters (seccomp(2))."""
    if _libc.prctl(_PR_GET_SECCOMP, 0, 0, 0, 0) < 0:
        return Facility(0, "the kernel was built without it")
    actions = read_text(root / "proc/sys/kernel/seccomp/actions_avail", 4096).split()
    return Facility(max(len(actions), 1))


def io_uring() -> Facility:
    """`value` is what the kernel says of its features (IORING_FEAT_* of <linux/io_uring.h>)."""
    parameters = ctypes.create_string_buffer(120)  # struct io_uring_params
    found = _descriptor(_SYS_IO_URING_SETUP, 1, parameters)
    return Facility(max(struct.unpack_from("=I", parameters, _PARAMS_FEATURES)[0], 1)) if found else found


def userfaultfd() -> Facility:
    return _descriptor(_SYS_USERFAULTFD, os.O_CLOEXEC | _UFFD_USER_MODE_ONLY)


def namespaces(root: Path = _ROOT) -> Facility:
    """`value` counts the kinds; user namespaces must be usable, too."""
    base = root / "proc/self/ns"
    kinds = [kind for kind in ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts") if (base / kind).is_symlink()]
    missing = sorted({"ipc", "mnt", "net", "pid", "user", "uts"} - set(kinds))
    if missing:
        return Facility(0, f"missing: {', '.join(missing)}")
    if read_text(root / "proc/sys/user/max_user_namespaces", 32) == "0":
        return Facility(0, "user namespaces are switched off (user.max_user_namespaces=0)")
    if read_text(root / "proc/sys/kernel/unprivileged_userns_clone", 32) == "0":
        return Facility(0, "user namespaces are for root only (kernel.unprivileged_userns_clone=0)")
    return Facility(len(kinds))


@dataclass(frozen=True, slots=True)
class Cgroups:
    version: int  # 0: none, 1: v1 (perhaps with a v2 tree beside it), 2: v2 alone
    controllers: tuple[str, ...]
    unified: bool  # a v2 tree is mounted


def cgroups(root: Path = _ROOT) -> Cgroups:
    base = root / "sys/fs/cgroup"
    if (base / "cgroup.controllers").is_file():
        return Cgroups(2, tuple(sorted(read_text(base / "cgroup.controllers", 4096).split())), True)
    unified = (base / "unified/cgroup.controllers").is_file()
    known = ("blkio", "cpu", "cpuacct", "cpuset", "devices", "freezer", "hugetlb", "memory", "pids")
    found = tuple(name for name in known if (base / name / "cgroup.procs").is_file())
    return Cgroups(1 if found else 0, found, unified)


def bridge() -> Facility:
    """Asks the bridge code for its version; the kernel loads the module by itself if it may."""
    siocgifbr, get_version = 0x8940, 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            version = fcntl.ioctl(sock, siocgifbr, bytearray(struct.pack("=3Q", get_version, 0, 0)))
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.ENOPKG, errno.ENOTTY, errno.EINVAL):
                return Facility(0, "the kernel has no bridge code loaded")
            return Facility(0, error.strerror or "")
    return Facility(max(version, 1))


def nf_tables() -> Facility:
    """Asks nf_tables for its generation (NFT_MSG_GETGEN), which every reader may."""
    netlink_netfilter, subsystem, getgen = 12, 10, 16
    request = struct.pack("=IHHII", 20, subsystem << 8 | getgen, 0x1, 1, 0) + struct.pack("=BBH", 0, 0, 0)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, netlink_netfilter) as sock:
            sock.settimeout(2)
            sock.bind((0, 0))
            sock.send(request)
            answer = sock.recv(65536)
    except OSError as error:
        return Facility(0, error.strerror or str(error))
    kind = struct.unpack_from("=IH", answer)[1] if len(answer) >= 20 else 0
    if kind == 2:  # NLMSG_ERROR
        code = -struct.unpack_from("=i", answer, 16)[0]
        if code == errno.EPERM:
            return Facility(0, "only root, or CAP_NET_ADMIN, may use it")
        return Facility(0, "the kernel has no nf_tables" if code == errno.EINVAL else os.strerror(code))
    return Facility(1)


def device(path: str, root: Path = _ROOT) -> Facility:
    """A device node that we may open for reading and writing."""
    node_path = root / path.lstrip("/")
    try:
        os.close(os.open(node_path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
    except FileNotFoundError:
        return Facility(0, f"{path} does not exist")
    except OSError as error:
        return Facility(0, f"{path}: {error.strerror}")
    return Facility(1)


def ksm(root: Path = _ROOT) -> Facility:
    """Kernel same-page merging: there at all; `value` 2 if it runs."""
    text = read_text(root / "sys/kernel/mm/ksm/run", 16)
    if not text:
        return Facility(0, "the kernel was built without it")
    return Facility(2 if text == "1" else 1)


def transparent_huge_pages(root: Path = _ROOT) -> str:
    """The setting: "always", "madvise", "never", or empty if the kernel has none."""
    text = read_text(root / "sys/kernel/mm/transparent_hugepage/enabled", 64)
    return text.partition("[")[2].partition("]")[0]
